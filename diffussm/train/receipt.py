"""The proof of each start that it goes on where the saved state ended, and the trace that the next one is held against.

The receipt, `attempts/<n>/receipt.json`, says what was restored (a digest for each whole tensor, held against the
manifest), which samples each rank read first, and how the first replayed step compares with the one taken before. The
trace, `attempts/<n>/trace.jsonl`, keeps samples, draws and loss of the first step after each checkpoint.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from diffussm.checkpoint import digest
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.restore import Found, everyone
from diffussm.checkpoint.snapshot import Part
from diffussm.checkpoint.store import Store
from diffussm.config.rules import micro_batch
from diffussm.config.schema import Config, Precision
from diffussm.errors import RestoreMismatch, StorageError
from diffussm.observe.events import Journal, read_journal
from diffussm.train.engine import StepResult
from diffussm.train.step import Inputs
from diffussm.train.world import World

_LOG = logging.getLogger(__name__)
TOLERANCES = {Precision.fp32: 1e-4, Precision.bf16: 2e-2}
"""Relative difference allowed between the losses of one step in two layouts; in the same one fp32 is bit-equal."""


class Receipt:
    """Rank 0 writes it; all ranks must take part."""

    def __init__(self, cfg: Config, world: World, store: Store, attempt: int) -> None:
        self._cfg, self._world, self._store, self._attempt = cfg, world, store, attempt
        self._content: dict[str, Any] = {"attempt": attempt, "layout": layout(cfg, world)}
        self._logged: dict[str, Any] | None = None
        self._first = True
        self._trace = Journal(store, f"attempts/{attempt}/trace.jsonl") if world.leads else None
        self._writer: threading.Thread | None = None

    def restored(self, found: Found | None, parts: Sequence[Part]) -> None:
        """Hold what this rank's slices contain now against the manifest. Collective: every rank must call it.

        Args:
            found: the checkpoint that was restored, if any.
            parts: this rank's own slices; over all ranks they must cover every element once.

        Raises:
            RestoreMismatch: on every rank, if a tensor is not what was saved.
            StorageError: on every rank, if rank 0 cannot read the trace.
        """
        if found is None:
            self._content |= {"images": 0, "checkpoint": None}
            return
        manifest = found.manifest
        expected = {name: value for name, value in manifest.digests.items() if name.split("/")[0] in manifest.kinds}
        sums = digests_of(parts, list(expected), self._world.device)
        self._content |= {
            "images": manifest.counters.images,
            "checkpoint": f"{found.store.url}/{found.folder}",
            "written_by_attempt": manifest.attempt,
            "written_by_ranks": manifest.world_size,
            "tensors": sums,
        }
        wrong = [name for name, value in expected.items() if sums[name] != value]
        if wrong:
            raise self._refused(
                f"{len(wrong)} of {len(expected)} restored tensors are not what was saved, the first {wrong[0]}: "
                f"digest {sums[wrong[0]]}, saved was {expected[wrong[0]]}"
            )
        self._logged = everyone(lambda: self._look_up(manifest.attempt, manifest.counters.images))[0]

    def step(self, before: Counters, result: StepResult, inputs: Sequence[Inputs], *, saved: bool) -> None:
        """Note the first step of this start and those after a snapshot. Collective: every rank must call it.

        Args:
            before: where the training stood before the step.
            result: what the step did.
            inputs: this rank's micro batches.
            saved: a snapshot was taken before the step.

        Raises:
            RestoreMismatch: on every rank, if the first step is not the one taken before from this state.
        """
        if not (self._first or saved):
            return
        seen = self._observe(before, result, inputs)
        if self._first:
            self._check_first(before, seen)
        if self._trace is not None:  # only now: a step that was refused is none to be held against
            self._trace.write(seen)

    def _check_first(self, before: Counters, seen: dict[str, Any]) -> None:
        """Hold the first step of this start against the one taken before, and write the receipt."""
        self._first = False
        self._content |= {"first_samples": seen["ids"], "replayed": None}
        if self._logged is not None:
            verdict = compare(self._logged, seen)
            self._content["replayed"] = {"before": self._logged, "now": seen, "verdict": verdict or "equal"}
            if verdict:
                raise self._refused(
                    f"the first step after {before.images:,} images is not the one that attempt "
                    f"{self._logged['attempt']} took: {verdict}"
                )
        self._write()

    def close(self, timeout_s: float = 60.0) -> None:
        """Wait until what was begun to be written is written, for at most `timeout_s`."""
        end = time.monotonic() + timeout_s
        if self._trace is not None:
            self._trace.end()
        self._wait(timeout_s)
        if self._trace is not None:
            self._trace.close(max(0.0, end - time.monotonic()))

    def _wait(self, timeout_s: float = 60.0) -> None:
        if self._writer is not None:
            self._writer.join(timeout_s)

    def _observe(self, before: Counters, result: StepResult, inputs: Sequence[Inputs]) -> dict[str, Any]:
        """The step as all ranks saw it. Collective: every rank must call it."""
        loss = result.loss.detach().clone()
        dist.all_reduce(loss)
        ids = [int(sample) for part in inputs for sample in part.id.tolist()]
        ranks: list[Any] = [None] * self._world.size
        dist.all_gather_object(ranks, (ids, draws(inputs)))
        value = float(loss) / self._world.size
        return {
            "images": before.images,
            "attempt": self._attempt,
            "epoch": before.epoch,
            "ids": [found for found, _ in ranks],
            "draws": digest.text(digest.add(number for _, number in ranks)),
            "loss": value if math.isfinite(value) else None,
            "layout": self._content["layout"],
        }

    def _look_up(self, since: int, images: int) -> dict[str, Any] | None:
        """The newest earlier attempt's record of the step from `images` on, on rank 0."""
        if not self._world.leads:
            return None
        for attempt in range(self._attempt - 1, since - 1, -1):
            for record in reversed(read_journal(self._store, f"attempts/{attempt}/trace.jsonl")):
                if record["images"] == images:
                    return record
        return None

    def _refused(self, why: str) -> RestoreMismatch:
        self._content["refused"] = why
        self._write()
        self._wait()  # the process may end before anybody closes this
        return RestoreMismatch(
            f"restore: {why}",
            f"see attempts/{self._attempt}/receipt.json; use the data, code and settings of the run. If the change is "
            "meant, delete that attempt's trace.jsonl, or give the run another name",
        )

    def _write(self) -> None:
        """Put the receipt, on a thread of rank 0."""
        if not self._world.leads:
            return
        key, text = f"attempts/{self._attempt}/receipt.json", json.dumps(self._content, indent=1).encode()

        def put() -> None:
            try:
                self._store.write(key, text)
            except StorageError as error:
                _LOG.warning("%s was not written: %s", key, error)

        self._writer = threading.Thread(target=put, name="receipt", daemon=True)
        self._writer.start()


def digests_of(parts: Sequence[Part], names: Sequence[str], device: torch.device) -> dict[str, str]:
    """`kind/parameter` -> digest of the whole tensor, from all ranks' slices. Collective: every rank must call it."""
    place = {name: index for index, name in enumerate(names)}
    sums = torch.zeros(len(names), dtype=torch.int64)  # (tensors,)
    for part in parts:
        for kind, values in part.tensors.items():
            if f"{kind}/{part.name}" in place:
                sums[place[f"{kind}/{part.name}"]] += digest.signed(digest.slice_sum(values, part.start))
    total = sums.to(device)
    dist.all_reduce(total)
    return {name: digest.text(value) for name, value in zip(names, total.tolist(), strict=True)}


def draws(inputs: Sequence[Inputs]) -> int:
    """A 64-bit sum over samples of (sample id, timestep, noise): equal however the samples are split over ranks."""
    total = 0
    for part in inputs:
        noise = part.noise.detach().cpu().contiguous().numpy()  # (B, C, H, W)
        for sample, t, values in zip(part.id.tolist(), part.t.tolist(), noise, strict=True):
            head = int(sample).to_bytes(8, "little") + int(t).to_bytes(8, "little")
            total += xxhash.xxh3_64_intdigest(head + values.tobytes())
    return total & ((1 << 64) - 1)


def compare(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What makes two records of one step differ, or nothing. Pure.

    Samples and draws must be the same. Losses must be bit-equal in the same layout on a CPU in fp32, and agree within
    the larger of both precisions' TOLERANCES elsewhere.
    """
    if sorted(itertools.chain(*before["ids"])) != sorted(itertools.chain(*now["ids"])):
        return f"it reads samples {_some(now['ids'])}, before it read {_some(before['ids'])}"
    same = before["layout"] == now["layout"]
    if same and before["ids"] != now["ids"]:
        return f"ranks read {_some(now['ids'])}, before they read {_some(before['ids'])}"
    if before["draws"] != now["draws"]:
        return f"noise or timesteps differ (digest {now['draws']}, before {before['draws']})"
    a, b = before["loss"], now["loss"]
    exact = same and now["layout"]["precision"] == Precision.fp32.value and now["layout"]["device"] == "cpu"
    limit = 0.0 if exact else max(TOLERANCES[Precision(record["layout"]["precision"])] for record in (before, now))
    if (a is None) != (b is None) or (a is not None and abs(a - b) > limit * abs(a)):
        return f"its loss is {b!r}, before it was {a!r} (allowed relative difference: {limit:g})"
    return ""


def layout(cfg: Config, world: World) -> dict[str, Any]:
    """All that rounding may depend on."""
    return {
        "device": world.device.type,
        "processor": _processor(world.device),
        "world_size": world.size,
        "zero_stage": cfg.train.zero_stage,
        "micro_batch": micro_batch(cfg),
        "precision": cfg.train.precision.value,
        "backend": cfg.model.backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _some(ids: list[list[int]]) -> str:
    return " | ".join(", ".join(map(str, rank[:4])) + (", ..." if len(rank) > 4 else "") for rank in ids)
