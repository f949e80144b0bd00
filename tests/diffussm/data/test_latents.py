from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from diffussm.config.schema import Config
from diffussm.data import encode, latents
from diffussm.data.cursor import Batch, Cursor
from diffussm.errors import DataError, MissingError
from tests.diffussm.data import sets

NUMBER, GLOBAL_BATCH = 83, 8
PER_EPOCH = NUMBER // GLOBAL_BATCH


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Latents of 83 pictures in several shards."""
    root = tmp_path_factory.mktemp("latents")
    folder = sets.picture_folder(root / "pictures", {"a": 40, "b": 43})
    cfg = sets.config(str(root / "out"), folder, sets.tiny_autoencoder(root / "vae"), GLOBAL_BATCH)
    encode.prepare(cfg)
    return cfg


@pytest.fixture
def cfg(made: Config) -> Config:
    """A copy that a test may change."""
    from copy import deepcopy

    return deepcopy(made)


def open_here(cfg: Config, scratch: Path) -> latents.Latents:
    scratch.mkdir(parents=True, exist_ok=True)
    return latents.open_latents(cfg, rank_batch=cfg.train.global_batch, scratch=scratch)


def read_ids(data: latents.Latents, cursor: Cursor, count: int) -> list[tuple[int, list[int]]]:
    """(epoch, ids) of the next `count` batches."""
    batches = data.batches(cursor)
    ids = [(epoch, batch.id.tolist()) for epoch, batch in itertools.islice(batches, count)]
    batches.close()  # type: ignore[attr-defined]
    return ids


@pytest.fixture(scope="module")
def order(made: Config, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[int]]]:
    """Two and a half epochs in one process, never interrupted."""
    data = open_here(made, tmp_path_factory.mktemp("order"))
    return read_ids(data, Cursor(), 2 * PER_EPOCH + 5)


def test_epochs_are_shuffled_without_doubles_and_differ(order: list[tuple[int, list[int]]]) -> None:
    assert [epoch for epoch, _ in order] == [0] * PER_EPOCH + [1] * PER_EPOCH + [2] * 5
    first, second = ([i for epoch, ids in order if epoch == e for i in ids] for e in (0, 1))
    for ids in (first, second):
        assert len(ids) == len(set(ids)) == PER_EPOCH * GLOBAL_BATCH
        assert ids != sorted(ids)
    assert first != second


def test_seed_decides_the_order(cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path) -> None:
    assert read_ids(open_here(cfg, tmp_path / "same"), Cursor(), 3) == order[:3]
    cfg.seed = (1 << 40) + 1
    assert read_ids(open_here(cfg, tmp_path / "other"), Cursor(), 3) != order[:3]


@pytest.mark.parametrize("done", [0, 1, 4, PER_EPOCH, PER_EPOCH + 3])
def test_reading_goes_on_anywhere(cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path, done: int) -> None:
    cursor = Cursor()
    for _ in range(done):
        cursor = cursor.after_batch(NUMBER, GLOBAL_BATCH)
    assert read_ids(open_here(cfg, tmp_path), cursor, 12) == order[done : done + 12]


def test_end_of_an_epoch_may_be_named_by_either_cursor(
    cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    data = open_here(cfg, tmp_path)
    assert read_ids(data, Cursor(0, data.epoch_images), 2) == order[PER_EPOCH : PER_EPOCH + 2]


def test_one_opening_can_be_rewound(cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path) -> None:
    data = open_here(cfg, tmp_path)
    assert read_ids(data, Cursor(1), PER_EPOCH + 1) == order[PER_EPOCH : 2 * PER_EPOCH + 1]
    assert read_ids(data, Cursor(0, 2 * GLOBAL_BATCH), 3) == order[2:5]
    data.close()


def test_loader_workers_change_nothing(cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path) -> None:
    cfg.data.loader_workers = 2
    assert read_ids(open_here(cfg, tmp_path), Cursor(0, GLOBAL_BATCH), PER_EPOCH + 2) == order[1 : PER_EPOCH + 3]


def test_batches_hold_what_was_stored(cfg: Config, tmp_path: Path) -> None:
    data = open_here(cfg, tmp_path)
    assert (data.null_class, data.latent.channels, data.latent.height) == (2, 2, 4)
    batches = data.batches(Cursor())
    _, batch = next(batches)
    assert isinstance(batch, Batch)
    moments = [getattr(batch, name) for name in latents.MOMENTS]
    for moment in moments:
        assert moment.dtype == torch.float32
        assert moment.shape == (GLOBAL_BATCH, 2, 4, 4)
        moment.add_(1)  # Writable, each on its own.
    assert batch.label.tolist() == [int(i >= 40) for i in batch.id.tolist()]
    stored = {sample["id"]: sample for sample in (data._dataset[i] for i in range(NUMBER))}
    for row, sample_id in enumerate(batch.id.tolist()):
        for name, moment in zip(latents.MOMENTS, moments, strict=True):
            np.testing.assert_array_equal(moment[row].numpy() - 1, (stored[sample_id][name].astype("f4") + 1) - 1)
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.world_size(2)
def test_two_ranks_read_the_same_global_batches(
    cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    check_ranks(cfg, order, tmp_path)


@pytest.mark.world_size(4)
def test_four_ranks_read_the_same_global_batches(
    cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path
) -> None:
    check_ranks(cfg, order, tmp_path)


def check_ranks(cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path) -> None:
    """On every rank: from the middle of an epoch over its end, all ranks together against one process."""
    scratch = tmp_path / str(dist.get_rank())  # The ranks agree on one of these.
    scratch.mkdir()
    data = latents.open_latents(cfg, rank_batch=GLOBAL_BATCH // dist.get_world_size(), scratch=scratch)
    mine = read_ids(data, Cursor(0, 3 * GLOBAL_BATCH), PER_EPOCH)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for step, (epoch, expected) in enumerate(order[3 : 3 + PER_EPOCH]):
        assert {rank[step][0] for rank in everyone} == {epoch}
        together = [i for rank in everyone for i in rank[step][1]]
        assert sorted(together) == sorted(expected)
    data.close()


def test_doubled_samples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = latents.collate([{"id": i, "label": 0} | dict.fromkeys(latents.MOMENTS, np.zeros(1)) for i in range(3)])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for other, doubled in (([3, 4, 5], False), ([2, 3, 4], True)):

        def gather(everyone: list[Any], mine: list[int], other: list[int] = other) -> None:
            everyone[:] = [mine, other]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        if doubled:
            with pytest.raises(DataError, match="1 of 6 samples of a batch are doubled"):
                latents._check_disjoint(batch)
        else:
            latents._check_disjoint(batch)


class TestBroken:
    """Shards that cannot be read, with streaming's downloads from a local folder."""

    @pytest.fixture
    def copy(self, made: Config, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(made.data.latents, tmp_path / "copy"))

    def read(self, remote: Path, scratch: Path) -> int:
        data = latents.LatentDataset(
            remote=str(remote), local=str(scratch), batch_size=4, validate_hash="xxh64", download_retry=1
        )
        return sum(1 for _ in data)

    def test_whole_shards_are_read(self, copy: Path, tmp_path: Path) -> None:
        assert self.read(copy, tmp_path / "scratch") == NUMBER

    @pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
    def test_damage_is_an_error_not_an_end(self, copy: Path, tmp_path: Path, damage: str) -> None:
        shard = sorted(copy.glob("*.mds"))[1]
        content = shard.read_bytes()
        if damage == "missing":
            shard.unlink()
        else:
            shard.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=r"a shard of .*copy cannot be read"):
            self.read(copy, tmp_path / "scratch")

    def test_shard_missing_from_a_local_folder(self, cfg: Config, copy: Path, tmp_path: Path) -> None:
        cfg.data.latents = str(copy)
        sorted(copy.glob("*.mds"))[-1].unlink()
        with pytest.raises(DataError, match=r"data\.latents"):
            read_ids(open_here(cfg, tmp_path / "scratch"), Cursor(), PER_EPOCH)

    def test_shards_of_another_passport(self, cfg: Config, copy: Path, tmp_path: Path) -> None:
        cfg.data.latents = str(copy)
        index = copy / latents.INDEX
        index.write_text(json.dumps(json.loads(index.read_text()), indent=1))
        with pytest.raises(DataError, match="do not belong together"):
            open_here(cfg, tmp_path / "scratch")
        index.unlink()
        with pytest.raises(DataError, match="do not belong together"):
            open_here(cfg, tmp_path / "scratch")


def test_latents_of_another_autoencoder_are_refused(cfg: Config, tmp_path: Path) -> None:
    cfg.data.autoencoder = str(sets.tiny_autoencoder(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match=r"data\.autoencoder"):
        open_here(cfg, tmp_path / "scratch")


def test_missing_latents_are_refused(cfg: Config, tmp_path: Path) -> None:
    cfg.data.latents = str(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"found no passport\.json") as caught:
        open_here(cfg, tmp_path / "scratch")
    assert "diffussm prepare" in caught.value.remedy


def test_batch_must_be_the_ranks_together(cfg: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.global_batch: found 8; 1 ranks with 4"):
        latents.open_latents(cfg, rank_batch=4, scratch=tmp_path)
    cfg.train.global_batch = 84
    with pytest.raises(DataError, match=r"train\.global_batch: found 84; the latents hold 83"):
        open_here(cfg, tmp_path)


class TestWorld:
    @pytest.fixture(autouse=True)
    def _clean(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    def set(self, monkeypatch: pytest.MonkeyPatch, values: str, rank: int, size: int) -> None:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        for name, value in zip(names, values.split(), strict=True):
            if value != "-":
                monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, "is_initialized", lambda: size > 1)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: size)

    def test_one_process_needs_no_variables(self) -> None:
        assert latents.check_world() == (1, 0)

    def test_size_and_first_rank_of_the_node(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set(monkeypatch, "5 6 1 2", 5, 6)
        assert latents.check_world() == (6, 4)

    @pytest.mark.parametrize(
        ("values", "rank", "size"),
        [
            ("- - - -", 1, 2),
            ("1 2 1 -", 1, 2),
            ("0 2 0 2", 1, 2),
            ("1 2 1 2", 0, 1),
            ("1 3 1 2", 1, 3),
            ("1 4 0 2", 1, 4),
        ],
    )
    def test_contradictions_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, values: str, rank: int, size: int
    ) -> None:
        self.set(monkeypatch, values, rank, size)
        with pytest.raises(MissingError, match="environment"):
            latents.check_world()


def test_names_are_our_own_and_locks_lie_in_scratch(cfg: Config, tmp_path: Path) -> None:
    import streaming.base.shared.prefix as prefixes

    before = (prefixes._each_prefix_int, prefixes.gettempdir)
    # What a killed job left under streaming's first name.
    stale = SharedMemory("000000_locals", create=True, size=64)
    try:
        data = open_here(cfg, tmp_path)
        number = data._dataset._shm_prefix_int
        assert number >= 1_000_000
        assert read_ids(data, Cursor(), 1)
        assert [p.name for p in tmp_path.iterdir() if p.is_file()]
        assert all(p.name.startswith(str(number)) for p in tmp_path.iterdir())
        assert open_here(cfg, tmp_path)._dataset._shm_prefix_int != number
        assert (prefixes._each_prefix_int, prefixes.gettempdir) == before
    finally:
        stale.close()
        stale.unlink()


def test_start_after_a_kill(cfg: Config, order: list[tuple[int, list[int]]], tmp_path: Path) -> None:
    """A process is killed while it reads; the next start uses the same folders and is not blocked."""
    code = (
        "import pickle, sys, time, pathlib\n"
        "from tests.diffussm.data.test_latents import open_here\n"
        "from diffussm.data.cursor import Cursor\n"
        "cfg = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "data = open_here(cfg, pathlib.Path(sys.argv[2]))\n"
        "batches = data.batches(Cursor())\n"
        "next(batches)\n"
        "print('reading', flush=True)\n"
        "time.sleep(300)\n"
    )
    import pickle

    (tmp_path / "cfg").write_bytes(pickle.dumps(cfg))
    command = [sys.executable, "-c", code, str(tmp_path / "cfg"), str(tmp_path / "scratch")]
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        os.killpg(process.pid, signal.SIGKILL)  # With Python's own cleaner of shared memory.
    stale = {lock.name.split("_")[0] for lock in (tmp_path / "scratch").iterdir()}
    start = time.monotonic()
    assert read_ids(open_here(cfg, tmp_path / "scratch"), Cursor(), 3) == order[:3]
    assert time.monotonic() - start < 20
    for prefix in stale:  # Nobody else will.
        for segment in Path("/dev/shm").glob(f"{prefix}_*"):  # noqa: S108
            segment.unlink()
