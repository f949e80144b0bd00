from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.config.schema import WandbMode
from diffussm.observe.sinks import WandbSink, wandb_mode


@pytest.mark.parametrize(
    ("asked", "environment", "expected"),
    [
        (WandbMode.auto, {}, "offline"),
        (WandbMode.auto, {"WANDB_API_KEY": "k"}, "online"),
        (WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        (WandbMode.auto, {"WANDB_MODE": "disabled"}, "disabled"),
        (WandbMode.auto, {"WANDB_MODE": "online"}, "online"),
        (WandbMode.offline, {"WANDB_MODE": "online"}, "offline"),
        (WandbMode.disabled, {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_mode_follows_config_then_environment(
    asked: WandbMode, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(asked) == expected


def test_offline_keeps_a_run_folder_and_records_before_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    sink = WandbSink("my-run", "project", "offline", {"seed": 1}, tmp_path)
    sink.write({"images": 1, "loss": 2.0})
    sink.close(60)
    assert sink._waiting == []
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_broken_wandb_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def down(**settings: object) -> None:
        raise RuntimeError("W&B is down")

    monkeypatch.setattr(wandb, "init", down)
    sink = WandbSink("my-run", "project", "online", {}, tmp_path)
    sink.write({"images": 1})
    sink.close(30)
    assert "W&B is down" in caplog.text


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    sink = WandbSink("r", "p", "disabled", {}, tmp_path / "none")
    sink.write({"images": 1})
    sink.close()
    assert not (tmp_path / "none").exists()
