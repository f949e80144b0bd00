"""What a start decides before any heavy work; tests/e2e walks through the stages themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.stages import Stages
from diffussm.config.schema import Config, DataConfig, TrainConfig
from diffussm.errors import ConfigError, StorageError


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
def test_the_config_is_kept_and_a_later_start_must_agree(tmp_path: Path) -> None:
    with pytest.raises(Worked):
        Stages.of(config(tmp_path)).all()
    assert "seed: 0" in (tmp_path / "runs" / "r" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="seed: the run has 0, asked was 1"):
        Stages.of(config(tmp_path, seed=1)).all()
    longer = config(tmp_path, train=TrainConfig(images=1024))
    with pytest.raises(Worked):
        Stages.of(longer).all()


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
