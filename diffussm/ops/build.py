"""Compile the C++ sources of the operator on first use, and keep the result for every later process.

The library is a plain shared object without Python or torch inside, so a build takes seconds and needs a C++ compiler
only. It is kept under a key made of the sources, the compiler, its flags and the processor, since `-march=native` code
must not run elsewhere; a home directory may be shared by machines of different kinds. The digest of the library is part
of its name: a damaged file is noticed, removed and built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-math-errno")
CACHE_VARIABLE = "DIFFUSSM_CACHE"
_TIMEOUT_S = 600


class BuildError(RuntimeError):
    """The library cannot be built or loaded; the text is the reason, for whoever chooses a backend."""


def cache_folder() -> Path:
    """Where libraries are kept: $DIFFUSSM_CACHE, else the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "diffussm"


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX, else g++.

    Raises:
        BuildError: there is none.
    """
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"no C++ compiler: {name!r} is not on the path (install g++, or set CXX)")
    return found


def library_key(compiler: str, sources: Path = SOURCES) -> str:
    """What the library depends on, as 16 hexadecimal digits.

    Raises:
        BuildError: the compiler does not run.
    """
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (_run([compiler, "--version"]), *FLAGS, _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library, built if nobody has built it yet. Processes that start together build it once and wait.

    Raises:
        BuildError: no compiler, a failed build, or a cache that cannot be written.
    """
    compiler = find_compiler()
    key = library_key(compiler)
    folder = cache_folder() / "ops"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{key}.lock"):
            found = _verified(folder, key) or _build(compiler, folder, key)
            try:
                return ctypes.CDLL(str(found))
            except OSError:  # intact, yet not loadable: say, linked against a library that was removed since
                found.unlink(missing_ok=True)
                return ctypes.CDLL(str(_build(compiler, folder, key)))
    except OSError as error:
        raise BuildError(f"{error} (cache folder {folder}; {CACHE_VARIABLE} moves it)") from error


def _verified(folder: Path, key: str) -> Path | None:
    """The library under that key whose content matches its name; files that do not match are removed."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        if path.name == _library_name(key, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return None


def _build(compiler: str, folder: Path, key: str) -> Path:
    """Compile under a temporary name, then rename: nobody ever sees half a library."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{key}-") as scratch:
        made = Path(scratch) / "library"
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        with ThreadPoolExecutor() as pool:  # compilers are processes: threads only wait for them
            commands = ([compiler, *FLAGS, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True))
            list(pool.map(_run, commands))
        _run([compiler, *FLAGS, "-shared", "-o", str(made), *objects])
        final = folder / _library_name(key, made.read_bytes())
        made.replace(final)
    return final


def _library_name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time. Without file locks each process builds for itself: safe, only slower."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _processor() -> str:
    """Model and instruction sets of this processor."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    lines = dict.fromkeys(line for line in info.read_text().splitlines() if line.startswith(wanted))
    return "\n".join([platform.machine(), *lines])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - a compiler that the user chose, with our own flags
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no output")
        raise BuildError(f"{command[0]} failed with exit code {done.returncode}: {first.strip()}")
    return done.stdout
