"""The only door to DeepSpeed: one optimiser step under ZeRO 0 to 3, and each rank's own slices of the state.

DeepSpeed keeps fp32 master weights and Adam moments in flat partitions that belong to the world size. `Slice` looks
through them by parameter name, so that checkpoints and EMAs can be kept by name and offset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from diffussm.config.schema import Precision, TrainConfig
from diffussm.model.footprint import bucket_elements
from diffussm.model.ssm import fixed_parameters
from diffussm.train.optim import adamw, parameter_groups
from diffussm.train.phases import Phase
from diffussm.train.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + numel) of one flattened parameter, as live fp32 views of this rank's state."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    tensors: dict[str, Tensor]
    """`master`, `exp_avg`, `exp_avg_sq`, each (numel,)."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did. `loss` is this rank's mean, a tensor so that reading it is the caller's choice."""

    loss: Tensor
    grad_norm: float
    skipped: bool


class Engine:
    """A model with its optimiser under DeepSpeed. Building it is a collective call: every rank must.

    Args:
        model: the network, initialised alike on every rank (rank 0's weights are broadcast).
        cfg: precision, ZeRO stage, optimiser.
        accumulation: micro batches for each step.
        world: this process.
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig, accumulation: int, world: World) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On the CPU the first group would build a shared-memory communication kernel for over a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")
        self.stage = cfg.zero_stage
        self.accumulation = accumulation
        self.world = world
        self.clip = cfg.grad_clip
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        optimizer = adamw(parameter_groups(model.parameters(), cfg.weight_decay), cfg)
        bucket = bucket_elements(sum(parameter.numel() for parameter in model.parameters()))
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_deepspeed_config(cfg, accumulation, world, bucket)
        )
        if self.stage == 0 and world.size == 1:
            self.engine.enable_backward_allreduce = False  # nobody to share gradients with: saves copying them twice
        self.adam: torch.optim.Optimizer = optimizer if self.stage == 0 else self.optimizer.optimizer

    @property
    def module(self) -> nn.Module:
        """The network itself."""
        return self.engine.module

    def step(
        self,
        losses: Sequence[Callable[[nn.Module], Tensor]],
        lr: float,
        enter: Callable[[Phase], None] = lambda phase: None,
        measure: Callable[[], None] | None = None,
    ) -> StepResult:
        """One optimiser step over `accumulation` micro batches. Collective: every rank must call it.

        Args:
            losses: one function for each micro batch; given the wrapped network it returns a scalar mean loss.
            lr: learning rate of this step.
            enter: told which part of the step begins. Gradients are also reduced within `backward`.
            measure: called when the step's gradients are whole and before they are used; then `gradients` has them.

        A step whose gradient is not finite anywhere is skipped on all ranks and changes no state.
        """
        for group in self.adam.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.world.device)
        norm, skipped = 0.0, False
        with fixed_parameters(self.module):  # they change in the last call of engine.step only
            for loss_of in losses:
                enter(Phase.FORWARD)
                loss = loss_of(self.engine)
                enter(Phase.BACKWARD)
                self.engine.backward(loss)
                enter(Phase.REDUCE)
                total += loss.detach()
                if measure is not None and self.engine.is_gradient_accumulation_boundary():
                    enter(Phase.OTHER)
                    measure()
                    enter(Phase.REDUCE)
                if self.stage == 0 and self.engine.is_gradient_accumulation_boundary():
                    norm, skipped = self._guard_plain_gradients()
                self.engine.step()
        if self.stage > 0:
            skipped = bool(self.optimizer.overflow)
            norm = float(self.engine.get_global_grad_norm()) if not skipped else float("inf")
        return StepResult(total / len(losses), norm, skipped)

    def _guard_plain_gradients(self) -> tuple[float, bool]:
        """Norm of the already averaged gradients, which are clipped here, or dropped if they are not finite.

        Without ZeRO DeepSpeed would step on non-finite gradients. AdamW passes over parameters without a gradient,
        moments and step count included.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not isfinite(norm):
            for parameter in self.module.parameters():
                parameter.grad = None
            return norm, True
        if 0 < self.clip < norm:
            torch._foreach_mul_(gradients, self.clip / norm)
        return norm, False

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share of the averaged gradient, unclipped, by parameter; valid only while `measure` runs.

        Over all ranks the shares cover every element exactly once. Local.
        """
        for parameter in self._deepspeed_parameters():
            name = self.names[id(parameter)]
            if self.stage == 0:
                size, rank = parameter.numel(), self.world.rank
                if parameter.grad is not None:
                    start, stop = rank * size // self.world.size, (rank + 1) * size // self.world.size
                    yield name, parameter.grad.view(-1)[start:stop]
            elif self.stage == 3:
                share = parameter.ds_tensor.ds_numel
                numel = min(share, parameter.ds_numel - min(self.world.rank * share, parameter.ds_numel))
                yield name, self.optimizer.get_local_fp32_grad_for_param(parameter).view(-1)[:numel]
            elif parameter._hp_mapping is not None:  # None where this rank owns nothing of the parameter
                yield name, parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def slices(self, *, held: bool = False) -> list[Slice]:
        """This rank's slices of every parameter, in the parameters' order.

        Over all ranks the slices cover every element exactly once. With `held` the slices are those that must be
        written to restore this rank: the same under ZeRO 1 to 3, whole parameters without ZeRO, where all ranks hold
        everything and own an equal share. Local: no communication. Creates empty Adam moments if no step was taken.
        """
        build = {0: self._plain, 1: self._partitioned, 2: self._partitioned, 3: self._sharded}[self.stage]
        return [piece for piece in build(held) if piece.numel > 0]

    def _plain(self, held: bool) -> list[Slice]:
        pieces = []
        rank, size = (0, 1) if held else (self.world.rank, self.world.size)
        for parameter in self.module.parameters():
            start, stop = rank * parameter.numel() // size, (rank + 1) * parameter.numel() // size
            state = self._adam_state(parameter)
            flat = {"master": parameter.data.view(-1)} | {key: state[key].view(-1) for key in MOMENTS}
            pieces.append(self._piece(parameter, start, stop - start, {k: v[start:stop] for k, v in flat.items()}))
        return pieces

    def _partitioned(self, held: bool) -> list[Slice]:
        pieces = []
        for parameter in self._deepspeed_parameters():
            mapping = parameter._hp_mapping  # None where this rank owns nothing of the parameter
            if mapping is None:
                continue
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            state = self._adam_state(flat)
            tensors = {"master": flat.data} | {key: state[key] for key in MOMENTS}
            views = {key: value.narrow(0, target.start, target.numel) for key, value in tensors.items()}
            pieces.append(self._piece(parameter, source.start, source.numel, views))
        return pieces

    def _sharded(self, held: bool) -> list[Slice]:
        pieces = []
        zero = self.optimizer
        for parameter in self._deepspeed_parameters():
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            share = parameter.ds_tensor.ds_numel  # padded: equal on every rank
            start = min(self.world.rank * share, parameter.ds_numel)
            numel = min(share, parameter.ds_numel - start)
            flat = zero.fp32_partitioned_groups_flat[group]
            state = self._adam_state(flat)
            tensors = {"master": flat.data} | {key: state[key] for key in MOMENTS}
            views = {key: value.narrow(0, offset, numel) for key, value in tensors.items()}
            pieces.append(self._piece(parameter, start, numel, views))
        return pieces

    def _deepspeed_parameters(self) -> Iterator[Any]:
        """The parameters with the attributes that DeepSpeed hangs on them: `_hp_mapping`, or `ds_tensor` and others."""
        yield from self.module.parameters()

    def _piece(self, parameter: nn.Parameter, start: int, numel: int, tensors: dict[str, Tensor]) -> Slice:
        name = self.names[id(parameter)]
        return Slice(name, self.shapes[name], start, numel, tensors)

    def _adam_state(self, flat: Tensor) -> dict[str, Any]:
        """AdamW's state of one of its tensors, made as AdamW itself would before the first step."""
        state = self.adam.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(flat)
        return state

    def restored(self, adam_steps: int) -> None:
        """Make the engine use what was written into `slices(held=True)`. Collective: every rank must call it."""
        for state in self.adam.state.values():
            state["step"].fill_(float(adam_steps))
        if self.stage in (1, 2):
            self.optimizer.update_lp_params()
        if self.stage == 3:
            self._refresh_sharded()

    def _refresh_sharded(self) -> None:
        zero = self.optimizer
        for parameter in self._deepspeed_parameters():
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group].narrow(0, offset, numel)
            parameter.ds_tensor.data.copy_(flat.data)
        # Small parameters stay gathered between steps and would keep their old values.
        persistent = zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _deepspeed_config(cfg: TrainConfig, accumulation: int, world: World, bucket: int) -> dict[str, Any]:
    """DeepSpeed's own config for ours."""
    return {
        "train_micro_batch_size_per_gpu": cfg.global_batch // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": cfg.grad_clip if cfg.zero_stage > 0 else 0.0,  # without ZeRO the guard clips
        "zero_optimization": {"stage": cfg.zero_stage, "reduce_bucket_size": bucket},
        "zero_allow_untested_optimizer": True,
        # Autocast keeps every parameter fp32; DeepSpeed's bf16 mode would cast the state-space parameters too.
        "torch_autocast": {"enabled": cfg.precision is Precision.bf16, "dtype": "bfloat16"},
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
