from __future__ import annotations

import itertools
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from streaming import StreamingDataset

from diffussm.config import plan
from diffussm.config.schema import Config
from diffussm.config.sets import each_set
from diffussm.data import encode, latents
from diffussm.data.cursor import Batch, Cursor
from diffussm.data.reader import LatentDataset, LatentStream, own_names
from diffussm.errors import ConfigError, DataError
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
    # As streaming itself decodes them.
    stored = {sample["id"]: sample for sample in StreamingDataset(local=cfg.data.latents, batch_size=1)}
    assert len(stored) == NUMBER
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


class TestBroken:
    """Shards that cannot be read, with streaming's downloads from a local folder."""

    @pytest.fixture
    def copy(self, made: Config, tmp_path: Path) -> Path:
        import shutil

        return Path(shutil.copytree(made.data.latents, tmp_path / "copy"))

    def test_shard_of_a_local_folder_is_verified(self, cfg: Config, copy: Path, tmp_path: Path) -> None:
        cfg.data.latents = str(copy)
        shard = sorted(copy.glob("*.mds"))[1]
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=rf"shard {shard.name} is corrupt"):
            read_ids(open_here(cfg, tmp_path / "scratch"), Cursor(), PER_EPOCH)

    def test_shard_missing_from_a_local_folder(self, cfg: Config, copy: Path, tmp_path: Path) -> None:
        cfg.data.latents = str(copy)
        sorted(copy.glob("*.mds"))[-1].unlink()
        with pytest.raises(DataError, match=r"a shard, .*\.mds, is missing at"):
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


def test_a_cluster_that_would_change_the_order_is_refused(cfg: Config, tmp_path: Path) -> None:
    cfg.data.canonical_nodes = 3
    with pytest.raises(ConfigError, match=r"data\.canonical_nodes: found 3; allowed: a divisor"):
        open_here(cfg, tmp_path)


@pytest.fixture(scope="module")
def two(made: Config) -> Config:
    """The same pictures at 8 and 16 px, side by side."""
    from copy import deepcopy

    cfg = deepcopy(made)
    cfg.data.more = [f"16={Path(made.data.latents).with_name('larger')}"]
    encode.prepare(each_set(cfg)[1])
    return cfg


class TestSeveralSets:
    """Two sets of the same pictures at 8 and 16 px, side by side."""

    def read(self, cfg: Config, scratch: Path, cursor: Cursor, count: int) -> list[tuple[int, int, list[int]]]:
        """(epoch, side, ids) of the next batches."""
        scratch.mkdir(parents=True, exist_ok=True)
        batches = open_here(cfg, scratch).batches(cursor)
        read = [(epoch, b.mean.shape[-1], b.id.tolist()) for epoch, b in itertools.islice(batches, count)]
        batches.close()
        return read

    def test_batches_are_of_one_size_and_an_epoch_has_all(self, two: Config, tmp_path: Path) -> None:
        whole = self.read(two, tmp_path, Cursor(), 4 * PER_EPOCH)
        first, second = whole[: 2 * PER_EPOCH], whole[2 * PER_EPOCH :]
        for epoch, batches in enumerate((first, second)):
            assert [e for e, _, _ in batches] == [epoch] * 2 * PER_EPOCH
            assert sorted(side for _, side, _ in batches) == [4] * PER_EPOCH + [8] * PER_EPOCH
            ids = [i for _, _, ids in batches for i in ids]
            assert len(set(ids)) == len(ids)
        assert [side for _, side, _ in first] != [side for _, side, _ in second]

    @pytest.mark.parametrize("done", [1, 7, 2 * PER_EPOCH - 1, 2 * PER_EPOCH, 2 * PER_EPOCH + 3])
    def test_reading_goes_on_anywhere(self, two: Config, tmp_path: Path, done: int) -> None:
        whole = self.read(two, tmp_path / "a", Cursor(), 3 * PER_EPOCH)
        epoch, batches = divmod(done, 2 * PER_EPOCH)
        assert self.read(two, tmp_path / "b", Cursor(epoch, batches * GLOBAL_BATCH), 4) == whole[done : done + 4]

    def test_other_classes_are_refused(self, two: Config, tmp_path: Path) -> None:
        from copy import deepcopy

        other = deepcopy(two)
        folder = sets.picture_folder(tmp_path / "pictures", {"a": 10, "b": 10, "c": 10})
        other.data.more = [f"16={tmp_path / 'other'}"]
        made = each_set(other)[1]
        made.data.images = str(folder)
        encode.prepare(made)
        with pytest.raises(DataError, match=r"data\.more: the 16 px latents have 3 classes"):
            open_here(other, tmp_path / "scratch")


@pytest.mark.world_size(2)
def test_two_ranks_read_the_same_mixture(two: Config, tmp_path: Path) -> None:
    """Every rank reads the same set in the same step, and together what one rank would."""
    scratch = tmp_path / str(dist.get_rank())
    scratch.mkdir()
    data = latents.open_latents(two, rank_batch=4, scratch=scratch)
    start = Cursor(0, 5 * GLOBAL_BATCH)
    batches = data.batches(start)
    mine = [(b.mean.shape[-1], b.id.tolist()) for _, b in itertools.islice(batches, 2 * PER_EPOCH)]
    batches.close()
    everyone: list[Any] = [None] * 2
    dist.all_gather_object(everyone, mine)
    data.close()
    turns = data.mixture.schedule(0)[5:] + data.mixture.schedule(1)[:5]
    for step, turn in enumerate(turns):
        assert {rank[step][0] for rank in everyone} == {(4, 8)[turn]}
        assert len({i for rank in everyone for i in rank[step][1]}) == GLOBAL_BATCH


class Cluster:
    """All ranks of a cluster of one-rank nodes, one after another in this process, on the real data set."""

    def __init__(self, cfg: Config, batch: int, rows: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cfg, self.batch, self.rows, self.root, self.monkeypatch = cfg, batch, rows, root, monkeypatch

    def read(self, nodes: int, images: int, steps: int) -> list[list[int]]:
        """Sorted ids of the next global batches."""
        plan.size(plan.Batching(self.batch, 0, self.rows), nodes, 1)
        # Its barriers need all ranks at once; here each has a node, and so a cache, of its own.
        self.monkeypatch.setattr("streaming.base.dataset.maybe_init_dist", lambda: False)
        together: list[list[int]] = [[] for _ in range(steps)]
        for rank in range(nodes):
            for name, value in (("RANK", rank), ("WORLD_SIZE", nodes), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
                self.monkeypatch.setenv(name, str(value))
            with own_names(1_000_000 + secrets.randbelow(1 << 30), str(self.root)):
                reader = LatentDataset(
                    stream=LatentStream(local=self.cfg.data.latents), rank_batch=self.batch // nodes,
                    canonical_nodes=self.rows, deadline_s=5, rank=rank, shuffle_seed=1, shuffle_block_size=16,
                    predownload=16,
                )  # fmt: skip
            reader.begin(1, images)
            for step, part in enumerate(itertools.islice(reader, steps)):
                together[step] += part.id.tolist()
            reader.stop()
        return [sorted(ids) for ids in together]


def test_the_cluster_may_change_in_the_middle_of_an_epoch(
    made: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2, 1, 4, 3 and 12 nodes after one another, each going on where the last one stopped."""
    batch, rows = 12, 4
    whole = Cluster(made, batch, rows, tmp_path, monkeypatch).read(1, 0, 6)
    read: list[list[int]] = []
    for nodes, steps in ((2, 1), (1, 1), (4, 2), (3, 1), (12, 1)):
        reader = Cluster(made, batch, rows, tmp_path, monkeypatch)
        read += reader.read(nodes, len(read) * batch, steps)
    assert read == whole
