"""Processes of the package keep their memory; a process that imports it is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from aang_ray.config.sections import ResourcesConfig
from aang_ray.train import process

FAULTS = """
import resource, sys, torch
from aang_ray.config.sections import ResourcesConfig
from aang_ray.train.process import set_up_process
print(set_up_process(ResourcesConfig(keep_memory=sys.argv[1] == "keep")), file=sys.stderr)
def use():
    torch.ones(20_000_000)
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Allocates and frees 80 MB five times, and prints the page faults of that."""


def faults(setting: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", FAULTS, setting], check=True, capture_output=True, text=True)
    return int(done.stdout), done.stderr


@pytest.mark.skipif(process.platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, line = faults("keep")
    assert kept < 100
    assert "kept for the next step" in line
    returned, line = faults("return")
    assert returned > 100  # huge pages make few faults; small ones 100,000
    assert "keep_memory=false" in line


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
