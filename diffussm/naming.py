"""A run is its name: paths and ids that follow from it, the same on disk and in a bucket."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from diffussm.errors import ConfigError

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")


def check_run_name(name: str) -> str:
    """Return `name` if it can be a folder, an object prefix and a scheduler's job name; raise ConfigError if not."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"name: found {name!r}; allowed are 1 to 63 characters of a-z, 0-9, '.', '_' and '-', "
            "beginning and ending with a letter or digit",
            "choose another name, for example name=my-run",
        )
    return name


def is_remote(url: str) -> bool:
    """Whether `url` names an object store (it has a scheme other than file) rather than a local folder."""
    return "://" in url and not url.startswith("file://")


def join(base: str, *parts: str) -> str:
    """Join a folder or a bucket URL with relative parts, always with forward slashes."""
    return "/".join([base.rstrip("/"), *(p.strip("/") for p in parts)])


@dataclass(frozen=True)
class RunPaths:
    """Where everything of one run lies below `<storage>/<name>/`."""

    storage: str
    name: str

    @property
    def root(self) -> str:
        """The run's own folder or prefix."""
        return join(self.storage, check_run_name(self.name))

    @property
    def config(self) -> str:
        """The resolved config."""
        return join(self.root, "config.yaml")

    @property
    def metrics(self) -> str:
        """One JSON object a logged step."""
        return join(self.root, "metrics.jsonl")

    @property
    def events(self) -> str:
        """One JSON object for each start, save, fault and decision."""
        return join(self.root, "events.jsonl")

    @property
    def summary(self) -> str:
        """Written last by a finished run."""
        return join(self.root, "summary.json")

    @property
    def checkpoints(self) -> str:
        """Folder of all checkpoints."""
        return join(self.root, "checkpoints")

    def checkpoint(self, images: int) -> str:
        """Folder of the checkpoint taken after `images` training images."""
        return join(self.checkpoints, f"{images:012d}")

    def samples(self, images: int) -> str:
        """Sample grid of the weights after `images` training images."""
        return join(self.root, grid_key(images))

    def evaluation(self, images: int, name: str) -> str:
        """Result of one evaluation; `name` is the extractor's."""
        return join(self.root, "evaluations", f"{images:012d}-{name}.json")

    def attempt(self, number: int) -> str:
        """Logs, receipts and post-mortems of one start of the run."""
        return join(self.root, "attempts", str(number))


def grid_key(images: int) -> str:
    """Sample grid of the weights after `images` training images, within a run."""
    return f"samples/{images:012d}.png"


def power_name(sigma_rel: float) -> str:
    """Name of the power-function average of relative width `sigma_rel`, as in `sample.ema`: power-0.050."""
    return f"power-{sigma_rel:.3f}"


def weights_kind(average: str) -> str:
    """Kind of tensor in a checkpoint that holds an average: `none` is `master`, `plain` is `ema-plain`."""
    return "master" if average == "none" else f"ema-{average}"


def wandb_id(name: str) -> str:
    """W&B run id that follows from the run name, so that a requeued run continues the same curve."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def absolute(place: str) -> str:
    """A local folder as an absolute path, so that every process means the same one; a bucket's URL as it is."""
    return place if not place or is_remote(place) else str(Path(place.removeprefix("file://")).expanduser().absolute())
