"""Which places a job in pods reads, and which of them pods see."""

from __future__ import annotations

from diffussm.config.schema import Config
from launch.kubernetes.places import read_by_job, read_for_latents, unseen


def test_only_places_that_are_named_count() -> None:
    cfg = Config(name="a", storage="s3://b/runs")
    cfg.data.latents, cfg.data.images = "s3://b/latents", ""
    assert read_by_job(cfg) == {"storage": "s3://b/runs", "data.latents": "s3://b/latents"}
    assert read_for_latents(cfg) == {}
    cfg.data.autoencoder = "owner/vae"
    assert "data.autoencoder" not in read_by_job(cfg)
    cfg.data.autoencoder, cfg.evaluate.reference, cfg.data.labels = "/vae", "/ref.npz", "/labels.csv"
    assert read_by_job(cfg)["data.autoencoder"] == "/vae"
    assert read_by_job(cfg)["evaluate.reference"] == "/ref.npz"
    assert read_for_latents(cfg) == {"data.labels": "/labels.csv"}


def test_a_place_is_seen_in_a_bucket_or_below_a_claim() -> None:
    cfg = Config(name="a")
    cfg.kubernetes.claims = ["shared=/data/"]
    places = {"a": "s3://b/c", "b": "/data", "c": "/data/x", "d": "/database", "e": "/home/x"}
    assert [said.split(":")[0] for said in unseen(cfg, places)] == ["d", "e"]
