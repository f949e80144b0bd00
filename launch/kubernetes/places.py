"""What a job reads and writes, and whether its pods see it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from diffussm.config.kubernetes import OWN_FOLDERS
from diffussm.config.schema import Config
from diffussm.config.sets import split
from diffussm.naming import is_remote


def unseen(cfg: Config, places: Mapping[str, str]) -> list[str]:
    """A sentence for each of the places (by config key) that pods do not see: neither in a bucket nor on a claim."""
    return [
        f"{key}: found {place}, which pods do not see; allowed: s3://bucket/prefix, or a folder below "
        "a mount of kubernetes.claims"
        for key, place in places.items()
        if not is_remote(place) and not _below(place, _mounted(cfg))
    ]


def unwritable(cfg: Config) -> list[str]:
    """A sentence for each folder of a node's own that pods cannot write: neither on a claim nor in a volume of ours."""
    own = [folder for folder in OWN_FOLDERS if folder.startswith(("/tmp", "/home", "/dev"))]  # noqa: S108 - in pods
    places = {"checkpoint.local": cfg.checkpoint.local, "data.cache": cfg.data.cache}
    return [
        f"{key}: found {place}, which pods cannot write; allowed: a folder below {', '.join(own)} or "
        "a mount of kubernetes.claims"
        for key, place in places.items()
        if place and not _below(place, [*own, *_mounted(cfg)])
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
    found |= {f"data.more ({side})": place for side, place in map(split, cfg.data.more)}
    return {key: place for key, place in found.items() if place}


def read_for_latents(cfg: Config) -> dict[str, str]:
    """Places that only a job reads that has to make its latents first."""
    found = {"data.images": cfg.data.images, "data.labels": cfg.data.labels}
    return {key: place for key, place in found.items() if place}


def _mounted(cfg: Config) -> list[str]:
    return [claim.partition("=")[2].rstrip("/") for claim in cfg.kubernetes.claims]


def _below(place: str, folders: Iterable[str]) -> bool:
    return any(place == folder or place.startswith(f"{folder}/") for folder in folders)
