"""Backends of the operator: what one must offer, the table of names, and how one is chosen.

A new backend is one file with an object `BACKEND`, one line in `_MODULES` and its place in `_PREFERENCE`.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from diffussm.errors import ConfigError, MissingError
from diffussm.ops import parity
from diffussm.ops.params import SSMParams

log = logging.getLogger("diffussm.ops")

AUTO = "auto"

_MODULES: dict[str, str] = {
    "reference": "diffussm.ops.reference",
    "torch": "diffussm.ops.torch",
    "cpu": "diffussm.ops.cpu",
    "triton": "diffussm.ops.triton",
    "cuda": "diffussm.ops.cuda",
}
"""Backend name -> module with its BACKEND; imported when first asked for."""

_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
"""Device type -> backends that `auto` tries there, best first; other devices use `torch`."""


@runtime_checkable
class Backend(Protocol):
    """One implementation of the operator.

    u is (B, L, D), read by both directions, or (B, L, 2D), whose first D channels feed the forward and whose last D
    the backward direction; y is (B, L, 2D) in u's dtype, contiguous. Kernels are (D, L). All methods run below
    autograd with autocast off, B may be 0, u and dy may be non-contiguous, and no result may alias an argument.
    """

    name: str

    def available(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if u of this dtype on this device can be served, else the reason why not."""

    def kernel(self, params: SSMParams, length: int) -> Tensor:
        """(D, length) in the parameters' dtype, skip included at l = 0."""

    def kernel_backward(self, dk: Tensor, params: SSMParams) -> SSMParams:
        """Gradients of the parameters, each like its parameter."""

    def conv(self, u: Tensor, k_f: Tensor, k_b: Tensor) -> Tensor:
        """y."""

    def conv_backward(self, dy: Tensor, u: Tensor, k_f: Tensor, k_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """du like u, dk_f and dk_b like the kernels."""


@runtime_checkable
class FusedBackend(Backend, Protocol):
    """A backend that goes from parameters to output without kernels in memory."""

    def ssm(self, u: Tensor, forward: SSMParams, backward: SSMParams) -> Tensor:
        """y."""

    def ssm_backward(
        self, dy: Tensor, u: Tensor, forward: SSMParams, backward: SSMParams
    ) -> tuple[Tensor, SSMParams, SSMParams]:
        """du like u, and the gradients of both directions' parameters."""


@dataclass(frozen=True)
class Verdict:
    """Whether a backend may be used for a device and dtype, and why (not)."""

    name: str
    usable: bool
    reason: str


_registered: dict[str, Backend] = {}
_verdicts: dict[tuple[str, torch.device, torch.dtype], Verdict] = {}
_chosen: dict[tuple[torch.device, torch.dtype], str] = {}


def names() -> list[str]:
    """All backend names, without `auto`."""
    return [*_MODULES, *(n for n in _registered if n not in _MODULES)]


def register(backend: Backend, devices: tuple[str, ...] = ()) -> None:
    """Add a backend from outside, before all others in `auto`'s order on the device types given."""
    _registered[backend.name] = backend
    for device in devices:
        _PREFERENCE[device] = (backend.name, *(n for n in preference(device) if n != backend.name))
    forget()


def unregister(name: str) -> None:
    """Take out what `register` added."""
    _registered.pop(name, None)
    for device, order in _PREFERENCE.items():
        _PREFERENCE[device] = tuple(n for n in order if n != name)
    forget()


def forget() -> None:
    """Drop all verdicts and choices: the next call checks again."""
    _verdicts.clear()
    _chosen.clear()


def get(name: str) -> Backend:
    """The backend of that name; ConfigError if there is none."""
    if name in _registered:
        return _registered[name]
    if name not in _MODULES:
        near = difflib.get_close_matches(name, [AUTO, *names()], n=1)
        raise ConfigError(
            f"model.backend: found {name!r}; allowed are {', '.join([AUTO, *names()])}",
            f"did you mean {near[0]!r}?" if near else "leave it at auto",
        )
    backend: Backend = importlib.import_module(_MODULES[name]).BACKEND
    _registered[name] = backend
    return backend


def verdict(name: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Ask the backend and run the parity check on the device, once for each (backend, device, dtype).

    Never touches the global random state. ConfigError on an unknown name.
    """
    backend = get(name)
    key = (name, device, dtype)
    if key not in _verdicts:
        reason = backend.available(device, dtype)
        if reason is None:
            # A tracer or a counter that is active now must not see the check, nor turn it into a dry run.
            with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), _autocast_off(device):
                failure = parity.check(backend, device, dtype, fused=isinstance(backend, FusedBackend))
            usable, why = failure is None, failure or "parity check passed"
        else:
            usable, why = False, reason
        _verdicts[key] = Verdict(name, usable, why)
    return _verdicts[key]


def survey(device: torch.device, dtype: torch.dtype) -> list[Verdict]:
    """The verdict on every backend, for `diffussm doctor`."""
    return [verdict(name, device, dtype) for name in names()]


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend to use for u of this dtype on this device.

    `auto` takes the first of the device's order that passes, says once which and why, and warns about each it had to
    pass over. A named backend is used or refused.

    Raises:
        ConfigError: no backend of that name.
        MissingError: the named backend (or, for `auto`, every one) cannot be used here.
    """
    if device.type == "meta":  # nothing is computed there: any name will do
        return get("torch" if backend == AUTO else backend)
    if backend != AUTO:
        found = verdict(backend, device, dtype)
        if not found.usable:
            raise MissingError(
                f"model.backend: {backend!r} cannot be used on {device} with {dtype}: {found.reason}",
                "set model.backend=auto, or mend what `diffussm doctor` says about this backend",
            )
        return get(backend)
    if (device, dtype) not in _chosen:
        _chosen[device, dtype] = _choose(device, dtype)
    return get(_chosen[device, dtype])


def _choose(device: torch.device, dtype: torch.dtype) -> str:
    passed_over: list[str] = []
    for name in preference(device.type):
        found = verdict(name, device, dtype)
        if found.usable:
            log.info("operator backend %s on %s with %s: %s", name, device, dtype, found.reason)
            return name
        log.warning("operator backend %s is not used on %s with %s: %s", name, device, dtype, found.reason)
        passed_over.append(f"{name} ({found.reason})")
    raise MissingError(
        f"model.backend: no operator backend can be used on {device} with {dtype}: {', '.join(passed_over)}",
        "run `diffussm doctor`; this points at a broken torch installation or device",
    )


def preference(device_type: str) -> tuple[str, ...]:
    """Backends that `auto` tries on a type of device, best first."""
    return _PREFERENCE.get(device_type, ("torch",))


def _autocast_off(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
