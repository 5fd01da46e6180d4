"""Signs of life: whole files, soon after an evaluation, gone at the end, silent after a kill."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aang_ray.config import parse_config
from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.sweep import heartbeat as module
from aang_ray.sweep.heartbeat import STOPPED_AFTER_SECONDS, Beat, Heartbeat, read_beats
from tests.sweep.conftest import done_record, fake_resolve, history_row

CONFIG = fake_resolve(parse_config({"method": "static"}, "test"))
FILE = f".progress/{CONFIG.cell}.json"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "QUICKEST_SECONDS", 0.01)


def the_beat(store: Path) -> Beat:
    return read_beats(str(store))[CONFIG.cell]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_store_without_trials_has_none(tmp_path: Path) -> None:
    assert read_beats(str(tmp_path / "nowhere")) == {}


def test_a_trial_is_there_from_its_start(tmp_path: Path) -> None:
    with Heartbeat(str(tmp_path), CONFIG):
        beat = the_beat(tmp_path)
    assert (beat.step, beat.steps, beat.score, beat.metric) == (0, 60, None, "accuracy")
    assert (beat.host, beat.pid) == (socket.gethostname(), os.getpid())
    assert beat.started_at <= beat.updated_at


def test_an_evaluation_is_told_and_time_goes_on(tmp_path: Path) -> None:
    with Heartbeat(str(tmp_path), CONFIG) as heart:
        heart.evaluated(history_row(30))
        until(lambda: the_beat(tmp_path).step == 30)
        beat = the_beat(tmp_path)
        assert (beat.score, beat.seconds) == (0.75, 3.0)
        until(lambda: the_beat(tmp_path).updated_at > beat.updated_at)  # without a further evaluation
    assert beat.alive(datetime.now(UTC))


def test_it_goes_away_with_the_end(tmp_path: Path) -> None:
    with Heartbeat(str(tmp_path), CONFIG):
        assert (tmp_path / FILE).exists()
    assert not (tmp_path / FILE).exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_store_behind_a_uri() -> None:
    uri = "memory://signs-of-life"
    with Heartbeat(uri, CONFIG) as heart:
        heart.evaluated(history_row(30))
        # A URI's file is replaced in two steps: for an instant there is none.
        until(lambda: (beat := read_beats(uri).get(CONFIG.cell)) is not None and beat.step == 30)
    assert read_beats(uri) == {}


def test_an_interruption_is_known_at_once(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Heartbeat(str(tmp_path), CONFIG) as heart:
            heart.evaluated(history_row(30))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    beat = the_beat(tmp_path)
    assert (beat.ended, beat.step) == (True, 30)
    assert not beat.alive(datetime.now(UTC))


def test_silence_means_dead(tmp_path: Path) -> None:
    with Heartbeat(str(tmp_path), CONFIG):
        beat = the_beat(tmp_path)
    last = datetime.fromisoformat(beat.updated_at)
    assert beat.alive(last + timedelta(seconds=STOPPED_AFTER_SECONDS))
    assert not beat.alive(last + timedelta(seconds=STOPPED_AFTER_SECONDS + 1))
    assert beat.alive(last - timedelta(seconds=30))  # the reader's clock is behind
    assert beat.silent(last - timedelta(seconds=30)) == 0.0


def test_rows_and_signs_of_life_do_not_meet(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with Heartbeat(store.uri, CONFIG):
        store.write(done_record(CONFIG))
        assert store.done() == {CONFIG.cell: "done"}
        assert store.results().num_rows == 1


def test_a_store_that_fails_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".progress").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING), Heartbeat(str(tmp_path), CONFIG) as heart:
        heart.evaluated(history_row(30))
    assert "no sign of life could be written" in caplog.text


KILLED = """
import sys, time
from aang_ray.config import RunConfig
from aang_ray.sweep import heartbeat
heartbeat.BEAT_SECONDS = heartbeat.QUICKEST_SECONDS = 0.0
with heartbeat.Heartbeat(sys.argv[1], RunConfig()):
    print("running", flush=True)
    time.sleep(60)
"""


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        until(lambda: bool(list((tmp_path / ".progress").glob("*.json"))))
        process.send_signal(signal.SIGKILL)
    (beat,) = read_beats(str(tmp_path)).values()
    assert beat.pid == process.pid
    assert not beat.ended


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not a JSON object"), ("[]", "not a JSON"), ("{}", "lacks 'cell'")]
)
def test_what_is_no_sign_of_life_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / ".progress").mkdir()
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        read_beats(str(tmp_path))
