from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffussm.checkpoint.digest import add, digest_blocks, signed, slice_sum


def test_the_digest_sees_every_byte_and_no_borders() -> None:
    content = bytearray(5 << 20)
    before = digest_blocks([bytes(content)])
    assert digest_blocks([bytes(content[:7]), bytes(content[7:])]) == before
    content[(5 << 20) - 1] = 1
    assert digest_blocks([bytes(content)]) != before


@given(st.integers(1, 200_000), st.lists(st.integers(0, 200_000), max_size=5), st.integers(0, 2**31))
def test_slices_add_up_to_the_whole_however_it_is_cut(numel: int, cuts: list[int], seed: int) -> None:
    whole = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    edges = sorted({0, numel, *(cut % (numel + 1) for cut in cuts)})
    parts = [slice_sum(whole[low:high], low) for low, high in itertools.pairwise(edges)]
    assert add(parts) == slice_sum(whole, 0)
    # Tensors add the same digests with wrap-around.
    assert int(torch.tensor([signed(part) for part in parts]).sum()) == signed(slice_sum(whole, 0))


@given(st.integers(2, 5000), st.data())
def test_a_flipped_bit_and_swapped_elements_are_seen(numel: int, data: st.DataObject) -> None:
    whole = torch.arange(1, numel + 1, dtype=torch.float32)
    before = slice_sum(whole, 0)
    a = data.draw(st.integers(0, numel - 1))
    flipped = whole.clone()
    flipped.view(torch.int32)[a] ^= 1 << data.draw(st.integers(0, 31))
    assert slice_sum(flipped, 0) != before
    b = data.draw(st.integers(0, numel - 1).filter(lambda b: b != a))
    swapped = whole.clone()
    swapped[a], swapped[b] = whole[b], whole[a]
    assert slice_sum(swapped, 0) != before
    assert slice_sum(whole, 1) != before
