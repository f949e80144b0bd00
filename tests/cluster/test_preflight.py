"""The doctor: each look on its own with invented machines, then the whole on this one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster import preflight
from cluster.preflight import Finding
from diffussm.config import Config
from diffussm.errors import DataError, ExitCode

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    made = Config(name="a", storage=str(tmp_path / "runs"))
    made.data.latents, made.train.images = str(tmp_path / "latents"), 1000
    return made


def test_only_python_3_11_is_well() -> None:
    assert preflight.python((3, 11)).ok
    assert not preflight.python((3, 12)).ok
    assert not preflight.python((3, 10)).ok


def test_packages_outside_their_range_are_named_with_what_mends_them() -> None:
    requires = ["Good-One>=1,<2", "old>=3", "absent", "extra>=9; extra == 'dev'"]
    found = list(preflight.packages(requires, {"good-one": "1.5", "old": "2.9"}))
    assert [(each.what, each.ok) for each in found] == [("old", False), ("absent", False), ("packages", True)]
    assert "2.9" in found[0].found
    assert "old>=3" in found[0].remedy
    assert "not installed" in found[1].found
    assert found[2].found == "1 of 3 fit"


def test_an_installation_without_requirements_is_not_called_well() -> None:
    assert [each.ok for each in preflight.packages([], {})] == [False]


def test_the_lock_names_what_differs() -> None:
    text = "# made by a==1\nOne.Two==1.0\nthree==2 ; python_version > '3'\nfour==3\n"
    exact = preflight.lock(text, {"one-two": "1.0", "three": "2", "four": "3"})
    assert exact.ok
    assert "3 packages" in exact.found
    other = preflight.lock(text, {"one-two": "1.1", "three": "2"})
    assert not other.ok
    assert not other.essential
    assert "One.Two 1.1 (lock: 1.0)" in other.found
    assert "four absent" in other.found
    assert "three" not in other.found


def test_a_missing_compiler_is_a_note() -> None:
    assert preflight.compiler({"g++": "/usr/bin/g++"}.get).found == "/usr/bin/g++"
    without = preflight.compiler(lambda name: None)
    assert not without.ok
    assert not without.essential
    assert "apt-get install g++" in without.line


def test_shared_memory_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not preflight.shared_memory(tmp_path / "absent").ok
    assert preflight.shared_memory(tmp_path).ok
    monkeypatch.setattr(preflight, "SHARED_MEMORY_BYTES", 1 << 60)
    assert not preflight.shared_memory(tmp_path).ok


def test_more_threads_than_cores_are_noted(cfg: Config) -> None:
    cfg.cluster.workers, cfg.cluster.threads_per_worker = 2, 3
    assert not preflight.cores(5, cfg).ok
    assert preflight.cores(6, cfg).ok
    assert preflight.cores(1, None).ok
    cfg.cluster.address = "ray://elsewhere"  # the workers run on other machines
    assert preflight.cores(1, cfg).ok


def test_an_error_becomes_a_finding_and_the_next_look_goes_on() -> None:
    def typed() -> Iterator[Finding]:
        yield Finding("first", True, "well")
        raise DataError("the folder is gone", "bring it back")

    def broken() -> Iterator[Finding]:
        raise ImportError("libsomething.so")
        yield  # makes this a generator

    first, second = preflight.guarded("images", typed)
    assert first.ok
    assert (second.ok, second.found, second.remedy) == (False, "the folder is gone", "bring it back")
    (only,) = preflight.guarded("gpus", broken)
    assert "libsomething.so" in only.found
    assert not only.ok


def test_gpus_are_essential_only_for_a_config_that_asks(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert next(preflight.devices(None)).ok
    assert next(preflight.devices(cfg)).ok
    cfg.cluster.gpus_per_worker = 1
    assert not next(preflight.devices(cfg)).ok


def test_backends_are_run_and_an_unknown_one_is_refused(cfg: Config) -> None:
    found = {each.what: each for each in preflight.backends(cfg)}
    assert found["operator reference"].ok
    assert found["operator torch"].ok
    cfg.model.backend = "torhc"
    assert "torch" in list(preflight.guarded("operator", lambda: preflight.backends(cfg)))[-1].remedy


def test_fashion_mnist_is_noted_where_it_is_not(tmp_path: Path) -> None:
    without = preflight.fashion_mnist(tmp_path)
    assert not without.ok
    assert not without.essential
    assert "apt-get install dataset-fashion-mnist" in without.line
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"")
    assert preflight.fashion_mnist(tmp_path).ok


def test_storage_and_images_of_a_config(cfg: Config, tmp_path: Path) -> None:
    assert next(preflight.storage(cfg)).ok
    (tmp_path / "file").write_text("")
    cfg.storage = str(tmp_path / "file")
    (found,) = preflight.guarded("storage", lambda: preflight.storage(cfg))
    assert not found.ok
    assert "pictures in" in next(preflight.images(cfg)).found
    cfg.data.classes = ["no such class"]
    (found,) = preflight.guarded("images", lambda: preflight.images(cfg))
    assert not found.ok
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "passport.json").write_text("{}")
    (found,) = preflight.guarded("images", lambda: preflight.images(cfg))
    assert "no passport" in found.found


@pytest.mark.parametrize(
    ("ok", "essential", "state"), [(True, True, "ok"), (False, True, "bad"), (False, False, "warn")]
)
def test_a_finding_is_a_line_of_json(ok: bool, essential: bool, state: str) -> None:
    shown = json.loads(Finding("it", ok, "gone", "mend it", essential, {"a_s": 1.5}).line)
    remedy = "" if ok else "mend it"
    assert shown == {"what": "it", "state": state, "found": "gone", "remedy": remedy, "numbers": {"a_s": 1.5}}


def test_a_look_that_does_not_end_is_left_alone_and_one_that_raises_still_raises() -> None:
    free = threading.Event()

    def stuck() -> Iterator[Finding]:
        free.wait()
        yield Finding("storage", True, "late")

    def broken() -> Iterator[Finding]:
        yield Finding("first", True, "well")
        raise DataError("the folder is gone", "bring it back")

    (late,) = preflight.guarded("storage", lambda: preflight.within(0.05, stuck))
    assert not late.ok
    assert "no answer within 0.05 s" in late.found
    free.set()
    first, second = preflight.guarded("images", lambda: preflight.within(30, broken))
    assert first.ok
    assert (second.ok, second.found) == (False, "the folder is gone")


def test_little_room_for_scratch_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.disk(tmp_path).ok == (shutil.disk_usage(tmp_path).free >= 1 << 30)
    monkeypatch.setattr(preflight, "SCRATCH_BYTES", 1 << 60)
    assert not preflight.disk(tmp_path).ok
    assert not preflight.disk(tmp_path).essential


def test_the_chosen_backend_is_timed_and_held_against_float64() -> None:
    found = preflight.speed("torch", torch.device("cpu"))
    assert found.numbers["ms"] > 0
    assert 0 < found.numbers["error"] < 1e-5
    assert found.what == "operator speed"


def test_a_place_for_latents_is_tried_and_latents_that_are_there_are_read(cfg: Config, tmp_path: Path) -> None:
    (absent,) = preflight.latents(cfg)
    assert "none there yet" in absent.found
    assert list((tmp_path / "latents").iterdir()) == []
    (tmp_path / "latents" / "shard.mds").write_bytes(bytes(9000))
    shard = {"raw_data": {"basename": "shard.mds", "bytes": 9000}, "samples": 3}
    (tmp_path / "latents" / "index.json").write_text(json.dumps({"shards": [shard]}))
    (there,) = preflight.latents(cfg)
    assert there.numbers["bytes_per_image"] == 3000
    assert there.numbers["read_bytes_per_s"] > 0
    assert "images/s" in there.found


def test_a_wrong_config_is_told_with_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.main(["absent.yaml"]) == ExitCode.CONFIG
    assert "absent.yaml" in capsys.readouterr().err


def test_the_whole_on_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "cluster.preflight"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == ExitCode.DONE, done.stderr
    found = {each["what"]: each for each in map(json.loads, done.stdout.splitlines())}
    for what in ("python", "packages", "versions", "compiler", "shared memory", "disk", "cpu", "gpus"):
        assert found[what]["state"] in ("ok", "warn", "bad")
    assert found["operator torch"]["state"] == "ok"
    assert found["operator speed"]["numbers"]["ratio"] > 0
