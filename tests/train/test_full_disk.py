"""A disk that is full at any moment of a run: one line, nothing is lost, and the same command goes on."""

from __future__ import annotations

import errno
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from aang_ray.cli import main
from aang_ray.store import Store, files
from aang_ray.train.export import load_classifier


@pytest.fixture
def command(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of four steps with a checkpoint after each, and the cache on another disk than the store."""
    monkeypatch.setenv("AANG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "disk").mkdir()
    run = {**tiny, "method": "finetune", "schedule": {"steps": 4, "eval_every": 2}}
    run["resources"] = {"device": "cpu", "checkpoint_minutes": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return ["train", str(tmp_path / "run.yaml"), "--store", str(tmp_path / "disk" / "store")]


def result(store: Path) -> dict[str, Any]:
    """The one row of a store, without what differs between two equal runs."""
    (row,) = Store(store).results().to_pylist()
    return {name: row[name] for name in row if name not in ("seconds", "finished_at", "config")}


def fails(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """Run a command that must end in one line; return the line."""
    capsys.readouterr()
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said.rstrip()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Path]]:
    """Let the disk take so many more files; returns the list of those that it has taken since."""
    write = files._write_and_rename
    left, taken = [10**9], []

    def limited(temporary: str, path: str, data: bytes) -> None:
        if Path(path).is_relative_to(tmp_path / "disk") and ".progress" not in path:
            if len(taken) >= left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken.append(Path(path))
        write(temporary, path, data)

    def take(count: int) -> list[Path]:
        left[0] = count
        taken.clear()
        return taken

    monkeypatch.setattr(files, "_write_and_rename", limited)
    return take


def test_full_at_every_moment(
    capsys: pytest.CaptureFixture[str], command: list[str], disk: Callable[[int], list[Path]], tmp_path: Path
) -> None:
    store = tmp_path / "disk" / "store"
    taken = disk(10**9)
    assert main(command) == 0
    moments, expected = len(taken), result(store)
    assert moments >= 4 + 1 + 4  # states, best models, and the files of the row
    for moment in range(moments):
        files.shutil.rmtree(store)
        disk(moment)
        line = fails(capsys, command)
        assert f"{store}/" in line
        assert "cannot be written: No space left on device" in line
        kept = list((tmp_path / "cache" / "unwritten").rglob("results/**/*.parquet"))
        assert len(kept) == (moment >= moments - 4)
        states = list(store.rglob("last-*.pt"))
        assert len(states) >= (moment >= 1)
        assert not list(store.rglob(".tmp-*"))
        disk(10**9)
        assert main(command) == 0
        goes_on = capsys.readouterr().out
        assert ("is done already" in goes_on) == bool(kept)
        assert result(store) == expected
        assert not list((tmp_path / "cache" / "unwritten").rglob("*.parquet"))


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    """No file may be larger: the kernel refuses as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kilobytes", [2, 12, 40, 100])
def test_files_that_the_kernel_refuses(
    capsys: pytest.CaptureFixture[str], command: list[str], tmp_path: Path, kilobytes: int
) -> None:
    """Of the state, the best model and the row, none, some or all are small enough."""
    assert main([*command, "--store", str(tmp_path / "other")]) == 0  # fills the cache, too
    with file_size(1024 * kilobytes):
        line = fails(capsys, command)
    assert "cannot be written: File too large" in line
    assert main(command) == 0
    assert result(tmp_path / "disk" / "store") == result(tmp_path / "other")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_export_that_fails_leaves_row_and_checkpoint(
    capsys: pytest.CaptureFixture[str], command: list[str], small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(50_000))
    export = small_disk / "model"
    line = fails(capsys, [*command, "--export", str(export)])
    assert line.startswith(f"error: export {export} cannot be written: ")
    store = tmp_path / "disk" / "store"
    assert result(store)["status"] == "done"
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    capsys.readouterr()
    assert main([*command, "--export", str(export)]) == 0
    assert "step 2/4" not in capsys.readouterr().out  # nothing is trained again
    assert load_classifier(export).card["result"]["cell"] == result(store)["cell"]
    assert not list(store.rglob("*.pt"))


def test_a_store_on_a_full_disk(
    capsys: pytest.CaptureFixture[str], command: list[str], small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "ballast").write_bytes(bytes(60_000))
    to_disk = [*command, "--store", str(small_disk / "store"), "--set", "resources.checkpoint_minutes=5"]
    line = fails(capsys, to_disk)
    assert "No space left on device; the finished run is kept in" in line
    assert "No space left on device" in fails(capsys, to_disk)
    (small_disk / "ballast").unlink()
    assert main(to_disk) == 0
    assert "is done already" in capsys.readouterr().out
    assert result(small_disk / "store")["status"] == "done"
