"""Pictures from a trained run: load a checkpoint's weights, draw latents, decode them, make the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor, nn

from diffussm.checkpoint import restore
from diffussm.checkpoint import weights as files
from diffussm.checkpoint.manifest import Manifest
from diffussm.checkpoint.store import Store
from diffussm.config.schema import Config, Precision
from diffussm.data import autoencoder
from diffussm.data.passport import Passport
from diffussm.diffusion.process import Process
from diffussm.diffusion.sampling import sample
from diffussm.errors import ConfigError, DataError
from diffussm.model import build_model
from diffussm.model.block import GroupedLinear
from diffussm.naming import weights_kind
from diffussm.observe.grid import grid

Pictures = npt.NDArray[np.uint8]

MOST_ROWS = 16
"""Classes of a grid for which nobody named any: a sheet of a thousand rows is drawn for an hour and seen by nobody."""


@dataclass(frozen=True)
class Painter:
    """A trained network with all that is needed to make pictures of its latents."""

    cfg: Config
    passport: Passport
    model: nn.Module
    process: Process
    decoder: autoencoder.Autoencoder
    images: int
    """Training images after which the weights stood."""
    device: torch.device
    kind: str
    """Which weights these are: `master`, or an average."""
    manifest: Manifest | None
    """Of the checkpoint they come from; None if they come from a file of weights."""
    digest: str
    """Of the weights, wherever they come from."""

    @staticmethod
    def load(
        cfg: Config,
        store: Store,
        passport: Passport,
        images: int | None = None,
        announce: Callable[[str], None] = lambda line: None,
    ) -> Painter:
        """Build the network with the weights of `sample.weights`, or those of a checkpoint that `sample.ema` names.

        Args:
            cfg: the run's config.
            store: the run's store.
            passport: of the latents it was trained on.
            images: which checkpoint; None takes the newest that verifies.
            announce: told which checkpoints are passed over, and why.

        Raises:
            ConfigError: a checkpoint is asked for, and a file of weights too.
            DataError: no such checkpoint or file, or it does not fit the model.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if cfg.sample.weights and images is not None:
            raise ConfigError(
                f"--checkpoint: found {images} and sample.weights={cfg.sample.weights}; allowed: one of the two",
                "the file holds weights of one time already",
            )
        if cfg.sample.weights:
            where, found, manifest = cfg.sample.weights, files.read(cfg.sample.weights), None
            weights, images, kind = found.tensors, found.images, found.metadata.get("kind", where)
        else:
            where, manifest = restore.choose(store, images, announce)
            kind = weights_kind(cfg.sample.ema)
            weights, images = restore.read_weights(store, where, manifest, kind), manifest.counters.images
        model = build_model(cfg.model, passport.latent)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if shapes != there:
            different = sorted(set(shapes.items()) ^ set(there.items()))
            raise DataError(
                f"{where}: does not fit the model of the config; for example {different[0][0]} differs",
                "use the run's own config: name its folder instead of a config file",
            )
        model.load_state_dict(weights)
        decoder = autoencoder.load(cfg.data.autoencoder).to(device)
        return Painter(
            cfg, passport, model.eval().to(device), Process(cfg.diffusion), decoder, images, device, kind, manifest,
            weights_digest(weights),
        )  # fmt: skip

    def cast(self) -> None:
        """Cast the dense weights to bf16 once, where drawing runs in bf16. For a painter that only draws."""
        if _is_bf16(self.cfg.train.precision, self.device):
            cast_dense(self.model)

    def paint(
        self, labels: Sequence[int], first_index: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> Pictures:
        """One picture for each label, (N, H, W, 3) uint8.

        Picture i depends on (sample.seed, first_index + i, label) and the weights, not on how many are drawn at once.
        """
        return self.decoder.decode(self.latents(labels, first_index, progress))

    def latents(
        self,
        labels: Sequence[int],
        first_index: int = 0,
        progress: Callable[[int, int], None] | None = None,
        *,
        initial: Tensor | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """One latent for each label, (N, C, h, w); `initial` and `watch` as in `diffusion.sampling.sample`."""
        cfg, latent = self.cfg.sample, self.passport.latent
        with torch.no_grad(), autocast(self.cfg.train.precision, self.device):
            return sample(
                self.model,
                self.process,
                torch.tensor(labels, dtype=torch.int64),
                (latent.channels, latent.height, latent.width),
                sampler=cfg.sampler,
                steps=cfg.steps,
                guidance=cfg.guidance,
                guidance_channels=cfg.guidance_channels,
                seed=cfg.seed,
                first_index=first_index,
                null_class=latent.classes,
                device=self.device,
                progress=progress,
                initial=initial,
                watch=watch,
            )  # (N, C, h, w)

    def batches(self, labels: Sequence[int], progress: Callable[[int, int], None] | None = None) -> Iterator[Pictures]:
        """Pictures for many labels, `sample.batch` at a time. `progress` is told (network passes done, in all)."""
        size, steps = self.cfg.sample.batch, self.cfg.sample.steps
        total = -(-len(labels) // size) * steps
        for first in range(0, len(labels), size):
            before = first // size * steps

            def tell(done: int, _: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, total)

            yield self.paint(labels[first : first + size], first, tell)


def grid_labels(passport: Passport, names: Sequence[str], per_class: int) -> tuple[list[str], list[int]]:
    """The rows of a grid and the label of each of its pictures; without `names` at most MOST_ROWS classes, evenly.

    Raises:
        ConfigError: a name is no class of the data.
    """
    known = len(passport.classes)
    shown = min(known, MOST_ROWS)
    rows = list(names) or [passport.classes[i * known // shown] for i in range(shown)]
    unknown = [name for name in rows if name not in passport.classes]
    if unknown:
        raise ConfigError(
            f"--classes: found {', '.join(unknown)}; allowed: {', '.join(passport.classes)}", "name some of those"
        )
    return rows, [passport.classes.index(name) for name in rows for _ in range(per_class)]


def weights_digest(weights: dict[str, Tensor]) -> str:
    """Digest of a state dict, the same wherever the weights lie."""
    total = xxhash.xxh3_128()
    for name, tensor in sorted(weights.items()):
        total.update(f"|{name}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def cast_dense(model: nn.Module) -> None:
    """Turn the dense layers' weights to bf16 once, as autocast would in each pass; the state-space ones stay fp32."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
        elif isinstance(module, GroupedLinear):  # its bias is added outside of what autocast casts
            module.weight.data = module.weight.data.to(torch.bfloat16)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """What a network of that precision is drawn under: bf16 on CUDA, and fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_is_bf16(precision, device))


def _is_bf16(precision: Precision, device: torch.device) -> bool:
    return precision is Precision.bf16 and device.type == "cuda"


def paint_grid(
    painter: Painter, names: Sequence[str] = (), progress: Callable[[int, int], None] | None = None
) -> tuple[bytes, Pictures]:
    """A PNG with one row a class and `sample.per_class` columns, and its pictures (N, H, W, 3), row by row."""
    rows, labels = grid_labels(painter.passport, names, painter.cfg.sample.per_class)
    pictures = np.concatenate(list(painter.batches(labels, progress)))
    scale = max(1, 64 // pictures.shape[1])  # small pictures are enlarged, so that a person can see them
    return grid(pictures, rows, painter.passport.credit, scale), pictures
