"""From a command to the job's command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffussm.checkpoint.store import open_store
from diffussm.config import dump, load
from diffussm.errors import ConfigError, StorageError
from launch import local
from tests.s3 import S3Server

PYTHON = [sys.executable, "-P", "-m"]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(f"name: a-run\nstorage: {tmp_path}/runs\ndata:\n  latents: latents\ntrain:\n  images: 1000\n")
    return path


@pytest.fixture
def folder(minimal: Path, tmp_path: Path) -> Path:
    made = tmp_path / "runs" / "a-run"
    made.mkdir(parents=True)
    (made / "config.yaml").write_text(dump(load(minimal)))
    return made


def test_the_whole_road_has_no_flags(minimal: Path) -> None:
    job = local.read(str(minimal), ["train.lr=0.5", "seed=3"])
    assert local.driver(job) == [*PYTHON, "cluster.driver", str(minimal), "train.lr=0.5", "seed=3"]


def test_a_stage_and_its_flags_stand_before_the_config(minimal: Path) -> None:
    flags = {"classes": "a,b", "grid": "", "checkpoint": 0}
    command = local.driver(local.read(str(minimal)), "sample", flags)
    assert command == [
        *(*PYTHON, "cluster.driver", "--only", "sample"),
        *("--classes", "a,b", "--checkpoint", "0"),
        str(minimal),
    ]


def test_the_driver_reads_what_is_rendered(minimal: Path) -> None:
    """The one interface between launch and cluster, held from both sides."""
    driver = pytest.importorskip("cluster.driver")
    job = local.read(str(minimal), ["seed=1"], {"sample.steps": 5})
    flags = {"classes": "a,b", "grid": "x.png", "checkpoint": 64}
    asked = driver.parse(local.driver(job, "sample", flags)[4:])
    assert (asked.only, asked.classes, asked.grid, asked.checkpoint) == ("sample", "a,b", "x.png", 64)
    assert (asked.config, asked.overrides) == (str(minimal), ["seed=1", "sample.steps=5"])
    assert driver.parse(local.driver(job)[4:]).only is None


def test_named_options_win_over_overrides_and_none_is_not_given(minimal: Path) -> None:
    job = local.read(str(minimal), ["sample.steps=10"], {"sample.steps": 20, "sample.seed": None})
    assert job.cfg.sample.steps == 20
    assert job.overrides == ("sample.steps=10", "sample.steps=20")


def test_a_config_is_checked_before_anything_starts(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr"):
        local.read(str(minimal), ["train.lr=-1"])
    with pytest.raises(ConfigError, match=r"sample\.steps"):
        local.read(str(minimal), options={"sample.steps": 0})


def test_a_run_folder_is_its_config(folder: Path) -> None:
    job = local.read(str(folder))
    assert job.path == str(folder / "config.yaml")
    assert job.overrides == ()
    assert job.cfg.name == "a-run"


def test_a_moved_run_is_used_where_it_lies(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "a-run"
    moved.parent.mkdir()
    folder.rename(moved)
    job = local.read(str(moved), ["seed=5"])
    assert job.cfg.storage == str(moved.parent)
    assert job.overrides == ("seed=5", f"storage={moved.parent}")
    assert local.read(str(moved), ["storage=other"]).cfg.storage == "other"


def test_a_renamed_run_is_refused(folder: Path) -> None:
    renamed = folder.rename(folder.parent / "b-run")
    with pytest.raises(ConfigError, match="b-run"):
        local.read(str(renamed))
    assert local.read(str(renamed), ["name=c-run"]).cfg.name == "c-run"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        local.read(str(tmp_path))


def test_a_run_in_a_bucket_is_its_url(
    folder: Path, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = s3_server.url("local-runs")
    open_store(f"{runs}/a-run").write("config.yaml", (folder / "config.yaml").read_bytes())
    job = local.read(f"{runs}/a-run/", ["seed=3"])
    assert (job.cfg.storage, job.cfg.name, job.cfg.seed) == (runs, "a-run", 3)
    assert job.overrides == ("seed=3", f"storage={runs}")
    assert Path(job.path).read_bytes() == (folder / "config.yaml").read_bytes()
    assert local.run_of(f"{runs}/a-run/checkpoints/000000000064") == (f"{runs}/a-run", 64)
    with pytest.raises(StorageError, match=r"other: found no config\.yaml there"):
        local.read(f"{runs}/other")


def test_doctor_takes_a_config_or_none(minimal: Path) -> None:
    assert local.preflight(None) == [*PYTHON, "cluster.preflight"]
    job = local.read(str(minimal), ["seed=1"])
    assert local.preflight(job) == [*PYTHON, "cluster.preflight", str(minimal), "seed=1"]


def test_run_becomes_the_command_with_its_exit_code_and_arguments() -> None:
    script = "import sys; print(sys.argv[1]); sys.exit(75)"
    code = f"from launch import local; print('before'); local.run([{sys.executable!r}, '-c', {script!r}, '$(a) *'])"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=buffered)
    assert done.returncode == 75
    assert done.stdout.splitlines() == ["before", "$(a) *"]


def test_folders_of_our_names_in_the_working_folder_do_not_hide_us(tmp_path: Path) -> None:
    for name in ("cluster", "diffussm", "launch"):
        (tmp_path / name).mkdir()
    command = [*PYTHON, "cluster.driver", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_shown_can_be_pasted() -> None:
    assert local.shown(["python", "a b", "x=[1]"]) == "python 'a b' 'x=[1]'"


def test_bench_passes_its_options_on() -> None:
    assert local.bench("op", ["--lengths", "64", "--json"]) == [
        *PYTHON, "diffussm.bench", "op", "--lengths", "64", "--json",
    ]  # fmt: skip
