"""Settings of a process that does nothing but train: trials, workers, and the command `aang train`.

They concern the whole process, so importing the package, and its Python interface, leave them alone.
"""

from __future__ import annotations

import ctypes
import platform

import torch

from aang_ray.config.sections import ResourcesConfig

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Numbers of parameters of glibc's `mallopt`, from malloc.h."""


def set_up_process(resources: ResourcesConfig) -> str:
    """Prepare this process for training, and return what was done, as one line.

    - Freed memory stays with the process (glibc only). By default glibc returns tensors of more than 32 MB at once, and
      a step requests the same memory again, page by page. Before version 2.38, glibc cannot always put an aligned
      block, such as a tensor, where one of the same size was; so this saves most of the page faults, and not all.
    - Numbers below 1e-38 in fp32 (1e-308 in fp64) count as 0: processors compute with them many times slower.

    `resources.keep_memory: false` leaves glibc as it is.
    """
    flushed = torch.set_flush_denormal(True)
    denormals = "numbers below the normal range are 0" if flushed else "this processor keeps denormal numbers"
    return f"process: {_keep_memory(resources)}, {denormals}"


def _keep_memory(resources: ResourcesConfig) -> str:
    if not resources.keep_memory:
        return "freed memory goes back to the system (resources.keep_memory=false)"
    if platform.libc_ver()[0] != "glibc":
        return "the C library, which is not glibc, manages memory"
    mallopt = ctypes.CDLL(None).mallopt
    # No block gets a mapping of its own, which would be returned when it is freed; -1 keeps the top of the heap. Ray
    # runs a trial in a thread, and the heaps that glibc gives to threads hold no block of more than 64 MB: one heap for
    # all, for threads that start after this.
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_ARENA_MAX, 1)):
        return "glibc refused mallopt and manages memory"
    return "freed memory is kept for the next step (resources.keep_memory=false changes that)"
