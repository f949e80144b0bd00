"""Bytes on their way to a store, read block by block and given up at once when their time is over."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from typing_extensions import override

from diffussm.errors import StorageError

T = TypeVar("T")
BLOCK_BYTES = 4 << 20


class Cancelled(StorageError):
    """The bytes were asked for after their deadline."""


class Source(io.RawIOBase):
    """Parts of memory one after another, as a file that can be read again from anywhere. Nothing is copied at once.

    After `cancel` every read raises Cancelled, so that a transfer that hangs never reads memory that has other use by
    then.
    """

    def __init__(self, parts: Sequence[memoryview]) -> None:
        super().__init__()
        self._parts = [part for part in parts if len(part)]
        self.size = sum(map(len, self._parts))
        self._at = 0
        self._cancelled = threading.Event()
        self._told: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Refuse all reads from now on, and tell whoever waits for a transfer."""
        with self._lock:
            self._cancelled.set()
            told = list(self._told)
        for tell in told:
            tell()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def when_cancelled(self, tell: Callable[[], None]) -> None:
        """Call `tell` at the moment of `cancel`, or now if that has passed."""
        with self._lock:
            self._told.append(tell)
        if self.cancelled:
            tell()

    def blocks(self) -> Iterator[memoryview]:
        """All bytes in order, in blocks of at most BLOCK_BYTES, without copying."""
        for part in self._parts:
            for low in range(0, len(part), BLOCK_BYTES):
                if self._cancelled.is_set():
                    raise Cancelled("given up after the deadline")
                yield part[low : low + BLOCK_BYTES]

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    @override
    def tell(self) -> int:
        return self._at

    @override
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._cancelled.is_set():
            raise Cancelled("given up after the deadline")
        # As much as there is, over borders: an upload makes a part of each answer, and S3 refuses short ones.
        begin = done = 0
        for part in self._parts:
            if done < len(buffer) and self._at < begin + len(part):
                piece = part[self._at - begin : self._at - begin + len(buffer) - done]
                buffer[done : done + len(piece)] = piece
                self._at += len(piece)
                done += len(piece)
            begin += len(part)
        return done


def within(seconds: float, work: Callable[[], T], source: Source, what: str) -> T:
    """The result of `work`, done on a thread, or StorageError naming `what` after `seconds`.

    A call into a store cannot be broken off, only left. Then the source is cancelled, so that the thread reads no
    memory that has other use by then; and once the source is cancelled the call is left.

    Raises:
        Cancelled: the source was cancelled before the end. StorageError: the time was over. What `work` raises.
    """
    given_up = f"{what}: given up before it was stored"
    if source.cancelled:
        raise Cancelled(given_up)
    outcome: list[T | BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised below
            outcome.append(error)
        ended.set()

    source.when_cancelled(ended.set)
    threading.Thread(target=run, name="store", daemon=True).start()
    ended.wait(max(0.0, min(seconds, threading.TIMEOUT_MAX)))
    if not outcome:
        if source.cancelled:
            raise Cancelled(given_up)
        source.cancel()
        raise StorageError(
            f"{what}: not stored within {seconds:.3g} s (checkpoint.deadline_s, or the notice before a preemption)",
            "check the speed of the store; raise checkpoint.deadline_s if it is always that slow",
        )
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
