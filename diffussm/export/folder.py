"""Write the exported folder: whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffussm.checkpoint.store import Store, open_store
from diffussm.config.schema import Config
from diffussm.data.latents import passport as read_passport
from diffussm.errors import DataError, StorageError, UsageError
from diffussm.export import card
from diffussm.model.counts import count
from diffussm.model.presets import resolve
from diffussm.naming import RunPaths
from diffussm.observe.report.gather import scores_of
from diffussm.sample import Painter

CARD = "README.md"


def export(
    cfg: Config,
    to: Path,
    *,
    images: int | None = None,
    licence: str = "",
    announce: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the weights of a run as a diffusers pipeline with a model card.

    Args:
        cfg: the run's config; `sample` says which weights, sampler and guided channels.
        to: folder to be made; its parent is made too.
        images: which checkpoint; None takes the newest that verifies.
        licence: SPDX identifier for the card; empty if unknown.
        announce: told which checkpoints are passed over, and why.

    Raises:
        UsageError: `to` exists and is not an empty folder.
        DataError: no usable checkpoint.
        StorageError: the folder cannot be written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"--to: {to} exists and is not an empty folder", "name a new folder, or remove this one")
    store = open_store(RunPaths(cfg.storage, cfg.name).root)
    painter = Painter.load(cfg, store, read_passport(cfg.data.latents), images, announce=announce)
    from diffussm.export.pipeline import DiffuSSMModel, DiffuSSMPipeline, scheduler

    latent, (width, depth) = painter.passport.latent, resolve(cfg.model)
    network = DiffuSSMModel(
        width=width,
        depth=depth,
        hourglass=cfg.model.hourglass,
        state=cfg.model.state,
        pos_embed=cfg.model.pos_embed.value,
        channels=latent.channels,
        height=latent.height,
        latent_width=latent.width,
        class_names=list(painter.passport.classes),
        guidance_channels=cfg.sample.guidance_channels,
        precision=cfg.train.precision.value,
    )
    network.load_state_dict(painter.model.state_dict())
    # The autoencoder is the very one that made the latents, files and all: Painter has held its digest against them.
    vae = painter.decoder.network
    pipe = DiffuSSMPipeline(network.eval(), vae, scheduler(cfg.sample.sampler, cfg.diffusion))
    story = card.Story(
        cfg=cfg,
        passport=painter.passport,
        images=painter.images,
        manifest=painter.manifest,
        counts=count(cfg.model, latent),
        weights=painter.kind,
        evaluations=evaluations(store),
        licence=licence,
    )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
        try:
            pipe.save_pretrained(scratch, safe_serialization=True)
            (scratch / CARD).write_text(card.write(story))
            scratch.chmod(0o755)
            if to.exists():
                to.rmdir()
            scratch.rename(to)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"--to: {to} cannot be written ({error})", "name a folder on a disk with room") from error
    return to


def evaluations(store: Store) -> list[Mapping[str, Any]]:
    """Scores of a run's stored evaluations, oldest first, as the report reads them.

    Raises:
        DataError: a file there is no result.
    """
    found: list[Mapping[str, Any]] = []
    for key in sorted(store.keys("evaluations/")):
        name = key.rpartition("/")[2]
        if not name.endswith(".json") or not name[:12].isdigit():
            continue
        try:
            found += scores_of(json.loads(store.read(key)), int(name[:12]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{key}: is no result of an evaluation ({error!r})", "remove the file and evaluate again"
            ) from error
    return found


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported folder to Hugging Face's hub, with the credentials of its own tools; returns its URL.

    A repository that is made is private unless `public`; one that exists keeps its visibility.

    Raises:
        StorageError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        hub = HfApi()
        hub.create_repo(repository, private=not public, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise StorageError(
            f"--push: {repository} was not uploaded ({type(error).__name__}: {error})",
            "log in with `hf auth login`, or upload the folder by hand",
        ) from error
