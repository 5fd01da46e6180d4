"""Processes of the package keep their memory; a process that imports it is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from aang_ray.config.sections import ResourcesConfig
from aang_ray.train import process

FAULTS = """
import ctypes, resource, sys, threading
from aang_ray.config.sections import ResourcesConfig
from aang_ray.train.process import set_up_process
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
print(set_up_process(ResourcesConfig(keep_memory=sys.argv[1] == "keep")), file=sys.stderr)
def use():
    block = libc.malloc(80_000_000)
    libc.memset(block, 1, 80_000_000)
    libc.free(block)
def main():
    for _ in range(3):
        use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == "thread":
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
else:
    main()
"""
"""Allocates and frees 80 MB five times, and prints the page faults of that. Tensors would not do: their blocks are
aligned, and glibc before 2.38 may then need a larger hole than the one that the same block left."""


def faults(setting: str, where: str) -> tuple[int, str]:
    code = [sys.executable, "-c", FAULTS, setting, where]
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(code, check=True, capture_output=True, text=True, env=plain)
    return int(done.stdout), done.stderr


@pytest.mark.skipif(process.platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_used_again_without_page_faults(where: str) -> None:
    kept, line = faults("keep", where)
    returned, other_line = faults("return", where)
    # 80 MB are 19,532 pages, or 38 huge ones.
    assert kept * 10 < returned
    assert "kept for the next step" in line
    assert "keep_memory=false" in other_line


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: pytest.fail("the C library was touched"))
    try:
        assert "not glibc" in process.set_up_process(ResourcesConfig())
    finally:
        torch.set_flush_denormal(False)


def test_denormals_are_flushed_only_where_asked_for() -> None:
    code = (
        "import aang_ray, torch; from aang_ray.train.process import set_up_process as s; "
        "from aang_ray.config.sections import ResourcesConfig as R; "
        "t = lambda: bool((torch.tensor([1e-39]) * 1.0).any()); "
        "a = t(); s(R()); print(a, t())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]
