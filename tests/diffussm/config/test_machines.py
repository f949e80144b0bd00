"""The table of cards."""

from __future__ import annotations

import pytest

from diffussm.config.machines import MACHINES, machine, of_card
from diffussm.config.schema import PlanConfig
from diffussm.errors import ConfigError


@pytest.mark.parametrize("row", MACHINES.values(), ids=lambda row: row.name)
def test_every_row_is_plausible_and_names_its_source(row) -> None:  # type: ignore[no-untyped-def]
    assert 0 < row.efficiency < 1
    assert row.peak_fp32_flops < row.peak_flops
    assert row.network_bytes_per_s <= row.link_bytes_per_s
    assert "data sheet" in row.source
    assert "not measured by us" in row.source


def test_the_config_overrides_efficiency_and_price() -> None:
    row = machine(PlanConfig(machine="h200"))
    assert row == MACHINES["H200"]
    mine = machine(PlanConfig(machine="H200", efficiency=0.4, gpu_hour_price=1.5))
    assert (mine.efficiency, mine.gpu_hour_price, mine.peak_flops) == (0.4, 1.5, row.peak_flops)


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(ConfigError, match="A100, H100, H200, B200"):
        machine(PlanConfig(machine="TPU"))


def test_a_card_is_found_by_the_name_of_its_driver() -> None:
    for name, row in (("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA B200", "B200")):
        found = of_card(name)
        assert found is not None
        assert found.name == row
    assert of_card("NVIDIA GeForce RTX 4090") is None
