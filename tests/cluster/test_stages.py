"""What a start decides before any heavy work; tests/e2e walks through the stages themselves."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import ray

from cluster import readiness
from cluster.preempt import SIGNALS
from cluster.stages import Stages
from diffussm.config import dump
from diffussm.config.schema import ClusterConfig, Config, DataConfig, EvaluateConfig, ModelConfig, TrainConfig
from diffussm.errors import ConfigError, MissingError, Preempted, StorageError
from diffussm.train.control import Level, Wish


def config(tmp_path: Path, **changes: object) -> Config:
    data = DataConfig(latents=str(tmp_path / "latents"))
    base = {"name": "r", "storage": str(tmp_path / "runs"), "data": data, "train": TrainConfig(images=512)}
    return Config(**(base | changes))


class Worked(Exception):
    """Heavy work would begin now."""


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Stages) -> None:
        raise Worked

    monkeypatch.setattr(Stages, "prepare", begin)


@pytest.mark.usefixtures("no_work")
def test_a_start_that_fails_early_freezes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Worked):
        Stages.of(config(tmp_path)).all()
    assert not list((tmp_path / "runs").rglob("*.yaml"))
    with pytest.raises(Worked):
        Stages.of(config(tmp_path, seed=1)).all()


@pytest.mark.usefixtures("no_work")
def test_once_there_is_a_checkpoint_frozen_keys_must_agree(tmp_path: Path) -> None:
    stages = Stages.of(config(tmp_path))
    stages.store.write("config.yaml", dump(stages.cfg).encode())
    stages.store.write("checkpoints/000000000256/manifest.json", b"{}")
    with pytest.raises(ConfigError, match="seed: the run has 0, asked was 1"):
        Stages.of(config(tmp_path, seed=1)).all()
    longer = config(tmp_path, train=TrainConfig(images=1024))
    with pytest.raises(Worked):
        Stages.of(longer).all()
    stages.store.write("config.yaml", b"{]")
    with pytest.raises(ConfigError, match=r"config\.yaml.*cannot be read"):
        stages.all()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": ModelConfig(preset="XX")}, ConfigError),
        ({"model": ModelConfig(backend="fast")}, ConfigError),
        ({"evaluate": EvaluateConfig(extractor="vgg")}, ConfigError),
        ({"evaluate": EvaluateConfig(extractor="inception", weights="/nowhere.pth")}, MissingError),
        ({"cluster": ClusterConfig(workers=64, gpus_per_worker=1)}, MissingError),
    ],
)
def test_what_would_fail_later_fails_first(tmp_path: Path, change: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        Stages.of(config(tmp_path, **change)).all()
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_work")
def test_a_full_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readiness.check_room(tmp_path)
    monkeypatch.setattr(readiness, "DISK_BYTES", 1 << 60)
    with pytest.raises(MissingError, match=r"MiB are free; wanted are"):
        Stages.of(config(tmp_path)).all()
    assert not (tmp_path / "runs" / "r").exists()


@pytest.mark.usefixtures("no_work")
def test_an_unwritable_place_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(StorageError, match="runs"):
        Stages.of(config(tmp_path)).all()


@pytest.mark.usefixtures("no_work")
def test_a_finished_run_is_a_no_op_until_more_images_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = Stages.of(config(tmp_path))
    stages.store.write("summary.json", json.dumps({"images": 512, "samples": "grid.png"}).encode())
    before = sorted(tmp_path.rglob("*"))
    stages.all()
    said = capsys.readouterr().err
    assert "finished: nothing to do" in said
    assert "grid.png" in said
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(Worked):
        Stages.of(config(tmp_path, train=TrainConfig(images=513))).all()


def test_local_places_become_absolute_and_buckets_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = config(tmp_path, storage="runs", data=DataConfig(latents="s3://bucket/l", images="pictures"))
    stages = Stages.of(cfg)
    assert stages.paths.root == f"{tmp_path}/runs/r"
    assert cfg.data.latents == "s3://bucket/l"
    assert cfg.data.images == f"{tmp_path}/pictures"
    assert cfg.data.cache == ""


def test_a_warning_after_the_last_step_leaves_samples_to_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(self: Stages) -> None:
        self.warnings.wish = Wish(Level.LEAVE, 1.0, "SIGTERM to the driver")

    def sample(self: Stages, *args: object) -> None:
        raise Worked

    monkeypatch.setattr(Stages, "begin", lambda self: None)
    monkeypatch.setattr(Stages, "train", train)
    monkeypatch.setattr(Stages, "sample", sample)
    with pytest.raises(Preempted, match="SIGTERM"):
        Stages.of(config(tmp_path)).all()


@pytest.mark.long
def test_a_signal_while_ray_waits_ends_the_job_in_order(tmp_path: Path) -> None:
    """Ray takes SIGTERM when it starts, and makes a SystemError of what a handler raises in one of its calls."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stages = Stages.of(config(tmp_path))
    stages.warnings.install()

    def wait_for_ever() -> None:
        with stages.warnings.through_ray():
            stages._connect(ray, {})
            never = ray.remote(num_cpus=10_000)(lambda: None).remote()
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            while not ray.wait([never], timeout=0.5)[0]:
                pass

    try:
        with pytest.raises(Preempted, match="SIGTERM"):
            wait_for_ever()
    finally:
        ray.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
