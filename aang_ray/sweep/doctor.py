"""`aang doctor`: what a run needs of this machine, checked one by one, each failure with what mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aang_ray.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "aang-ray"
OLDEST_PYTHON = (3, 11)
LEAST_DISK_GIB = 2.0
"""Free space below which a check of a disk fails: one model, its checkpoint and its export may take as much."""
LEAST_MEMORY_GIB = 2.0
"""Free memory below which a sweep on this machine is unlikely to finish: two trials of a small encoder."""
HUB_SECONDS = 3.0
"""How long the Hub may take to answer."""

_LONGEST = 300
"""Characters of an error that are shown."""
_RAY_MEND = (
    "look for a firewall on the loopback interface, a full /dev/shm, or a proxy without NO_PROXY=127.0.0.1; "
    "`aang train` needs no Ray"
)
_STORE_MEND = "choose another folder with --store or AANG_STORE"
_CACHE_MEND = "set AANG_CACHE to a folder on another disk"

State = Literal["ok", "note", "FAIL"]
"""`note`: something that only some runs need is missing."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    state: State
    text: str
    mend: str = ""
    """What the user can do about it; empty if all is well."""


def doctor(store: str, *, quick: bool = False) -> Iterator[tuple[str, Finding]]:
    """Check everything that a run needs of this machine, one thing after the other.

    Args:
        store: Folder or URI of the store that results would go to.
        quick: Leave out what takes seconds: starting Ray, and asking the Hub.

    Yields:
        The name of each check, and what it found. No check raises: an exception becomes a finding that fails.
    """
    mends = {"ray": _RAY_MEND, "store": _STORE_MEND, "cache": _CACHE_MEND}
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "packages": check_packages,
        "torch": check_torch,
        "device": check_device,
        "memory": check_memory,
        "store": lambda: check_store(store),
        "cache": check_cache,
        "temporary files": check_temporary_files,
        "encoder": check_encoder,
    }
    if not quick:
        checks |= {"ray": check_ray, "hub": check_hub}
    for name, check in checks.items():
        try:
            yield name, check()
        except UserError as error:
            yield name, Finding("FAIL", str(error), mends.get(name, "change what the line names"))
        except Exception as error:  # noqa: BLE001  the other checks shall still run, and this one is not hidden
            text = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST]
            yield name, Finding("FAIL", text, mends.get(name, "install the package or the driver of this line anew"))


def check_python() -> Finding:
    """Check the version of Python."""
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("FAIL", text, "install Python 3.11 or newer: make PYTHON=python3.12 try TASK=...")
    return Finding("ok", text)


def check_packages() -> Finding:
    """Check that every dependency is installed in a version that is allowed, and tell which extras are complete."""
    from packaging.requirements import Requirement

    wrong: list[str] = []
    extras: dict[str, bool] = dict.fromkeys(metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or (), True)
    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ()):
        extra = next((name for name in extras if _belongs_to(requirement, name)), None)
        if extra is None and requirement.marker is not None and not requirement.marker.evaluate():
            continue  # of another platform
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = ""
        fits = bool(found) and requirement.specifier.contains(found, prereleases=True)
        if extra is not None:
            extras[extra] = extras[extra] and fits
        elif not fits:
            wrong.append(f"{requirement.name} {found or 'is missing'} (allowed: {requirement.specifier})")
    if wrong:
        return Finding("FAIL", "; ".join(wrong), f"pip install --upgrade {DISTRIBUTION} in this environment")
    there = ", ".join(sorted(name for name, complete in extras.items() if complete)) or "none"
    missing = ", ".join(sorted(name for name, complete in extras.items() if not complete)) or "none"
    return Finding("ok", f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}; extras: {there}; not installed: {missing}")


def _belongs_to(requirement: Requirement, extra: str) -> bool:
    """Return whether a requirement is one of an extra alone."""
    marker = requirement.marker
    return marker is not None and not marker.evaluate({"extra": ""}) and marker.evaluate({"extra": extra})


def check_torch() -> Finding:
    """Check that PyTorch can be imported."""
    import torch

    return Finding("ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_device() -> Finding:
    """Check the device and the precision that a run takes by default, with one matrix product on it."""
    import torch

    from aang_ray.config import RunConfig
    from aang_ray.train.device import choose_compute

    compute = choose_compute(RunConfig())
    factor = torch.ones(64, 64, device=compute.device, requires_grad=True)
    with compute.autocast():
        loss = (factor @ factor).float().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    if not (factor.grad is not None and bool(torch.isfinite(factor.grad).all()) and float(loss.detach()) == 64.0**3):
        return Finding("FAIL", f"{compute.device_name}, {compute.precision}: wrong results", "set precision=fp32")
    text = f"{compute.device_name}, {compute.precision}"
    if compute.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(compute.device)
        return Finding("ok", f"{text}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists():
        return Finding(
            "FAIL",
            f"{text}; this machine has an NVIDIA GPU that PyTorch {torch.__version__} cannot use",
            "install the CUDA build of this PyTorch version that fits the driver (pytorch.org, Get started), or run "
            "with resources.device=cpu",
        )
    slow = "" if compute.precision == "bf16" else "; no bf16, which would be two to four times as fast"
    return Finding("ok", f"{text}{slow}")


def check_memory() -> Finding:
    """Check the free memory."""
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, {cores} cores"
    if memory.available < LEAST_MEMORY_GIB * 2**30:
        return Finding("FAIL", text, "end other programs, or lower batch.auxiliary and encoder.layers")
    return Finding("ok", text)


def check_store(store: str) -> Finding:
    """Check that results can be written, and that their disk has room."""
    from aang_ray.store import Store

    opened = Store(store)
    if "://" in opened.uri:
        return Finding("ok", f"{opened.uri} is remote; whether it can be written shows with the first file")
    return _disk(Path(opened.uri), _STORE_MEND)


def check_cache() -> Finding:
    """Check the folder of prepared data, and that of models of the Hub."""
    from aang_ray.data.cache import cache_folder

    return _disk(cache_folder(), _CACHE_MEND)


def check_temporary_files() -> Finding:
    """Check the folder that Ray's processes write into."""
    return _disk(Path(tempfile.gettempdir()), "set TMPDIR to a folder on another disk")


def _disk(folder: Path, mend: str) -> Finding:
    """Check that a folder, or the nearest one above it that exists, can be written and has room."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**30
    text = f"{folder}, {free:.1f} GiB free"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("FAIL", f"{text}; {there} cannot be written", mend)
    if free < LEAST_DISK_GIB:
        return Finding("FAIL", text, f"free at least {LEAST_DISK_GIB:g} GiB, or {mend}")
    return Finding("ok", text)


def check_encoder() -> Finding:
    """Check that an encoder is at hand which needs no download."""
    from aang_ray.config import EncoderConfig
    from aang_ray.data.pretrained import PACKAGED, locate
    from aang_ray.model.loading import encoder_size

    try:
        located = locate(EncoderConfig(name=PACKAGED))
    except UserError as error:
        return Finding("note", "no packaged encoder; `aang try` and jobs/demo.yaml need one", str(error))
    size = encoder_size(EncoderConfig(name=PACKAGED), located)
    return Finding("ok", f"{PACKAGED}: {size.layers} layers, {size.parameters / 1e6:.0f} million parameters")


def check_ray() -> Finding:
    """Check that the cluster of RAY_ADDRESS answers, or that a cluster starts on this machine and runs a task."""
    from aang_ray.sweep.cluster import cluster_lines, own_cluster, ray_cluster

    if not own_cluster():
        lines = cluster_lines()
        if not lines[0].startswith("cluster at "):
            mend = "check RAY_ADDRESS (HOST:PORT of the head), the network and the token; unset it to run here"
            return Finding("FAIL", lines[0], mend)
        return Finding("ok", lines[0])
    began = time.perf_counter()
    with ray_cluster():
        import ray

        answer = ray.get(ray.remote(num_cpus=0.1)(_process).remote(), timeout=60)
    if answer == os.getpid():
        return Finding("FAIL", "the task did not run in a process of its own", _RAY_MEND)
    return Finding("ok", f"{ray.__version__}; a cluster on this machine started in {time.perf_counter() - began:.0f} s")


def _process() -> int:
    """Return the number of the process; `ray.remote` takes no built-in function."""
    return os.getpid()


def check_hub() -> Finding:
    """Check whether the Hugging Face Hub answers. Only encoders and data that are named there need it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Finding("note", "not asked: HF_HUB_OFFLINE is set, so only models and data in its cache are found")
    mend = (
        "only encoders and data on the Hub need it; else name a folder or package:NAME. A mirror: HF_ENDPOINT; a "
        "proxy: HTTPS_PROXY; models that are in the cache: HF_HUB_OFFLINE=1"
    )
    began = time.perf_counter()
    problem = _ask(constants.ENDPOINT)
    if problem is not None:
        return Finding("note", f"{constants.ENDPOINT} does not answer ({problem})", mend)
    return Finding("ok", f"{constants.ENDPOINT} answered in {time.perf_counter() - began:.1f} s")


def _ask(url: str) -> str | None:
    """Return what went wrong with a request to a server; None if it answered."""
    problem: list[str | None] = [f"no answer within {HUB_SECONDS:g} s"]

    def request() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_SECONDS):
                problem[0] = None
        except (OSError, ValueError, HTTPException) as error:
            problem[0] = " ".join(str(error).split()) or type(error).__name__

    # In a thread, because the time-out of a request does not bound the look-up of the server's name.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return problem[0]
