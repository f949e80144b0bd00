import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffussm.errors import MissingError
from diffussm.ops import cuda, cuda_tables, registry
from diffussm.ops.cuda import BACKEND, SpectrumCache, served, subsequences
from diffussm.ops.parity import example, relative_error, tolerance
from diffussm.ops.torch import BACKEND as TORCH
from tests.diffussm.ops import monarch

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(monarch.COMPILER is None, reason="no C++ compiler to run the CUDA source with")


def kernels(length: int, channels: int, dtype: torch.dtype, shared: bool, batch: int = 1) -> tuple[Tensor, ...]:
    u, forward, backward = example(batch, length, channels, 8, CPU, dtype, shared)
    return u, TORCH.kernel(forward, length), TORCH.kernel(backward, length)


def exact(u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
    return TORCH.conv(u.double(), k_f.double(), k_b.double())


@needs_compiler
@pytest.mark.parametrize(
    ("subs", "dtype", "sizes"),
    [
        (1, torch.bfloat16, ((37, 9), (1024, 8))),
        pytest.param(1, torch.float16, ((1, 8), (640, 9), (1024, 9)), marks=pytest.mark.long),
        (4, torch.float16, ((2049, 8),)),
        pytest.param(4, torch.bfloat16, ((5, 8), (3001, 9), (4096, 8)), marks=pytest.mark.long),
    ],
)
def test_the_cuda_source_on_a_cpu(
    tmp_path: Path, subs: int, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]
) -> None:
    """8 channels go by vector loads and stores, 9 one by one, in two blocks of which one holds a single channel."""
    library = monarch.build(tmp_path, subs, dtype)
    for length, channels in sizes:
        u, k_f, k_b = kernels(length, channels, dtype, shared=channels == 8, batch=2 if length < 100 else 1)
        y = monarch.convolve(library, subs, u, k_f, k_b)
        assert relative_error(y, exact(u, k_f, k_b)) < tolerance(dtype)[0], (length, channels)
        if length < 1000:
            across = u.transpose(1, 2).contiguous().transpose(1, 2)
            assert torch.equal(monarch.convolve(library, subs, across, k_f, k_b), y)


@needs_compiler
def test_range_is_never_lost(tmp_path: Path) -> None:
    """float16 operands overflow at 65504 and vanish below 6e-8: the blocks' own powers of two must prevent both."""
    library = monarch.build(tmp_path, 1, torch.bfloat16)
    u, k_f, k_b = kernels(300, 8, torch.bfloat16, shared=True)
    for size in (1e-20, 1e20):
        scaled = (u.double() * size).bfloat16()
        y = monarch.convolve(library, 1, scaled, k_f, k_b)
        assert relative_error(y.double() / size, exact(scaled, k_f, k_b) / size) < tolerance(torch.bfloat16)[0]
    assert torch.equal(monarch.convolve(library, 1, u * 0, k_f, k_b), torch.zeros(1, 300, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("subs", [1, 4])
def test_spectra_are_the_modulated_transform(subs: int) -> None:
    """The product of spectra, as laid out, must be that of polynomials modulo x^N - i."""
    points, length = 1024 * subs, 600 * subs
    _, k_f, k_b = kernels(length, 2, torch.float32, shared=True)
    pairs, gain = cuda_tables.spectra(k_f, k_b, subs)
    row, column = cuda_tables._result_index()
    index = ((row + 32 * column)[:, :, :, None, :] + 1024 * torch.arange(subs)[:, None]).flatten()
    halves = torch.view_as_complex(pairs.view(torch.float16).float().unflatten(2, (-1, 2)).contiguous())
    spectrum = torch.empty(2, 2, points, dtype=torch.complex128)
    spectrum[:, :, index] = halves.to(torch.complex128)
    w = torch.polar(torch.ones(points).double(), torch.pi * torch.arange(points).double() / (2 * points))
    back = torch.fft.ifft(spectrum).mul(points) * gain[:, :, None]
    assert relative_error((back[0] * w.conj()).real[:, :length], k_f) < 1e-3
    backward = torch.fft.ifft(spectrum[1].conj()).mul(points) * gain[1, :, None]
    assert relative_error((backward * w.conj()).real[:, :length], k_b) < 1e-3


class StaleSpectra(SpectrumCache):
    """The mutant: looks at the first kernel's identity alone."""

    def get(self, k_f: Tensor, k_b: Tensor, subs: int) -> tuple[Tensor, Tensor]:
        entry = self._entries.get(k_f)
        return entry[2] if entry is not None else super().get(k_f, k_b, subs)


def test_stale_spectra_are_never_used() -> None:
    assert_never_stale(SpectrumCache())
    with pytest.raises(AssertionError):
        assert_never_stale(StaleSpectra())


def assert_never_stale(cache: SpectrumCache) -> None:
    """Reused while nothing changes; made anew after a write to either kernel; gone with the kernel."""
    _, k_f, k_b = kernels(20, 2, torch.float32, shared=True)
    first = cache.get(k_f, k_b, 1)
    assert cache.get(k_f, k_b, 1) is first
    for kernel in (k_f, k_b):
        kernel.mul_(2)
        again = cache.get(k_f, k_b, 1)
        assert again is not first
        for found, expected in zip(again, cuda_tables.spectra(k_f, k_b, 1), strict=True):
            assert torch.equal(found, expected)
        first = again
    other = k_b.clone()
    assert cache.get(k_f, other, 1) is not first
    assert len(cache) == 1
    del k_f
    gc.collect()
    assert len(cache) == 0


def test_spectra_of_inference_tensors_are_not_kept() -> None:
    cache = SpectrumCache()
    with torch.inference_mode():
        k = torch.randn(2, 20)
        first = cache.get(k, k, 1)
        k.mul_(3)
        assert not torch.equal(cache.get(k, k, 1)[1], first[1])
    assert len(cache) == 0


def test_what_it_serves() -> None:
    assert served(torch.empty(2, 4096, 8, dtype=torch.float16))
    assert not served(torch.empty(2, 4097, 8, dtype=torch.float16))
    assert not served(torch.empty(2, 64, 8))
    assert not served(torch.empty(0, 64, 8, dtype=torch.float16))
    assert [subsequences(n) for n in (1, 1024, 1025, 4096)] == [1, 1, 4, 4]


def test_what_it_does_not_serve_goes_through_torch() -> None:
    u, k_f, k_b = kernels(20, 3, torch.float32, shared=True)
    assert torch.equal(BACKEND.conv(u, k_f, k_b), TORCH.conv(u, k_f, k_b))


def test_without_a_card_it_is_refused_with_the_reason() -> None:
    with pytest.raises(MissingError, match="needs a CUDA device, not cpu"):
        registry.resolve("cuda", CPU, torch.bfloat16)
    assert "float32" in (cuda.BACKEND.available(torch.device("cuda"), torch.float32) or "")
