"""Exported models as ONNX, by onnxruntime, and on a Hub that runs on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from aang_ray.cli import main
from aang_ray.errors import RunFailure, UserError
from aang_ray.store import Store
from aang_ray.train import publish
from aang_ray.train.export import load_classifier
from aang_ray.train.publish import ONNX, check_push, push_to_hub, write_onnx
from tests.train.running import tiny_config

STEPS = ("schedule.steps=4", "schedule.eval_every=2", "method=finetune")


@pytest.fixture(scope="module")
def store(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the run whose model is kept."""
    from aang_ray.sweep.trial import run_and_store

    store = Store(tmp_path_factory.mktemp("published"))
    run_and_store(tiny_config(tiny, *STEPS), store, lambda report: None, keep=True)
    return store


@pytest.fixture
def model(store: Store, tmp_path: Path) -> Path:
    (cell,) = store.done()
    assert main(["export", cell, "-o", str(tmp_path / "model"), "--store", store.uri]) == 0
    return tmp_path / "model"


def test_onnxruntime_gives_the_probabilities_of_the_model(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    (cell,) = store.done()
    folder = tmp_path / "model"
    assert main(["export", cell, "-o", str(folder), "--onnx", "--store", store.uri]) == 0
    assert f"as ONNX: {folder / ONNX}" in capsys.readouterr().out
    assert not list(folder.glob(".onnx-*"))
    texts = ["the film was great", "a dull plot and a grim actor with very sad music", "awful"]
    encoded = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / ONNX)
    (logits,) = session.run(None, {one.name: encoded[one.name] for one in session.get_inputs()})
    _, expected = load_classifier(folder).predict(texts)
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_another_computation_is_not_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(publish, "_difference", lambda *_: float("nan"))
    with pytest.raises(RunFailure, match=r"probabilities by ONNX differ by nan, more than 0\.0001"):
        write_onnx(model)
    assert not (model / ONNX).exists()


def test_onnx_without_its_packages(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publish, "find_spec", lambda name: None)
    (cell,) = store.done()
    assert main(["export", cell, "-o", str(tmp_path / "m"), "--onnx", "--store", store.uri]) == 2
    assert "--onnx needs the package onnx: pip install 'aang-ray[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "m").exists(), "it is said before anything is trained"


class Hub(ThreadingHTTPServer):
    """A Hugging Face Hub with the requests that pushing a folder makes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        """By SHA-256: what goes to the storage of large files."""
        self.cards: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200) -> None:
        data = json.dumps(value or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @property
    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/whoami-v2":
            return self.answer({"name": "somebody", "type": "user"})
        return self.answer({"id": "somebody/model", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        body = self.body
        if self.server.refuses:
            return self.answer({"error": "You have no rights to this namespace"}, 403)
        if self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.url}/somebody/model", "name": "somebody/model"})
        if "/preupload/" in self.path:
            modes = {"model.safetensors": "lfs"}
            files = json.loads(body)["files"]
            return self.answer(
                {
                    "files": [
                        {"path": one["path"], "uploadMode": modes.get(one["path"], "regular"), "shouldIgnore": False}
                        for one in files
                    ]
                }
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/storage/{one['oid']}"}}} for one in wanted
            ]
            return self.answer({"transfer": "basic", "objects": actions})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "lfsFile":
                    self.server.files[entry["value"]["path"]] = self.server.large[entry["value"]["oid"]]
            return self.answer({"commitUrl": f"{self.server.url}/somebody/model/commit/1", "commitOid": "1" * 40})
        return self.answer({"error": f"not known here: {self.path}"}, 404)

    def do_PUT(self) -> None:
        data = self.body
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_on_the_hub(store: Store, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = store.done()
    folder = tmp_path / "model"
    arguments = ["export", cell, "-o", str(folder), "--push-to-hub", "somebody/model", "--private"]
    assert main([*arguments, "--store", store.uri]) == 0
    assert f"on the Hub: {hub.url}/somebody/model" in capsys.readouterr().out
    (made,) = hub.created
    assert made["name"] == "model"
    assert made.get("private") is True or made.get("visibility") == "private"
    local = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}
    assert {name: data for name, data in hub.files.items() if name != ".gitattributes"} == local
    assert hub.tokens <= {"Bearer hf_test"}
    assert str(tmp_path).encode() not in b"".join(hub.files.values()), "no path of this machine"


def test_a_hub_that_refuses(model: Path, hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(
        RunFailure, match=r"--push-to-hub somebody/model: .*403.*; the model is in .*; the same command"
    ):
        push_to_hub(model, "somebody/model")


def test_what_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    with pytest.raises(UserError, match="--push-to-hub a//b: "):
        check_push("a//b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_push("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="nobody is logged in"):
        check_push("a/b")
