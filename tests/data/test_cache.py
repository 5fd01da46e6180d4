"""The cache holds whole things only, and several processes may build the same one."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from aang_ray.data.cache import cache_folder, content_key, file_digest, made_once
from aang_ray.errors import UserError
from aang_ray.store.files import new_folder, write_file


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made" / "it"

    def fail() -> None:
        with new_folder(target) as draft:
            (draft / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(target.parent.iterdir()) == []


def test_the_second_of_two_builders_discards_its_own(tmp_path: Path) -> None:
    target = tmp_path / "it"
    with new_folder(target) as first:
        (first / "who").write_text("first")
        with new_folder(target) as second:
            (second / "who").write_text("second")
    assert (target / "who").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["it"]


def test_a_rename_that_fails_for_another_reason_is_said(tmp_path: Path) -> None:
    target = tmp_path / "it"
    target.write_text("a file is in the way")
    with pytest.raises(OSError, match="it"), new_folder(target):
        pass


def test_of_many_who_want_the_same_folder_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    target, makers, together = tmp_path / "made" / "it", 4, Barrier(4)
    made: list[Path] = []

    def make(draft: Path) -> None:
        made.append(draft)
        (draft / "a").write_text("whole")
        time.sleep(0.05)  # long enough for the others to begin, too, if they did not wait

    def want(_: int) -> str:
        together.wait()
        return (made_once(target, make) / "a").read_text()

    with ThreadPoolExecutor(makers) as pool:
        assert list(pool.map(want, range(makers))) == ["whole"] * makers
    assert len(made) == 1


def test_a_maker_that_fails_lets_the_next_try(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        made_once(tmp_path / "it", fail)
    made_once(tmp_path / "it", lambda draft: (draft / "a").touch())
    assert (tmp_path / "it" / "a").is_file()


def test_concurrent_processes_build_the_same_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from aang_ray.store.files import new_folder\n"
        "for i in range(50):\n"
        "    with new_folder(Path(sys.argv[1]) / str(i)) as draft:\n"
        "        (draft / 'a').write_text('whole'); (draft / 'b').write_text('whole')\n"
    )
    target = tmp_path / "built"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(target)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(int(p.name) for p in target.iterdir()) == list(range(50))
    assert all((p / name).read_text() == "whole" for p in target.iterdir() for name in "ab")


def test_the_digest_is_sha256_and_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "big"
    for byte in (b"a", b"b"):
        path.write_bytes(byte * (3 << 20))
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert file_digest(path) == expected
        assert file_digest(path) == expected
        # The same size and modification time: only the time of the status change differs.
        os.utime(path, ns=(10**18, 10**18))


def test_the_digest_of_a_large_file_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"a" * (2 << 20))
    first = file_digest(path)
    monkeypatch.setattr("aang_ray.data.cache._sha256", lambda _: pytest.fail("read again"))
    assert file_digest(path) == first


def test_the_key_does_not_depend_on_order() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


def test_writing_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "notes" / "x"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["x"]


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AANG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="AANG_CACHE"):
        cache_folder()


def test_a_cache_without_a_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AANG_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor a password entry is
    with pytest.raises(UserError, match="no home folder for the cache: set AANG_CACHE"):
        cache_folder()


def test_a_cache_that_is_read_only_serves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the way of its folders stands for a read-only file system, which root could write."""
    monkeypatch.setenv("AANG_CACHE", str(tmp_path))
    (tmp_path / "made").mkdir()
    for name in ("locks", "digests"):
        (tmp_path / name).write_text("in the way")
    big = tmp_path / "big"
    big.write_bytes(b"a" * (2 << 20))
    assert file_digest(big) == hashlib.sha256(big.read_bytes()).hexdigest()
    assert made_once(tmp_path / "made", lambda _: pytest.fail("it is there")) == tmp_path / "made"
    with pytest.raises(UserError, match=r"lacks other and cannot be written \(File exists\): set AANG_CACHE"):
        made_once(tmp_path / "other", lambda _: None)
