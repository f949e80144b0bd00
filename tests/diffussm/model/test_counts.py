import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffussm.config.schema import ModelConfig
from diffussm.model import LatentShape, build_model, counts, embed
from diffussm.model.counts import count, memory
from diffussm.model.presets import PRESETS

IMAGENET_256, IMAGENET_512 = LatentShape(4, 32, 32, 1000), LatentShape(4, 64, 64, 1000)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_network(preset: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(preset=preset), IMAGENET_256)
    found = count(preset, IMAGENET_256)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.ssm_parameters == sum(p.numel() for p in model.parameters() if hasattr(p, "_optim"))


def test_xl_has_the_papers_parameters() -> None:
    assert count("XL", IMAGENET_256).parameters == pytest.approx(673e6, rel=0.005)


def test_macs_stay_near_the_papers_table() -> None:
    for latent, paper in ((IMAGENET_256, 280.3e9), (IMAGENET_512, 1066.2e9)):
        found = count("XL", latent)
        assert found.macs + found.kernel_macs == pytest.approx(paper, rel=0.06)


@pytest.mark.parametrize("hourglass", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_macs_are_what_torch_counts(hourglass: int, batch: int) -> None:
    """torch sees the operator as opaque, so its count is that of the dense layers."""
    latent, cfg = LatentShape(3, 4, 8, 7), ModelConfig(preset="tiny", hourglass=hourglass)
    with torch.device("meta"):
        model = build_model(cfg, latent)
        args = torch.randn(batch, 3, 4, 8), torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(*args)
    assert counter.get_total_flops() == 2 * batch * count(cfg, latent).dense_macs


def test_kernel_macs_are_what_torch_counts() -> None:
    from diffussm.ops.parity import example
    from diffussm.ops.torch import TorchBackend

    latent = LatentShape(4, 8, 8, 9)
    _, params, _ = example(1, latent.length, 64, 32, torch.device("cpu"), torch.float32, shared=True)
    with FlopCounterMode(display=False) as counter:
        TorchBackend().kernel(params, latent.length)
    one_direction_of_one_layer = count(ModelConfig(preset="tiny", depth=1), latent).kernel_macs // 2
    assert counter.get_total_flops() == 2 * one_direction_of_one_layer


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("hourglass", [2, 4])
def test_activation_bytes_are_what_autograd_keeps(hourglass: int, bf16: bool) -> None:
    latent, n = LatentShape(4, 16, 16, 9), 24
    kept = []
    smallest = n * latent.length // hourglass * 64 * 2  # leaves out kernels, modulations and weights cast to bf16
    for depth in (1, 3):  # the difference leaves stem, head and constants out
        cfg = ModelConfig(preset="tiny", depth=depth, hourglass=hourglass)
        model = build_model(cfg, latent)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(t: torch.Tensor, own: set[int] = own, storages: dict[int, torch.UntypedStorage] = storages) -> object:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own and storage.nbytes() >= smallest:
                storages[storage.data_ptr()] = storage
            return t

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            out = model(torch.randn(n, 4, 16, 16), torch.zeros(n).long(), torch.zeros(n).long())
        kept.append(sum(s.nbytes() for s in storages.values()))
        del out
    cfg = ModelConfig(preset="tiny", depth=1, hourglass=hourglass)
    assert (kept[1] - kept[0]) / 2 / n == pytest.approx(count(cfg, latent, bf16=bf16).activation_bytes, rel=0.1)


def test_checkpointing_keeps_block_inputs_and_one_block() -> None:
    plain, saving = (count("XL", IMAGENET_512, activation_checkpointing=on) for on in (False, True))
    one_block = plain.activation_bytes // 29
    assert saving.activation_bytes == one_block + 29 * 4 * 2048 * 1152
    assert dataclasses.replace(saving, activation_bytes=0) == dataclasses.replace(plain, activation_bytes=0)


def test_memory_falls_with_the_stage_and_the_ranks() -> None:
    assert memory(100, 0, 8).total == 4 * 100 + 4 * 100 + 8 * 100 + 4 * 13
    assert [memory(100, stage, 1).optimizer for stage in range(4)] == [800, 1200, 1200, 1200]
    assert [memory(800, stage, 8).total for stage in (1, 2, 3)] == [8000, 5200, 2400]
    assert [memory(800, stage, 8, averages=3).ema for stage in range(4)] == [1200] * 4


def test_docstring_tells_these_counts() -> None:
    rows = dict(re.findall(r"^\| (S|B|L|XL) \| (.*) \|$", counts.__doc__ or "", flags=re.MULTILINE))
    assert list(rows) == ["S", "B", "L", "XL"]
    for preset, row in rows.items():
        small, large = count(preset, IMAGENET_256), count(preset, IMAGENET_512)
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[0] == f"{small.parameters / 1e6:.1f} M"
        for at, value in ((2, small.macs), (3, small.macs + small.kernel_macs), (5, large.macs)):
            assert cells[at] == f"{value / 1e9:.1f}"
        assert cells[6] == f"{(large.macs + large.kernel_macs) / 1e9:.1f}"


def test_counting_needs_no_torch() -> None:
    code = "import sys, diffussm.model.counts, diffussm.model.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sinusoid_has_the_size_counted() -> None:
    assert counts._FREQUENCIES == embed._FREQUENCIES
