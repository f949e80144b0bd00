"""What a run costs: memory, bytes, time and money in pure arithmetic, and the settings that cost least.

Time is that of the multiply-adds at the stated fraction of the card's peak, plus the network, not overlapped. Saves run
beside the steps and cost none. It is an estimate to decide with, not a promise; `diffussm plan` prints where each rate
comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from diffussm.config.machines import Machine, machine
from diffussm.config.plan import Batching, is_legal, layout, most_on_a_node, why_illegal
from diffussm.config.rules import snapshot_interval
from diffussm.config.schema import Config, Precision, SnapshotDtype
from diffussm.model.counts import Counts, count
from diffussm.model.footprint import USABLE, Footprint, footprint
from launch.latent import Latent


@dataclass(frozen=True)
class Layout:
    """How a run is spread out."""

    workers: int
    nodes: int
    stage: int
    micro_batch: int
    recompute: bool
    """Activation checkpointing."""

    def passes(self, global_batch: int) -> int:
        """Forward passes of each rank for one optimiser step."""
        return global_batch // (self.workers * self.micro_batch)

    @property
    def overrides(self) -> list[str]:
        """As keys of the config."""
        each = self.workers // self.nodes
        return [
            f"cluster.workers={self.workers}",
            f"cluster.workers_per_node={each if self.nodes > 1 else 0}",
            f"train.zero_stage={self.stage}",
            f"train.micro_batch={self.micro_batch}",
            f"train.activation_checkpointing={str(self.recompute).lower()}",
        ]


@dataclass(frozen=True)
class Estimate:
    """One layout of a run and what it costs. Bytes, seconds, and the table's money."""

    layout: Layout
    passes: int
    """Forward passes of each rank for one optimiser step."""
    memory: Footprint
    fits: bool | None
    """Whether it fits the card; None without cards."""
    steps: int
    network_bytes_per_step: int
    """Sent by each rank."""
    data_bytes_per_step: int
    """Latents read by all ranks together."""
    step_s: float | None
    """None without cards: nothing is said about CPUs."""
    save_s: float
    train_s: float | None
    evaluate_gpu_s: float | None
    """GPU seconds of drawing for all scores of the run."""
    score_s: float | None
    """Wall-clock seconds of drawing for one score, on the workers that share it."""
    gpu_hours: float | None
    price: float | None

    def plain(self) -> dict[str, Any]:
        """As plain data for JSON, with the peak that the parts add up to."""
        return asdict(self) | {"peak_bytes": self.memory.peak}


@dataclass(frozen=True)
class Estimator:
    """A config with everything about it that does not depend on the layout."""

    cfg: Config
    known: Latent
    card: Machine | None
    """None: the run trains on CPUs."""

    @staticmethod
    def of(cfg: Config, known: Latent) -> Estimator:
        """Raises ConfigError: `plan.machine` names no card."""
        return Estimator(cfg, known, machine(cfg.plan) if cfg.cluster.gpus_per_worker else None)

    def counts(self, recompute: bool = False) -> Counts:
        """Parameters and multiply-adds."""
        return count(self.cfg.model, self.known.shape, bf16=self._bf16, activation_checkpointing=recompute)

    @property
    def _bf16(self) -> bool:
        return self.cfg.train.precision is Precision.bf16

    @property
    def averages(self) -> int:
        """Averages of the weights that the run keeps."""
        return 1 + len(self.cfg.train.power_ema)

    @property
    def checkpoint_bytes(self) -> int:
        """Master weights, two moments and the averages, fp32."""
        return 4 * (3 + self.averages) * self.counts().parameters

    @property
    def kept_bytes(self) -> int:
        """Checkpoints that are in the store at the end: the newest, and the milestones."""
        cfg = self.cfg.checkpoint
        milestones = self.cfg.train.images // cfg.milestone_images if cfg.milestone_images else 0
        return (cfg.keep + milestones) * self.checkpoint_bytes

    @property
    def snapshot_bytes(self) -> int:
        """Snapshots of the power averages that are in the store at the end."""
        train = self.cfg.train
        number = math.ceil(train.images / snapshot_interval(self.cfg)) if train.power_ema else 0  # the last at the end
        number = min(number, train.keep_ema_snapshots or number)
        size = 4 if train.ema_snapshot_dtype is SnapshotDtype.fp32 else 2
        return number * len(train.power_ema) * size * self.counts().parameters

    def nodes(self, workers: int) -> int:
        """Nodes to recommend for so many workers: as many on each as the config says, else as its GPUs take."""
        each = self.cfg.cluster.workers_per_node or most_on_a_node(self.cfg) or workers
        return math.ceil(workers / each)

    def configured(self) -> Layout:
        """The layout that the config asks for, as every target is given it. Raises ConfigError as `layout`."""
        train, workers = self.cfg.train, self.cfg.cluster.workers
        micro = train.micro_batch or train.global_batch // workers
        return Layout(workers, layout(self.cfg)[0], train.zero_stage, micro, train.activation_checkpointing)

    def estimate(self, layout: Layout) -> Estimate:
        """What `layout` costs."""
        cfg, card = self.cfg, self.card
        train, workers = cfg.train, layout.workers
        counts = self.counts()
        passes = layout.passes(train.global_batch)
        memory = footprint(
            cfg.model,
            self.known.shape,
            stage=layout.stage,
            workers=workers,
            micro_batch=layout.micro_batch,
            accumulation=passes,
            averages=self.averages,
            bf16=self._bf16,
            activation_checkpointing=layout.recompute,
        )
        steps = -(-train.images // train.global_batch)
        sent = network_bytes(counts.parameters, workers, layout.stage, passes)
        save_s = self.checkpoint_bytes / (layout.nodes * cfg.plan.store_bytes_per_s)
        step_s = train_s = evaluate_s = score_s = hours = price = fits = None
        if card is not None:
            rate = card.flops(self._bf16) * card.efficiency
            # Backward costs twice the forward pass; recomputation is one more forward pass.
            flops = 2 * (4 if layout.recompute else 3) * (counts.macs * layout.micro_batch + counts.kernel_macs)
            line = card.link_bytes_per_s if layout.nodes == 1 else card.network_bytes_per_s
            step_s = passes * flops / rate + sent / line
            train_s = steps * step_s  # saves run beside the steps
            picture_s = self._picture_flops(counts) / rate
            evaluate_s = self.scores * cfg.evaluate.images * picture_s
            score_s = self._longest_share(workers) * picture_s
            hours = (workers * train_s + self._evaluation_s(workers, score_s, evaluate_s)) / 3600
            price = hours * card.gpu_hour_price
            fits = memory.peak <= USABLE * card.memory_bytes
        return Estimate(
            layout,
            passes,
            memory,
            fits,
            steps,
            sent,
            train.global_batch * self.known.sample_bytes,
            step_s,
            save_s,
            train_s,
            evaluate_s,
            score_s,
            hours,
            price,
        )

    @property
    def scores(self) -> int:
        """Evaluations of the run: one at the end, and those while it trains."""
        every, total = self.cfg.evaluate.every_images, self.cfg.train.images
        return int(self.cfg.evaluate.enabled) + (-(-total // every) - 1 if every else 0)

    def score_workers(self, workers: int) -> int:
        """How many workers share an evaluation, of a run that trains on so many."""
        return self.cfg.evaluate.workers or workers

    def _evaluation_s(self, workers: int, score_s: float, drawing_s: float) -> float:
        """GPU seconds paid for scores: those beside the training take what they draw, at the end all wait for the last.

        `score_s` is the wall clock of one score, `drawing_s` the GPU seconds of drawing for all of them.
        """
        if not self.cfg.evaluate.enabled:
            return drawing_s
        return drawing_s * (self.scores - 1) / self.scores + workers * score_s

    def _longest_share(self, workers: int) -> int:
        """Pictures of the worker that has most of them; whole blocks are handed out."""
        images, block = self.cfg.evaluate.images, self.cfg.evaluate.block_images
        blocks = math.ceil(images / block)
        return min(images, math.ceil(blocks / self.score_workers(workers)) * block)

    def _picture_flops(self, counts: Counts) -> float:
        """Operations of drawing one picture; decoding it and its features come on top.

        Kernels are made once for all pictures, guidance takes both halves.
        """
        sample = self.cfg.sample
        guided = 1 if sample.guidance == 1 else 2
        return 2.0 * sample.steps * guided * counts.macs

    def candidates(self, workers: int) -> Iterator[Layout]:
        """Every stage, micro batch and recomputation for a legal number of workers; none if it is not legal."""
        cfg, nodes = self.cfg, self.nodes(workers)
        free = Batching(cfg.train.global_batch, 0, cfg.data.canonical_nodes)
        if workers % nodes or not is_legal(free, nodes, workers // nodes):
            return
        share = cfg.train.global_batch // workers
        for micro in (size for size in range(1, share + 1) if share % size == 0):
            for stage in range(4):
                for recompute in (False, True):
                    yield Layout(workers, nodes, stage, micro, recompute)

    def why_not(self, workers: int) -> str:
        """Why `recommend` has nothing for so many workers; "" if it has something."""
        nodes = self.nodes(workers)
        free = Batching(self.cfg.train.global_batch, 0, self.cfg.data.canonical_nodes)
        if workers % nodes:
            return f"{workers} workers do not fill {nodes} nodes evenly"
        if not is_legal(free, nodes, workers // nodes):
            return (why_illegal(free, nodes, workers // nodes) or ("not legal", ""))[0]
        if self.card is None or self.recommend(workers) is not None:
            return ""
        least = min(self.estimate(found).memory.peak for found in self.candidates(workers)) / (1 << 30)
        return f"the least memory is {least:.1f} GiB, {self.card.name} has {self.card.memory_bytes / (1 << 30):.0f}"

    def recommend(self, workers: int) -> Estimate | None:
        """The quickest layout that fits the card, the one with most memory left among equals; None if none fits.

        Without cards there is nothing to fit and nothing to predict: None.
        """
        if self.card is None:
            return None
        fitting = [found for found in map(self.estimate, self.candidates(workers)) if found.fits]
        return min(fitting, key=lambda found: (round(found.step_s or 0, 4), found.memory.peak), default=None)


def network_bytes(parameters: int, workers: int, stage: int, passes: int) -> int:
    """Bytes each rank sends for one step, fp32, by ring algorithms.

    ZeRO 0 and 1 reduce gradients once and share them or the new weights out once. ZeRO 2 reduces after each pass.
    ZeRO 3 also gathers the weights twice in each pass.
    """
    once = 4 * parameters * (workers - 1) / workers
    rounds = {0: 2, 1: 2, 2: passes + 1, 3: 3 * passes}[stage]
    return round(rounds * once)
