"""Scores on a few channels."""

from dataclasses import replace

import torch

from pattern_checks import make_call, selected
from pointillist.accel.patterns.sampled import Sampled


def test_channels_of_no_weight_change_nothing():
    """Where only 5 of 16 channels hold anything, scores on 5 choose what scores on all choose, those on 2 do not."""
    call = make_call((3, 6, 7))
    q, k = call.q.clone(), call.k.clone()
    for head, dropped in enumerate(torch.stack([torch.randperm(16)[:11] for _ in range(3)])):
        q[:, head, :, dropped] = k[:, head, :, dropped] = 0
    call = replace(call, q=3 * q, k=3 * k)
    everything, five, two = (
        selected(Sampled(0.3, channels=count), replace(call, memory={})).mask for count in (0, 5, 2)
    )
    assert torch.equal(everything, five) and not torch.equal(everything, two)


def test_channels_are_kept_for_the_generation():
    call = make_call((3, 6, 7))
    pattern = Sampled(0.3, channels=4)
    selected(pattern, call)
    (memory,) = call.memory.values()
    kept = memory["channels"]
    other = replace(call, q=call.q.flip(-1), k=call.k.flip(-1))
    selected(pattern, other)
    assert memory["channels"] is kept and kept.shape == (2, 3, 4)
    assert (kept.diff(dim=-1) > 0).all()
