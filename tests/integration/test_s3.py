"""A store on S3: rows, checkpoints, a killed run that continues, a sweep and its status.

The server is moto's, on the loopback, with credentials that are valid only there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from aang_ray.config import parse_config
from aang_ray.errors import UserError
from aang_ray.store import CellIsDone, CellRecord, Store
from aang_ray.store.files import open_location
from aang_ray.train.checkpoint import CheckpointFiles, checkpoint_folder, discard
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell
from tests.integration.conftest import PROJECT, Start
from tests.integration.test_train_resume import RUN, cells, numbers
from tests.store.conftest import make

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",  # or a machine without credentials is asked for seconds
}

# Writes the rows of cells 0, 1, ... until it is killed.
WRITER = """
import itertools, sys
from aang_ray.store import Store
from tests.store.conftest import make

store = Store(sys.argv[1])
for number in itertools.count():
    store.write(make(number))
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server with one bucket, `bucket`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _listens(port):
            assert process.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not listen"
            time.sleep(0.05)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        with urllib.request.urlopen(request, timeout=30):
            yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def uri(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a store that does not exist yet, with credentials set."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{request.node.name}?endpoint_override={server}&scheme=http"


def names(uri: str) -> list[str]:
    """Names of all objects below a URI, without folder entries."""
    location = open_location(uri)
    infos = location.filesystem.get_file_info(fs.FileSelector(location.root, recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"{location.root}/") for info in infos if info.type == fs.FileType.File)


def test_rows(uri: str) -> None:
    store = Store(uri)
    assert not store.exists()
    assert store.done() == {}
    store.write(make(1, status="failed", evaluations=5))
    assert store.done() == {f"{1:016x}": "failed"}
    done: list[CellRecord] = [make(1, evaluations=2), make(2, task="a/b %25 ü")]
    for record in done:
        store.write(record)
    assert [store.record(record.result.cell) for record in done] == done
    assert store.history().num_rows == 2 + 3
    with pytest.raises(CellIsDone):
        store.write(make(1, status="failed"))
    assert len(names(uri)) == 2 * 3, "three files a cell, no temporary ones"


def test_a_killed_writer_leaves_whole_rows_alone(uri: str) -> None:
    chance = random.Random(0)
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, f"{uri}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=PROJECT, env=dict(os.environ)) as writer:
            assert writer.stdout is not None
            for _ in range(3):
                assert writer.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.1))
            writer.kill()
        store = Store(uri)
        written = store.done()
        assert len(written) >= 3
        for cell, status in written.items():
            assert (status, store.record(cell)) == ("done", make(int(cell, 16)))
        location = open_location(uri)
        location.filesystem.delete_dir(location.root)


def test_checkpoints(uri: str) -> None:
    folder = checkpoint_folder(uri)
    files = CheckpointFiles(folder, "cell")
    assert files.load() is None
    best = {"weight": torch.arange(3.0)}
    for step in (1, 2):
        files.save(step, {"steps": step, "large": torch.full((2_000_000,), float(step))}, 1, best)
    assert len(names(folder)) == 2, "the last state and the best model"
    found = CheckpointFiles(folder, "cell").load()
    assert found is not None
    assert found.state["steps"] == 2
    assert bool((found.state["large"] == 2).all())
    assert torch.equal(found.kept["weight"], best["weight"])
    discard(folder, "cell")
    assert names(folder) == []
    assert files.load() is None


@pytest.mark.parametrize("root", ["s3://no-such-bucket/store", "s3://no-such-bucket"])
def test_a_bucket_that_is_not_there(uri: str, server: str, root: str) -> None:
    with pytest.raises(UserError, match="there is no bucket no-such-bucket; make it, or name another"):
        Store(f"{root}?endpoint_override={server}&scheme=http")


def test_a_server_that_is_not_there(uri: str) -> None:
    with pytest.raises(UserError, match="cannot be read: "):
        Store("s3://bucket/store?endpoint_override=127.0.0.1:1&scheme=http")


def test_a_killed_run_goes_on(
    uri: str, start: Start, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AANG_CACHE", environment["AANG_CACHE"])
    value = {**cells(tmp_path)[-1], "schedule": {"steps": 60, "eval_every": 7}}
    config = resolve(parse_config(value, "test"))
    expected = numbers(run_cell(config))
    command = [sys.executable, "-c", RUN, uri, json.dumps([value])]
    running = start(command, environment | CREDENTIALS)

    def state_of_step(step: int) -> bool:
        lasts = [name.split("/")[-1] for name in names(checkpoint_folder(uri)) if "/last-" in name]
        return any(int(name.split("-")[1]) >= step for name in lasts)

    running.wait_for(lambda: state_of_step(5), 90, pause=0.01)
    running.kill()
    store = Store(uri)
    assert store.done() == {}, "the row came too early to kill its run"
    assert start(command, environment | CREDENTIALS).wait(120) == 0
    assert numbers(store.record(config.cell)) == expected
    assert names(checkpoint_folder(uri)) == [], "the checkpoint of a finished cell is removed"


def test_a_sweep_and_its_status(
    uri: str, start: Start, environment: dict[str, str], sweep_file: Callable[..., Path]
) -> None:
    file = sweep_file(["finetune", "static"], 1, steps=10)
    aang = [str(Path(sys.executable).with_name("aang"))]
    sweep = start([*aang, "sweep", str(file), "--store", uri], environment | CREDENTIALS)
    assert sweep.wait(180) == 0, sweep.output
    assert f"results: {uri}" in sweep.output
    rows = Store(uri).results().to_pylist()
    assert sorted((row["method"], row["status"]) for row in rows) == [("finetune", "done"), ("static", "done")]
    status = start([*aang, "status", "--store", uri], environment | CREDENTIALS)
    assert status.wait(60) == 0, status.output
    assert "sweep: 2 cells: 2 done" in status.output
    left = [name for name in names(uri) if name.startswith(".")]
    assert left == [name for name in left if name.startswith(".progress/sweeps/")], "no checkpoints"


@pytest.mark.parametrize("interrupt", [False, True])
def test_the_command_ends_although_the_store_never_answers(interrupt: bool) -> None:
    """A server that takes connections and says nothing: one line, half a minute at most, at once after Ctrl-C.

    The driver itself goes on for minutes, and Python's own way to end the process waits for it.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"s3://bucket/x?endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http"
        process = subprocess.Popen(
            [sys.executable, "-m", "aang_ray", "table", "--store", uri],
            env=os.environ | CREDENTIALS,
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        try:
            connection, _ = server.accept()
            began = time.monotonic()
            if interrupt:
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            seconds = time.monotonic() - began
            connection.close()
        finally:
            process.kill()
            process.wait()
    assert errors.count("\n") == 1
    if interrupt:
        assert (process.returncode, errors[:18]) == (130, "error: interrupted")
        assert seconds < 10
    else:
        assert process.returncode == 2
        assert "does not answer within 20 s" in errors or "cannot be read" in errors
        assert seconds < 40
