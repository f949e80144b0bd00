"""What a job in pods reads, and whether its pods see it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from diffussm.config.schema import Config
from diffussm.naming import is_remote


def unseen(cfg: Config, places: Mapping[str, str]) -> list[str]:
    """A sentence for each of the places (by config key) that pods do not see: neither in a bucket nor on a claim."""
    mounted = [claim.partition("=")[2].rstrip("/") for claim in cfg.kubernetes.claims]
    return [
        f"{key}: found {place}, which pods do not see; allowed: s3://bucket/prefix, or a folder below "
        "a mount of kubernetes.claims"
        for key, place in places.items()
        if not is_remote(place) and not any(place == folder or place.startswith(f"{folder}/") for folder in mounted)
    ]


def read_by_job(cfg: Config) -> dict[str, str]:
    """Places that a job reads or writes in any case, by config key; local ones are absolute here."""
    found = {
        "storage": cfg.storage,
        "data.latents": cfg.data.latents,
        "train.start_from": cfg.train.start_from,
        "sample.weights": cfg.sample.weights,
        "evaluate.weights": cfg.evaluate.weights,
        "evaluate.reference": cfg.evaluate.reference,
        # Else it is built in, or an id on the hub.
        "data.autoencoder": cfg.data.autoencoder if cfg.data.autoencoder.startswith("/") else "",
    }
    return {key: place for key, place in found.items() if place}


def read_for_latents(cfg: Config) -> dict[str, str]:
    """Places that only a job reads that has to make its latents first."""
    found = {"data.images": cfg.data.images, "data.labels": cfg.data.labels}
    return {key: place for key, place in found.items() if place}
