"""`diffussm checkpoints` and `diffussm ema` on a run's folder: what they print, write, refuse and return."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from diffussm.checkpoint import __main__ as command
from diffussm.checkpoint import catalog, weights
from diffussm.errors import DataError, ExitCode
from tests.diffussm.checkpoint import snapshots


def state(images: int, *kinds: str) -> dict[str, dict[str, torch.Tensor]]:
    return {
        kind: {
            name: torch.arange(torch.empty(shape).numel()).view(shape) * 1.0 + images + index
            for name, shape in snapshots.SHAPES.items()
        }
        for index, kind in enumerate(kinds)
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "a-run"
    for images in (64, 128):
        kept = state(images, "master", "exp_avg", "ema-plain", "ema-power-0.050")
        facts = {"permanent": images == 64, "digests": {"master/w": "c0ffee"}, "dtypes": {"master/w": "F32"}}
        snapshots.write(root, "checkpoints", images, kept, created=1e9 + images, **facts)
    for images in (32, 64, 96, 128):
        snapshots.write(root, "ema", images, state(images, "ema-power-0.050", "ema-power-0.100"))
    (root / "config.yaml").write_text("name: a-run\n")
    return root


def flip(root: Path, folder: str) -> None:
    file = next((root / folder).glob("*rank00001*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_the_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", str(run)]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["what", "images", "bytes", "files", "written", "(UTC)", "kept", "state", "kinds"]
    assert [line.split()[:2] for line in lines[1:-1]] == [
        *(["checkpoint", images] for images in ("64", "128")),
        *(["averages", images] for images in ("32", "64", "96", "128")),
    ]
    assert "2001-09-09 01:47:44  for ever  not read  master, exp_avg, ema-plain, ema-power-0.050" in lines[1]
    assert "2001-09-09 01:48:48  newest    not read  master" in lines[2]
    size = sum(file.stat().st_size for file in run.rglob("*.safetensors"))
    assert lines[-1] == f"6 in {run}, {size:,} bytes"
    assert command.main(["list", str(run), "--json", "--verify"]) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    assert {entry["state"] for entry in found} == {"verified"}
    assert [entry["images"] for entry in found] == [64, 128, 32, 64, 96, 128]


def test_verify_finds_damage_and_says_so_by_its_exit_code(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run, f"checkpoints/{64:012d}")
    (run / f"ema/{96:012d}/manifest.json").write_text("{}")
    assert command.main(["list", str(run), "--verify"]) == ExitCode.DATA
    told = capsys.readouterr()
    lines = told.out.splitlines()[1:-1]
    assert sum("verified" in line for line in lines) == len(lines) - 2
    assert [line.split()[:2] for line in lines if "unusable" in line] == [
        ["checkpoint", "64"], ["averages", f"{96:012d}"],
    ]  # fmt: skip
    assert "digest" in told.err
    assert "manifest" in told.err


def test_the_manifest_as_tables(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["show", str(run), "--at", "64"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert f"checkpoints/{64:012d}" in out
    assert "47 in 2 tensors" in out
    assert "6 x 7" in out
    assert "0: 0+21, 1: 21+21" in out
    assert "master/w  F32    c0ffee" in out
    assert "2001-09-09 01:47:44" in out
    assert command.main(["show", str(run), "--at", "128", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["counters"]["images"] == 128
    assert command.main(["show", str(run), "--at", "65"]) == ExitCode.DATA
    assert "it has: 64, 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "kind", "index"), [("plain", "ema-plain", 2), ("none", "master", 0), ("exp_avg", "exp_avg", 1)]
)
def test_export_is_the_state_of_that_kind(run: Path, tmp_path: Path, asked: str, kind: str, index: int) -> None:
    target = str(tmp_path / "w.safetensors")
    assert command.main(["export", str(run), "--kind", asked, "--to", target]) == ExitCode.DONE
    found = weights.read(target)
    assert (found.images, found.metadata["kind"]) == (128, kind)
    expected = list(state(128, *"abc").values())[index]
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    assert command.main(["export", str(run), "--kind", asked, "--to", target, "--at", "64"]) == ExitCode.DONE
    assert weights.read(target).images == 64


def test_export_takes_the_newest_that_verifies_and_refuses_what_is_not_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run, f"checkpoints/{128:012d}")
    target = str(tmp_path / "w.safetensors")
    assert command.main(["export", str(run), "--to", target]) == ExitCode.DONE
    assert weights.read(target).images == 64
    assert command.main(["export", str(run), "--to", target, "--at", "128"]) == ExitCode.DATA
    assert command.main(["export", str(run), "--to", target, "--kind", "power-0.300"]) == ExitCode.DATA
    assert "holds master, exp_avg, ema-plain, ema-power-0.050, not 'power-0.300'" in capsys.readouterr().err
    assert command.main(["export", str(run)]) == ExitCode.USAGE


def test_ema_prints_the_fit_and_writes_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["ema", str(run), "--length", "0.08", "--dry-run"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 8 + 1
    assert sum(float(line.split()[2]) for line in lines[1:9]) == pytest.approx(1, abs=1e-4)
    assert "correlation 0.9" in lines[-1]
    assert not (run / "weights").exists()
    assert command.main(["ema", str(run), "--length", "0.08", "--at", "96"]) == ExitCode.DONE
    target = run / "weights" / f"{96:012d}-power-0.080.safetensors"
    assert str(target) in capsys.readouterr().out
    assert weights.read(str(target)).images == 96
    assert command.main(["ema", str(run), "--length", "0.013", "--dry-run"]) == ExitCode.DONE
    assert "coarse" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["0", "0.3", "nan"])
def test_a_width_that_no_average_has_is_a_usage_error(run: Path, length: str) -> None:
    assert command.main(["ema", str(run), "--length", length]) == ExitCode.USAGE


def test_a_place_without_a_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for absent in (tmp_path, tmp_path / "absent"):
        assert command.main(["list", str(absent)]) == ExitCode.DATA
        assert "no run lies there" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "ema")
    store = catalog.open_run(str(run))
    assert catalog.entries(store) == []
    with pytest.raises(DataError, match="it has: none"):
        catalog.select(store, None)
