"""Memory of one rank at its fullest moment in a training step, in pure arithmetic: no torch.

What is there all the time (weights, optimiser, EMA, buckets) plus the fuller end of the backward pass: its start, when
all activations are kept and few gradients exist, or its end, when one block's activations and all gradients do. On top
come the tensors that the operator's gradient needs for one block. A test holds the sum within a tenth of what torch's
allocator counts on the CPU, for every ZeRO stage, with and without recomputation, on one and two ranks.

Beside it a GPU needs the CUDA context, NCCL's buffers and room for fragments: `USABLE` of a card is planned with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffussm.config.schema import ModelConfig
from diffussm.model.counts import count, memory
from diffussm.model.presets import LatentShape, resolve

REDUCE_BUCKET = 50_000_000
"""Most gradients that DeepSpeed gathers before it reduces them; its own 500,000,000 would take 2 GB of each rank."""

GATHERED_PARAMETERS = 1_000_000_000
"""Parameters that ZeRO 3 keeps gathered at most: DeepSpeed's `stage3_max_live_parameters`."""

USABLE = 0.9
"""Fraction of a card's memory that tensors may take."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank by what they are for."""

    weights: int
    """fp32 parameters held between steps."""
    optimizer: int
    """Master copy and both moments of AdamW."""
    ema: int
    """Average of the weights this rank owns."""
    buckets: int
    """DeepSpeed's reduction bucket and, under ZeRO 3, parameters gathered for use."""
    gradients: int
    """fp32 gradients held at the fullest moment."""
    activations: int
    """What autograd keeps at the fullest moment, bf16 copies of the weights included."""
    transient: int
    """What the gradient of one block's operator needs while it runs."""

    @property
    def state(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.optimizer + self.ema + self.buckets

    @property
    def peak(self) -> int:
        """All together."""
        return self.state + self.gradients + self.activations + self.transient


def bucket_elements(parameters: int) -> int:
    """Size of DeepSpeed's reduction bucket for a network: never larger than the network."""
    return min(REDUCE_BUCKET, parameters)


def footprint(
    model: ModelConfig | str,
    latent: LatentShape,
    *,
    stage: int,
    workers: int,
    micro_batch: int,
    accumulation: int = 1,
    averages: int = 1,
    bf16: bool = False,
    activation_checkpointing: bool = False,
) -> Footprint:
    """Bytes of one rank of `workers` under ZeRO `stage`, at the fullest moment of a step.

    Args:
        model: section `model` of the config, or a preset's name.
        latent: what the network denoises.
        stage: 0 to 3.
        workers: ranks.
        micro_batch: images of one pass.
        accumulation: passes of a step; with more than one the gradients of the first are there during the second.
        averages: averages of the weights that are kept.
        bf16: dense layers under autocast.
        activation_checkpointing: each block keeps its input alone and is computed again in the backward pass.

    Raises:
        ConfigError: as `count`.
    """
    cfg = ModelConfig(preset=model) if isinstance(model, str) else model
    width, depth = resolve(cfg)
    costs = count(cfg, latent, bf16=bf16, activation_checkpointing=activation_checkpointing)
    one_block = costs.block_activation_bytes * micro_batch
    kernels = 2 * 4 * width * latent.length  # both directions' kernels of one block, kept once for all images
    blocks_with_kernels = 1 if activation_checkpointing else depth
    casts = 2 * (costs.parameters - costs.ssm_parameters) if bf16 else 0
    held = memory(costs.parameters, stage, workers, averages)
    share = math.ceil(costs.parameters / workers)

    bucket = 4 * bucket_elements(costs.parameters) if stage else 0
    gathered = 4 * min(costs.parameters, GATHERED_PARAMETERS) if stage == 3 and workers > 1 else 0
    early = 0 if stage < 3 and accumulation == 1 else held.gradients  # ZeRO 3 has a buffer for them from the start
    start = costs.activation_bytes * micro_batch + blocks_with_kernels * kernels
    end = one_block + kernels
    at_start = start + early >= end + held.gradients
    return Footprint(
        weights=4 * share if stage == 3 else held.weights,
        optimizer=held.optimizer,
        ema=held.ema,
        buckets=bucket + gathered,
        gradients=early if at_start else held.gradients,
        activations=(start if at_start else end) + casts,
        transient=_operator_gradient_bytes(width, latent.length, micro_batch, bf16)
        + _kernel_gradient_bytes(cfg, latent),
    )


def _operator_gradient_bytes(width: int, length: int, images: int, bf16: bool) -> int:
    """The convolution's gradient in plain torch; other backends need less.

    At its fullest there are the incoming gradient and five transforms or products, each twice as long as the sequence.
    """
    values = images * length * 2 * width
    return values * (2 if bf16 else 4) + 5 * values * 8


def _kernel_gradient_bytes(cfg: ModelConfig, latent: LatentShape) -> int:
    """Tables of powers and their products, of the square root of the length each, for one direction."""
    width, _ = resolve(cfg)
    return 4 * width * cfg.state * 8 * math.isqrt(latent.length)
