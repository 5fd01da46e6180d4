"""Listening to Ray while a run trains: whether its node drains, and whether its launcher is still there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aang_ray.train.notices import Notices

POLL_SECONDS = 1.0
"""Between two looks: a spot machine is taken two minutes after its notice, but a person waits for Ctrl-C."""

Sign = Callable[[], bool]

logger = logging.getLogger(__name__)


@contextmanager
def watching(draining: Sign, abandoned: Sign, pause: float = POLL_SECONDS) -> Iterator[Notices]:
    """Notices that a thread of its own keeps up to date while the block runs; what was noticed once stays so."""
    notices, over = Notices(), threading.Event()

    def look() -> None:
        while not over.wait(pause):
            notices.draining = notices.draining or draining()
            notices.stop = notices.stop or abandoned()

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield notices
    finally:
        over.set()
        thread.join()


def nobody_left() -> bool:
    """Of a run whose launcher never goes before it."""
    return False


def node_drains() -> bool:
    """Whether the node of this process takes no new work and will go away: a spot notice, `ray drain-node`.

    A process that is not connected to Ray is on no node.
    """
    import ray
    from ray._private.state import state  # the public state API does not tell; Ray Train's own watcher asks here

    if not ray.is_initialized():
        return False
    try:
        return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
    except (ray.exceptions.RayError, RuntimeError) as error:
        logger.warning("Ray does not say whether this node drains: %s", error)  # the head restarts; asked again soon
        return False
