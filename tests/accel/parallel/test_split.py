"""Split over gloo processes: bit for bit what one process makes under Ulysses, the same to rounding in a ring."""

import re

import pytest
import torch

import split_cases
from jobs import run_job

CLOSE = 1e-5
SLOW = ("joint text", "four")
pytestmark = pytest.mark.timeout(1500)  # the first test of a group waits for the whole job


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the processes of a group made: one job for all of its cases, started when the first one is asked for."""
    known = {}

    def of(group):
        if group not in known:
            processes, cases = split_cases.GROUPS[group]
            names = [*cases, *split_cases.REFUSED, *split_cases.DISAGREEING] if group == "wan" else [*cases]
            known[group] = run_job(processes, "split_cases", names, tmp_path_factory.mktemp("job"))
        return known[group]

    return of


@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, id=name, marks=[pytest.mark.slow] if group in SLOW else [])
        for group, (_, cases) in split_cases.GROUPS.items()
        for name in cases
    ],
)
def test_processes_together_make_what_one_makes(made, group, name):
    found, case = made(group)[name], split_cases.ALL[name]
    assert not isinstance(found, str), found
    alone, plain_alone, kinds, density = split_cases.run_case(name)
    split, plain, split_kinds, split_density = found
    assert split_kinds == kinds
    assert kinds["cached"] > 0 or "cache" not in case.how
    assert kinds["region"] > 0 or "regions" not in case.how
    assert split_density == pytest.approx(density, abs=1e-6)
    assert float((split - alone).abs().max()) <= (0 if case.exact else CLOSE)
    if plain is not None:
        assert float((plain - plain_alone).abs().max()) < CLOSE  # that is Diffusers' own splitting, back in its place
        assert not torch.equal(plain_alone, alone)


@pytest.mark.parametrize("name", split_cases.REFUSED)
def test_what_cannot_be_split_is_refused_with_a_reason(made, name):
    said = str(made("wan")[name])
    assert re.search(split_cases.REFUSED[name][1], said), said


@pytest.mark.parametrize("how", split_cases.DISAGREEING)
def test_processes_that_disagree_all_stop_and_say_on_what(made, how):
    said = made("wan")[how].split("\n")
    assert len(said) == 2
    for each in said:
        assert re.search("do not agree on the " + split_cases.DISAGREEING[how], each), each
