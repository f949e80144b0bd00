"""Parameters, multiply-adds and memory of a network in pure arithmetic: no torch, so that a login node can plan.

Multiply-adds (MACs) of one image's forward pass, in 1e9, beside the paper's table (whose "Gflops" are MACs too):

| preset | parameters | paper | 256 px | with kernels | paper | 512 px | with kernels | paper |
|---|---|---|---|---|---|---|---|---|
| S | 32.9 M | | 12.3 | 13.0 | | 49.7 | 52.2 | |
| B | 126.8 M | | 48.3 | 49.5 | | 193.7 | 198.6 | |
| L | 442.2 M | | 170.6 | 173.8 | | 684.1 | 696.9 | |
| XL | 673.2 M | 673 M | 260.4 | 264.8 | 280.3 | 1043.8 | 1061.3 | 1066.2 |

The paper's table and its own formula, 13 (L/M) D^2 + L D^2 + FFT a block, contradict each other: the formula gives
295.6 and 1182.3. Ours are the dense layers as they run, plus the convolution by FFT; the kernels are made once for
each forward pass whatever the batch, and counted on their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from diffussm.config.schema import ModelConfig
from diffussm.model.presets import LatentShape, check_fit, resolve

_FREQUENCIES = 256  # size of the timestep's sinusoid; a test holds it equal to embed.py's


@dataclass(frozen=True)
class Counts:
    """What a network costs."""

    parameters: int
    """All trainable numbers."""
    ssm_parameters: int
    """Those of the state-space layers, fp32 always."""
    dense_macs: int
    """Multiply-adds of the linear layers for one image's forward pass."""
    fft_macs: int
    """Multiply-adds of the convolutions by FFT for one image's forward pass."""
    kernel_macs: int
    """Multiply-adds of making all kernels, once for each forward pass of any number of images."""
    activation_bytes: int
    """Activations one image keeps for the backward pass, estimated."""
    block_activation_bytes: int
    """Those of one block while its gradients are computed."""

    @property
    def macs(self) -> int:
        """Multiply-adds for one image's forward pass, kernels not included (they serve the whole batch)."""
        return self.dense_macs + self.fft_macs

    def training_macs(self, micro_batch: int) -> float:
        """Multiply-adds of one image's forward pass and of the backward pass, twice as many, with its share of kernels.

        Recomputed activations do not count: a utilisation by this number is of useful work (MFU).
        """
        return 3 * (self.macs + self.kernel_macs / micro_batch)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank that do not depend on the batch."""

    weights: int
    """fp32 parameters."""
    gradients: int
    """fp32 gradients."""
    optimizer: int
    """fp32 master copy and AdamW's two moments."""
    ema: int
    """fp32 averages of the slices this rank owns."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.ema


def count(
    model: ModelConfig | str, latent: LatentShape, *, bf16: bool = False, activation_checkpointing: bool = False
) -> Counts:
    """Costs of the network `build_model` would build.

    Args:
        model: section `model` of the config, or a preset's name.
        latent: what the network denoises.
        bf16: activations of the dense layers are bf16 rather than fp32.
        activation_checkpointing: each block keeps its input alone.

    Raises:
        ConfigError: unknown preset, or sizes that do not fit each other.
    """
    cfg = replace(ModelConfig(), preset=model) if isinstance(model, str) else model
    check_fit(cfg, latent)
    width, depth = resolve(cfg)
    ssm = 2 * width * (2 + 3 * cfg.state)
    groups = latent.length // cfg.hourglass
    kept = _block_activation_bytes(width, groups, cfg.hourglass, bf16)
    block_input = 4 * groups * width
    return Counts(
        parameters=depth * (_block_dense_parameters(width, cfg.hourglass) + ssm)
        + _outer_parameters(cfg, width, latent),
        ssm_parameters=depth * ssm,
        dense_macs=depth * _block_macs(width, groups, cfg.hourglass) + _outer_macs(cfg, width, latent),
        fft_macs=depth * _fft_macs(width, latent.length),
        kernel_macs=depth * 2 * width * cfg.state * latent.length,
        activation_bytes=depth * block_input + kept if activation_checkpointing else depth * kept,
        block_activation_bytes=kept,
    )


def memory(parameters: int, zero_stage: int, workers: int, averages: int = 1) -> Memory:
    """Bytes on each rank under ZeRO `zero_stage` (0 to 3) over `workers` ranks; everything fp32, activations apart.

    Stage 1 shares out the optimiser's state, stage 2 the gradients too, stage 3 the parameters too. Stage 0 needs no
    master copy beside the fp32 parameters. The EMAs, `averages` of them, always follow the slices that a rank owns.
    """
    share = math.ceil(parameters / workers)
    return Memory(
        weights=4 * (share if zero_stage >= 3 else parameters),
        gradients=4 * (share if zero_stage >= 2 else parameters),
        optimizer=12 * share if zero_stage >= 1 else 8 * parameters,
        ema=4 * averages * share,
    )


def _linear(features_in: int, features_out: int) -> int:
    return features_in * features_out + features_out


def _block_dense_parameters(width: int, ratio: int) -> int:
    """W0, W_up, W_down, W1, W2, W3 and the modulations: (13 + 4) D^2 weights at M = 2, and biases."""
    return (
        3 * _linear(width, width)  # W0, W1, W3
        + _linear(width, 2 * ratio * width)  # W_up
        + ratio * _linear(2 * width, 2 * width // ratio)  # W_down
        + _linear(2 * width, width)  # W2
        + _linear(width, 4 * width)  # modulations
    )


def _outer_parameters(cfg: ModelConfig, width: int, latent: LatentShape) -> int:
    """Stem, timestep, label and head."""
    return (
        _linear(cfg.hourglass * latent.channels, width)
        + _linear(_FREQUENCIES, width)
        + _linear(width, width)
        + (latent.classes + 1) * width
        + _linear(width, 2 * width)
        + _linear(width, cfg.hourglass * 2 * latent.channels)
    )


def _block_macs(width: int, groups: int, ratio: int) -> int:
    """All dense layers but the modulations run on J groups: W0, W1, W3, W2 (5), W_up (2M) and W_down (4) times D^2."""
    return groups * (9 + 2 * ratio) * width**2 + 4 * width**2


def _outer_macs(cfg: ModelConfig, width: int, latent: LatentShape) -> int:
    groups = latent.length // cfg.hourglass
    stem_and_head = groups * width * cfg.hourglass * 3 * latent.channels
    return stem_and_head + _FREQUENCIES * width + width**2 + 2 * width**2


def _fft_macs(width: int, length: int) -> int:
    """2D real FFTs of n = 2L forth and 2D back, 2.5 n log2 n flops each, and the products between."""
    n = 2 * length
    transform = 2.5 * n * math.log2(n) / 2  # multiply-adds are two flops
    product = 4 * (n // 2 + 1)
    return round(4 * width * transform + 2 * width * product)


def _block_activation_bytes(width: int, groups: int, ratio: int, bf16: bool) -> int:
    """Tensors autograd keeps for one image.

    fp32 always: the block's input, its norm and the output before the gate. Else: h, both sides of the five GELUs
    (W0, W1, W2: 1 each; W_down: 2; W_up: 2M, at length L), the SSM's output (2M), the product, and W3's input. Under
    bf16 two more stay fp32, the SSM's output as the operator gives it, and one is kept in both kinds.
    """
    element = 2 if bf16 else 4
    fp32_tensors = 5 if bf16 else 3
    dense_tensors = 1 + 2 * (1 + 1 + 1 + 2 + 2 * ratio) + 2 * ratio + 1 + (0 if bf16 else 1)
    return groups * width * (4 * fp32_tensors + element * dense_tensors)
