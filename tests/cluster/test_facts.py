"""Facts of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.facts import _storage, matmul_seconds, software
from diffussm.checkpoint.store import open_store
from diffussm.config.schema import Config
from tests.distributed import free_port
from tests.runs import tiny_run


def test_software_has_a_version_each() -> None:
    found = dict(software())
    assert found["torch"].startswith("2.")
    assert "absent" not in found.values()


def test_a_product_is_timed_and_checked() -> None:
    assert 0 < matmul_seconds(on_gpu=False) < 10


def test_storage_and_latents_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    cfg = tiny_run(tmp_path)
    open_store(f"{cfg.storage}/{cfg.name}").write("config.yaml", b"x")
    assert _storage(cfg) == []
    cfg.data.latents = str(tmp_path / "nowhere")
    assert [each.split(":")[0] for each in _storage(cfg)] == ["latents"]
    assert len(_storage(Config(name="absent", storage=str(tmp_path / "none"), data=cfg.data))) == 2


@pytest.mark.timeout(120)
def test_two_nodes_time_an_all_reduce() -> None:
    code = (
        "import sys\n"
        "from cluster.facts import reduce_seconds\n"
        "seconds = reduce_seconds(int(sys.argv[1]), '127.0.0.1', int(sys.argv[2]))\n"
        "assert 0 < seconds < 10, seconds\n"
    )
    port = str(free_port())
    nodes = [subprocess.Popen([sys.executable, "-c", code, str(rank), port]) for rank in (0, 1)]
    assert [node.wait(100) for node in nodes] == [0, 0]
