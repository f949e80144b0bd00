"""The compile cache: built once, by whoever comes first, and never half."""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from diffussm.ops import build, registry
from diffussm.ops.cpu import BACKEND, _library

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

SMALL = '#pragma GCC visibility push(default)\nextern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and one small source, so that a build takes a moment."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "answer.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build.library_key, "__defaults__", (sources,))
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    build.load_library.cache_clear()
    yield tmp_path / "cache" / "ops"
    build.load_library.cache_clear()


def _load_and_ask(gate: multiprocessing.synchronize.Event, answers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    gate.wait()
    build.load_library.cache_clear()
    answers.put(build.load_library().answer())


@needs_compiler
def test_two_processes_that_start_together_share_one_library(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, answers = context.Event(), context.Queue()
    workers = [context.Process(target=_load_and_ask, args=(gate, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    gate.set()
    assert [answers.get(timeout=60) for _ in workers] == [42, 42]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(list(cache.glob("*.so"))) == 1
    assert not [p for p in cache.iterdir() if p.is_dir()]  # no scratch folder is left


@needs_compiler
def test_a_second_load_does_not_compile(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_library()
    build.load_library.cache_clear()
    monkeypatch.setattr(build, "_build", lambda *args: pytest.fail("it compiled again"))
    assert build.load_library().answer() == 42


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"not a library", b"\x7fELF"])
def test_a_damaged_library_is_built_again(cache: Path, damage: bytes) -> None:
    key = build.library_key(build.find_compiler())
    cache.mkdir(parents=True)
    bad = cache / f"{key}-0123456789abcdef.so"
    bad.write_bytes(damage)
    assert build.load_library().answer() == 42
    assert not bad.exists()


@needs_compiler
def test_a_library_that_does_not_load_is_built_again(cache: Path) -> None:
    key = build.library_key(build.find_compiler())
    cache.mkdir(parents=True)
    content = b"the digest fits, the content does not"
    (cache / build._library_name(key, content)).write_bytes(content)
    assert build.load_library().answer() == 42


@needs_compiler
def test_the_key_follows_sources_compiler_and_flags(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build.find_compiler()
    keys = {build.library_key(compiler)}
    (build.SOURCES / "answer.cpp").write_text(SMALL.replace("42", "43"))
    keys.add(build.library_key(compiler))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DX"))
    keys.add(build.library_key(compiler))
    monkeypatch.setattr(build, "_processor", lambda: "another")
    keys.add(build.library_key(compiler))
    monkeypatch.setattr(build, "_run", lambda command: "another compiler")
    keys.add(build.library_key(compiler))
    assert len(keys) == 5


@needs_compiler
def test_a_failed_compile_names_the_error_and_leaves_nothing(cache: Path) -> None:
    (build.SOURCES / "answer.cpp").write_text("int answer() { return; }\n")
    with pytest.raises(build.BuildError, match="error"):
        build.load_library()
    assert not list(cache.glob("*.so"))


def test_an_unwritable_cache_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(build, "find_compiler", lambda: "c++")
    monkeypatch.setattr(build, "_run", lambda command: "")
    with pytest.raises(build.BuildError, match=build.CACHE_VARIABLE):
        build.load_library()


def test_without_a_compiler_auto_falls_back_and_a_named_backend_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    _library.cache_clear()
    registry.forget()
    try:
        device = torch.device("cpu")
        reason = BACKEND.available(device, torch.float32)
        assert reason is not None
        assert "no-such-compiler" in reason
        with caplog.at_level("WARNING", logger="diffussm.ops"):
            assert registry.resolve("auto", device, torch.float32).name == "torch"
        assert "no-such-compiler" in caplog.text
        with pytest.raises(registry.MissingError, match="no-such-compiler"):
            registry.resolve("cpu", device, torch.float32)
    finally:
        _library.cache_clear()
        registry.forget()


@needs_compiler
def test_the_shipped_sources_build_without_warnings(tmp_path: Path) -> None:
    shipped = Path(build.__file__).parent / "csrc"
    for source in sorted(shipped.glob("*.cpp")):
        build._run(["g++", "-std=c++17", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", str(source)])
    assert isinstance(_library(), ctypes.CDLL)
