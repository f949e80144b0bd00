import pytest

from diffussm.config.schema import ModelConfig
from diffussm.errors import ConfigError
from diffussm.model.presets import PRESETS, resolve


def test_preset_gives_the_size_and_the_config_overrides_it() -> None:
    assert resolve(ModelConfig(preset="XL")) == (1152, 29)
    assert resolve(ModelConfig(preset="S", width=100)) == (100, 12)
    assert resolve(ModelConfig(preset="S", depth=3)) == (384, 3)


@pytest.mark.parametrize(("typed", "near"), [("xl", "XL"), ("emojis", "emoji"), ("Tiny", "tiny"), ("DiT-XL", "XL")])
def test_unknown_preset_names_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"found '{typed}'; allowed are {', '.join(PRESETS)}") as refused:
        resolve(ModelConfig(preset=typed))
    assert f"did you mean '{near}'" in refused.value.remedy
