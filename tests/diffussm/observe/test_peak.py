from __future__ import annotations

import pytest
import torch

from diffussm.observe import peak as module
from diffussm.observe.peak import measured, peak


def test_a_cpu_is_measured() -> None:
    found = peak(torch.device("cpu"), bf16=True)
    assert "measured" in found.source
    assert 1e8 < found.macs_per_s < 1e14


def test_a_known_card_is_what_its_sheet_says_and_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for cards that this machine lacks: only their names are made up."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = peak(torch.device("cuda", 0), bf16=True)
    assert found.macs_per_s == 989e12 / 2
    assert found.source == "data sheet of H100"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(module, "measured", lambda device, dtype: 1.0 if dtype is torch.bfloat16 else 2.0)
    assert peak(torch.device("cuda", 0), bf16=True).macs_per_s == 1.0


def test_a_product_of_ones_takes_time() -> None:
    assert measured(torch.device("cpu"), torch.float32) < float("inf")
