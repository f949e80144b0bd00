"""The only door to Weights & Biases: one W&B run for each run name, however often it is started again.

Offline unless asked otherwise; `wandb sync` then sends what was kept. W&B gets pointers to checkpoints, never their
bytes, and of the config only what decides results: sections that may name an environment are left out.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any, Literal

import psutil
from PIL import Image

from diffussm.config.explain import PRIVATE_SECTIONS
from diffussm.config.schema import WandbMode
from diffussm.naming import is_remote, wandb_id
from diffussm.observe.mirror import Mirror
from diffussm.observe.scalars import Urgency, alert, saved_checkpoint, scalars
from diffussm.observe.sinks import Record

Mode = Literal["online", "offline", "disabled"]


def wandb_mode(asked: WandbMode) -> Mode:
    """`online`, `offline` or `disabled`: what was asked, or with `auto` what the user's environment says.

    The environment says online when WANDB_MODE is online, or when it is unset and WANDB_API_KEY is set.
    """
    said = os.environ.get("WANDB_MODE", "").lower() if asked is WandbMode.auto else asked.value
    match said:
        case "online" | "offline" | "disabled":
            return said
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


class Wandb:
    """Curves over images, pictures, alerts and pointers to checkpoints in one W&B run.

    Args:
        name: of the run; the W&B id follows from it.
        root: the run's folder or URL, which checkpoints are named by.
        mode: online or offline.
        about: what is to be known of the run (config, code, data) as nested plain data.
        mirror: the local folder that takes W&B's files.
        first_step: a number no smaller than W&B has counted in earlier starts: W&B drops what goes back.
    """

    def __init__(
        self, name: str, project: str, root: str, mode: Mode, about: Mapping[str, Any], mirror: Mirror, first_step: int
    ) -> None:  # fmt: skip
        import wandb

        self._wandb, self._mirror, self._step = wandb, mirror, first_step
        self._root = root if is_remote(root) else f"file://{root.removeprefix('file://')}"
        mirror.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=60,
            disable_git=True,  # a remote's address may hold a token
            disable_code=True,
            x_disable_meta=True,  # the command line and the user's name; `about` says what matters
            x_save_requirements=False,
        )
        self._run = wandb.init(
            id=wandb_id(name), name=name, project=project, mode=mode, resume="allow", settings=settings,
            dir=str(mirror.folder.parent),  # W&B adds the last part itself
            config={key: value for key, value in about.items() if key not in PRIVATE_SECTIONS},
        )  # fmt: skip
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")
        self._name = name

    def take(self, record: Record) -> None:
        """Log numbers or a picture at the record's images; alert; point to a checkpoint."""
        numbers = scalars(record)
        if numbers:
            self._log(record["images"], numbers)
        elif record.get("kind") == "picture":
            with Image.open(io.BytesIO(record["png"])) as picture:
                shown = self._wandb.Image(picture, caption=record.get("caption") or None)
                self._log(record["images"], {str(record["name"]): shown})
        found = alert(record)
        if found is not None:
            title, text, urgency = found
            level = "ERROR" if urgency is Urgency.ERROR else "WARN"
            self._run.alert(title=f"{self._name}: {title}", text=text or title, level=level)
        checkpoint = saved_checkpoint(record)
        if checkpoint is not None:
            self._point_to(checkpoint, record)
            self._mirror.try_push()

    def close(self) -> None:
        """Finish the W&B run and keep its files with the run."""
        self._run.finish()
        self._wandb.teardown()  # finish alone may return before the last bytes are in the file
        self._mirror.try_push()

    def _log(self, images: int, values: Mapping[str, Any]) -> None:
        self._step += 1
        self._run.log({"images": images, **values}, step=self._step)

    def _point_to(self, folder: str, record: Record) -> None:
        about = {key: record[key] for key in ("images", "permanent", "bytes") if key in record}
        artifact = self._wandb.Artifact(f"{self._name}-checkpoint", type="checkpoint", metadata=about)
        artifact.add_reference(f"{self._root}/{folder}", name="checkpoint", checksum=False)
        self._run.log_artifact(artifact, aliases=[f"images-{record['images']}"])


def abandon() -> None:
    """End W&B's own process, which else would keep this one from ending; what it wrote can be synced later."""
    for child in psutil.Process().children():
        if "wandb-core" in child.name():
            child.kill()


def step_after(lines: int, starts: int) -> int:
    """A W&B step that no earlier start of the run has reached. Pure.

    Every W&B step has a line in one of the run's journals; a killed start may lose its last lines in a bucket.

    Args:
        lines: in all journals of the run.
        starts: so far.
    """
    return lines + 64 * starts
