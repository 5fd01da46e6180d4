"""The Ray cluster that a sweep runs on: the one of RAY_ADDRESS, else one of its own on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from aang_ray.train.control import Interrupted

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in a trial
    "RAY_AIR_NEW_OUTPUT": "0",  # the new reporter prints tables at verbosity 0, too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about CUDA_VISIBLE_DEVICES
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must reach us, not end the experiment politely
    "TUNE_MAX_PENDING_TRIALS_PG": "64",  # the queue says how many may wait; by default a searcher's wait one by one
}
"""Ray's settings by environment variable; what the user has set stays."""

OWN_CLUSTER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Further settings of a cluster of our own: whoever else can reach its ports, here or from elsewhere, has no token.

Only the dashboard can be kept on the loopback. Another's cluster has its own mode and token."""

OBJECT_STORE_BYTES = 160 * 2**20
"""Trials share data through memory-mapped files; the object store only carries configurations."""

LONGEST_TEMP = 26
"""Ray adds up to 67 characters to its temporary folder, we add 14, and a socket's path may have 107."""


def own_cluster() -> bool:
    """Whether a sweep starts a cluster of its own: when RAY_ADDRESS names no other."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def in_ray_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job, whose folder goes away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, else start one on this machine and end it afterwards.

    In the block SIGTERM raises `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`: Ray's own handler would end all
    processes at once, before checkpoints are written.

    The dashboard is on, on the loopback: without it Ray 2.60 never gives back the resources of a trial
    whose process was killed, and the sweep goes on with one trial less at a time.
    """
    own = own_cluster()
    for name, value in (SETTINGS | OWN_CLUSTER if own else SETTINGS).items():
        os.environ.setdefault(name, value)
    import ray

    scratch: Path | None = None
    common = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    try:
        if not own:
            ray.init(**common)
        else:
            scratch = Path(tempfile.mkdtemp(prefix="aang-", dir=_short_temp()))
            ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(scratch),
                **common,
            )
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        with _sigterm_raises():
            yield
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Only the main thread may say what a signal does; on another one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM; what has finished is in the store, the same command goes on from there")

    # None stands for a handler that was not installed from Python and cannot be put back.
    before = signal.signal(signal.SIGTERM, stop) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _short_temp() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_TEMP or not Path("/tmp").is_dir() else "/tmp"
