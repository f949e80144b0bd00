"""Wrong evaluations, made from the right text: each changes the number, and the check against others' parts rejects it.

The mistakes are those that made published numbers differ. Those of precision and recall stand in test_manifold.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffussm.errors import DataError
from tests.diffussm.evaluate.whole_path import TOLERANCE, Case, check, prepare, score

STACK = [
    "data.autoencoder", "evaluate.extractors", "evaluate.inception", "evaluate.moments", "evaluate.metrics",
    "evaluate.scores", "evaluate.blocks", "evaluate.run",
]  # fmt: skip
"""Modules on the way from a latent to a result; one that stands later may import one that stands before."""

Edit = tuple[str, str, str]
"""Module, its text, and what stands there instead."""

RAW = ".clamp(0, 255).to(torch.uint8)"
GUARD = "if images.dtype != np.uint8:"
EACH, EVERY_OTHER = "for index in range(plan.count):", "for index in range(0, plan.count, 2):"
COMPLETE = "if self.n < 2 or self._seen != self.n:"

MUTANTS: dict[str, tuple[str, list[Edit]]] = {
    "resize about centres": (
        "FID",
        [("evaluate.inception", "resize_like_tensorflow(pixels.float(), _SIDE)",
          "functional.interpolate(pixels.float(), (_SIDE, _SIDE), mode='bilinear', align_corners=False)")],
    ),
    "resize that smooths": (
        "FID",
        [("evaluate.inception", "resize_like_tensorflow(pixels.float(), _SIDE)",
          "functional.interpolate(pixels.float(), (_SIDE, _SIDE), mode='bicubic', antialias=True)")],
    ),
    "no rounding to uint8": (
        "FID",
        [("data.autoencoder", RAW, ".clamp(0, 255)"), ("evaluate.extractors", GUARD, "if False:")],
    ),
    "rounded to the nearest": ("FID", [("data.autoencoder", RAW, ".round().clamp(0, 255).to(torch.uint8)")]),
    "wraps around instead of clipping": ("FID", [("data.autoencoder", RAW, ".to(torch.int64).to(torch.uint8)")]),
    "channels of colour swapped": (
        "FID", [("evaluate.extractors", "pixels.permute(0, 3, 1, 2)", "pixels.flip(3).permute(0, 3, 1, 2)")],
    ),
    "padding counted in the mean": (
        "FID", [("evaluate.inception", "count_include_pad=False", "count_include_pad=True")],
    ),
    "mean in the last block": ("FID", [("evaluate.inception", '_e(2048, "max")', '_e(2048, "mean")')]),
    "logits with bias": (
        "IS", [("evaluate.inception", "LOGITS: pool @ self.network.fc.weight.T", "LOGITS: self.network.fc(pool)")],
    ),
    "tap in NCHW order": ("sFID", [("evaluate.inception", ".permute(0, 2, 3, 1).flatten(1)", ".flatten(1)")]),
    "tap before its ReLU": (
        "sFID",
        [("evaluate.inception", "taps[self.branches[0][0].name] = outputs[0]",
          "taps[self.branches[0][0].name] = self.branch1x1.conv(x)")],
    ),
    "ddof 0": ("FID", [("evaluate.moments", "/ (self.n - 1)", "/ self.n")]),
    "one rank only": (
        "FID",
        [("evaluate.blocks", f"{EACH}\n        key", f"{EVERY_OTHER}\n        key"),
         ("evaluate.scores", COMPLETE, "if False:")],
    ),
    "each rank counts its pictures from the first": (
        "FID", [("evaluate.blocks", "first + plan.batch, span.stop)], first)", "first + plan.batch, span.stop)], 0)")],
    ),
    "one rank's moments only": (
        "FID",
        [("evaluate.moments", "for part in parts:\n        total +=", "for part in parts[:0]:\n        total +=")],
    ),
}  # fmt: skip

ALWAYS = {
    "resize about centres", "no rounding to uint8", "logits with bias", "tap in NCHW order", "ddof 0", "one rank only",
}  # fmt: skip
"""The others take long together."""


@contextmanager
def mutated(edits: Sequence[Edit]) -> Iterator[None]:
    """The evaluation with texts of its modules changed, and everything above them loaded anew."""
    package = "diffussm."
    before = {name: importlib.import_module(package + name).__dict__.copy() for name in STACK}
    modules = {name: sys.modules[package + name] for name in STACK}
    texts = {name: Path(str(module.__file__)).read_text() for name, module in modules.items()}
    for name, old, new in edits:
        assert texts[name].count(old) == 1, f"{name}: the mutation no longer fits the source"
        texts[name] = texts[name].replace(old, new)
    try:
        for name, module in modules.items():
            exec(compile(texts[name], str(module.__file__), "exec"), module.__dict__)  # noqa: S102 - our own source
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.clear()
            module.__dict__.update(before[name])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return prepare(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def right(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return score(case, tmp_path_factory.mktemp("right"))


def test_our_whole_path_agrees_with_one_of_others_parts(case: Case, right: dict[str, float]) -> None:
    check(case, right)
    assert min(right.values()) > 1e-5  # the random network tells pictures apart, or all of this would prove nothing
    with mutated([]):  # loading the modules anew changes nothing: what fails below fails by the mutation
        check(case, score(case, case.folder / "again", ["IS"]))


@pytest.mark.parametrize("mutant", [m if m in ALWAYS else pytest.param(m, marks=pytest.mark.long) for m in MUTANTS])
def test_a_mutant_changes_the_number_and_is_rejected(
    mutant: str, case: Case, right: dict[str, float], tmp_path: Path
) -> None:
    name, edits = MUTANTS[mutant]
    with mutated(edits):
        found = score(case, tmp_path, [name])
    assert abs(found[name] - right[name]) > 10 * TOLERANCE * right[name]
    with pytest.raises(AssertionError):
        check(case, found)


def test_pictures_that_are_not_uint8_are_refused(case: Case, tmp_path: Path) -> None:
    with mutated(MUTANTS["no rounding to uint8"][1][:1]), pytest.raises(TypeError, match="float32"):
        score(case, tmp_path)


def test_the_blocks_of_one_rank_alone_are_refused(case: Case, tmp_path: Path) -> None:
    with mutated(MUTANTS["one rank only"][1][:1]), pytest.raises(DataError, match="found 2 generated pictures of 3"):
        score(case, tmp_path)
