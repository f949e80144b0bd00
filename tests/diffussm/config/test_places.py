from __future__ import annotations

from pathlib import Path

import pytest

from diffussm.config.places import absolutely
from diffussm.config.schema import Config, DataConfig


def test_local_places_become_absolute_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(latents="l", images="p", labels="l.csv", more=["512=more", "1024=s3://bucket/l"])
    cfg = absolutely(Config(name="r", data=data))
    assert (data.latents, data.images, data.labels) == (f"{tmp_path}/l", f"{tmp_path}/p", f"{tmp_path}/l.csv")
    assert data.more == [f"512={tmp_path}/more", "1024=s3://bucket/l"]
    assert (data.cache, cfg.train.start_from, cfg.slurm.logs and Path(cfg.slurm.logs).is_absolute()) == ("", "", True)
    assert data.autoencoder == "builtin:emoji-32"
    data.autoencoder = "vae"
    assert absolutely(cfg).data.autoencoder == "vae"  # may be an id on the hub
    (tmp_path / "vae").mkdir()
    assert absolutely(cfg).data.autoencoder == f"{tmp_path}/vae"
