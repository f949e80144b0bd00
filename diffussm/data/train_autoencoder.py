"""Train the small autoencoder that ships with the package: `python -m diffussm.data.train_autoencoder`.

A KL-VAE of diffusers' class, downsampling 4, 4 latent channels, 0.4M parameters. It learns on all Twemoji pictures,
half of them disturbed (zoomed, grey, inverted, colours swapped) so that the decoder serves other small pictures too.
One picture in twenty is held out, all skin tones of an emoji together. About 25 minutes of one CPU core.
The weights in the package saw 53,000 images: two runs cut short at high rates (30,000 and 3,300), then `--start` with
20,000 more from 1.5e-3 down to zero. Held-out pictures come back at 24.8 dB, Fashion-MNIST, never seen, at 23.3 dB.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffussm.data import autoencoder, images, twemoji

SIDE_PX = 32
ZOOM_PX = 72
"""Side of the package's pictures, from which zoomed training crops are cut."""
BATCH = 16
PEAK_LR = 2e-3
EMA = 0.998
WARMUP_STEPS = 100
KL_WEIGHT = 2e-3
"""Weight of the mean KL divergence of a latent element against the mean error of a pixel value."""
EDGE_WEIGHT = 1.0
SAVE_INTERVAL_S = 120.0
_TONES = tuple(int(tone, 16) for tone in twemoji.TONES if tone)


def new_network(start: Path | None = None) -> Any:
    """An AutoencoderKL of the shipped shape: untrained, or with the weights in the folder `start`."""
    from diffusers import AutoencoderKL

    network: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE_PX,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
    )
    if start is not None:
        # Only the weights: the config of a loaded network would name the folder it came from.
        network.load_state_dict(AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32).state_dict())
    return network


def read_pictures() -> tuple[Tensor, Tensor, Tensor]:
    """Training pictures at SIDE_PX, the same at ZOOM_PX, and held-out ones at SIDE_PX: uint8 (n, 3, side, side)."""
    small, large, held_out = [], [], []
    groups: dict[tuple[int, ...], int] = {}
    for code, path in sorted(twemoji.picture_files().items()):
        # Skin tones of one emoji differ by little: all or none of them are held out.
        group = groups.setdefault(tuple(c for c in code if c not in _TONES), len(groups))
        with Image.open(path) as image:
            rgb = images.to_rgb(image)
        picture = np.asarray(images.center_crop(rgb, SIDE_PX))  # (32, 32, 3)
        if group % 20 == 7:
            held_out.append(picture)
        else:
            small.append(picture)
            large.append(np.asarray(images.center_crop(rgb, ZOOM_PX)))  # (72, 72, 3)
    return _channels_first(small), _channels_first(large), _channels_first(held_out)


def batches(small: Tensor, large: Tensor, rng: np.random.Generator) -> Iterator[Tensor]:
    """Endless batches (BATCH, 3, 32, 32) in [-1, 1], half plain and half disturbed; all are mirrored by chance."""
    half = BATCH // 2
    while True:
        plain = small[rng.integers(len(small), size=half)].float()  # (half, 3, 32, 32)
        crop_px = int(rng.integers(SIDE_PX, ZOOM_PX + 1))
        top, left = rng.integers(0, ZOOM_PX - crop_px + 1, size=2)
        zoomed = large[rng.integers(len(large), size=half), :, top : top + crop_px, left : left + crop_px].float()
        zoomed = F.interpolate(zoomed, size=(SIDE_PX, SIDE_PX), mode="bicubic", antialias=True).clamp(0, 255)
        quarter = half // 4
        zoomed[:quarter] = zoomed[:quarter].mean(1, keepdim=True)  # Grey.
        zoomed[quarter // 2 : 2 * quarter] = 255 - zoomed[quarter // 2 : 2 * quarter]  # Inverted; some of them grey.
        zoomed[2 * quarter :] = zoomed[2 * quarter :, rng.permutation(3)]
        batch = torch.cat([plain, zoomed]) / 127.5 - 1  # (BATCH, 3, 32, 32)
        mirrored = torch.from_numpy(rng.random(BATCH) < 0.5)
        yield torch.where(mirrored[:, None, None, None], batch.flip(-1), batch).contiguous(
            memory_format=torch.channels_last
        )


def loss(network: Any, batch: Tensor) -> Tensor:
    """L1 + squared + edge error of the reconstruction, plus the weighted KL divergence; a scalar."""
    posterior = network.encode(batch).latent_dist
    error = network.decode(posterior.sample()).sample - batch  # (B, 3, 32, 32)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


@torch.no_grad()
def normalise(network: Any, pictures: Tensor) -> None:
    """Fold each latent channel's mean and standard deviation over `pictures` into the 1x1 convolutions, in place.

    Encoder and decoder then speak latents with zero mean and unit deviation in every channel; reconstructions are
    unchanged. With W z + b the last layer of the encoder and V, c the first of the decoder, z' = (z - m) / s needs
    rows of W and b scaled by 1/s (log-variance: shifted by -2 log s), columns of V scaled by s, and c + V m.
    """
    means, squares = [], []
    for part in pictures.float().div(127.5).sub(1).split(256):
        posterior = network.encode(part).latent_dist
        means.append(posterior.mean)
        squares.append(posterior.mean**2 + posterior.var)
    m = torch.cat(means).mean((0, 2, 3))  # (4,)
    s = (torch.cat(squares).mean((0, 2, 3)) - m**2).sqrt()  # (4,)
    encoder, decoder = network.quant_conv, network.post_quant_conv
    channels = len(m)
    encoder.weight[:channels] /= s[:, None, None, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - m) / s
    encoder.bias[channels:] -= 2 * s.log()
    decoder.bias += decoder.weight[:, :, 0, 0] @ m
    decoder.weight *= s[None, :, None, None]


@torch.no_grad()
def psnr_db(network: Any, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of decode(mean of encode) over uint8 pictures (n, 3, h, w)."""
    total = 0.0
    for part in pictures.split(256):
        x = part.float() / 127.5 - 1  # (b, 3, h, w)
        restored = network.decode(network.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        total += float(((restored - x) / 2).square().mean((1, 2, 3)).sum())
    return -10 * math.log10(total / len(pictures))


def save(network: nn.Module, pictures: Tensor, folder: Path) -> None:
    """Write the normalised network in half precision to `folder` as a diffusers folder."""
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    normalise(network, pictures)
    autoencoder.write(network.half(), folder)


def train(total_images: int, folder: Path, seed: int, start: Path | None, peak_lr: float) -> None:
    """Train on `total_images` pictures, saving the averaged weights to `folder` every two minutes and at the end."""
    torch.manual_seed(seed)
    small, large, held_out = read_pictures()
    network = new_network(start).to(memory_format=torch.channels_last)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak_lr, weight_decay=1e-4)
    last_save = time.monotonic()
    steps = total_images // BATCH
    for step, batch in enumerate(itertools.islice(batches(small, large, np.random.default_rng(seed)), steps)):
        # Short warm-up, then a half cosine to zero.
        lr = peak_lr * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        value = loss(network, batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        if time.monotonic() - last_save > SAVE_INTERVAL_S or step + 1 == steps:
            last_save = time.monotonic()
            save(average, small[::4], folder)
            print(f"image {(step + 1) * BATCH}: held-out {psnr_db(average, held_out):.2f} dB, saved", flush=True)
        elif step % 100 == 0:
            print(f"image {(step + 1) * BATCH}: loss {value.item():.4f}", flush=True)


def _channels_first(pictures: list[npt.NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m diffussm.data.train_autoencoder", description=__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="length of the training")
    parser.add_argument(
        "--out", type=Path, default=autoencoder.BUILTIN_FOLDER / "emoji-32", help="folder for the weights"
    )
    parser.add_argument("--start", type=Path, default=None, help="folder of weights to go on from")
    parser.add_argument("--lr", type=float, default=PEAK_LR, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.images, args.out, args.seed, args.start, args.lr)


if __name__ == "__main__":
    main()
