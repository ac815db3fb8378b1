"""Decoding in parts: who decodes what, and that no seam is to be seen."""

import itertools

import pytest
import torch

import decode_cases
from jobs import run_job
from pointillist.accel.parallel.decode import CONTEXT, SEAM, parts_of

ROUNDING = 1e-5
"""Of pictures from -1 to 1: convolutions of another length, or with more threads, add up in another order."""


@pytest.mark.parametrize(("processes", "context"), [(2, 12), (3, 5), (4, 12), (8, 1), (2, 0)])
def test_every_frame_is_of_one_process_and_has_its_context(processes, context):
    for frames in range(1, 130):
        parts = parts_of(frames, processes, context)
        if not parts:
            continue
        assert [each.own for each in parts[1:]] == [each.stop for each in parts[:-1]]
        assert parts[0].start == parts[0].own == 0 and parts[-1].stop == frames
        assert all(each.own - each.start == context and each.own < each.stop for each in parts[1:])
        lengths = [each.stop - each.start for each in parts]
        assert max(lengths) - min(lengths) <= 1 and max(lengths) <= 0.75 * frames


def test_short_clips_are_decoded_in_one_pass():
    assert parts_of(9, 2, 12) == [] and parts_of(21, 2, 12) == [] and parts_of(33, 1, 12) == []
    assert [each.stop for each in parts_of(33, 2, 12)] == [22, 33]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    usual = CONTEXT["AutoencoderKLWan"]
    names = [str(usual), f"{usual} bfloat16", "1"]
    return run_job(2, "decode_cases", names, tmp_path_factory.mktemp("decoded"))


@pytest.fixture(scope="module")
def in_one_pass():
    return decode_cases.run_case("12")[0]


def test_two_processes_decode_what_one_decodes(made, in_one_pass):
    pictures, lengths, notes = made["12"]
    assert lengths == [22] and notes == [] and pictures.shape == in_one_pass.shape
    first, second = itertools.pairwise([0, 1 + 21 * 4, pictures.shape[2]])
    apart = (pictures - in_one_pass).abs()
    assert float(apart[:, :, slice(*first)].max()) < ROUNDING
    assert ROUNDING < float(apart[:, :, slice(*second)].max()) < SEAM


def test_neighbours_that_do_not_agree_at_a_seam_decode_in_one_pass(made, in_one_pass):
    pictures, lengths, notes = made["1"]
    assert lengths == [17, 33] and float((pictures - in_one_pass).abs().max()) < ROUNDING
    assert notes == ["decoded in one pass: the pictures of parts did not agree at their seams"]


def test_parts_agree_in_half_precision(made):
    pictures, lengths, notes = made["12 bfloat16"]
    assert lengths == [22] and notes == [] and pictures.dtype == torch.bfloat16
