"""One worker's part of an evaluation: draw blocks, and for the first worker put the result together. Knows no Ray.

The same object works inside the driver, when one worker is enough, and inside Ray actors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from diffussm.checkpoint import restore, weights
from diffussm.checkpoint.store import NotFound, Store, open_store
from diffussm.config import dump
from diffussm.config.schema import Config
from diffussm.data import autoencoder
from diffussm.data.images import open_source, picture_batches
from diffussm.data.latents import passport as read_passport
from diffussm.data.passport import Passport
from diffussm.evaluate import blocks, npz
from diffussm.evaluate.adm import identify, read_reference
from diffussm.evaluate.blocks import Plan, Report
from diffussm.evaluate.extractors import Extractor, open_extractor
from diffussm.evaluate.labels import labels
from diffussm.evaluate.reference import Reference, members, prepare_reference
from diffussm.evaluate.run import Result, code, judge
from diffussm.naming import RunPaths, join, weights_kind
from diffussm.sample import Painter

Say = Callable[[str], None]
PENDING = "pending"
"""Folder below `samples` or `evaluations` of the weights that wait for that work: `<images>.safetensors`."""


def keep_weights(cfg: Config, store: Store, images: int, folder: str = "evaluations") -> bool:
    """Copy the weights that `sample.ema` names out of the checkpoint after `images` images, which may soon be deleted.

    Returns False if they are there already.

    Raises:
        DataError, StorageError: the checkpoint cannot be read.
    """
    if store.exists(_kept_key(images, folder)):
        return False
    where, manifest = restore.choose(store, images)
    kind = weights_kind(cfg.sample.ema)
    tensors = restore.read_weights(store, where, manifest, kind)

    def produce(name: str, start: int, numel: int) -> Tensor:
        return tensors[name].flatten()[start : start + numel]

    place = kept_place(cfg, images, folder)
    weights.write(place, manifest.shapes, produce, images, {"kind": kind, "run": cfg.name})
    return True


def kept_place(cfg: Config, images: int, folder: str = "evaluations") -> str:
    """Where kept weights lie, as `sample.weights` takes them."""
    return join(RunPaths(cfg.storage, cfg.name).root, _kept_key(images, folder))


def _kept_key(images: int, folder: str) -> str:
    return f"{folder}/{PENDING}/{images:012d}.safetensors"


def kept(store: Store, folder: str = "evaluations") -> list[int]:
    """Images of the checkpoints whose weights wait to be worked on, oldest first."""
    return sorted(int(key.split("/")[2].split(".")[0]) for key in store.keys(f"{folder}/{PENDING}/"))


def release(store: Store, images: int, folder: str = "evaluations") -> None:
    """Delete kept weights."""
    store.delete(_kept_key(images, folder))


class Scorer:
    """Network, decoder and extractor of one evaluation, ready to make any of its blocks.

    Args:
        cfg: a checked config with absolute local paths.
        images: which checkpoint; None takes the newest that verifies.
            With `sample.weights` in the config, that file instead of a checkpoint.
        say: told which checkpoints are passed over.

    Raises:
        DataError, ConfigError, MissingError, StorageError: as those who load the parts say.
    """

    def __init__(self, cfg: Config, images: int | None, say: Say = lambda line: None) -> None:
        import torch

        # Float sums depend on the number of threads, so it is the same wherever a block is made.
        torch.set_num_threads(cfg.cluster.threads_per_worker)
        self.cfg = cfg
        self.store = open_store(RunPaths(cfg.storage, cfg.name).root)
        self.passport = checked_passport(cfg)
        self.painter = Painter.load(cfg, self.store, self.passport, images, say)
        self.painter.cast()
        self.device = self.painter.device
        self.extractor = open_extractor(cfg.evaluate.extractor, self.device, cfg.evaluate.weights)
        self.plan = self._plan()

    @property
    def images(self) -> int:
        """Training images that the checkpoint has seen."""
        return self.painter.images

    @property
    def key(self) -> str:
        """Where the result goes."""
        return result_key(self.images, self.extractor, self.plan.settings)

    def ready(self) -> tuple[int, str, Plan]:
        """Images of the checkpoint, key of the result, and the plan; for those who share out the blocks."""
        return self.images, self.key, self.plan

    def make(self, index: int, pictures: bool = False) -> Report:
        """Make one block and store it."""
        return blocks.make(self.store, self.plan, index, self._paint, self.extractor, pictures)

    def finish(self, reports: Sequence[Report], seconds: float, workers: int, count: Callable[[int], None]) -> Result:
        """Score what the blocks hold, and store the result and the grid.

        Args:
            reports: of the blocks made by this start.
            seconds: wall-clock time of making them.
            workers: how many made them.
            count: told how many real pictures were just done, if the reference has to be made.
        """
        began = time.perf_counter()
        reference = self._reference(count)
        referred = time.perf_counter()
        result = judge(
            blocks.features(self.store, self.plan, self.extractor.taps),
            len(self.plan.labels),
            reference,
            self.extractor,
            checkpoint={"images": self.images, "weights": self.painter.kind, "digest": self.painter.digest},
            settings=dict(self.plan.settings) | {"plan": self.plan.digest, "run": self.cfg.name},
            device=self.device.type,
        )
        done = time.perf_counter()
        result = _timed(result, reports, seconds, workers, reference_s=referred - began, scores_s=done - referred)
        sheet = blocks.preview(
            self.store, self.plan, self.passport.classes, self.cfg.sample.per_class, self.passport.credit
        )
        self.store.write(self.key.removesuffix(".json") + ".png", sheet)
        result.save(self.store, self.key)
        return result

    def _paint(self, wanted: Sequence[int], first: int) -> Any:
        return self.painter.paint(wanted, first)

    def _reference(self, count: Callable[[int], None]) -> Reference:
        evaluate = self.cfg.evaluate
        if evaluate.reference:
            return read_reference(Path(evaluate.reference), self.extractor, self.store, evaluate.batch, count)
        return training_reference(self.cfg, self.passport, self.extractor, len(self.plan.labels), count)

    def _plan(self) -> Plan:
        cfg, evaluate = self.cfg, self.cfg.evaluate
        plain = yaml.safe_load(dump(cfg))
        beside = ("every_images", "per_class", "weights")  # of grids alone; the weights are here by their digest
        sampler = {key: value for key, value in plain["sample"].items() if key not in beside}
        settings = {
            "sample": sampler,
            "evaluate": {key: plain["evaluate"][key] for key in ("images", "labels", "batch", "block_images")},
            "model": plain["model"],
            "diffusion": plain["diffusion"],
            "precision": plain["train"]["precision"],
            "device": self.device.type,
            "threads": cfg.cluster.threads_per_worker,
            "weights": self.painter.digest,
            "autoencoder": self.passport.autoencoder_digest,
            "data": self.passport.index_digest,
            "resolution_px": self.passport.resolution_px,
            "reference": evaluate.reference,
            # Another file under the same name makes another result.
            "reference_digest": identify(Path(evaluate.reference), self.extractor) if evaluate.reference else "",
            "extractor": self.extractor.digest,
            "code": code()["digest"],
        }
        wanted = labels(evaluate.labels, self.passport.class_counts, evaluate.images, cfg.sample.seed)
        return Plan(tuple(wanted), evaluate.block_images, cfg.sample.batch, evaluate.batch, settings)


def result_key(images: int, extractor: Extractor, settings: Mapping[str, Any]) -> str:
    """Key of a result: checkpoint, extractor, and a digest of the settings, so that no result overwrites another's."""
    decisive = {key: value for key, value in settings.items() if key != "code"}
    short = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]
    return f"evaluations/{images:012d}-{extractor.name}-{short}.json"


def stored_result(store: Store, key: str, plan: Plan) -> Result | None:
    """The result of this very plan, if it is there."""
    try:
        found = Result.from_json(store.read(key), f"{store.url}/{key}")
    except NotFound:
        return None
    return found if found.settings.get("plan") == plan.digest else None


def training_reference(
    cfg: Config, passport: Passport, extractor: Extractor, n: int, count: Callable[[int], None] = lambda more: None
) -> Reference:
    """The reference of the run's own training set, made unless it is there."""
    return prepare_reference(
        open_store(cfg.data.latents),
        extractor,
        lambda: picture_batches(open_source(cfg.data), cfg.evaluate.batch),
        count=passport.number,
        n=n,
        data=passport.index_digest,
        progress=count,
    )


def write_reference(path: Path, cfg: Config, passport: Passport, extractor: Extractor, reference: Reference) -> None:
    """The reference as ADM's .npz: the pictures whose features are kept, and the moments of all."""
    chosen = members(passport.number)

    def kept_pictures() -> Iterable[Any]:
        seen = 0
        for batch in picture_batches(open_source(cfg.data), cfg.evaluate.batch):
            yield batch[chosen[seen : seen + len(batch)]]
            seen += len(batch)

    side = passport.resolution_px
    npz.write(
        path, (int(chosen.sum()), side, side, 3), kept_pictures(), dict(reference.side.statistics), extractor.digest
    )  # fmt: skip


def checked_passport(cfg: Config) -> Passport:
    """The passport of the run's latents. Raises DataError unless they are those of the config."""
    made = read_passport(cfg.data.latents)
    made.check(cfg.data, autoencoder.digest(cfg.data.autoencoder))
    return made


def _timed(result: Result, reports: Sequence[Report], seconds: float, workers: int, **more: float) -> Result:
    made = sum(report.images for report in reports)
    times: dict[str, Any] = {
        "blocks_s": seconds,
        "images_per_s": made / seconds if made else 0.0,
        "sample_s": sum(report.sample_s for report in reports),
        "extract_s": sum(report.extract_s for report in reports),
        "store_s": sum(report.store_s for report in reports),
        **more,
    }
    rounded = {key: round(value, 3) for key, value in times.items()}
    return dataclasses.replace(result, times=rounded | {"images_made": made, "workers": workers})
