"""Counting tensors against what a piece of code is known to allocate."""

from __future__ import annotations

import torch

from lightning_cl.core.live_bytes import LiveBytes


def test_counts_what_lives_at_once() -> None:
    """What has ended does not count, views and in-place results are no bytes of their own."""
    with LiveBytes() as live:
        for _ in range(5):
            block = torch.zeros(1000)
            block.view(10, 100).add_(1)
            del block
    assert live.peak == 4000


def test_known_tensors_count_until_they_end() -> None:
    """A tensor that was there before makes room when it goes."""
    known = [torch.zeros(1000)]
    live = LiveBytes(known)
    with live:
        known.clear()
        kept = torch.zeros(900)
    assert (live.peak, live.largest["known"], kept.numel()) == (4000, 4000, 900)


def test_resized_storages_are_gathered_weights() -> None:
    """The way in which FSDP2 frees and takes the memory of whole parameters."""
    whole = torch.zeros(1000)
    storage = whole.untyped_storage()
    storage.resize_(0)
    with LiveBytes([whole]) as live:
        storage.resize_(4000)
        other = whole + 1
        storage.resize_(0)
        more = torch.zeros(500)
    assert live.peak == 8000
    assert (live.largest["gathered"] + live.largest["known"], live.largest["other"]) == (4000, 4000)
    assert len(other) + len(more) == 1500


def test_what_is_saved_for_the_backward_is_told_apart() -> None:
    """Unless `tell_saved=False`, which lets transforms of `torch.func` run."""
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        loss = (weight.exp() * 2).sum()
    assert (live.largest["saved"], live.peak) == (4000, 8004)
    with LiveBytes(tell_saved=False) as live:
        torch.func.grad(lambda x: x.exp().sum())(weight.detach())
    assert live.largest["saved"] == 0
    assert live.peak >= 8000
    assert loss.requires_grad
