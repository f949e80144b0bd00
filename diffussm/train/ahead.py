"""One step ahead: the next batch is read and its noise drawn on a thread while the present step computes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(
    make: Callable[[], T], count: int, prepare: Callable[[], object] = lambda: None
) -> Generator[T, None, None]:  # fmt: skip
    """Yield `count` results of `make`, in order, each made on a thread while its predecessor is in use.

    `prepare` runs first on that thread, for what belongs to a thread, such as the current CUDA device.

    An exception of `make` is raised where its result would have come. Nothing is made beyond `count`; closing the
    generator early waits for what is being made.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=prepare) as pool:
        coming = pool.submit(make) if count > 0 else None
        for left in range(count - 1, -1, -1):
            assert coming is not None  # noqa: S101 - there is one for each round
            value = coming.result()
            coming = pool.submit(make) if left else None
            yield value
