"""`python -m cluster.preflight [CONFIG [key=value ...]]`: what this machine has, what it lacks, what mends it.

Nothing is changed; with a config its storage is written to once and read back. Exit code 69 when something essential
is missing, 0 otherwise.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from diffussm.config import Config, check, load
from diffussm.errors import DiffuSSMError, ExitCode

LOCK = Path(__file__).parents[1] / ".ci" / "requirements.lock"
"""The pinned environment; there in a checkout, absent in an installed wheel."""

COMPILERS = ("c++", "g++", "clang++")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the system's own place, only looked at
SHARED_MEMORY_BYTES = 256 << 20
"""Ray's object store is 100 MiB for us; the data loader's shared memory comes on top."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""
    """The command or step that mends it; empty when it is well."""
    essential: bool = True
    """Whether jobs fail without it."""

    @property
    def line(self) -> str:
        """`ok  what: found`, or `MISSING`, or `note` for what is not essential, with the remedy below."""
        mark = "ok     " if self.ok else "MISSING" if self.essential else "note   "
        tail = f"\n         -> {self.remedy}" if self.remedy and not self.ok else ""
        return f"{mark}  {self.what}: {self.found}{tail}"


def survey(cfg: Config | None = None) -> Iterator[Finding]:
    """Look at one thing after another, cheap ones first."""
    yield python(sys.version_info[:2])
    yield from packages(metadata.requires("diffussm") or [], installed())
    if LOCK.exists():
        yield lock(LOCK.read_text(), installed())
    yield compiler(shutil.which)
    yield shared_memory(SHARED_MEMORY)
    yield cores(os.cpu_count() or 1, cfg)
    yield from guarded("gpus", lambda: devices(cfg))
    yield from guarded("operator", lambda: backends(cfg))
    if cfg is None:
        yield from guarded("fashion-mnist", lambda: iter([fashion_mnist()]))
    else:
        yield from guarded("images", lambda: images(cfg))
        yield from guarded("storage", lambda: storage(cfg))


def guarded(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of `look`; what it raises is a finding too, so that one missing part does not hide the others."""
    try:
        yield from look()
    except DiffuSSMError as error:
        yield Finding(what, False, error.message, error.remedy)
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything; it is shown, not swallowed
        yield Finding(what, False, f"{type(error).__name__}: {error}", "install the locked environment: make venv")


def python(version: tuple[int, ...]) -> Finding:
    """Python must be 3.11."""
    text = ".".join(map(str, version))
    return Finding("python", version[:2] == (3, 11), text, "make a virtual environment with Python 3.11")


def installed() -> dict[str, str]:
    """Versions of all installed packages by normalised name."""
    return {_normal(each.name): each.version for each in metadata.distributions()}


def packages(requires: Sequence[str], versions: Mapping[str, str]) -> Iterator[Finding]:
    """Each package the project imports that does not fit its range, then how many fit."""
    needs = [need for need in map(Requirement, requires) if not need.marker or need.marker.evaluate({"extra": ""})]
    if not needs:
        yield Finding("packages", False, "diffussm is installed without its list of requirements", "make venv")
    fitting = 0
    for need in needs:
        found = versions.get(_normal(need.name))
        if found is not None and need.specifier.contains(found, prereleases=True):
            fitting += 1
        else:
            remedy = f"make venv, or pip install '{need.name}{need.specifier}'"
            yield Finding(need.name, False, f"{found or 'not installed'}; needed is {need.specifier}", remedy)
    if fitting:
        yield Finding("packages", True, f"{fitting} of {len(needs)} fit")


def lock(text: str, versions: Mapping[str, str]) -> Finding:
    """Whether the environment is exactly the one that is tested."""
    pins = [line.split(";")[0].strip() for line in text.splitlines() if "==" in line and not line.startswith("#")]
    other = []
    for name, _, wanted in (pin.partition("==") for pin in pins):
        found = versions.get(_normal(name))
        if found != wanted:
            other.append(f"{name} {found or 'absent'} (lock: {wanted})")
    found_text = ", ".join(other[:8]) + (f" and {len(other) - 8} more" if len(other) > 8 else "")
    return Finding("lock", not other, found_text or f"all {len(pins)} packages as locked", "make venv", essential=False)


def compiler(which: Callable[[str], str | None]) -> Finding:
    """A C++ compiler, for the operator backends that are built on first use."""
    path = next((found for found in map(which, COMPILERS) if found), None)
    return Finding(
        "compiler",
        path is not None,
        path or f"none of {', '.join(COMPILERS)}; backends that are built on first use stay off",
        "on Debian: apt-get install g++",
        essential=False,
    )


def shared_memory(folder: Path) -> Finding:
    """Room in /dev/shm for Ray and the data loader."""
    if not folder.exists():
        return Finding("shared memory", False, f"{folder} does not exist", "mount a tmpfs there", essential=False)
    free = shutil.disk_usage(folder).free
    return Finding(
        "shared memory",
        free >= SHARED_MEMORY_BYTES,
        f"{_mib(free)} free in {folder}; wanted are {_mib(SHARED_MEMORY_BYTES)}",
        "give the container more, for example docker run --shm-size=1g",
        essential=False,
    )


def cores(count: int, cfg: Config | None) -> Finding:
    """CPU cores against what the workers want."""
    found = f"{count} cores, {platform.machine()}"
    if cfg is None or cfg.cluster.address:
        return Finding("cpu", True, found)
    wanted = cfg.cluster.workers * cfg.cluster.threads_per_worker
    remedy = "fewer cluster.workers or cluster.threads_per_worker; threads beyond the cores slow each other down"
    return Finding("cpu", wanted <= count, f"{found}; the workers use {wanted} threads", remedy, essential=False)


def devices(cfg: Config | None) -> Iterator[Finding]:
    """CUDA devices; essential only for a config that asks for them."""
    import torch

    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    found = f"{count} x {names}" if count else "none; torch trains on the CPU"
    wanted = 0 if cfg is None or cfg.cluster.address else cfg.cluster.workers * cfg.cluster.gpus_per_worker
    if wanted:
        found += f"; the workers use {wanted:g}"
    yield Finding("gpus", count >= wanted, found, "cluster.gpus_per_worker=0 trains on the CPU")


def backends(cfg: Config | None) -> Iterator[Finding]:
    """Each operator backend on the device that would be used, run against the float64 reference there."""
    import torch

    registry = importlib.import_module("diffussm.ops.registry")
    on_gpu = torch.cuda.is_available() and (cfg is None or cfg.cluster.gpus_per_worker > 0)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    wanted = "auto" if cfg is None else cfg.model.backend
    verdicts = registry.survey(device, torch.float32)
    for each in verdicts:
        remedy = "model.backend=auto" if each.name == wanted else ""
        found = f"{each.reason} on {device.type}"
        yield Finding(f"operator {each.name}", each.usable, found, remedy, essential=each.name == wanted)
    if not any(each.usable for each in verdicts):
        yield Finding("operator", False, f"no backend can be used on {device.type}", "make venv")
    if wanted != "auto":
        registry.get(wanted)  # an unknown name is refused here, with the nearest one


def fashion_mnist(folder: Path | None = None) -> Finding:
    """The data set behind configs/fashion-mnist.yaml; `folder` defaults to where Debian puts it."""
    from diffussm.data.images import FASHION_MNIST_FOLDER

    place = folder or FASHION_MNIST_FOLDER
    there = any(place.glob("*.gz"))
    found = f"{place}" if there else f"no files in {place}; only configs/fashion-mnist.yaml wants them"
    return Finding("fashion-mnist", there, found, "on Debian: apt-get install dataset-fashion-mnist", essential=False)


def images(cfg: Config) -> Iterator[Finding]:
    """The pictures, counted and not decoded; latents that are there already make them needless."""
    from diffussm.checkpoint.store import NotFound, open_store
    from diffussm.data.images import open_source
    from diffussm.data.passport import FILE, Passport

    place = open_store(cfg.data.latents)
    try:
        passport = Passport.from_json(place.read(FILE), cfg.data.latents)
    except NotFound:  # which is no fault: the latents are made from the pictures
        source = open_source(cfg.data)
        found = f"{len(source):,} pictures in {len(source.classes)} classes ({cfg.data.source.name})"
    else:
        found = f"{passport.number:,} latents in {len(passport.classes)} classes are there ({cfg.data.latents})"
    yield Finding("images", True, found)


def storage(cfg: Config) -> Iterator[Finding]:
    """A round trip to the place where the run will lie."""
    from diffussm.checkpoint.store import open_store
    from diffussm.naming import RunPaths

    root = RunPaths(cfg.storage, cfg.name).root
    open_store(root).check_writable()
    yield Finding("storage", True, f"{root} can be written and read")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings as they come and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cfg = load(given[0], given[1:]) if given else None
        if cfg is not None:
            check(cfg)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    missing = 0
    for finding in survey(cfg):
        print(finding.line, flush=True)
        missing += finding.essential and not finding.ok
    print(f"\n{missing} essential thing(s) missing" if missing else "\nnothing essential is missing")
    return int(ExitCode.ENVIRONMENT if missing else ExitCode.DONE)


def _normal(name: str) -> str:
    """A package name as pip compares it."""
    return name.lower().replace("_", "-").replace(".", "-")


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
