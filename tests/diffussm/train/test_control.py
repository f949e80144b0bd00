"""Ranks leave at the same step, whoever was asked."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffussm.checkpoint.manifest import Counters
from diffussm.config.schema import Config, TrainConfig
from diffussm.errors import Preempted, Regroup
from diffussm.train.control import Agreement, Control, Leaving, Level, Wish, shorten_timeouts


@pytest.mark.world_size(2)
def test_the_most_urgent_wish_and_the_earliest_deadline_count_one_step_later(tmp_path: Path) -> None:
    rank, agreement = dist.get_rank(), Agreement(2)
    assert agreement.exchange(Wish()) == Wish()
    mine = Wish(Level.LEAVE, 1000.5, "asked") if rank else Wish(Level.REGROUP, math.inf, "grow")
    assert agreement.exchange(mine).level is Level.NONE
    agreed = agreement.exchange(Wish())
    assert (agreed.level, agreed.deadline_s) == (Level.LEAVE, 1000.5)
    assert agreement.exchange(Wish()).level is Level.NONE


def at(images: int) -> Counters:
    return Counters(images, images // 8, 0, images, images // 8, 0)


def leave(level: Level, asked_rank: int, every_images: int) -> tuple[list[int], str, int]:
    """Steps of 8 images; after the third this rank may be asked. Saved images, kind of the end, images at the end."""
    cfg = Config(train=TrainConfig(images=800, global_batch=8))
    control = Control()
    leaving, saved = Leaving(cfg, control, dist.get_world_size()), list[int]()
    for images in range(8, 400, 8):
        control.phases.completed(images)
        if images == 24 and dist.get_rank() == asked_rank:
            control.wish = Wish(level, 2000.0, "because")
        try:
            leaving.step(
                at(images),
                lambda where, deadline_s: saved.append(where.images),
                checkpoint=images % every_images == 0,
            )
        except Preempted as error:
            return saved, type(error).__name__, images
    return saved, "none", 400


@pytest.mark.world_size(2)
def test_all_leave_after_the_same_step_and_wait_for_its_save(tmp_path: Path) -> None:
    assert leave(Level.LEAVE, 1, 800) == ([32], "Preempted", 32)
    assert leave(Level.MOVE, 0, 800) == ([32], "Preempted", 32)
    assert leave(Level.REGROUP, 1, 80) == ([80], "Regroup", 80), "after the next regular checkpoint"
    assert leave(Level.NONE, 0, 80) == ([], "none", 400)


@pytest.mark.world_size(1)
def test_a_training_that_is_done_does_not_leave(tmp_path: Path) -> None:
    cfg = Config(train=TrainConfig(images=8, global_batch=8))
    control = Control()
    control.wish = Wish(Level.LEAVE)
    leaving = Leaving(cfg, control, 1)
    for _ in range(3):
        leaving.step(at(8), lambda where, deadline_s: pytest.fail("saved"), checkpoint=True)


def test_regroup_is_a_kind_of_leaving() -> None:
    assert issubclass(Regroup, Preempted)


@pytest.mark.world_size(2)
def test_a_collective_without_its_peer_fails_in_the_shortened_time(tmp_path: Path) -> None:
    lonely = dist.new_group(backend="gloo")
    shorten_timeouts(1.0)
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed out"):
            dist.all_reduce(torch.zeros(1), group=lonely)
    shorten_timeouts(60.0)


def test_an_end_takes_no_longer_than_there_is_time() -> None:
    control = Control()
    assert control.left_s(60.0) == 60.0
    control.wish = Wish(Level.LEAVE, time.time() + 20, "asked")
    assert 10 < control.left_s(60.0) <= 20
    control.wish = Wish(Level.LEAVE, time.time() - 20, "asked")
    assert control.left_s(60.0) == 0.0
