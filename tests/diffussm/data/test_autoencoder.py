from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffussm.config.schema import DataConfig, Source
from diffussm.data import autoencoder, images
from diffussm.errors import DataError
from tests.diffussm.data import sets

BUILTIN = "builtin:emoji-32"


@pytest.fixture(scope="module")
def builtin() -> autoencoder.Autoencoder:
    return autoencoder.load(BUILTIN)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.tiny_autoencoder(tmp_path_factory.mktemp("vae"))


def pictures(count: int, side: int = 8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_builtin_restores_emoji_from_latents_of_unit_variance(builtin: autoencoder.Autoencoder) -> None:
    source = images.open_source(DataConfig(source=Source.twemoji, resolution_px=32, limit=90))
    batch = np.stack([source.load(item) for item in source])
    mean, std = builtin.encode(batch)
    assert mean.shape == std.shape == (90, 4, 8, 8)
    assert (builtin.downsampling, builtin.channels) == (4, 4)
    moment = (mean**2 + std**2).mean((0, 2, 3)).sqrt()  # (4,)
    assert ((moment > 0.7) & (moment < 1.4)).all()
    error = builtin.decode(mean).astype(float) - batch
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 24


def test_latents_are_shifted_and_scaled(tiny: Path) -> None:
    from diffusers import AutoencoderKL

    loaded = autoencoder.load(str(tiny))
    assert (loaded.scaling_factor, loaded.shift, loaded.downsampling, loaded.channels) == (0.5, 0.25, 2, 2)
    batch = pictures(3)
    mean, std = loaded.encode(batch)
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        raw = AutoencoderKL.from_pretrained(tiny).encode(x).latent_dist
    torch.testing.assert_close(mean, (raw.mean - 0.25) * 0.5)
    torch.testing.assert_close(std, raw.std * 0.5)


class Fake(nn.Module):
    """Decodes latents to themselves and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(
            block_out_channels=(1,), latent_channels=3, scaling_factor=2.0, shift_factor=0.5
        )  # fmt: skip

    def decode(self, z: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=z)

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x / 0, std=x))


def test_decode_undoes_the_scaling_clamps_and_truncates() -> None:
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 2.0])
    latents = ((x - 0.5) * 2).view(1, 1, 1, 7).expand(1, 3, 1, 7)
    decoded = autoencoder.Autoencoder(Fake(), "fake", "").decode(latents)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (1, 1, 7, 3)
    # 127.5 x + 128: 0.5, 0.6275, 128, 191.75, 255.5; truncated, never rounded.
    assert decoded[0, 0, :, 1].tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_latents_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        autoencoder.Autoencoder(Fake(), "fake", "").encode(pictures(1))


def test_digest_follows_the_files(tiny: Path, tmp_path: Path) -> None:
    same = sets.tiny_autoencoder(tmp_path / "same")
    other = sets.tiny_autoencoder(tmp_path / "other", seed=1)
    scaled = sets.tiny_autoencoder(tmp_path / "scaled", scaling_factor=0.6)
    digests = [autoencoder.digest(str(folder)) for folder in (tiny, same, other, scaled)]
    assert digests[0] == digests[1] == autoencoder.load(str(tiny)).digest
    assert len(set(digests)) == 3


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (8, 8, 3), (1, 9, 8, 3), (1, 8, 9, 3)])
def test_wrong_pictures_are_refused(tiny: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"autoencoder: found|multiples of 2"):
        autoencoder.load(str(tiny)).encode(np.zeros(shape, np.uint8))


def test_unknown_builtin_names_the_known() -> None:
    with pytest.raises(DataError, match=r"'builtin:none'; built in are .*builtin:emoji-32"):
        autoencoder.load("builtin:none")


def test_incomplete_and_broken_folders_are_refused(tmp_path: Path) -> None:
    folder = sets.tiny_autoencoder(tmp_path / "vae")
    weights = folder / autoencoder.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be loaded"):
        autoencoder.load(str(folder))
    weights.unlink()
    with pytest.raises(DataError, match=f"lacks {autoencoder.WEIGHTS_FILE}"):
        autoencoder.digest(str(folder))


def test_hub_that_cannot_be_reached_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for spec in ("someone/some-vae", "/nowhere/at/all"):
        with pytest.raises(DataError, match="is no folder here and cannot be fetched"):
            autoencoder.digest(spec)


def test_write_leaves_only_the_two_files(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(sets.tiny_autoencoder(tmp_path / "a"))
    autoencoder.write(network, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [autoencoder.CONFIG_FILE, autoencoder.WEIGHTS_FILE]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    # Both were written by diffusers, whose file headers may differ in order.
    first, second = (autoencoder.load(str(tmp_path / name)) for name in "ab")
    assert torch.equal(first.encode(pictures(2))[0], second.encode(pictures(2))[0])
