"""Registers, spills and shared memory of every GPU kernel, compiled here for cards that are not here.

`python -m tests.diffussm.ops.resources` measures all and writes budget.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffussm.ops import cuda_nvrtc
from diffussm.ops.triton_generate import generate_gradient_kernel, generate_kernel
from diffussm.ops.triton_grad import gradient_kernel
from diffussm.ops.triton_launch import BLOCK_B, CHUNK_MAX, CONFIGS
from diffussm.ops.triton_params import parameter_gradient_kernel, table_kernel
from diffussm.ops.triton_scan import scan_kernel, segment_kernel

BUDGET = Path(__file__).with_name("budget.json")
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = 99 * 1024
STATES = 32

_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_KINDS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
_SEQUENCES = ("u_ptr", "y_ptr", "g_ptr")
_ONES = ("u_d", "y_d", "g_d")  # channels lie side by side: what a launch specialises on
_ALIGNED = ("u_b", "u_l", "u_direction", "y_b", "y_l", "y_direction", "g_b", "g_l", "g_direction", "D", "length")


def variants() -> dict[str, tuple[Any, dict[str, Any], int, int, str]]:
    """Name -> kernel, constants, warps, stages and dtype of the sequences."""
    found: dict[str, tuple[Any, dict[str, Any], int, int, str]] = {}
    for dtype, kind in _KINDS.items():
        wide = dtype == "fp32"
        shared = {
            "BB": BLOCK_B,
            "H": STATES,
            "KIND": kind,
            "ROUND": False,
            "PRECISION": "tf32x3" if wide else "tf32",
        }
        for family, name, kernel, extra in (
            ("scan", "scan", scan_kernel, {"ADD": False}),
            ("scan", "scan-add", scan_kernel, {"ADD": True}),
            ("scan", "segment", segment_kernel, {"FIELDS": 2, "SPLIT": False}),
            ("gradient", "segment-derivative", segment_kernel, {"FIELDS": 4, "SPLIT": not wide}),
            ("gradient", "gradient", gradient_kernel, {"LOCAL": CHUNK_MAX, "HS": 16, "SPLIT": not wide}),
        ):
            # float16 compiles to what bfloat16 does, and adding costs one load: one configuration of each will do.
            configs = CONFIGS[family][wide]
            for config in configs[:1] if dtype == "fp16" or name == "scan-add" else configs:
                constants = {**shared, **extra, **config.kwargs}
                label = f"{name}-{dtype}-{config.kwargs['DB']}x{config.kwargs['C']}-{config.num_warps}w"
                found[label] = (kernel, constants, config.num_warps, config.num_stages, dtype)
    small = {"DB": 4, "H": STATES}
    found["table"] = (table_kernel, small, 4, 3, "fp32")
    found["generate"] = (generate_kernel, {"H": STATES}, 4, 3, "fp32")
    found["generate-gradient"] = (generate_gradient_kernel, {"H": STATES}, 4, 3, "fp32")
    constants = {"LOCAL": CHUNK_MAX, "DB": 1, "H": STATES}
    found["parameter-gradient"] = (parameter_gradient_kernel, constants, 4, 3, "fp32")
    return found


def measure_triton(name: str, architecture: int) -> dict[str, int]:
    """Compile one variant ahead of time and read what the machine code asks for."""
    kernel, constants, warps, stages, dtype = variants()[name]
    names = kernel.arg_names
    constants = {**constants, **{one: 1 for one in _ONES if one in names}}
    pointers = {a for a in names if a not in constants and (a.endswith("_ptr") or kernel in _PARAMETER_KERNELS)}
    pointers -= {"D", "N", "parts"}
    signature = {
        a: "constexpr"
        if a in constants
        else "*fp64"
        if a == "table_ptr"
        else f"*{dtype}"
        if a in _SEQUENCES
        else "*fp32"
        if a in pointers
        else "i32"
        for a in names
    }
    hints = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names) if a in pointers or a in _ALIGNED}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs=hints,
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {**usage(compiled.asm["cubin"]), "shared": compiled.metadata.shared}


_PARAMETER_KERNELS = (table_kernel, parameter_gradient_kernel)


def measure_monarch(subs: int, bf16: bool, architecture: int) -> dict[str, int]:
    """Compile the CUDA source with NVRTC and read what the machine code asks for."""
    cubin = cuda_nvrtc.compile_cubin(subs, bf16, f"sm_{architecture}")
    return {**usage(cubin), "shared": cuda_nvrtc.shared_bytes(subs)}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory of a thread: a spill, or an array that could not stay in registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([str(_TOOL), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = _USAGE.search(report.stdout)
    assert found is not None, report.stdout
    registers, stack, _shared, local = map(int, found.groups())
    return {"registers": registers, "spilled": stack + local}


def main() -> None:
    """Measure everything; the numbers become the budget."""
    budget: dict[str, dict[str, dict[str, int]]] = {}
    for name in variants():
        budget[name] = {f"sm_{a}": measure_triton(name, a) for a in ARCHITECTURES}
        print(name, budget[name], flush=True)
    for subs in (1, 4):
        for bf16 in (False, True):
            name = f"monarch-{'bf16' if bf16 else 'fp16'}-{1024 * subs}"
            budget[name] = {f"sm_{a}": measure_monarch(subs, bf16, a) for a in ARCHITECTURES}
            print(name, budget[name], flush=True)
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    main()
