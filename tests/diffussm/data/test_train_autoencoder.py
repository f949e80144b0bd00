from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffussm.data import autoencoder, twemoji
from diffussm.data import train_autoencoder as trainer


@pytest.fixture(scope="module")
def picture_tensor() -> Tensor:
    """Four plain colours with a random edge, (64, 3, 32, 32)."""
    rng = np.random.default_rng(0)
    pictures = np.repeat(rng.integers(0, 256, (64, 3, 1, 1), dtype=np.uint8), 32, 2).repeat(32, 3)
    for picture in pictures:
        picture[:, :, rng.integers(4, 28) :] = rng.integers(0, 256)
    return torch.from_numpy(pictures)


def test_normalising_gives_unit_latents_and_the_same_pictures(picture_tensor: Tensor) -> None:
    torch.manual_seed(0)
    network = trainer.new_network()
    x = picture_tensor.float() / 127.5 - 1
    with torch.no_grad():
        # Far from unit variance, and different in each channel.
        network.quant_conv.weight.mul_(5)
        network.quant_conv.bias.copy_(torch.tensor([1.0, -2, 3, 0, -1, 0.5, 0, -3]))
        before = network.encode(x).latent_dist
        noise = torch.randn_like(before.mean)
        picture_before = network.decode(before.mean + before.std * noise).sample
        trainer.normalise(network, picture_tensor)
        after = network.encode(x).latent_dist
        picture_after = network.decode(after.mean + after.std * noise).sample
    torch.testing.assert_close(picture_after, picture_before, rtol=1e-3, atol=1e-4)
    mean = after.mean.mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-4)
    second = (after.mean**2 + after.std**2).mean((0, 2, 3))
    torch.testing.assert_close(second, torch.ones(4), rtol=1e-3, atol=0)


def test_batches_are_in_range_and_half_plain(picture_tensor: Tensor) -> None:
    large = torch.randint(0, 256, (64, 3, 72, 72), dtype=torch.uint8)
    rng = np.random.default_rng(0)
    plain = {tuple(p.flatten().tolist()) for p in torch.cat([picture_tensor, picture_tensor.flip(-1)])}
    for batch in itertools.islice(trainer.batches(picture_tensor, large, rng), 5):
        assert batch.shape == (trainer.BATCH, 3, 32, 32)
        assert batch.abs().max() <= 1
        as_bytes = ((batch + 1) * 127.5).round().to(torch.uint8)
        assert all(tuple(p.flatten().tolist()) in plain for p in as_bytes[: trainer.BATCH // 2])
        grey = as_bytes[trainer.BATCH // 2]
        assert torch.equal(grey[0], grey[1])


def test_skin_tones_are_held_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict(itertools.islice(sorted(twemoji.picture_files().items()), 900, 1300))
    monkeypatch.setattr(twemoji, "picture_files", lambda: files)
    small, large, held_out = trainer.read_pictures()
    assert len(small) == len(large)
    assert len(small) + len(held_out) == len(files)
    bare = {tuple(c for c in code if c not in trainer._TONES) for code in files}
    assert len(bare) < len(files) / 2
    assert 0 < len(held_out) < len(files) / 5


def test_training_improves_and_writes_a_loadable_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture_tensor: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    large = torch.nn.functional.interpolate(picture_tensor.float(), size=72).to(torch.uint8)
    monkeypatch.setattr(trainer, "read_pictures", lambda: (picture_tensor, large, picture_tensor[:16]))
    torch.manual_seed(0)
    before = trainer.psnr_db(trainer.new_network(), picture_tensor[:16])
    trainer.train(total_images=20 * trainer.BATCH, folder=tmp_path / "out", seed=0, start=None, peak_lr=2e-3)
    loaded = autoencoder.load(str(tmp_path / "out"))
    mean, _ = loaded.encode(picture_tensor[:16].permute(0, 2, 3, 1).contiguous().numpy())
    error = loaded.decode(mean).astype(float) - picture_tensor[:16].permute(0, 2, 3, 1).numpy()
    after = 10 * np.log10(255**2 / np.square(error).mean())
    assert after > before + 1
    assert "image 320: held-out" in capsys.readouterr().out
