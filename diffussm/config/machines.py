"""What graphics cards can do and cost. Every row says where its figures come from; section `plan` overrides them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from diffussm.config.schema_jobs import PlanConfig
from diffussm.errors import ConfigError


@dataclass(frozen=True)
class Machine:
    """One kind of card in nodes of eight, and the network between them."""

    name: str
    peak_flops: float
    """Dense bf16 operations a second, without sparsity."""
    peak_fp32_flops: float
    """fp32 operations a second outside the tensor cores."""
    memory_bytes: int
    link_bytes_per_s: float
    """Between cards of one node, each way, for each card."""
    network_bytes_per_s: float
    """Between nodes, each way, for each card."""
    efficiency: float
    """Fraction of the peak that the multiply-adds of a training step reach."""
    gpu_hour_price: float
    """US dollars for one card and hour."""
    source: str
    """Where peak, memory and links come from, and what the rest stands on."""

    def flops(self, bf16: bool) -> float:
        """The peak in that precision."""
        return self.peak_flops if bf16 else self.peak_fp32_flops


_EFFICIENCY = (
    "efficiency is stated, not measured by us: half to two thirds of the 0.30 that nanotron published for Llama-1B on "
    "8 H100 (302 TFLOP/s), since transforms and gates are bound by memory; a little more for A100, which moves twice "
    "as many bytes for each operation of its peak"
)
_PRICE = "price is a round figure for an on-demand cloud node; set plan.gpu_hour_price to yours"


def _source(sheet: str) -> str:
    return f"{sheet}; {_EFFICIENCY}; {_PRICE}"


GIB = 1 << 30
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("A100", 312e12, 19.5e12, 80 * GIB, 300e9, 25e9, 0.22, 2.0, _source("NVIDIA A100 80GB SXM data sheet")),
        Machine("H100", 989e12, 67e12, 80 * GIB, 450e9, 50e9, 0.18, 3.0, _source("NVIDIA H100 SXM data sheet")),
        Machine("H200", 989e12, 67e12, 141 * 10**9, 450e9, 50e9, 0.20, 3.8, _source("NVIDIA H200 SXM data sheet")),
        Machine("B200", 2250e12, 80e12, 180 * 10**9, 900e9, 50e9, 0.15, 6.0, _source("NVIDIA HGX B200 data sheet")),
    )
}


def machine(plan: PlanConfig) -> Machine:
    """The row that section `plan` names, with what it overrides.

    Raises:
        ConfigError: no such row.
    """
    row = MACHINES.get(plan.machine.upper())
    if row is None:
        raise ConfigError(
            f"plan.machine: found {plan.machine!r}; allowed are {', '.join(MACHINES)}",
            "choose the nearest and set plan.efficiency and plan.gpu_hour_price to yours",
        )
    return replace(
        row, efficiency=plan.efficiency or row.efficiency, gpu_hour_price=plan.gpu_hour_price or row.gpu_hour_price
    )


def of_card(name: str) -> Machine | None:
    """The row of a card by the name its driver gives, such as "NVIDIA H100 80GB HBM3"; None if no row is its. Pure."""
    words = name.upper().replace("-", " ").split()
    return next((row for key, row in MACHINES.items() if key in words), None)
