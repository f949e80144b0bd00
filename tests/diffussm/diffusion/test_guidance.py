"""Guidance on a network whose output is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffussm.diffusion.guidance import guided_output
from diffussm.errors import ConfigError

NULL = 10


class Recorder:
    """Output depends on x, t, the label and the channel; calls are kept."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((x, t, y))
        return self.output(x, t, y)

    @staticmethod
    def output(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        channel = torch.arange(1.0, 2 * x.shape[1] + 1).view(1, -1, 1, 1)
        per_sample = (y.float() ** 2 + t.float() / 7).view(-1, 1, 1, 1)
        return torch.cat([x, x.cos()], dim=1) + channel * per_sample


X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
STEPS, LABELS = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
CONDITIONAL = Recorder.output(X, STEPS, LABELS)
UNCONDITIONAL = Recorder.output(X, STEPS, torch.full((3,), NULL))


def guided(scale: float, channels: int, model: Recorder | None = None) -> Tensor:
    return guided_output(model or Recorder(), X, STEPS, LABELS, scale=scale, channels=channels, null_class=NULL)


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
@pytest.mark.parametrize(("channels", "first_free"), [(0, 4), (1, 1), (3, 3), (4, 4)])
def test_first_channels_are_extrapolated_and_the_rest_conditional(scale: float, channels: int, first_free: int) -> None:
    found = guided(scale, channels)
    assert found.shape == (3, 8, 2, 2)
    expected = (1 - scale) * UNCONDITIONAL + scale * CONDITIONAL
    torch.testing.assert_close(found[:, :first_free], expected[:, :first_free], rtol=1e-4, atol=1e-3)
    assert torch.equal(found[:, first_free:], CONDITIONAL[:, first_free:])


def test_both_halves_share_one_forward_pass() -> None:
    model = Recorder()
    guided(1.5, 3, model)
    [(x, t, y)] = model.calls
    assert torch.equal(x, torch.cat([X, X]))
    assert torch.equal(t, torch.cat([STEPS, STEPS]))
    assert y.tolist() == [1, 2, 3, NULL, NULL, NULL]


def test_scale_1_is_the_conditional_model_alone() -> None:
    model = Recorder()
    assert torch.equal(guided(1.0, 3, model), CONDITIONAL)
    [(x, _, _)] = model.calls
    assert len(x) == 3


@pytest.mark.parametrize("channels", [-1, 5])
def test_channels_the_latent_does_not_have_are_refused(channels: int) -> None:
    with pytest.raises(ConfigError, match=r"sample\.guidance_channels: found .* 0 \(all\) to 4"):
        guided(1.5, channels)
