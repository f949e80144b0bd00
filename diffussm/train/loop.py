"""The training of one rank, from the first look for a checkpoint to the last save."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from diffussm.checkpoint.store import open_store
from diffussm.config.rules import accumulation, micro_batch
from diffussm.config.schema import Config
from diffussm.data import latents
from diffussm.data.cursor import Cursor
from diffussm.diffusion.process import Process
from diffussm.errors import DiffuSSMError, Preempted, Regroup
from diffussm.model import build_model
from diffussm.model.counts import count
from diffussm.naming import RunPaths
from diffussm.train import lineage
from diffussm.train.ahead import ahead
from diffussm.train.control import Control, Leaving
from diffussm.train.ema import Averages
from diffussm.train.engine import Engine
from diffussm.train.guard import Guard
from diffussm.train.logger import Announce, Logger
from diffussm.train.optim import learning_rate, steps_left
from diffussm.train.phases import Phase
from diffussm.train.profiler import Profiler
from diffussm.train.saver import Saver
from diffussm.train.snapshots import Snapshots
from diffussm.train.step import Inputs, draw, loss
from diffussm.train.telemetry import Telemetry
from diffussm.train.world import World

CLOSE_S = 60.0
"""Longest wait at the end for what is written beside the training, if nobody asked to leave sooner."""


def train(
    cfg: Config, world: World, attempt: int, scratch: Path, announce: Announce, control: Control | None = None
) -> None:  # fmt: skip
    """Train until `train.images`, from the newest checkpoint if there is one. Collective: every rank must call it.

    Args:
        cfg: a checked config.
        world: this process, in an initialised process group.
        attempt: number of this start of the run.
        scratch: local folder of this attempt.
        announce: called on rank 0 with what happens.
        control: this rank's end of the line from outside; by default nobody asks for anything.

    Raises:
        DataError, StorageError, DivergedError: as their docstrings say, on every rank that sees the cause.
        Preempted, Regroup: on every rank after the same step, when that was asked and the state is saved.
    """
    control = control or Control()
    enter = control.phases.enter
    torch.manual_seed(cfg.seed)
    store = open_store(RunPaths(cfg.storage, cfg.name).root)
    data = latents.open_latents(cfg, rank_batch=cfg.train.global_batch // world.size, scratch=scratch)
    process = Process(cfg.diffusion)
    model = build_model(cfg.model, data.latent, activation_checkpointing=cfg.train.activation_checkpointing)
    engine = Engine(model.to(world.device), cfg.train, accumulation(cfg), world)
    averages = Averages(engine.slices(), cfg.train)
    telemetry = Telemetry(cfg, engine, averages)
    macs = count(cfg.model, data.latent).training_macs(micro_batch(cfg))
    logger = Logger(cfg, world, store, attempt, announce, control.phases, macs)
    profiler = Profiler(cfg, world, store, logger.event)
    saver = Saver(cfg, engine, averages, store, attempt, logger)
    snapshots = Snapshots(saver)
    leaving = Leaving(cfg, control, world.size)
    enter(Phase.RESTORE)
    try:
        at = lineage.begin(cfg, engine, averages, store, logger, saver.restore())
    except DiffuSSMError:
        logger.close(control.left_s(CLOSE_S))  # it has told which checkpoints are refused, and why
        raise
    guard = Guard(cfg.train.max_nonfinite_steps, total=at.nonfinite_steps)
    control.phases.resumed(at.images)
    logger.begin(at)

    batches = data.batches(Cursor(at.epoch, at.images_in_epoch))

    def fetch() -> tuple[int, int, list[Inputs]]:
        epoch, batch = next(batches)
        micros = [draw(m, cfg, epoch, data.null_class).to(world.device) for m in batch.split(micro_batch(cfg))]
        return epoch, batch.fingerprint(epoch), micros

    coming = ahead(fetch, steps_left(cfg.train, at.images), world.claim_device)
    try:
        enter(Phase.DATA)
        for epoch, samples, micros in coming:
            profiler.begin(at.images + cfg.train.global_batch)
            lr = learning_rate(cfg.train, at.images)
            measure = telemetry.gradients if telemetry.due(at.images + cfg.train.global_batch) else None
            losses = [partial(loss, process=process, inputs=inputs, note=telemetry.note) for inputs in micros]
            result = engine.step(losses, lr, enter, measure)
            enter(Phase.OTHER)
            at = at.after_step(cfg.train.global_batch, epoch, result.skipped)
            averages.update(at.images, skipped=result.skipped)
            control.phases.completed(at.images)
            logger.measured(telemetry.step(at, skipped=result.skipped))
            logger.step(result, at, lr, samples, telemetry.losses)
            guard.observe(result.skipped, at.images)
            enter(Phase.SAVE)
            snapshots.step(at)
            saver.step(at, result, micros)
            profiler.end(at.images)
            leaving.step(at, saver.leave, checkpoint=saver.due)
            enter(Phase.DATA)
        data.close()
        saver.tidy()
        logger.event("trained", images=at.images)
    except Preempted as error:  # nothing went wrong: the state is saved
        cause = "regroup" if isinstance(error, Regroup) else "preemption"
        logger.event("left", images=at.images, cause=cause, reason=error.message)
        raise
    except DiffuSSMError as error:
        logger.event("stopped", images=at.images, reason=error.message)
        raise
    finally:
        enter(Phase.END)
        coming.close()
        batches.close()
        snapshots.close()
        saver.close(control.left_s(CLOSE_S))
        profiler.close(control.left_s(CLOSE_S) / 6)  # the journals matter more
        logger.close(control.left_s(CLOSE_S))
