"""The passport of a set of latents: what they are, how they were made, and whether a config may use them.

It lies beside the shards as `passport.json` and is written last: shards without a passport do not count.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from diffussm.config.schema import DataConfig
from diffussm.errors import DataError
from diffussm.model.presets import LatentShape

FILE = "passport.json"
VERSION = 1
CROP = "adm-center"
"""Name of the crop in `images.center_crop`; another recipe gets another name."""
DTYPE = "float16"
_SHOWN = 5
_TUPLES = {"wanted_classes", "classes", "class_counts", "latent_shape", "columns", "latents_mean", "latents_std"}


@dataclass(frozen=True)
class Skipped:
    """One picture that could not be decoded and has no latent."""

    name: str
    reason: str
    kind: str = "undecodable"
    """One word for reports: see `picture.decode`."""


@dataclass(frozen=True)
class Passport:
    """Everything about a set of latents that is not in the shards themselves."""

    source: str
    """`data.source` of the pictures."""
    wanted_classes: tuple[str, ...]
    """`data.classes` as asked for; empty asked for all."""
    limit: int
    """`data.limit` as asked for."""
    resolution_px: int
    """Side of the pictures."""
    crop: str
    """Recipe of the crop."""
    classes: tuple[str, ...]
    """Class names in label order."""
    class_counts: tuple[int, ...]
    """Latents of each class."""
    number: int
    """Latents in all."""
    skipped: tuple[Skipped, ...]
    """Pictures without a latent."""
    credit: str
    """Line to be shown under pictures of this source, and of what was learnt from it; may be empty."""
    autoencoder: str
    """`data.autoencoder` that made the latents."""
    autoencoder_digest: str
    """SHA-256 of its files."""
    downsampling: int
    """Side of a picture over side of its latent."""
    scaling_factor: float
    """Factor already applied to the latents."""
    shift: float
    """Value already taken off before scaling."""
    dtype: str
    """Number format of the moments in the shards."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one latent."""
    latent_mean: float
    """Mean over all elements of all latents; about 0 in a well scaled set."""
    latent_std: float
    """Standard deviation over all elements, posterior noise included; about 1 in a well scaled set."""
    index_digest: str
    """SHA-256 of the shards' index, which holds the digest of each shard."""
    version: int = VERSION
    """Version of this format."""
    images: str = ""
    """`data.images` as it was; the pictures may have moved since."""
    labels: str = ""
    """`data.labels` as asked for."""
    encoder_precision: str = "fp32"
    """Arithmetic of the encoder."""
    stored: str = "moments"
    """`data.stored`: moments of the posterior, or one sample, kept in the columns of the mean."""
    columns: tuple[str, ...] = ("mean", "std", "mean_flip", "std_flip")
    """The shards' columns beside id and label; a deviation that is missing is 0."""
    latents_mean: tuple[float, ...] = ()
    """Value already taken off each channel, and"""
    latents_std: tuple[float, ...] = ()
    """what each channel was divided by, where the autoencoder states them; `shift` is 0 then."""
    converted: dict[str, int] = dataclasses.field(default_factory=dict)
    """Pictures that were not plain RGB, by what was done to them (see `picture.oddities`)."""
    plan_digest: str = ""
    """SHA-256 over settings and names of all pictures; tells whether a source still is what it was."""

    @property
    def latent(self) -> LatentShape:
        """Shape of a latent and number of classes, as the network is built for."""
        return LatentShape(*self.latent_shape, classes=len(self.classes))

    def remarks(self) -> list[str]:
        """Lines about pictures that were converted and that were skipped, the first of each kind by name."""
        lines = []
        if self.converted:
            lines.append("converted: " + ", ".join(f"{count:,} {word}" for word, count in self.converted.items()))
        for kind in sorted({skipped.kind for skipped in self.skipped}):
            of_kind = [skipped for skipped in self.skipped if skipped.kind == kind]
            more = f" and {len(of_kind) - _SHOWN:,} more" if len(of_kind) > _SHOWN else ""
            lines.append(f"skipped, {kind}: {', '.join(each.name for each in of_kind[:_SHOWN])}{more}")
        return lines

    def summary(self) -> dict[str, Any]:
        """What identifies the set, as plain data without the lists that grow with it."""
        found = dataclasses.asdict(self)
        for name in ("classes", "class_counts", "wanted_classes", "skipped"):
            del found[name]
        return found | {"number_of_classes": len(self.classes), "number_skipped": len(self.skipped)}

    def to_json(self) -> str:
        """The passport as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes, where: str) -> Passport:
        """Read what `to_json` wrote; `where` names the file in errors. Raises DataError when it is no passport."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["version"] != VERSION:
                raise DataError(
                    f"{where}: found a passport of version {values['version']}; this program reads version {VERSION}",
                    "make the latents again with `diffussm prepare` under another data.latents",
                )
            values["skipped"] = tuple(Skipped(**entry) for entry in values["skipped"])
            for key in _TUPLES & values.keys():
                values[key] = tuple(values[key])
            return Passport(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{where}: is no passport ({type(error).__name__}: {error})",
                "remove the latents and make them again with `diffussm prepare`",
            ) from error

    def check(self, cfg: DataConfig, autoencoder_digest: str) -> None:
        """Raise DataError, naming the field, unless latents with this passport are what `cfg` asks for.

        Args:
            cfg: the data section of a config.
            autoencoder_digest: digest of the files that `cfg.autoencoder` names, from `autoencoder.digest`.
        """
        pairs: list[tuple[str, Any, Any]] = [
            ("data.source", self.source, cfg.source.value),
            ("data.resolution_px", self.resolution_px, cfg.resolution_px),
            ("data.classes", list(self.wanted_classes), list(cfg.classes)),
            ("data.limit", self.limit, cfg.limit),
            ("data.autoencoder (digest)", self.autoencoder_digest, autoencoder_digest),
            ("data.labels", self.labels, cfg.labels),
            ("data.encoder_precision", self.encoder_precision, cfg.encoder_precision.value),
            ("data.stored", self.stored, cfg.stored.value),
            ("crop", self.crop, CROP),
            ("dtype", self.dtype, DTYPE),
        ]
        for key, made_with, wanted in pairs:
            if made_with != wanted:
                raise DataError(
                    f"{key}: the latents at {cfg.latents} were made with {made_with!r}, the config asks for {wanted!r}",
                    "set data.latents to another place and run `diffussm prepare`, or change the config to match",
                )
