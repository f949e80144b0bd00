"""The job's command line: what it accepts, and how each kind of error ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import driver, stages
from cluster.driver import main, parse
from diffussm.errors import DataError, ExitCode


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: r\nstorage: {tmp_path}/runs\ndata: {{latents: {tmp_path}/l}}\ntrain: {{images: 512}}\n")
    return str(path)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_the_line_that_launch_renders_is_understood() -> None:
    line = [
        "--only",
        "sample",
        "--classes",
        "Flags,Symbols",
        "--grid",
        "g.png",
        "--checkpoint",
        "64",
        "c.yaml",
        "seed=1",
    ]
    asked = parse(line)
    assert (asked.only, asked.classes, asked.grid, asked.checkpoint) == ("sample", "Flags,Symbols", "g.png", 64)
    assert (asked.config, asked.overrides) == ("c.yaml", ["seed=1"])


def test_a_name_with_a_comma_stands_in_quotes() -> None:
    assert driver.listed("") == []
    assert driver.listed("cat,dog") == ["cat", "dog"]
    assert driver.listed('"tench, Tinca tinca", dog,') == ["tench, Tinca tinca", "dog"]


def test_a_typo_ends_with_the_config_code_before_anything_starts(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config, "train.globl_batch=3"]) == ExitCode.CONFIG
    said = capsys.readouterr().err
    assert "train.globl_batch" in said
    assert "train.global_batch" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("gone", "look"), 65), (ValueError("bug"), 1), (KeyboardInterrupt(), 130)]
)
def test_each_error_has_its_code(
    config: str, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: stages.Stages) -> None:
        raise error

    monkeypatch.setattr(stages.Stages, "all", fail)
    assert main([config]) == code
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (code == 1)
    assert ("gone" in said) == (code == 65)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_while_the_driver_starts_is_one_that_was_heard(
    config: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """It comes while the config is looked at, long before the training could listen."""
    monkeypatch.setattr(driver, "check", lambda cfg: signal.raise_signal(number))
    monkeypatch.setattr(stages.Stages, "all", lambda self: pytest.fail("went on"))
    assert main([config]) == ExitCode.PREEMPTED
    assert number.name in capsys.readouterr().err
