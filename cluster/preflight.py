"""`python -m cluster.preflight [CONFIG [key=value ...]]`: what this machine has, what it lacks, what mends it.

A JSON object a line, which `diffussm doctor` shows. Nothing is changed; with a config its storage is written to for a
few seconds, read back and cleaned.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from cluster import bandwidth
from diffussm.config import Config, check, load
from diffussm.errors import DiffuSSMError, ExitCode, StorageError
from diffussm.naming import is_remote

if TYPE_CHECKING:
    import torch

LOCK = Path(__file__).parents[1] / ".ci" / "requirements.lock"
"""The pinned environment; there in a checkout, absent in an installed wheel."""

COMPILERS = ("c++", "g++", "clang++")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the system's own place, only looked at
SHARED_MEMORY_BYTES = 256 << 20
"""Ray's object store is 100 MiB for us; the data loader's shared memory comes on top."""

SCRATCH_BYTES = 1 << 30
"""Least room for a start's scratch: Ray's session, caches, sockets."""
ANSWER_S = 60.0
"""Longest wait for a store."""
VERSIONS = ("diffussm", "torch", "deepspeed", "ray", "mosaicml-streaming", "diffusers", "numpy")
MENDS = {
    "cpu": "on Debian: apt-get install g++",
    "triton": "make venv; triton comes with torch for CUDA",
    "cuda": "leave model.backend=auto",
}
"""What makes an operator backend usable."""
TIMED = (2, 1024, 64)
"""B, L (a picture of 256 px) and D of the call that is timed."""


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

    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by a name with its unit."""

    @property
    def line(self) -> str:
        """As JSON, with `state`: ok, bad, or warn for what is not essential."""
        state = "ok" if self.ok else "bad" if self.essential else "warn"
        remedy = "" if self.ok else self.remedy
        shown = {"what": self.what, "state": state, "found": self.found, "remedy": remedy, "numbers": self.numbers}
        return json.dumps(shown)


def survey(cfg: Config | None = None) -> Iterator[Finding]:
    """Look at one thing after another, cheap ones first."""
    yield python(sys.version_info[:2])
    yield from packages(metadata.requires("diffussm") or [], installed())
    if LOCK.exists():
        yield lock(LOCK.read_text(), installed())
    yield versions(installed())
    yield compiler(shutil.which)
    yield shared_memory(SHARED_MEMORY)
    yield disk(Path(tempfile.gettempdir()))
    yield cores(os.cpu_count() or 1, cfg)
    yield from guarded("gpus", lambda: devices(cfg))
    yield from guarded("operator", lambda: backends(cfg))
    if cfg is None:
        yield from guarded("fashion-mnist", lambda: iter([fashion_mnist()]))
    else:
        yield from guarded("images", lambda: within(ANSWER_S, lambda: images(cfg)))
        yield from guarded("storage", lambda: within(ANSWER_S, lambda: storage(cfg)))
        yield from guarded("latents", lambda: within(ANSWER_S, lambda: latents(cfg)))


def guarded(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of `look`; what it raises is a finding too, so that one missing part does not hide the others."""
    try:
        yield from look()
    except DiffuSSMError as error:
        yield Finding(what, False, error.message, error.remedy)
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything; it is shown, not swallowed
        yield Finding(what, False, f"{type(error).__name__}: {error}", "install the locked environment: make venv")


def within(seconds: float, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of `look`, made in a thread that is left alone after `seconds`: a client may try for very long.

    Raises:
        StorageError: no answer in time.
        Exception: whatever `look` raises.
    """
    found: list[Finding] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            found.extend(look())
        except Exception as error:  # noqa: BLE001 - raised again by the caller
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise StorageError(
            f"no answer within {seconds:g} s", "check the endpoint (S3_ENDPOINT_URL), the network and the store itself"
        )
    yield from found
    if raised:
        raise raised[0]


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


def versions(found: Mapping[str, str]) -> Finding:
    """Versions that decide what a run computes."""
    said = ", ".join(f"{name} {found.get(_normal(name), 'absent')}" for name in VERSIONS)
    return Finding("versions", True, f"{said}; {platform.platform()}")


def disk(folder: Path) -> Finding:
    """Room for scratch."""
    free = shutil.disk_usage(folder).free
    return Finding(
        "disk",
        free >= SCRATCH_BYTES,
        f"{_mib(free)} free in {folder}; wanted are {_mib(SCRATCH_BYTES)}",
        "free some, or set TMPDIR to a larger disk",
        essential=False,
    )


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
    if count:
        there = torch.distributed.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if there else "this torch has no NCCL"
        yield Finding("nccl", there, version, "make venv, or install torch for CUDA")


def backends(cfg: Config | None) -> Iterator[Finding]:
    """Each operator backend on the device that would be used, run against the float64 reference there."""
    import torch

    registry = importlib.import_module("diffussm.ops.registry")
    on_gpu = torch.cuda.is_available() and (cfg is None or cfg.cluster.gpus_per_worker > 0)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    wanted = "auto" if cfg is None else cfg.model.backend
    verdicts = registry.survey(device, torch.float32)
    tried = registry.preference(device.type)
    for each in verdicts:
        remedy = "model.backend=auto" if each.name == wanted else MENDS.get(each.name, "make venv")
        needless = each.name not in (*tried, wanted)  # such as a GPU's backend where there is no GPU
        found = f"on {device.type}: {each.reason}" + ("; auto does not try it here" if needless else "")
        yield Finding(f"operator {each.name}", each.usable or needless, found, remedy, essential=each.name == wanted)
    if not any(each.usable for each in verdicts):
        yield Finding("operator", False, f"no backend can be used on {device.type}", "make venv")
        return
    yield speed(registry.resolve(wanted, device, torch.float32).name, device)


def speed(backend: str, device: torch.device) -> Finding:
    """The chosen backend timed against the textbook formula, forward and all gradients, and its error."""
    from diffussm.bench import op

    batch, length, channels = TIMED
    rows = op.bench([length], [batch], [channels], backends=[backend], device=device, modes=["forward+backward"])
    row = next(each for each in rows if each.backend == backend)
    found = (
        f"{backend} takes {row.ms:.1f} ms for forward and gradients of {TIMED}, {row.ratio:.1f} times as fast as the "
        f"textbook formula; off by {row.error:.1g} (relative L2 against float64)"
    )
    numbers = {"ms": row.ms, "ratio": row.ratio, "error": row.error}
    remedy = "diffussm bench op compares all backends at more sizes"
    return Finding("operator speed", row.ratio >= 1, found, remedy, essential=False, numbers=numbers)


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
    """A round trip to the place where the run will lie, and its speed."""
    from diffussm.checkpoint.store import open_store
    from diffussm.naming import RunPaths

    root = RunPaths(cfg.storage, cfg.name).root
    store = open_store(root)
    store.check_writable()
    found = bandwidth.round_trip(store)
    said = f"{root} takes {_mb(found.write)} and gives {_mb(found.read)}, one stream{_cached(root)}"
    numbers = {"write_bytes_per_s": found.write, "read_bytes_per_s": found.read}
    yield Finding("storage", True, said, numbers=numbers)
    if not is_remote(root):
        yield disk(Path(root.removeprefix("file://")))


def latents(cfg: Config) -> Iterator[Finding]:
    """How fast latents come, if they are there; else whether they can be made there, and how fast."""
    from diffussm.checkpoint.store import NotFound, open_store

    place = cfg.data.latents
    store = open_store(place)
    try:
        shards = [(each["raw_data"]["basename"], each["raw_data"]["bytes"], each["samples"])
                  for each in json.loads(store.read("index.json"))["shards"]]  # fmt: skip
    except NotFound:
        store.check_writable()
        found = bandwidth.round_trip(store)
        said = (
            f"{place} takes {_mb(found.write)} and gives {_mb(found.read)}, one stream{_cached(place)}; none there yet"
        )
        yield Finding("latents", True, said)
        return
    rate = bandwidth.reading(store, [(name, size) for name, size, _ in shards])
    each = sum(size for _, size, _ in shards) / max(1, sum(samples for *_, samples in shards))
    said = f"{place} gives {_mb(rate)}, {rate / max(each, 1):,.0f} images/s in one stream{_cached(place)}"
    yield Finding("latents", True, said, numbers={"read_bytes_per_s": rate, "bytes_per_image": each})


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings as they come and return the exit code: that of a wrong config, or 0 whatever was found."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cfg = load(given[0], given[1:]) if given else None
        if cfg is not None:
            check(cfg)
    except DiffuSSMError as error:
        print(f"diffussm: {type(error).__name__}: {error}", file=sys.stderr)
        return int(error.code)
    for finding in survey(cfg):
        print(finding.line, flush=True)
    return int(ExitCode.DONE)


def _normal(name: str) -> str:
    """A package name as pip compares it."""
    return name.lower().replace("_", "-").replace(".", "-")


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"


def _mb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:,.0f} MB/s"


def _cached(place: str) -> str:
    return "" if is_remote(place) else " (what is read may come from memory)"


if __name__ == "__main__":
    sys.exit(main())
