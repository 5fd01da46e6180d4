"""`aang doctor`: each failure is a line with what mends it, and decides the exit code."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import types
from collections import namedtuple
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from aang_ray.cli import main
from aang_ray.sweep import doctor as module
from aang_ray.sweep.doctor import Finding


def findings(store: Path | str) -> dict[str, Finding]:
    return dict(module.doctor(str(store), quick=True))


def test_a_machine_that_runs_the_tests_is_ready(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--quick", "--store", str(tmp_path / "store")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "this machine is ready"
    names = [line[6:].partition(":")[0] for line in lines if not line.startswith("      ")][:-1]
    assert names[:4] == ["python", "packages", "torch", "device"]
    assert "ray" not in names
    assert not (tmp_path / "store").exists()


def test_what_fails_is_named_with_its_mend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=2**33, available=2**20))
    assert main(["doctor", "--quick", "--store", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: 4 checks failed: memory, store, cache, temporary files\n"
    assert "FAIL  store: " in captured.out
    assert "to mend it: free at least 2 GiB, or choose another folder with --store" in captured.out
    assert "free at least 2 GiB, or set AANG_CACHE" in captured.out
    assert "ready" not in captured.out


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = findings(tmp_path / "file")["store"]
    assert found.state == "FAIL"
    assert found.mend.startswith("choose another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in findings(tmp_path / "store")["store"].text


def test_a_remote_store_is_not_asked() -> None:
    found = findings("memory://results")["store"]
    assert (found.state, "is remote" in found.text) == ("ok", True)


def test_old_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=999", "no-such-package>=1", 'torch<1; sys_platform == "other"', 'nothing>=1; extra == "demo"']
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    found = module.check_packages()
    assert found.state == "FAIL"
    assert f"numpy {metadata.version('numpy')} (allowed: >=999)" in found.text
    assert "no-such-package is missing (allowed: >=1)" in found.text
    assert "torch" not in found.text
    monkeypatch.setattr(metadata, "requires", lambda _: wanted[2:])
    found = module.check_packages()
    assert found.state == "ok"
    assert found.text.partition("not installed: ")[2] == "demo"


def test_a_check_that_raises_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> Finding:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(module, "check_torch", broken)
    found = findings(tmp_path)
    assert found["torch"].state == "FAIL"
    assert found["torch"].text.startswith("ImportError: libcudart.so.13")
    assert found["device"].state == "ok"


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    assert "make PYTHON=" in module.check_python().mend


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    found = module.check_device()
    assert found.state == "FAIL"
    assert "CUDA build" in found.mend


def test_without_the_packaged_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aang_ray.data.pretrained.PACKAGED", "package:not_installed_anywhere")
    found = module.check_encoder()
    assert found.state == "note"
    assert "pip install" in found.mend


@pytest.fixture
def server() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as started:
        thread = threading.Thread(target=started.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{started.server_port}"
        started.shutdown()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The constants of the Hub's library, without a proxy for the loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return monkeypatch


def test_a_hub_that_answers(hub: pytest.MonkeyPatch, server: str) -> None:
    hub.setattr("huggingface_hub.constants.ENDPOINT", server)
    assert module.check_hub().state == "ok"


def test_a_hub_that_keeps_silent_is_a_note_within_seconds(hub: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        hub.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        hub.setattr(module, "HUB_SECONDS", 0.2)
        found = module.check_hub()
    assert found.state == "note"
    assert "HF_ENDPOINT" in found.mend


def test_an_address_that_is_none(hub: pytest.MonkeyPatch) -> None:
    hub.setattr("huggingface_hub.constants.ENDPOINT", "nowhere")
    assert module.check_hub().state == "note"


def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not asked" in module.check_hub().text


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = module.check_ray()
    assert found.state == "FAIL"
    assert "RAY_ADDRESS" in found.mend


@pytest.mark.integration
def test_ray_starts(tmp_path: Path) -> None:
    # In a process of its own: Ray keeps for the life of a process whether the first cluster asked for a token.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "aang_ray", "doctor", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert re.search(r"^ok +ray: \S+; a cluster on this machine started in \d+ s$", done.stdout, re.M), done
    assert done.returncode == 0
