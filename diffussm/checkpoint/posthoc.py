"""An average of any length, put together after the training from stored snapshots of power-function averages.

Karras et al. 2023 (arXiv 2312.02696), section 3.2: some weighted sum of the stored profiles comes nearest to the wanted
one, and the same sum of the stored weights is the average.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from diffussm.checkpoint import restore, weights
from diffussm.checkpoint.manifest import Manifest
from diffussm.checkpoint.profiles import Fit, Profile, fit, gamma
from diffussm.checkpoint.slices import Slices
from diffussm.checkpoint.store import Store
from diffussm.errors import DataError
from diffussm.naming import power_name

FOLDER = "ema"
"""Where the snapshots of a run lie."""
READERS = 8
"""Slices that are read at once; each is at most weights.BLOCK elements."""

_POWER_KIND = re.compile(r"ema-power-(0\.\d{3})")


@dataclass(frozen=True)
class Term:
    """One stored average and its share."""

    folder: str
    manifest: Manifest
    kind: str
    coefficient: float


@dataclass(frozen=True)
class Recipe:
    """How a wanted average is put together."""

    wanted: Profile
    terms: tuple[Term, ...]
    fit: Fit


def recipe(store: Store, sigma_rel: float, images: int | None, announce: Callable[[str], None]) -> Recipe:
    """Find the coefficients for the average of relative width `sigma_rel` after `images` images. Local.

    Every stored power-function average up to that time takes part: those of snapshots, and those of checkpoints of
    other times. One whose manifest cannot be read is announced and left out, as is what an earlier run of the same
    name left behind.

    Args:
        store: the run's store.
        sigma_rel: wanted relative width.
        images: wanted time; None is that of the newest snapshot.
        announce: told what is left out.

    Raises:
        DataError: no snapshot is there, or none so early or so late.
    """
    found = _stored(store, announce)
    if not found:
        raise DataError(
            f"{store.url}: has no snapshots of power-function averages below {FOLDER}/, nor checkpoints with them",
            "set train.power_ema before a run begins; they cannot be had afterwards",
        )
    first, last = found[0][1].counters.images, found[-1][1].counters.images
    at = last if images is None else images
    if not first <= at <= last:
        raise DataError(
            f"--at: found {at:,} images; allowed: {first:,} to {last:,}, the oldest and the newest snapshot",
            "choose a time between them",
        )
    stored = [(f, m, kind) for f, m in found if m.counters.images <= at for kind in m.kinds if _POWER_KIND.match(kind)]
    profiles = [Profile(m.counters.images, width_of(kind)) for _, m, kind in stored]
    wanted = Profile(at, sigma_rel)
    solved = fit(profiles, wanted)
    terms = tuple(Term(*entry, x) for entry, x in zip(stored, solved.coefficients, strict=True))
    return Recipe(wanted, terms, solved)


def _stored(store: Store, announce: Callable[[str], None]) -> list[tuple[str, Manifest]]:
    """Snapshots and checkpoints that hold power-function averages, one for each time, oldest first."""
    by_time: dict[int, tuple[str, Manifest]] = {}
    for prefix in ("checkpoints", FOLDER):  # of the same time the snapshot counts, which stays
        for folder, manifest in restore.manifests(store, prefix):
            if not isinstance(manifest, Manifest):
                announce(f"{folder} is left out: {manifest.message}")
            elif any(map(_POWER_KIND.fullmatch, manifest.kinds)):
                by_time[manifest.counters.images] = folder, manifest
    run = max(by_time.values(), key=lambda entry: entry[1].created)[1].run_id if by_time else ""
    kept = []
    for _, (folder, manifest) in sorted(by_time.items()):
        if manifest.run_id == run:
            kept.append((folder, manifest))
        else:
            announce(f"{folder} is left out: an earlier run of this name wrote it")
    return kept


def width_of(kind: str) -> float:
    """Relative width that the name of a kind says: 0.05 of `ema-power-0.050`."""
    match = _POWER_KIND.fullmatch(kind)
    if match is None:
        raise ValueError(f"{kind!r} is no power-function average")
    return float(match[1])


def write(store: Store, made: Recipe, target: str, progress: Callable[[int, int], None] | None = None) -> int:
    """Add up the stored averages and write the sum as one safetensors file; returns its bytes. Local.

    Every byte that is used is verified first, one file at a time. The sum is taken in fp64, weights.BLOCK elements at a
    time, so memory depends neither on the model nor on the number of snapshots.

    Args:
        store: the run's store.
        made: from `recipe`.
        target: a file or an s3:// object.
        progress: told (parameters done, in all).

    Raises:
        DataError: a snapshot is damaged, or its parameters are not those of the others.
        StorageError: a file cannot be read or the target not written.
    """
    opened: dict[str, Slices] = {}
    shapes = made.terms[-1].manifest.shapes
    for term in made.terms:
        if term.folder in opened:
            continue
        wrong = restore.verify(store, term.folder, term.manifest)
        if term.manifest.shapes != shapes:
            wrong.append(f"{term.folder} has other parameters than {made.terms[-1].folder}")
        if wrong:
            raise DataError(
                f"snapshot does not verify: {'; '.join(wrong)}",
                f"delete {term.folder} to do without it; the fit will be a little worse",
            )
        opened[term.folder] = Slices(store, term.folder, term.manifest)
    names = list(shapes)
    with ThreadPoolExecutor(READERS) as pool:

        def produce(name: str, start: int, numel: int) -> Tensor:
            if progress is not None and start == 0:
                progress(names.index(name), len(names))
            total = torch.zeros(numel, dtype=torch.float64)
            for group in _groups(made.terms):
                read = [pool.submit(opened[t.folder].read, t.kind, name, start, numel) for t in group]
                for term, block in zip(group, read, strict=True):
                    total.add_(block.result(), alpha=term.coefficient)
            return total

        return weights.write(target, shapes, produce, made.wanted.images, _metadata(store, made))


def _groups(terms: Sequence[Term]) -> Iterator[Sequence[Term]]:
    for first in range(0, len(terms), READERS):
        yield terms[first : first + READERS]


def _metadata(store: Store, made: Recipe) -> dict[str, str]:
    return {
        "run": store.url,
        "kind": f"ema-{power_name(made.wanted.sigma_rel)}",
        "sigma_rel": repr(made.wanted.sigma_rel),
        "gamma": repr(gamma(made.wanted.sigma_rel)),
        "fit_error": repr(made.fit.error),
        "fit_correlation": repr(made.fit.correlation),
        "coefficients": json.dumps([[t.manifest.counters.images, t.kind, t.coefficient] for t in made.terms]),
    }
