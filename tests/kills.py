"""Trainings of real processes that kill themselves at a chosen moment, without Ray, and what they left.

A moment is a place in a step, a snapshot, an upload, the conclusion of a checkpoint, a deletion or a start. Each
process counts how often it comes by each of them and sends itself SIGKILL at the one it was given. Processes are
forked from a server that has imported everything, so that an attempt costs seconds less.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffussm.config.schema import Config
from tests.distributed import free_port

PRELOAD = [
    "deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx", "streaming", "diffussm.train.loop", "cluster.lease", "tests.kills",
]  # fmt: skip
WAIT_S = 200


@dataclass(frozen=True)
class Kill:
    """Rank `rank` dies when it comes by `moment` for the `nth` time."""

    rank: int
    moment: str
    nth: int


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended."""

    died_at: str
    """Name of the moment; empty if nobody was killed."""
    errors: dict[int, str]
    """Traceback by rank, of ranks that ended by themselves badly."""
    moments: dict[int, dict[str, int]]
    """How often the ranks that came to the end came by each moment."""


def context() -> Any:
    """Multiprocessing whose processes are forked from one that has imported everything."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


def start(
    cfg: Config,
    folder: Path,
    size: int,
    kill: Kill | None = None,
    patch: str = "",
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Start one attempt on `size` ranks.

    `patch` names a function of this module that is called in each process. The processes have the environment of the
    first start of all, with `environment` over it.
    """
    port, made = free_port(), context()
    over = dict(environment or {})
    ranks = [made.Process(target=_rank, args=(cfg, folder, r, size, port, kill, patch, over)) for r in range(size)]
    for name in ("died", *(f"{word}-{r}" for word in ("error", "moments") for r in range(size))):
        (folder / name).unlink(missing_ok=True)
    for process in ranks:
        process.start()
    return ranks


def finish(ranks: list[Any], folder: Path) -> Outcome:
    """Wait for all ranks; when one has died the others have a moment to notice, as under Ray."""
    died = folder / "died"
    for process in ranks:
        process.join(WAIT_S)
        if died.exists():
            for other in ranks:
                other.join(0.2)
                if other.is_alive():
                    other.kill()
                other.join()
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} ranks did not end within {WAIT_S} s"
    errors = {r: path.read_text() for r in range(len(ranks)) if (path := folder / f"error-{r}").exists()}
    moments = {r: json.loads(path.read_text()) for r in range(len(ranks)) if (path := folder / f"moments-{r}").exists()}
    return Outcome(died.read_text() if died.exists() else "", errors, moments)


def attempt(
    cfg: Config,
    folder: Path,
    size: int,
    kill: Kill | None = None,
    patch: str = "",
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """One attempt from start to end."""
    return finish(start(cfg, folder, size, kill, patch, environment), folder)


def steps(folder: Path, name: str) -> dict[int, dict[str, Any]]:
    """By images: sorted (sample id, timestep, noise digest) over ranks. Of a replayed step the last attempt's count."""
    found: dict[int, dict[str, Any]] = {}
    by_attempt: dict[int, dict[int, list[Any]]] = {}
    for path in folder.glob(f"steps-{name}-*.jsonl"):
        number = int(path.stem.split("-")[-2])
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # cut by a kill
                record = json.loads(line)
                by_attempt.setdefault(number, {}).setdefault(record["images"], []).append(record)
    for number in sorted(by_attempt):
        for images, records in by_attempt[number].items():
            found[images] = {
                "samples": sorted(itertools.chain(*(r["samples"] for r in records))),
                "ranks": len(records),
            }
    return found


class Ticks:
    """Counts how often each moment comes and dies at the given one."""

    def __init__(self, folder: Path, kill: Kill | None) -> None:
        self.folder, self.kill, self.counts, self.lock = folder, kill, Counter[str](), threading.Lock()

    def __call__(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1
            if self.kill is not None and (name, self.counts[name]) == (self.kill.moment, self.kill.nth):
                (self.folder / "died").write_text(name)
                os.kill(os.getpid(), signal.SIGKILL)


def _rank(
    cfg: Config,
    folder: Path,
    rank: int,
    size: int,
    port: int,
    kill: Kill | None,
    patch: str,
    environment: dict[str, str],
) -> None:
    try:
        os.environ.update(environment)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
        )  # fmt: skip
        import torch
        import torch.distributed as dist

        from cluster.lease import claim_attempt
        from diffussm.train import loop
        from diffussm.train.world import current

        warnings.simplefilter("ignore")  # torch's and DeepSpeed's of each other, on each of many starts
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        cfg.cluster.workers = size
        ticks = Ticks(folder, kill if kill and kill.rank == rank else None)
        world = current(torch.device("cpu"))
        number = claim_attempt(cfg, world)
        place_ticks(ticks)
        note_steps(folder / f"steps-{cfg.name}-{number}-{rank}.jsonl")
        if patch:
            globals()[patch](folder, rank, number)
        scratch = folder / f"scratch-{cfg.name}-{number}-{rank}"
        scratch.mkdir(exist_ok=True)
        loop.train(cfg, world, number, scratch, lambda record: None)
        (folder / f"moments-{rank}").write_text(json.dumps(ticks.counts))
    except BaseException:  # noqa: BLE001 - the edge of the process
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # no waiting for peers that are gone


def place_ticks(tick: Callable[[str], None]) -> None:
    """Put ticks into the code under test, in this process."""
    from diffussm.checkpoint import snapshot, source, store
    from diffussm.train import engine, loop

    source.BLOCK_BYTES = 1 << 13  # many moments within one upload

    def around(owner: Any, name: str, label: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            tick(f"before {label}")
            result = original(*args, **named)
            tick(f"after {label}")
            return result

        setattr(owner, name, wrapped)

    around(loop, "loss", "forward")
    around(engine.Engine, "step", "step")
    around(store.LocalStore, "_publish", "rename")
    around(store.LocalStore, "delete", "deletion")
    around(store.LocalStore, "read_range", "reading")

    write = store.LocalStore.write

    def ticking_write(self: Any, key: str, data: bytes, **named: Any) -> None:
        label = key.rsplit("/", 1)[-1]
        tick(f"before {label}")
        write(self, key, data, **named)
        tick(f"after {label}")

    store.LocalStore.write = ticking_write  # type: ignore[method-assign]

    def ticking_take(self: Any, parts: Any) -> None:
        self.prepare(parts)
        for entry, view in zip(self._entries, self._views, strict=True):
            tick("snapshot")
            view.copy_(parts[entry.part].tensors[entry.kind].detach())

    snapshot.Snapshot.take = ticking_take  # type: ignore[method-assign]
    blocks = source.Source.blocks

    def ticking_blocks(self: Any) -> Iterator[memoryview]:
        for block in blocks(self):
            tick("upload")
            yield block

    source.Source.blocks = ticking_blocks  # type: ignore[method-assign]


def note_steps(path: Path) -> None:
    """Write down the samples, timesteps and noise of each step of this rank."""
    import xxhash

    from diffussm.train import saver

    original = saver.Saver.step

    def noting(self: Any, at: Any, result: Any, inputs: Any) -> None:
        samples = [
            [int(i), int(t), xxhash.xxh3_64_hexdigest(noise.contiguous().numpy().tobytes())]
            for part in inputs
            for i, t, noise in zip(part.id, part.t, part.noise, strict=True)
        ]
        with path.open("a") as file:
            file.write(json.dumps({"images": at.images, "samples": samples}) + "\n")
        original(self, at, result, inputs)

    saver.Saver.step = noting  # type: ignore[method-assign]


def hold_first(folder: Path, rank: int, number: int) -> None:
    """Attempt 1 stops after its fourth step until somebody writes the file `go`."""
    from diffussm.train import saver

    original, count = saver.Saver.step, itertools.count(1)

    def holding(self: Any, at: Any, result: Any, inputs: Any) -> None:
        if number == 1 and next(count) == 4:
            (folder / f"held-{rank}").touch()
            gate = threading.Event()
            while not (folder / "go").exists():
                gate.wait(0.02)
        original(self, at, result, inputs)

    saver.Saver.step = holding  # type: ignore[method-assign]


def hold_where_told(folder: Path, rank: int, number: int) -> None:
    """After step n wait for as long as there is a file `hold-n`."""
    from diffussm.train import saver

    original, count = saver.Saver.step, itertools.count(1)

    def holding(self: Any, at: Any, result: Any, inputs: Any) -> None:
        original(self, at, result, inputs)
        hold, gate = folder / f"hold-{next(count)}", threading.Event()
        while hold.exists():
            gate.wait(0.02)

    saver.Saver.step = holding  # type: ignore[method-assign]


def rest_and_hold(folder: Path, rank: int, number: int) -> None:
    """As `hold_where_told`; journals in a bucket rest for ever after their first put."""
    from diffussm.observe import appended

    appended.PUT_BYTES_PER_S = 0.001  # type: ignore[assignment]
    hold_where_told(folder, rank, number)
