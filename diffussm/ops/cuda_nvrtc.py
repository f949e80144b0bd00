"""Compile and launch `csrc/monarch*.cu*` with what comes with torch: NVRTC and the driver, no toolkit, no compiler."""

from __future__ import annotations

import ctypes
import re
from importlib import resources
from typing import Any

from diffussm.errors import MissingError

CHANNELS = 8
"""Channels of one block; rows of 36 for 32 elements, both as in csrc/monarch_tile.cuh."""

_INCLUDE = re.compile(r'^#(?:include "(\w+\.cuh)"|pragma once)\n', re.MULTILINE)
_SEQUENCE_BYTES = 32 * 36 * 2
_EXCHANGE_BYTES = 4 * 16 * 32 * 8


def source(name: str = "monarch.cu") -> str:
    """Text of a CUDA source, package data, with each of our headers in the place of its first `#include`."""
    folder, known = resources.files("diffussm.ops").joinpath("csrc"), set()

    def text(name: str) -> str:
        known.add(name)
        return _INCLUDE.sub(
            lambda m: "" if m[1] is None or m[1] in known else text(m[1]), folder.joinpath(name).read_text()
        )

    return text(name)


def shared_bytes(subs: int) -> int:
    """Dynamic shared memory of one block."""
    return CHANNELS * subs * _SEQUENCE_BYTES + (_EXCHANGE_BYTES if subs == 4 else 0)


def threads(subs: int) -> int:
    """Threads of one block."""
    return 256 if subs == 1 else 128


def compile_cubin(subs: int, bf16: bool, architecture: str) -> bytes:
    """Machine code of `monarch` for an architecture such as `sm_90`; needs no GPU.

    Raises:
        MissingError: NVRTC is missing or refuses the source; its log is in the message.
    """
    from cuda.bindings import nvrtc

    def check(result: tuple[Any, ...]) -> Any:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise MissingError(f"NVRTC answered {status.name}", "install the nvidia-cuda-nvrtc of this torch build")
        return values[0] if values else None

    program = check(nvrtc.nvrtcCreateProgram(source().encode(), b"monarch.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}", f"-DSUBS={subs}", f"-DBF16={int(bf16)}", "--std=c++17"]
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
            check(nvrtc.nvrtcGetProgramLog(program, log))
            raise MissingError(
                f"monarch.cu does not compile for {architecture}: {log.decode(errors='replace').strip()}",
                "use model.backend=triton or torch",
            )
        cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin


class Kernel:
    """`monarch`, loaded into the current CUDA context. The caller must have made the device current."""

    def __init__(self, subs: int, bf16: bool, architecture: str) -> None:
        from cuda.bindings import driver

        self._subs = subs
        self._module = _check(driver.cuModuleLoadData(compile_cubin(subs, bf16, architecture)))
        self._function = _check(driver.cuModuleGetFunction(self._module, b"monarch"))
        _check(
            driver.cuFuncSetAttribute(
                self._function,
                driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                shared_bytes(subs),
            )
        )

    def launch(self, grid: tuple[int, int, int], stream: int, pointers: list[int], integers: list[int]) -> None:
        """Queue the kernel on `stream`; MissingError if the driver refuses."""
        from cuda.bindings import driver

        values = tuple(pointers) + tuple(integers)
        kinds = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int,) * len(integers)
        _check(
            driver.cuLaunchKernel(
                self._function, *grid, threads(self._subs), 1, 1, shared_bytes(self._subs), stream, (values, kinds), 0
            )
        )


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise MissingError(f"the CUDA driver answered {status.name}", "use model.backend=triton or torch")
    return values[0] if values else None
