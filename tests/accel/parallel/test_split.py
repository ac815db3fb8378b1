"""Split over gloo processes: bit for bit what one process makes under Ulysses, the same to rounding in a ring."""

import re

import pytest
import torch

import split_cases
from jobs import run_job

CLOSE = 1e-5
pytestmark = pytest.mark.timeout(1500)  # the first test of a fixture waits for the whole job
JOINT = split_cases.JOINT | split_cases.JOINT_RING
EXACT_FOUR = split_cases.FOUR | split_cases.JOINT_FOUR
NEAR_FOUR = split_cases.FOUR_IN_RINGS | split_cases.JOINT_FOUR_IN_RINGS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    names = [*split_cases.CASES, *split_cases.RING, *split_cases.REFUSED, *split_cases.DISAGREEING]
    return run_job(2, "split_cases", names, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_two_joint(tmp_path_factory):
    return run_job(2, "split_cases", [*JOINT], tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    names = [*EXACT_FOUR, *NEAR_FOUR]
    return run_job(4, "split_cases", names, tmp_path_factory.mktemp("four"))


def both(made, name):
    assert not isinstance(made[name], str), made[name]
    alone, kinds, density = split_cases.run_case(name)
    split, split_kinds, split_density = made[name]
    assert split_kinds == kinds
    how = split_cases.ALL[name].how
    assert kinds["cached"] > 0 or "cache" not in how
    assert kinds["region"] > 0 or "regions" not in how
    assert split_density == pytest.approx(density, abs=1e-6)
    return split, alone


@pytest.mark.parametrize("name", split_cases.CASES)
def test_two_processes_make_what_one_makes(of_two, name):
    split, alone = both(of_two, name)
    assert torch.equal(split, alone), float((split - alone).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", split_cases.JOINT)
def test_joint_text_is_put_in_order_again(of_two_joint, name):
    split, alone = both(of_two_joint, name)
    assert torch.equal(split, alone), float((split - alone).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", split_cases.JOINT_RING)
def test_joint_text_in_a_ring(of_two_joint, name):
    split, alone = both(of_two_joint, name)
    assert float((split - alone).abs().max()) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT_FOUR)
def test_four_processes_make_what_one_makes(of_four, name):
    split, alone = both(of_four, name)
    assert torch.equal(split, alone), float((split - alone).abs().max())


@pytest.mark.parametrize("name", split_cases.RING)
def test_a_ring_of_two_makes_nearly_what_one_makes(of_two, name):
    split, alone = both(of_two, name)
    assert float((split - alone).abs().max()) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", NEAR_FOUR)
def test_rings_of_four_processes_make_nearly_what_one_makes(of_four, name):
    split, alone = both(of_four, name)
    assert float((split - alone).abs().max()) < CLOSE


@pytest.mark.parametrize("name", split_cases.REFUSED)
def test_what_cannot_be_split_is_refused_with_a_reason(of_two, name):
    assert re.search(split_cases.REFUSED[name][1], str(of_two[name])), of_two[name]


@pytest.mark.parametrize("how", split_cases.DISAGREEING)
def test_processes_that_disagree_all_stop_and_say_on_what(of_two, how):
    said = of_two[how].split("\n")
    assert len(said) == 2
    for each in said:
        assert re.search("do not agree on the " + split_cases.DISAGREEING[how], each), each
