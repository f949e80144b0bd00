"""The house rules that no linter knows: file lengths, mirrored tests, names with units, contracts in docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffussm.config.explain import describe
from diffussm.errors import exit_code_table

ROOT = Path(__file__).parents[1]
PACKAGES = ("diffussm", "cluster", "launch")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [path.relative_to(ROOT) for path in SOURCES if path.name != "__init__.py"]

LINES = 400
ENTRY_LINES = {"cluster/driver.py": 100}
"""Entry files: load the config, build, run."""

TESTED_ELSEWHERE = {
    "diffussm/checkpoint/__main__.py": "tests/diffussm/checkpoint/test_catalog.py calls it as the command does",
    "diffussm/config/schema_data.py": "data without behaviour: tests/diffussm/config/test_explain.py reads every key",
    "diffussm/config/schema_jobs.py": "data without behaviour: tests/diffussm/config/test_explain.py reads every key",
    "diffussm/config/kubernetes.py": "tests/launch/kubernetes/test_render.py gives it right and wrong values",
    "diffussm/config/schema.py": "data without behaviour: tests/diffussm/config/test_explain.py reads every key",
    "cluster/chaos/__main__.py": "a command for whole runs: tests/chaos/test_long.py runs it",
    "cluster/readiness.py": "tests/cluster/test_stages.py starts with what it refuses",
    "cluster/worker.py": "runs only inside Ray: tests/cluster/test_trainer.py starts it on real workers",
    "diffussm/bench/__main__.py": "tests/diffussm/bench/test_loop.py runs it as a command",
    "diffussm/export/__main__.py": "tests/diffussm/export/test_folder.py runs it as a command",
    "diffussm/export/pipeline.py": "tests/diffussm/export/test_folder.py draws through it and compares",
    "diffussm/data/__main__.py": "tests/diffussm/data/test_inspect.py runs it",
    "diffussm/data/encoder.py": "tests/diffussm/data/test_encode.py makes latents with it and reads them back",
    "diffussm/data/fashion_mnist.py": "one of the sources of tests/diffussm/data/test_images.py",
    "diffussm/data/ledger.py": "tests/diffussm/data/test_encode.py stops work in the middle and goes on",
    "diffussm/data/shards.py": "tests/diffussm/data/test_encode.py reads what it writes",
    "diffussm/data/source.py": "the base of all sources: tests/diffussm/data/test_images.py",
    "diffussm/observe/report/__main__.py": "tests/diffussm/observe/report/test_gather.py runs it as a command",
    **{
        f"launch/kubernetes/{name}.py": "tests/launch/kubernetes/test_render.py holds what they make against schemas"
        for name in ("grace", "names", "schema")
    },
    "launch/target.py": "a protocol: tests/launch/kubernetes/test_target.py uses one that fulfils it",
    "diffussm/ops/api.py": "the face of library.py: tests/diffussm/ops/test_library.py calls everything through it",
    "diffussm/ops/cuda_nvrtc.py": "compiles the CUDA source: tests/diffussm/ops/test_budget.py; on a card tests/gpu",
    "diffussm/ops/cuda_tables.py": "data of the CUDA kernel: tests/diffussm/ops/test_cuda.py convolves with it",
    **{
        f"diffussm/ops/triton_{part}.py": "tests/diffussm/ops/triton_cases.py runs the kernels in the interpreter"
        for part in ("generate", "grad", "launch", "math", "params", "scan")
    },
    "diffussm/ops/parity.py": "tests/diffussm/ops/test_registry.py gives its check right and wrong backends",
    "diffussm/ops/textbook.py": "tests/diffussm/bench/test_op.py holds it against the reference",
    "diffussm/train/logger.py": "tests/diffussm/train/test_loop.py reads what it writes",
    "diffussm/checkpoint/wants.py": "tests/diffussm/checkpoint/test_restore.py reads through it",
    "diffussm/train/saver.py": "tests/diffussm/train/test_loop.py saves and resumes through it",
    "launch/options.py": "data without behaviour: tests/launch/test_cli.py uses every option",
}
"""Modules without a test file of their own, with the reason."""

COLLECTIVES = re.compile(
    r"^(all_reduce|all_gather\w*|all_to_all\w*|barrier|monitored_barrier|broadcast\w*|gather\w*|reduce|reduce_scatter\w*|"
    r"scatter\w*|new_group)$"
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=relative)
def test_a_file_is_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < ENTRY_LINES.get(relative(path), LINES)


def test_there_is_no_room_for_odds_and_ends() -> None:
    assert not [relative(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize("module", MODULES, ids=Path.as_posix)
def test_a_module_has_its_test(module: Path) -> None:
    mirror = Path("tests") / module.parent / f"test_{module.name}"
    if module.as_posix() in TESTED_ELSEWHERE:
        assert not (ROOT / mirror).exists(), f"{module} has its own test now: take it off the list"
    else:
        assert (ROOT / mirror).exists(), f"{mirror} is missing"


def test_the_list_of_modules_tested_elsewhere_is_true() -> None:
    for module, reason in TESTED_ELSEWHERE.items():
        assert (ROOT / module).exists(), module
        named = re.search(r"tests/\S+\.py", reason)
        assert named, module
        assert (ROOT / named.group()).exists(), module


# --- names with units -------------------------------------------------------------------------------------------------

UNITS = {
    r"\bseconds\b": "_s",
    r"\bbytes\b": "_bytes",
    r"\bpixels\b|^Side of": "_px",
    r"^Images (between|over|at|within)": "_images",
    r"^Upper bound of one latent shard": "_bytes",
}
"""What the help says, and the unit that the name must carry then."""

COUNTED_IN_STEPS = {"diffusion.timesteps", "sample.steps", "train.max_nonfinite_steps"}
"""Keys whose unit is a step: of the diffusion, and optimiser steps in a row, which no batch size changes."""


@pytest.mark.parametrize("key", describe(), ids=lambda key: key.name)
def test_a_key_has_help_and_its_name_carries_its_unit(key) -> None:  # type: ignore[no-untyped-def]
    assert key.help
    if key.kind in (int, float):
        for words, unit in UNITS.items():
            if re.search(words, key.help):
                assert key.name.endswith(unit), f"{key.name}: {key.help}"
    if "step" in key.name:
        assert key.name in COUNTED_IN_STEPS, "lengths count images, so that the batch may change"
    if re.search(r"(interval|every|timeout|deadline|warmup)", key.name):
        assert re.search(r"_(images|s)$", key.name)


# --- contracts in docstrings ------------------------------------------------------------------------------------------


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls_a_collective(function: ast.AST) -> bool:
    """Whether it calls `dist.X` or `torch.distributed.X` for a collective X."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and COLLECTIVES.match(node.func.attr)
        and ast.unparse(node.func.value) in ("dist", "torch.distributed")
        for node in ast.walk(function)
    )


def without_contract(source: str) -> list[str]:
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [
        node.name
        for node in found
        if calls_a_collective(node) and "collective" not in (ast.get_docstring(node) or "").lower()
    ]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_function_with_a_collective_says_so(path: Path) -> None:
    assert without_contract(path.read_text()) == []


def test_the_search_for_collectives_finds_them() -> None:
    bare = "def f():\n    'Adds up.'\n    dist.all_reduce(x)\n"
    assert without_contract(bare) == ["f"]
    assert without_contract(bare.replace("Adds up.", "Adds up. Collective.")) == []
    assert without_contract("def g():\n    torch.distributed.barrier()\n") == ["g"]
    assert without_contract("def h():\n    functools.reduce(x)\n") == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_annotations_are_not_evaluated(path: Path) -> None:
    """`from __future__ import annotations` everywhere but in the schema, whose annotations OmegaConf reads."""
    text = path.read_text()
    needs = any(isinstance(node, ast.FunctionDef | ast.AnnAssign) for node in ast.walk(ast.parse(text)))
    expected = needs and relative(path) != "diffussm/config/schema.py"
    assert not expected or "from __future__ import annotations\n" in text


# --- documents and contracts ------------------------------------------------------------------------------------------


def test_the_readme_has_the_exit_codes() -> None:
    assert exit_code_table() in (ROOT / "README.md").read_text()


def test_the_plan_of_the_rooms_names_every_module() -> None:
    """docs/architecture.md is the map: a room, a module or its folder's line must be there."""
    plan = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {module.parts[1] for module in MODULES if module.parts[0] == "diffussm" and len(module.parts) > 2}
    missing = [room for room in rooms if f"      {room}/" not in plan]
    missing += [m.as_posix() for m in MODULES if m.parts[0] != "diffussm" and m.name not in plan]
    assert missing == []


def test_the_lock_pins_exactly_and_names_no_index() -> None:
    lines = (ROOT / ".ci" / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", pin), pin


def test_imports_keep_to_the_contracts() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
