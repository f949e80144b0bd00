"""An average put together afterwards against the same average followed step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import posthoc, weights
from diffussm.checkpoint.profiles import beta, gamma
from diffussm.checkpoint.store import open_store
from diffussm.errors import DataError
from tests.diffussm.checkpoint import snapshots

BATCH, STEPS, EVERY = 8, 512, 16
STORED, WANTED = (0.05, 0.1), (0.075, 0.12, 0.06)

State = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, State]]:
    """Weights that wander like those of a training: snapshots of two averages in a folder, and all five by images."""
    root = tmp_path_factory.mktemp("run")
    rng = torch.Generator().manual_seed(0)
    live = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in snapshots.SHAPES.items()}
    averages = {w: {name: torch.zeros_like(tensor) for name, tensor in live.items()} for w in STORED + WANTED}
    seen: dict[int, State] = {}
    for step in range(1, STEPS + 1):
        for name, tensor in live.items():
            tensor += torch.randn(tensor.shape, generator=rng, dtype=torch.float64) + 0.05
            for width, average in averages.items():
                average[name].lerp_(tensor, 1 - beta(step * BATCH, BATCH, gamma(width)))
        if step % EVERY == 0:
            kept = {f"ema-power-{w:.3f}": {n: t.float() for n, t in average.items()} for w, average in averages.items()}
            kept["live"] = {name: tensor.float() for name, tensor in live.items()}
            seen[step * BATCH] = kept
            snapshots.write(root, "ema", step * BATCH, {k: kept[k] for k in ("ema-power-0.050", "ema-power-0.100")})
    return root, seen


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())


@pytest.mark.parametrize("sigma_rel", WANTED)
@pytest.mark.parametrize("at", [None, STEPS * BATCH // 2])
def test_it_is_the_average_that_was_followed(
    history: tuple[Path, dict[int, State]], tmp_path: Path, sigma_rel: float, at: int | None
) -> None:
    """Within 3 % of the way from the nearest stored average, which has another width, to the one that is wanted."""
    root, seen = history
    store = open_store(str(root))
    made = posthoc.recipe(store, sigma_rel, at, print)
    images = at or STEPS * BATCH
    assert made.wanted.images == images
    assert max(term.manifest.counters.images for term in made.terms) == images
    assert made.fit.error < 0.01
    target = tmp_path / "w.safetensors"
    assert posthoc.write(store, made, str(target)) == target.stat().st_size
    found = weights.read(str(target))
    tracked = seen[images][f"ema-power-{sigma_rel:.3f}"]
    nearest = min(distance(seen[images][f"ema-power-{w:.3f}"], tracked) for w in STORED)
    assert distance(found.tensors, tracked) < 0.03 * nearest
    assert found.images == images
    assert float(found.metadata["sigma_rel"]) == sigma_rel
    assert float(found.metadata["fit_error"]) == made.fit.error


def test_a_stored_width_comes_back(history: tuple[Path, dict[int, State]], tmp_path: Path) -> None:
    root, seen = history
    store = open_store(str(root))
    posthoc.write(store, posthoc.recipe(store, 0.1, None, print), str(tmp_path / "w"))
    found, last = weights.read(str(tmp_path / "w")).tensors, seen[STEPS * BATCH]
    assert distance(found, last["ema-power-0.100"]) < 1e-3 * distance(last["ema-power-0.100"], last["live"])


def test_times_without_snapshots_and_runs_without_them_are_refused(
    history: tuple[Path, dict[int, State]], tmp_path: Path
) -> None:
    store = open_store(str(history[0]))
    for at in (BATCH, STEPS * BATCH + 1):
        with pytest.raises(DataError, match=r"found .* images; allowed: 128 to 4,096"):
            posthoc.recipe(store, 0.1, at, print)
    with pytest.raises(DataError, match="no snapshots"):
        posthoc.recipe(open_store(str(tmp_path)), 0.1, None, print)


def test_damage_is_found_before_anything_is_written(tmp_path: Path) -> None:
    for images in (8, 16, 24):
        state = {"ema-power-0.050": {n: torch.full(s, float(images)) for n, s in snapshots.SHAPES.items()}}
        snapshots.write(tmp_path, "ema", images, state)
    store = open_store(str(tmp_path))
    made = posthoc.recipe(store, 0.1, None, print)
    file = tmp_path / "ema" / f"{16:012d}" / made.terms[0].manifest.files[0].name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"does not verify.*digest"):
        posthoc.write(store, made, str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    (tmp_path / "ema" / f"{16:012d}" / "manifest.json").write_bytes(b"{")
    said: list[str] = []
    fewer = posthoc.recipe(store, 0.1, None, said.append)
    assert [term.manifest.counters.images for term in fewer.terms] == [8, 24]
    assert len(said) == 1
    posthoc.write(store, fewer, str(tmp_path / "w"))
    assert sum(term.coefficient for term in fewer.terms) == pytest.approx(1)


def test_checkpoints_take_part_and_what_an_earlier_run_left_does_not(tmp_path: Path) -> None:
    def put(prefix: str, images: int, value: float, created: float, run_id: str, *more: str) -> None:
        state = {
            kind: {n: torch.full(s, value) for n, s in snapshots.SHAPES.items()} for kind in ("ema-power-0.050", *more)
        }
        snapshots.write(tmp_path, prefix, images, state, created=created, run_id=run_id)

    put("ema", 8, 1.0, 20, "new")
    put("ema", 16, 1.0, 21, "new")
    put("checkpoints", 16, 5.0, 21, "new", "master")  # the same time: the snapshot counts
    put("checkpoints", 24, 1.0, 22, "new", "master")
    put("ema", 32, 9.0, 11, "old")
    said: list[str] = []
    made = posthoc.recipe(open_store(str(tmp_path)), 0.1, None, said.append)
    assert [(t.folder.split("/")[0], t.manifest.counters.images, t.kind) for t in made.terms] == [
        ("ema", 8, "ema-power-0.050"), ("ema", 16, "ema-power-0.050"), ("checkpoints", 24, "ema-power-0.050"),
    ]  # fmt: skip
    assert said == [f"ema/{32:012d} is left out: an earlier run of this name wrote it"]
    posthoc.write(open_store(str(tmp_path)), made, str(tmp_path / "w"))
    for tensor in weights.read(str(tmp_path / "w")).tensors.values():
        torch.testing.assert_close(tensor, torch.ones_like(tensor))


def test_the_width_is_read_from_the_kind() -> None:
    assert posthoc.width_of("ema-power-0.050") == 0.05
    with pytest.raises(ValueError, match="ema-plain"):
        posthoc.width_of("ema-plain")
