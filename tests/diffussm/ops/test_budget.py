"""Every GPU kernel is compiled here, without a GPU, and held against budget.json.

When a kernel is changed on purpose, `python -m tests.diffussm.ops.resources` measures anew.
"""

import json

import pytest

from tests.diffussm.ops import resources

BUDGET: dict[str, dict[str, dict[str, int]]] = json.loads(resources.BUDGET.read_text())
MONARCH = {"monarch-bf16-1024": (1, True), "monarch-bf16-4096": (4, True), "monarch-fp16-1024": (1, False)}
MONARCH["monarch-fp16-4096"] = (4, False)

# One kernel for one card; the rest takes minutes to compile.
QUICK = ["scan-bf16-4x16-4w"]


def hold(found: dict[str, int], allowed: dict[str, int]) -> None:
    assert found["spilled"] <= allowed["spilled"]
    assert found["registers"] <= allowed["registers"] + 8
    assert found["shared"] <= allowed["shared"]


def test_the_budget_covers_every_kernel_and_keeps_the_limits() -> None:
    """No spills but in float32, which is not trained with on a card; shared memory that consumer cards have."""
    assert set(BUDGET) == {*resources.variants(), *MONARCH}
    for name, cards in BUDGET.items():
        assert set(cards) == {f"sm_{a}" for a in resources.ARCHITECTURES}
        for card, allowed in cards.items():
            assert allowed["shared"] <= resources.SHARED_LIMIT, (name, card)
            if "fp32" not in name:
                assert allowed["spilled"] == 0, (name, card)


@pytest.mark.parametrize("name", QUICK)
def test_triton_kernels_keep_their_budget(name: str) -> None:
    hold(resources.measure_triton(name, 90), BUDGET[name]["sm_90"])


@pytest.mark.long
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("name", resources.variants())
def test_triton_kernels_keep_their_budget_everywhere(name: str, architecture: int) -> None:
    hold(resources.measure_triton(name, architecture), BUDGET[name][f"sm_{architecture}"])


@pytest.mark.parametrize("name", ["monarch-bf16-4096"])
def test_the_cuda_kernel_keeps_its_budget(name: str) -> None:
    hold(resources.measure_monarch(*MONARCH[name], 90), BUDGET[name]["sm_90"])


@pytest.mark.long
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
@pytest.mark.parametrize("name", MONARCH)
def test_the_cuda_kernel_keeps_its_budget_everywhere(name: str, architecture: int) -> None:
    hold(resources.measure_monarch(*MONARCH[name], architecture), BUDGET[name][f"sm_{architecture}"])
