"""A loss in chunks of rows has the value and the gradients of the loss of all rows at once."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from microvlm.model.embedding import TiedEmbedding
from microvlm.training.heap import trim_heap
from microvlm.training.losses.chunked_loss import chunked_loss
from microvlm.training.losses.distillation_loss import logits_divergence


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rows", [1, 5, 7, 64])
def test_value_and_gradients(bits, rows):
    torch.manual_seed(0)
    head = TiedEmbedding(40, 16, bits)
    hidden, target = torch.randn(23, 16), torch.randn(23, 40)
    labels = torch.randint(40, (23,))

    def terms(part: Tensor, chunk: slice) -> Tensor:
        logits = head.head(part)
        entropy = F.cross_entropy(logits, labels[chunk], reduction="sum")
        return torch.stack([entropy, 0.3 * logits_divergence(logits, target[chunk], 5.0) * len(logits)])

    results = []
    for parts in (23, rows):
        head.weight.grad = None
        states = hidden.clone().requires_grad_()
        loss, seen = chunked_loss(states, terms, [head.weight], parts)
        (2 * loss).backward()
        results.append((loss.detach(), seen, states.grad, head.weight.grad))
    whole = hidden.clone().requires_grad_()
    head.weight.grad = None
    direct = terms(whole, slice(0, 23)).sum()
    (2 * direct).backward()
    results.append((direct.detach(), results[0][1], whole.grad, head.weight.grad))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    head = TiedEmbedding(40, 16, 8)
    head.weight.requires_grad_(False)
    states = torch.randn(9, 16, requires_grad=True)
    loss, terms = chunked_loss(
        states, lambda part, chunk: head.head(part).square().sum().reshape(1), list(head.parameters()), 4
    )
    loss.backward()
    assert head.weight.grad is None
    assert states.grad is not None
    assert not terms.requires_grad
    assert float(states.grad.abs().sum()) > 0


@pytest.mark.linux
def test_free_pages_of_the_heap_go_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Small enough to lie in the heap, every second one kept: freed memory is between what is used.
    blocks = [torch.ones(25_000) for _ in range(4000)]
    del blocks[::2]
    before = resident()
    trim_heap()
    assert resident() < before - 100_000_000
    assert len(blocks) == 2000


LARGE_BLOCKS = """
import ctypes, sys
import torch
from microvlm.training.heap import map_large_blocks

class Counts(ctypes.Structure):  # glibc's struct mallinfo2
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

counted = ctypes.CDLL(None).mallinfo2
counted.restype = Counts
if sys.argv[1] == "mapped":
    map_large_blocks()
torch.ones(7_000_000)  # freed at once: glibc then serves blocks of this size from its heap
before = counted().hblkhd
blocks = [torch.ones(5_000_000) for _ in range(5)]
print(counted().hblkhd - before)
del blocks
print(counted().hblkhd - before)
"""
"""Prints the bytes of blocks mapped by themselves, with five of 20 MB and after they were freed."""


@pytest.mark.linux
@pytest.mark.parametrize("place", ["mapped", "heap", "chosen"])
def test_large_blocks_are_mapped_and_go_back_when_they_are_freed(place: str):
    """`chosen`: a user's own size, above these blocks, stays."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("only glibc 2.33 and newer say what is mapped")
    chosen = {"MALLOC_MMAP_THRESHOLD_": "33554432"} if place == "chosen" else {}
    ran = subprocess.run(
        [sys.executable, "-c", LARGE_BLOCKS, "heap" if place == "heap" else "mapped"],
        env={**os.environ, **chosen}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    held, left = map(int, ran.stdout.split())
    assert (held >= 100_000_000) == (place == "mapped")
    assert held < 20_000_000 or place == "mapped"
    assert left < 20_000_000
