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


def test_per_channel_mean_and_deviation_take_the_place_of_the_shift(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    mean, std = [0.5, -1.0], [2.0, 0.25]
    folder = sets.tiny_autoencoder(tmp_path / "a", latents_mean=mean, latents_std=std)
    loaded = autoencoder.load(str(folder))
    traits = autoencoder.describe(str(folder))
    assert traits == loaded.traits
    assert (traits.latents_mean, traits.latents_std, traits.shift) == ((0.5, -1.0), (2.0, 0.25), 0.0)
    batch = pictures(3)
    z, deviation = loaded.encode(batch)
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        network = AutoencoderKL.from_pretrained(folder)
        raw = network.encode(x).latent_dist
        m, s = torch.tensor(mean).view(1, 2, 1, 1), torch.tensor(std).view(1, 2, 1, 1)
        torch.testing.assert_close(z, (raw.mean - m) / s * 0.5)
        torch.testing.assert_close(deviation, raw.std / s * 0.5)
        expected = (127.5 * network.decode(raw.mean).sample + 128).clamp(0, 255).to(torch.uint8)
    assert np.abs(loaded.decode(z).astype(int) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    broken = sets.tiny_autoencoder(tmp_path / "b", latents_mean=mean, latents_std=[1.0])
    with pytest.raises(DataError, match="states latents_mean"):
        autoencoder.describe(str(broken))


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderDC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_without_a_posterior(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    import diffusers

    folder = sets.deterministic_autoencoder(tmp_path / "a", kind)
    loaded = autoencoder.load(str(folder)).in_precision(dtype)
    traits = autoencoder.describe(str(folder))
    assert traits == loaded.traits
    assert traits.deterministic
    batch = pictures(2, side=4 * traits.downsampling)
    mean, std = loaded.encode(batch)
    assert mean.shape == std.shape == (2, traits.channels, 4, 4)
    assert mean.dtype == std.dtype == torch.float32
    assert not std.any()
    x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        encoded = getattr(diffusers, kind).from_pretrained(folder).encode(x)
    raw = encoded.latents if kind == "AutoencoderTiny" else encoded.latent
    torch.testing.assert_close(
        mean, raw * 0.5, **({"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1})
    )
    assert loaded.decode(mean).shape == batch.shape


def test_other_classes_are_refused(tmp_path: Path) -> None:
    folder = sets.tiny_autoencoder(tmp_path / "a")
    config = folder / autoencoder.CONFIG_FILE
    config.write_text(config.read_text().replace("AutoencoderKL", "VQModel"))
    for look in (autoencoder.load, autoencoder.describe):
        with pytest.raises(DataError, match="an VQModel; allowed are AutoencoderKL, AutoencoderTiny, AutoencoderDC"):
            look(str(folder))


def test_an_old_config_has_the_defaults_of_its_class(tmp_path: Path) -> None:
    """sd-vae-ft-ema's config names neither class nor factor."""
    import json

    folder = sets.tiny_autoencoder(tmp_path / "a")
    config = folder / autoencoder.CONFIG_FILE
    old = json.loads(config.read_text())
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        del old[key]
    config.write_text(json.dumps(old))
    traits = autoencoder.describe(str(folder))
    assert (traits.scaling_factor, traits.shift, traits.latents_std) == (0.18215, 0.0, ())
    assert autoencoder.load(str(folder)).traits == traits
