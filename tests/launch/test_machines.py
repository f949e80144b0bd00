"""The table of cards."""

from __future__ import annotations

import pytest

from diffussm.config.schema import PlanConfig
from diffussm.errors import ConfigError
from launch.machines import MACHINES, machine


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
