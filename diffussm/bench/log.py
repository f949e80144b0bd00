"""What all telling of a run costs its steps: the same steps with and without it, one by one in turns, in one process.

With it, each step feeds loss by timestep; each logged line reduces, writes the journals and tells the driver's voice,
and looks at norms by block, averages and the machine besides. The voice draws a panel and feeds W&B (offline) and
TensorBoard on their threads. In a run the voice is another process, the driver: here it takes this one's time, so a run
pays less.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from diffussm.bench.loop import _group_of_one
from diffussm.checkpoint.manifest import Counters
from diffussm.checkpoint.store import open_store
from diffussm.config.rules import accumulation, micro_batch
from diffussm.config.schema import Config, WandbMode
from diffussm.data import latents
from diffussm.data.cursor import Cursor
from diffussm.diffusion.process import Process
from diffussm.model import build_model
from diffussm.model.counts import count
from diffussm.observe.herald import Herald
from diffussm.observe.log import Narrator
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.logger import Logger
from diffussm.train.phases import Phases
from diffussm.train.step import draw, loss
from diffussm.train.telemetry import Telemetry
from diffussm.train.world import World


@dataclass(frozen=True)
class LogRow:
    """Milliseconds of a step of both sides, and the cost of telling as a share of the step without it."""

    lines: str
    """How often a line is logged."""
    plain_ms: float
    told_ms: float
    cpu: float
    """CPU time of the whole process, all threads, with telling over without, minus 1: the median round."""
    cpu_low: float
    cpu_high: float
    wall: float
    """Likewise by the clock on the wall, which other work on the machine disturbs."""
    wall_low: float
    wall_high: float
    waited: float
    """Time the step itself spends in the calls that tell, over a step without them."""
    rounds: int
    steps_a_round: int


class _Screen(io.StringIO):
    """A terminal of which nobody sees anything: the panel is drawn all the same."""

    def isatty(self) -> bool:
        return True


def bench_log(cfg: Config, *, rounds: int = 5, steps: int = 20) -> list[LogRow]:
    """Measure on one worker with the config's network, batch and threads: lines as configured, and one a step.

    Args:
        cfg: a checked config whose latents exist.
        rounds: rounds after one of warm-up.
        steps: steps of each side in a round with a line each; as configured a round takes the steps of one line.

    Raises:
        DataError: there are no latents.
    """
    cfg.cluster.workers = 1
    torch.set_num_threads(cfg.cluster.threads_per_worker)
    batch = cfg.train.global_batch
    own = max(1, cfg.train.log_images // batch)
    rows = []
    with tempfile.TemporaryDirectory(prefix="diffussm-bench-") as scratch, _group_of_one(scratch) as world:
        for what, each, length in ((f"every {own} steps", own, own), ("every step", 1, steps)):
            folder = Path(scratch, what.replace(" ", "-"))
            one = replace(
                cfg, storage=str(folder / "runs"), train=replace(cfg.train, log_images=each * batch, images=1 << 40),
                observe=replace(
                    cfg.observe, wandb=WandbMode.offline, tensorboard=True, telemetry_images=each * batch
                ),
            )  # fmt: skip
            rows.append(_row(what, _Sides(one, world, folder), rounds, length))
    return rows


class _Sides:
    """One engine whose steps are taken with telling or without."""

    def __init__(self, cfg: Config, world: World, scratch: Path) -> None:
        torch.manual_seed(cfg.seed)
        self.cfg, self.world = cfg, world
        data = latents.open_latents(cfg, rank_batch=cfg.train.global_batch, scratch=scratch)
        self.process = Process(cfg.diffusion)
        self.engine = Engine(build_model(cfg.model, data.latent).to(world.device), cfg.train, accumulation(cfg), world)
        self.averages, self.phases = Averages(self.engine.slices(), cfg.train), Phases()
        batches = data.batches(Cursor())
        _, first = next(batches)
        self.micros = [draw(m, cfg, 0, data.null_class).to(world.device) for m in first.split(micro_batch(cfg))]
        self.samples = first.fingerprint(0)
        batches.close()
        data.close()
        store = open_store(f"{cfg.storage}/{cfg.name}")
        self.herald = Herald(cfg, store, Narrator(_Screen(), name=cfg.name), {})
        self.herald.wait_until_open()
        macs = count(cfg.model, data.latent).training_macs(micro_batch(cfg))
        self.telemetry = Telemetry(cfg, self.engine, self.averages)
        self.logger = Logger(cfg, world, store, 1, self.herald.hear, self.phases, macs)
        self.at = Counters(0, 0, 0, 0, 0, 0)
        self.logger.begin(self.at)
        self.telling = 0.0

    def plain(self) -> None:
        """A step and its averages."""
        losses = [partial(loss, process=self.process, inputs=micro) for micro in self.micros]
        result = self.engine.step(losses, self.cfg.train.lr, self.phases.enter)
        self.averages.update(self.at.images + self.cfg.train.global_batch, skipped=result.skipped)

    def told(self) -> None:
        """The same, and everything that is told of it; adds to `telling` what the step waits for that."""
        batch = self.cfg.train.global_batch
        measure = self._timed(self.telemetry.gradients) if self.telemetry.due(self.at.images + batch) else None
        note = self._timed(self.telemetry.note)
        losses = [partial(loss, process=self.process, inputs=micro, note=note) for micro in self.micros]
        result = self.engine.step(losses, self.cfg.train.lr, self.phases.enter, measure)
        self.at = self.at.after_step(batch, 0, result.skipped)
        self.averages.update(self.at.images, skipped=result.skipped)
        began = time.perf_counter()
        self.logger.measured(self.telemetry.step(self.at, skipped=result.skipped))
        self.logger.step(result, self.at, self.cfg.train.lr, self.samples, self.telemetry.losses)
        self.telling += time.perf_counter() - began

    def close(self) -> None:
        """End threads and journals."""
        self.logger.close()
        self.herald.close()

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: torch.Tensor) -> None:
            began = time.perf_counter()
            call(*arguments)
            self.telling += time.perf_counter() - began

        return timed


def _row(what: str, sides: _Sides, rounds: int, steps: int) -> LogRow:
    """Take both sides' steps in turns, the side that goes first changing, and sum them up by round."""
    wall: dict[str, list[float]] = {"plain": [], "told": []}
    cpu: dict[str, list[float]] = {"plain": [], "told": []}
    waited = []
    for turn in range(rounds + 1):
        sums = {name: [0.0, 0.0] for name in wall}
        sides.telling = 0.0
        for number in range(steps):
            for name in ("plain", "told") if number % 2 else ("told", "plain"):
                began, began_cpu = time.perf_counter(), time.process_time()
                (sides.told if name == "told" else sides.plain)()
                if sides.world.device.type != "cpu":
                    torch.accelerator.synchronize(sides.world.device)
                sums[name][0] += time.perf_counter() - began
                sums[name][1] += time.process_time() - began_cpu
        if turn:
            for name, (seconds, busy) in sums.items():
                wall[name].append(seconds)
                cpu[name].append(busy)
            waited.append(sides.telling / sums["plain"][0])
    sides.close()
    over_wall, over_cpu = (
        sorted(a / b - 1 for a, b in zip(each["told"], each["plain"], strict=True)) for each in (wall, cpu)
    )
    return LogRow(
        what,
        1e3 * statistics.median(wall["plain"]) / steps,
        1e3 * statistics.median(wall["told"]) / steps,
        statistics.median(over_cpu), over_cpu[0], over_cpu[-1],
        statistics.median(over_wall), over_wall[0], over_wall[-1],
        statistics.median(waited),
        rounds,
        steps,
    )  # fmt: skip
