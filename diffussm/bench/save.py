"""What a save costs the training, and how long a restore takes, against DeepSpeed's own checkpoints.

Both sides save the state of one engine, in turns, in the same processes: fp32 weights and both moments under ZeRO 1.
DeepSpeed's files hold each weight once more, as the module's. Everything lies in a local folder.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffussm.bench.machine import risen_gb
from diffussm.checkpoint import restore
from diffussm.checkpoint.fence import Fence
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.save import Order, draft, publish
from diffussm.checkpoint.snapshot import Part, Snapshot
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import DiffusionConfig, ModelConfig, Precision, TrainConfig
from diffussm.diffusion.process import Process
from diffussm.model import build_model
from diffussm.model.presets import LatentShape
from diffussm.train.engine import Engine
from diffussm.train.step import Inputs, loss
from diffussm.train.world import current

LATENT = LatentShape(4, 8, 8, 10)
_BATCH = 2
"""Samples of a step of each rank: little, so that the step is short and the share of a save in it large."""


@dataclass(frozen=True)
class SaveRow:
    """One thing that was timed: the slowest rank of each round, its median and spread over the rounds."""

    what: str
    ranks: int
    parameters: int
    seconds: float
    low: float
    high: float
    over_deepspeed: float | None
    """Seconds over those that DeepSpeed took in the same round, the median; None where there is no such round."""
    gigabytes: float | None
    """Size of all files."""
    peak_rise_gb: float | None
    """By how much resident memory rose during it, in the largest rank and round; None where it was not read."""


def bench_save(model: ModelConfig, folder: Path, *, ranks: int = 2, rounds: int = 5) -> list[SaveRow]:
    """Measure saves on `ranks` processes of one thread, restores on as many and half as many, and the conversion.

    Args:
        model: the network.
        folder: an empty local folder with room for the files of both sides three times over.
        ranks: an even number of processes on this machine.
        rounds: interleaved rounds after one of warm-up.
    """
    rows = _on_ranks(_saves, model, folder, ranks, rounds)
    rows += _on_ranks(_restores, model, folder, ranks, rounds)
    rows += _on_ranks(_restores, model, folder, ranks // 2, rounds)
    idle = _convert("--help")
    began = time.perf_counter()
    inputs, outputs = str(folder / "deepspeed/last"), str(folder / "universal")
    peak = _convert("--inject_missing_state", "--input_folder", inputs, "--output_folder", outputs)
    seconds = time.perf_counter() - began
    size = _gigabytes(folder / "universal")
    converted = SaveRow(
        "restore: DeepSpeed's conversion, once, without the load", 1, rows[0].parameters, seconds, seconds, seconds,
        None, size, (peak - idle) / 1e9,
    )  # fmt: skip
    return [*rows, converted]


def _convert(*options: str) -> int:
    """Run DeepSpeed's conversion; the most bytes that its largest process had in memory.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options]
    process = subprocess.Popen(command, stdout=sys.stderr, env=os.environ | {"DS_ACCELERATOR": "cpu"})  # noqa: S603 - our own words
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    return 1024 * usage.ru_maxrss


def _on_ranks(
    work: Callable[..., dict[str, Any]], model: ModelConfig, folder: Path, ranks: int, rounds: int
) -> list[SaveRow]:  # fmt: skip
    """Run `work` on fresh processes and make rows of what they measured."""
    meet = folder / f"meet-{work.__name__}-{ranks}"
    torch.multiprocessing.spawn(_rank, args=(work, model, folder, ranks, rounds, meet), nprocs=ranks)
    found = [json.loads(Path(f"{meet}-{rank}.json").read_text()) for rank in range(ranks)]
    slowest_of = {
        what: [max(times) for times in zip(*(one["seconds"][what] for one in found), strict=True)][1:]
        for what in found[0]["seconds"]
    }
    rows = []
    for what, slowest in slowest_of.items():
        theirs = slowest_of.get(f"{what.split(':')[0]}: DeepSpeed")
        rises = [rise for one in found if (rise := one["rise"].get(what)) is not None]
        rows.append(
            SaveRow(
                what,
                ranks,
                found[0]["parameters"],
                statistics.median(slowest),
                min(slowest),
                max(slowest),
                statistics.median(a / b for a, b in zip(slowest, theirs, strict=True)) if theirs else None,
                found[0]["gigabytes"].get(what),
                max(rises, default=None),
            )
        )
    return rows


def _rank(
    rank: int,
    work: Callable[..., dict[str, Any]],
    model: ModelConfig,
    folder: Path,
    ranks: int,
    rounds: int,
    meet: Path,
) -> None:
    """One process: make an engine, do the work, leave what it measured as JSON. Collective: every rank must call it."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    cfg = TrainConfig(images=1, global_batch=_BATCH * ranks, zero_stage=1, precision=Precision.fp32)
    engine = Engine(build_model(model, LATENT), cfg, 1, current(torch.device("cpu")))
    measured = work(engine, folder, rounds) | {"parameters": sum(p.numel() for p in engine.module.parameters())}
    Path(f"{meet}-{rank}.json").write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def _saves(engine: Engine, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds that a step waits for a save, on both sides, and of a step. Collective: every rank must call it."""
    group, snapshot, store = dist.new_group(backend="gloo"), Snapshot(), open_store(str(folder / "ours"))
    process, at = Process(DiffusionConfig()), Counters(1, 1, 0, 1, 1, 0)
    shape = (_BATCH, LATENT.channels, LATENT.height, LATENT.width)
    inputs = Inputs(
        torch.randn(shape), torch.randint(0, 1000, (_BATCH,)), torch.randn(shape),
        torch.zeros(_BATCH, dtype=torch.int64), torch.arange(_BATCH),
    )  # fmt: skip
    times: dict[str, list[float]] = {
        "step": [], "step, beside a save": [], "save: stall": [], "save: to the manifest": [], "save: DeepSpeed": [],
    }  # fmt: skip
    rise: dict[str, float] = {}

    def take() -> Order:
        parts = _parts(engine)
        snapshot.take(parts)
        plan = draft(at, engine.shapes, list(parts[0].tensors), attempt=1, zero_stage=1, config_digest="")
        return Order(
            store, "checkpoints/000000000001", plan, snapshot.source(), 600.0, Fence(store, 1), group, read_back=False
        )

    def ours(began: float) -> None:
        order = take()
        times["save: stall"].append(time.perf_counter() - began)
        publish(order, snapshot)
        times["save: to the manifest"].append(time.perf_counter() - began)

    def step() -> None:
        engine.step([partial(loss, process=process, inputs=inputs)], 1e-4)

    def beside() -> None:
        with ThreadPoolExecutor(1) as threads:
            saved = threads.submit(publish, take(), snapshot)
            _time(step, times["step, beside a save"])
            saved.result()

    theirs = partial(engine.engine.save_checkpoint, str(folder / "deepspeed"), tag="last")
    for _ in range(rounds + 1):
        _time(step, times["step"])
        beside()
        _watch(lambda: ours(_together()), rise, "save: to the manifest")
        _watch(lambda: _time(theirs, times["save: DeepSpeed"]), rise, "save: DeepSpeed")
    sizes = {"save: to the manifest": _gigabytes(folder / "ours"), "save: DeepSpeed": _gigabytes(folder / "deepspeed")}
    return {"seconds": times, "rise": rise, "gigabytes": sizes}


def _restores(engine: Engine, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to restore, and DeepSpeed's where it can at this size. Collective: every rank must call it."""
    store = open_store(str(folder / "ours"))
    times: dict[str, list[float]] = {"restore": []}
    rise: dict[str, float] = {}
    for part in _parts(engine, held=True):  # a training has its moments anyway: they are none of the restore's memory
        for tensor in part.tensors.values():
            tensor.add_(0)

    def ours() -> None:
        found = restore.restore_newest([store], _parts(engine, held=True), print, attempt=1)
        if found is None:
            raise RuntimeError(f"{store.url}: the checkpoint that was just written is not there")
        engine.restored(found.manifest.counters.adam_steps)

    theirs = partial(engine.engine.load_checkpoint, str(folder / "deepspeed"), tag="last")
    written_by = len(list((folder / "deepspeed/last").glob("*optim_states.pt")))
    for _ in range(rounds + 1):
        _watch(lambda: _time(ours, times["restore"]), rise, "restore")
        if written_by == dist.get_world_size():  # it cannot load another size's
            into = times.setdefault("restore: DeepSpeed", [])
            _watch(lambda into=into: _time(theirs, into), rise, "restore: DeepSpeed")  # type: ignore[misc]
    sizes = {"restore": _gigabytes(folder / "ours"), "restore: DeepSpeed": _gigabytes(folder / "deepspeed")}
    return {"seconds": times, "rise": rise, "gigabytes": sizes}


def _parts(engine: Engine, *, held: bool = False) -> list[Part]:
    return [Part(s.name, s.shape, s.start, s.tensors) for s in engine.slices(held=held)]


def _together() -> float:
    """The present moment, once all ranks are here. Collective: every rank must call it."""
    dist.barrier()
    return time.perf_counter()


def _time(call: Callable[[], object], into: list[float]) -> None:
    began = _together()
    call()
    into.append(time.perf_counter() - began)


def _watch(call: Callable[[], object], rises: dict[str, float], what: str) -> None:
    """Note by how many GB this process's resident memory rose in the call, if that is more than before."""
    rise = risen_gb(call)
    if rise is not None:
        rises[what] = max(rises.get(what, 0.0), rise)


def _gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
