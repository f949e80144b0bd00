"""What `diffussm config` prints."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from diffussm.config import Config, load
from diffussm.config.explain import describe
from diffussm.config.schema import Source
from launch import show


def made() -> Config:
    cfg = Config(name="a")
    cfg.data.latents, cfg.train.images = "null", 1000
    cfg.data.source, cfg.data.images = Source.folder, "/a: b # c"
    cfg.data.classes = ["1", "x: y"]
    cfg.model.width = 96
    cfg.train.lr = 3e-4
    return cfg


def test_the_marked_config_loads_as_itself(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(show.marked(made()))
    assert load(path) == made()


def test_only_what_differs_is_marked() -> None:
    lines = {line.strip() for line in show.marked(made()).splitlines()}
    assert "lr: 0.0003  # default: 0.0001" in lines
    assert "source: folder  # default: twemoji" in lines
    assert "width: 96  # default: null" in lines
    assert "images: 1000  # default: (must be set)" in lines
    assert "global_batch: 256" in lines
    assert sum("# default" in line for line in lines) == 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_key_is_explained_with_its_default_on_paper_and_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    plain, terminal = io.StringIO(), Terminal()
    show.keys(plain)
    show.keys(terminal)
    for key in describe():
        assert f"{key.name} = {key.default_text}\n    {key.help}" in plain.getvalue()
        assert key.name in terminal.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert "[ddpm, ddim, dpm]" in terminal.getvalue()
