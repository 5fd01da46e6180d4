"""Prepare the next steps' batches on another thread, so that the step never waits for data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], first: int, stop: int, depth: int = 2) -> Iterator[T]:
    """make(first), ..., make(stop - 1) in order, at most `depth` ahead; depth 0 makes each when it is asked for.

    An exception in `make` is raised where its result would have come.
    """
    if depth == 0:
        yield from map(make, range(first, stop))
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            for step in range(first, stop):
                waiting.append(pool.submit(make, step))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
