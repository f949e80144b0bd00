"""What a set of latents holds, for a person to look at: numbers, hashes, and pictures beside their sources."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config import load
from diffussm.config.schema import DataConfig, Source
from diffussm.data import autoencoder, images, latents, shards
from diffussm.data.ledger import PLAN
from diffussm.data.passport import FILE, Passport
from diffussm.data.picture import CorruptImageError, Pixels
from diffussm.data.source import ImageSource
from diffussm.data.units import plan
from diffussm.errors import DataError, DiffuSSMError
from diffussm.naming import join
from diffussm.observe.grid import grid

CONFIG = "config.yaml"
ROWS = 8
"""Classes in the grid."""
_SHARDS_READ = 4
_LISTED = 40
_BAR = 30
_THREADS = 8
_SMALLEST_PX = 64


@dataclass(frozen=True)
class Latents:
    """A set of latents and where its pictures came from."""

    store: Store
    passport: Passport
    data: DataConfig
    """A data section that opens the same source."""


def find(what: str) -> Latents:
    """The latents at `what`: their own folder or URL, a run's, or a config file.

    Raises:
        DataError: there is neither a passport nor a config with latents that are made.
        StorageError: the store cannot be read.
    """
    if what.endswith((".yaml", ".yml")) and Path(what).is_file():
        return _of_config(load(what).data)
    place = latents.local_path(what)
    store = open_store(place)
    try:
        passport = Passport.from_json(store.read(FILE), join(place, FILE))
        return Latents(store, passport, _of_passport(passport, place))
    except NotFound:
        pass
    try:
        text = store.read(CONFIG)
    except NotFound as error:
        raise DataError(
            f"found {what}, which holds neither {FILE} (latents) nor {CONFIG} (a run)",
            "name a run, its latents or a config; unfinished latents are finished by `diffussm prepare`",
        ) from error
    with tempfile.TemporaryDirectory(prefix="diffussm-data-") as scratch:
        path = Path(scratch) / CONFIG
        path.write_bytes(text)
        return _of_config(load(path).data)


def text(found: Latents) -> str:
    """Count, histogram of the classes and passport as lines."""
    passport = found.passport
    shape = " x ".join(map(str, passport.latent_shape))
    rows = [
        ("latents", found.store.url),
        ("images", f"{passport.number:,} of {len(passport.classes):,} classes, {len(passport.skipped):,} skipped"),
        (
            "source",
            f"{passport.source} {passport.images}".strip() + f", {passport.crop} at {passport.resolution_px} px",
        ),
        (
            "autoencoder",
            f"{passport.autoencoder} (SHA-256 {passport.autoencoder_digest[:16]}), {passport.encoder_precision}",
        ),
        ("latent", f"{shape} of {passport.dtype}, {passport.stored}: {', '.join(passport.columns)}"),
        ("scaling", _scaling(passport)),
        ("mean, deviation", f"{passport.latent_mean:.4f}, {passport.latent_std:.4f}"),
        ("index", f"SHA-256 {passport.index_digest}"),
    ]
    lines = [f"{name:<16}{value}" for name, value in rows]
    lines += passport.remarks()
    return "\n".join([*lines, "", *histogram(passport.classes, passport.class_counts)])


def histogram(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """A bar for each class; of more than forty the largest and the smallest, and the spread."""
    order = list(range(len(names)))
    between: list[str] = []
    if len(order) > _LISTED:
        order.sort(key=lambda i: (-counts[i], i))
        quartiles = ", ".join(f"{q:,.0f}" for q in np.quantile(counts, [0, 0.25, 0.5, 0.75, 1]))
        between = [f"... {len(order) - _LISTED:,} classes between; quartiles {quartiles}"]
        order = order[: _LISTED // 2] + order[-_LISTED // 2 :]
    wide, most = max(len(names[i]) for i in order), max(counts)
    digits = len(f"{most:,}")
    lines = [
        f"{names[i]:<{wide}}  {counts[i]:>{digits},}  {'#' * max(1, round(_BAR * counts[i] / most))}".rstrip()
        for i in order
    ]
    return lines[: _LISTED // 2] + between + lines[_LISTED // 2 :] if between else lines


def verify(found: Latents, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What is wrong with the stored files: empty if index and every shard are as they were written.

    Raises:
        StorageError: the store cannot be read.
    """
    try:
        index = found.store.read(latents.INDEX)
    except NotFound:
        return [f"{latents.INDEX} is missing"]
    wrong = []
    if (digest := hashlib.sha256(index).hexdigest()) != found.passport.index_digest:
        wrong.append(f"{latents.INDEX} has SHA-256 {digest}, the passport says {found.passport.index_digest}")
    try:
        records: list[shards.Shard] = json.loads(index)["shards"]
        number = sum(record["samples"] for record in records)
    except (ValueError, KeyError, TypeError) as error:
        return [*wrong, f"{latents.INDEX} is no index ({error!r})"]
    if number != found.passport.number:
        wrong.append(f"{latents.INDEX} has {number:,} samples, the passport says {found.passport.number:,}")
    with tempfile.TemporaryDirectory(prefix="diffussm-data-") as scratch, ThreadPoolExecutor(_THREADS) as pool:
        checks = pool.map(lambda record: shards.check(found.store, record, Path(scratch)), records)
        for done, problem in enumerate(checks, start=1):
            wrong += [problem] if problem else []
            progress(done, len(records))
    return wrong


def source_of(found: Latents) -> ImageSource | str:
    """The pictures that the latents were made of, or why they cannot be shown."""
    try:
        settings: dict[str, Any] = json.loads(found.store.read(PLAN))
        source = images.open_source(found.data)
    except DiffuSSMError as error:
        return error.message
    for key in ("format", "digest", "images"):
        settings.pop(key, None)
    if plan(source, settings, settings["prepare.unit_images"]).digest != found.passport.plan_digest:
        return "they are not the same pictures any more"
    return source


def paint(found: Latents, source: ImageSource | None, pairs: int) -> bytes:
    """A PNG: one row for each of up to eight classes, and for each of `pairs` pictures source, latent, mirrored latent.

    Raises:
        DataError: the autoencoder is not there or not the one that made the latents.
        StorageError: a shard cannot be read.
    """
    network = autoencoder.load(found.passport.autoencoder)
    if network.digest != found.passport.autoencoder_digest:
        raise DataError(
            f"data.autoencoder: {found.passport.autoencoder} has changed since the latents were made",
            "put the files back that made them",
        )
    by_class: dict[int, list[dict[str, Any]]] = {}
    for sample in _first_samples(found.store):
        members = by_class.setdefault(sample["label"], [])
        if len(members) < pairs:
            members.append(sample)
    fullest = sorted(by_class, key=lambda label: (-len(by_class[label]), label))[:ROWS]
    side = found.passport.resolution_px
    blank: Pixels = np.full((side, side, 3), 255, np.uint8)
    cells: list[Pixels] = []
    for label in sorted(fullest):
        for sample in by_class[label]:
            if source is not None:
                cells.append(_load(source, sample["id"], blank))
            moments = np.stack([sample["mean"], sample["mean_flip"]]).astype(np.float32)  # (2, C, h, w)
            cells += list(network.decode(torch.from_numpy(moments)))
        missing = pairs - len(by_class[label])
        cells += [blank] * missing * (3 if source is not None else 2)
    rows = [found.passport.classes[label] for label in sorted(fullest)]
    return grid(np.stack(cells), rows, found.passport.credit, max(1, _SMALLEST_PX // side))


def _first_samples(store: Store) -> Iterator[dict[str, Any]]:
    records = json.loads(store.read(latents.INDEX))["shards"][:_SHARDS_READ]
    with tempfile.TemporaryDirectory(prefix="diffussm-data-") as scratch:
        for record in records:
            yield from shards.read(store, record, Path(scratch))


def _load(source: ImageSource, number: int, blank: Pixels) -> Pixels:
    try:
        return source.load(source.items[number])
    except CorruptImageError:
        return blank  # it changed since it was encoded


def _scaling(passport: Passport) -> str:
    if passport.latents_std:
        return f"(z - {list(passport.latents_mean)}) / {list(passport.latents_std)} * {passport.scaling_factor:g}"
    return f"(z - {passport.shift:g}) * {passport.scaling_factor:g}"


def _of_config(data: DataConfig) -> Latents:
    place = latents.local_path(data.latents)
    return Latents(open_store(place), latents.passport(place), data)


def _of_passport(passport: Passport, place: str) -> DataConfig:
    """A data section for the source that the passport names; columns are looked for by their usual names."""
    return replace(
        DataConfig(latents=place),
        source=Source(passport.source),
        images=passport.images,
        labels=passport.labels,
        classes=list(passport.wanted_classes),
        limit=passport.limit,
        resolution_px=passport.resolution_px,
        autoencoder=passport.autoencoder,
    )
