from __future__ import annotations

import json
from dataclasses import replace

import pytest

from diffussm.config.schema import DataConfig, Source
from diffussm.data.passport import Passport, Skipped
from diffussm.errors import DataError

PASSPORT = Passport(
    source="folder", wanted_classes=("cat", "dog"), limit=5, resolution_px=32, crop="adm-center",
    classes=("cat", "dog"),
    class_counts=(3, 2), number=5, skipped=(Skipped("x.png", "truncated"),), credit="someone", autoencoder="a",
    autoencoder_digest="d", downsampling=4, scaling_factor=0.5, shift=0.1, dtype="float16", latent_shape=(4, 8, 8),
    latent_mean=0.0, latent_std=1.0, index_digest="i",
)  # fmt: skip
WANTED = DataConfig(source=Source.folder, latents="l", resolution_px=32, classes=["cat", "dog"], limit=5)


def test_json_round_trip_and_latent_shape() -> None:
    assert Passport.from_json(PASSPORT.to_json(), "here") == PASSPORT
    latent = PASSPORT.latent
    assert (latent.channels, latent.height, latent.width, latent.classes) == (4, 8, 8, 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}'])
def test_what_is_no_passport_is_refused_by_name(text: str) -> None:
    with pytest.raises(DataError, match="there"):
        Passport.from_json(text, "there")
    missing = json.loads(PASSPORT.to_json())
    del missing["classes"]
    with pytest.raises(DataError, match="there"):
        Passport.from_json(json.dumps(missing), "there")


def test_latents_that_fit_are_accepted() -> None:
    PASSPORT.check(WANTED, "d")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"source": "twemoji"}, "data.source"),
        ({"resolution_px": 64}, "data.resolution_px"),
        ({"wanted_classes": ("cat",)}, "data.classes"),
        ({"limit": 0}, "data.limit"),
        ({"autoencoder_digest": "other"}, "data.autoencoder"),
        ({"crop": "other"}, "crop"),
        ({"dtype": "float32"}, "dtype"),
    ],
)
def test_each_mismatch_names_its_key_and_both_values(change: dict[str, object], key: str) -> None:
    with pytest.raises(DataError) as caught:
        replace(PASSPORT, **change).check(WANTED, "d")
    assert caught.value.message.startswith(key)
    assert "config asks for" in caught.value.message
    assert caught.value.remedy
