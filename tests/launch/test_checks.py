"""What is looked at before a job is handed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.config import Config
from launch import submit
from launch.checks import bucket, checks, deadline, legal_size, memory_and_deadline, places
from launch.target import Submission

RECIPE = Path(__file__).parents[2] / "configs" / "imagenet-512.yaml"


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    made = Config(name="a", storage=str(tmp_path / "runs"))
    made.data.latents, made.data.resolution_px, made.data.classes = str(tmp_path / "latents"), 32, ["x"]
    made.model.preset, made.train.images = "tiny", 1000
    return made


def test_all_is_well_with_a_small_run(cfg: Config) -> None:
    looked = list(checks(Submission(cfg, submit.minimal(cfg)), "slurm"))
    assert [each.what for each in looked] == ["size", "memory", "deadline", "places", "bucket"]
    assert all(each.ok for each in looked), [each.line for each in looked]
    assert not (Path(cfg.storage) / "a").exists() or not list((Path(cfg.storage) / "a").iterdir())


def test_an_illegal_size_says_what_is_legal(cfg: Config) -> None:
    cfg.cluster.workers, cfg.cluster.workers_per_node = 96, 8
    found = legal_size(cfg)
    assert not found.ok
    assert "train.global_batch=256" in found.found
    assert "-> " in found.line
    cfg.cluster.workers = 9
    assert "a multiple of 8" in legal_size(cfg).found


def test_a_rank_that_does_not_fit_is_told_what_does() -> None:
    submission = submit.prepare(str(RECIPE), ["cluster.workers=8", "train.micro_batch=32", "plan.machine=A100"])
    memory, _ = memory_and_deadline(submission.cfg, "slurm")
    assert not memory.ok
    assert "of 80 GiB on A100" in memory.found
    assert "train.micro_batch=" in memory.remedy


def test_the_save_must_fit_the_warning(cfg: Config) -> None:
    cfg.slurm.warning_s, cfg.cluster.grace_s = 60, 10
    assert deadline(30.0, cfg, "slurm").ok
    assert not deadline(31.0, cfg, "slurm").ok
    assert not deadline(6.0, cfg, "local").ok
    found = deadline(600.0, cfg, "kubernetes")
    assert (found.ok, found.found) == (True, "a save takes about 600 s of 1215 s (the pods' grace)"), "it follows"
    assert "slurm.warning_s=" in deadline(31.0, cfg, "slurm").remedy


def test_local_places_on_several_nodes_are_named(cfg: Config) -> None:
    assert "share" not in places(cfg, "slurm").found
    cfg.cluster.workers, cfg.cluster.workers_per_node = 4, 2
    assert "all 2 nodes share" in places(cfg, "slurm").found


def test_pods_must_see_every_place_that_the_job_reads(cfg: Config) -> None:
    cfg.storage, cfg.data.latents = "s3://b/runs", "/data/latents"
    assert not places(cfg, "kubernetes").ok
    assert "data.latents: found /data/latents" in places(cfg, "kubernetes").found
    cfg.kubernetes.claims = ["shared=/data"]
    assert places(cfg, "kubernetes").ok
    cfg.train.start_from = "/home/me/runs/a"
    assert "train.start_from" in places(cfg, "kubernetes").found


def test_pictures_of_latents_that_are_still_to_be_made_must_be_seen_too(cfg: Config) -> None:
    cfg.data.images = "/home/me/pictures"
    found = bucket(Submission(cfg, ""), "kubernetes")
    assert not found.ok
    assert "data.images: found /home/me/pictures" in found.found
    assert bucket(Submission(cfg, ""), "slurm").ok


def test_a_bucket_that_only_the_pods_may_write_is_not_refused(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cfg.storage, cfg.kubernetes.env_from_secrets = str(tmp_path / "file"), ["bucket"]
    assert not bucket(Submission(cfg, ""), "slurm").ok
    assert "cannot be looked at from here" in bucket(Submission(cfg, ""), "kubernetes").line


def test_more_gpus_than_a_node_has_are_refused(cfg: Config) -> None:
    cfg.cluster.workers, cfg.cluster.gpus_per_worker = 64, 1
    found = legal_size(cfg)
    assert "cluster.workers=64: found 64 GPUs on one node; allowed: plan.gpus_per_node=8" in found.found
    assert "cluster.workers_per_node=8" in found.remedy
    cfg.cluster.workers_per_node = 8
    assert legal_size(cfg).ok
    cfg.cluster.workers_per_node, cfg.plan.gpus_per_node = 16, 16
    assert legal_size(cfg).ok


def test_a_place_that_cannot_be_written_is_refused(cfg: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cfg.storage = str(tmp_path / "file")
    found = bucket(Submission(cfg, ""), "slurm")
    assert not found.ok
    assert "file" in found.found


def test_the_index_is_read(cfg: Config) -> None:
    folder = Path(cfg.data.latents)
    folder.mkdir()
    (folder / "passport.json").write_text('{"number": 1234}')
    assert "1,234 images" in bucket(Submission(cfg, ""), "slurm").found
