"""The job's command line: what it accepts, and how each kind of error ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import stages
from cluster.driver import main, parse
from diffussm.errors import DataError, ExitCode


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: r\nstorage: {tmp_path}/runs\ndata: {{latents: {tmp_path}/l}}\ntrain: {{images: 512}}\n")
    return str(path)


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
