"""What the store says of a run, on disk and in a bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffussm.checkpoint.store import open_store
from diffussm.observe import runs


def fill(url: str, *, finished: bool = False) -> None:
    store = open_store(url)
    store.write("config.yaml", b"train:\n  images: 640\n")
    lines = [{"images": images, "loss": 1 / images, "step": images // 8, "secret": 1} for images in (8, 16)]
    store.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    store.write("events.jsonl", b'{"event": "saved", "images": 8, "seconds": 2.5}\n')
    store.write("checkpoints/000000000008/manifest.json", b"{}")
    store.write("checkpoints/000000000016/half.safetensors", b"")  # no manifest: no checkpoint
    for number in (1, 2):
        store.write(f"attempts/{number}/start.json", b"{}")
    if finished:
        store.write("summary.json", b'{"score": "FD = 1", "images": 640}')


def test_status(tmp_path: Path) -> None:
    fill(str(tmp_path / "a"))
    found = runs.status(str(tmp_path / "a"))
    assert found["found"]
    assert (found["images"], found["total"], found["finished"], found["attempts"]) == (16, 640, False, 2)
    assert found["checkpoints"] == [8]
    assert found["metrics"] == {"loss": 1 / 16, "step": 2}
    assert found["event"]["event"] == "saved"
    assert found["save_s"] == 2.5
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"images": 2{"images": 24}\n{"images": 32}\n')
    assert runs.status(str(tmp_path / "a"))["images"] == 32  # a torn line is left out
    fill(str(tmp_path / "a"), finished=True)
    assert runs.status(str(tmp_path / "a"))["score"] == "FD = 1"


def test_an_absent_run_is_not_found(tmp_path: Path) -> None:
    assert runs.status(str(tmp_path / "b"))["found"] is False
    assert not (tmp_path / "b").exists()


def test_a_bucket_says_the_same(s3_server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    fill(str(tmp_path / "a"))
    fill("s3://data/observe-runs/a")
    local, remote = runs.status(str(tmp_path / "a")), runs.status("s3://data/observe-runs/a")
    assert {**local, "root": ""} == {**remote, "root": ""}
    assert runs.listed("s3://data/observe-runs") == ["a"]
    assert runs.check("s3://data/observe-runs/b", "s3://data/none") == {"writable": True, "latents": None}


def test_runs_are_listed_by_their_config(tmp_path: Path) -> None:
    fill(str(tmp_path / "b"))
    fill(str(tmp_path / "a"))
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "passport.json").write_text("{}")
    assert runs.listed(str(tmp_path)) == ["a", "b"]


def test_the_command_answers_in_json_and_refuses_with_a_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.main(["list", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert runs.main(["check", str(tmp_path)]) == 2
    assert "UsageError" in capsys.readouterr().err
