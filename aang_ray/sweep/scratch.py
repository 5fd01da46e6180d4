"""The temporary folder of our own cluster: its driver locks it, and a later start removes what a killed one left."""

from __future__ import annotations

import fcntl
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

HELD = "driver.lock"
"""File in the folder that its driver has locked."""


def hold_folder(folder: Path) -> IO[str]:
    """Lock a cluster's folder as long as this process lives or until the returned file is closed.

    The kernel gives a lock back however a process ends. A process number would say nothing to another container.
    """
    draft = folder / f"{HELD}.new"
    stream = draft.open("w")
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    draft.rename(folder / HELD)  # nobody sees the file before it is locked
    return stream


def remove_left_folders(root: Path) -> None:
    """Remove the folders of clusters whose driver was killed, which could not remove them."""
    for file in root.glob(f"aang-*/{HELD}"):
        with suppress(OSError):  # another user's, or one that goes away or is locked
            with file.open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(file.parent, ignore_errors=True)
