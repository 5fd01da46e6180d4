"""Files of rows: what is read, and the one-line error for each kind of damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aang_ray.config import DataConfig
from aang_ray.data.read import labelled_texts, read_lines, read_table
from aang_ray.errors import UserError

WANTED = ["text", "label"]


def complaint(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jsonl_ignores_columns_of_mixed_kinds_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "2020-01-01", "label": "x", "metadata": {"a": 1}}\n'
        "\n"
        '{"label": 3, "text": "line\\u2028end", "metadata": [1, "two"]}\n'
        '{"text": "c", "label": true, "metadata": "none"}\n',
        encoding="utf-8-sig",
    )
    table = read_table(path, WANTED)
    # A date stays a string; rows have the numbers of their lines.
    assert table.columns == {"text": ["2020-01-01", "line\u2028end", "c"], "label": ["x", 3, True]}
    assert table.rows == [1, 3, 4]


def test_csv_cells_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text,label\r\n1,"a, ""b""\nc",NA\r\n2,null,001\r\n'.encode())
    assert read_table(path, WANTED).columns == {"text": ['a, "b"\nc', "null"], "label": ["NA", "001"]}


def test_csv_short_rows_and_trailing_commas(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,\na,x,\nb\n")
    assert read_table(path, WANTED).columns == {"text": ["a", "b"], "label": ["x", ""]}


def test_a_table_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n")
    table = read_table(path, WANTED)
    assert (table.columns, table.rows) == ({"text": [], "label": []}, [])
    assert "there are no rows" in complaint(lambda: labelled_texts(table, DataConfig()))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "other": [{"x": 1}, None], "label": [1, 0]}), path)
    assert read_table(path, WANTED).columns == {"text": ["a", "b"], "label": [1, 0]}


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n \r\ntwo\u2028two\nthree".encode())
    table = read_lines(path)
    assert table.columns["text"] == ["one", "two\u2028two", "three"]
    assert table.rows == [1, 3, 4]


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*.jsonl", "c?d e#f.jsonl", "[x]/g.jsonl", ".hidden/h.jsonl"])
def test_names_with_special_characters(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"text": "a", "label": "x"}\n')
    assert read_table(path, WANTED).columns["text"] == ["a"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for word in ("one", "two"):
        path.write_text(f"text,label\n{word},x\n")
        assert read_table(path, WANTED).columns["text"] == [word]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "row 2 has no valid JSON (Expecting value)"),
        ("a.jsonl", b'{"text": "a"}\n["a"]\n', "row 2 has no JSON object"),
        ("a.jsonl", b'{"text": "a", "score": 1}\n', "no column 'label'; columns found: text, score"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "row 2 is not valid UTF-8 (byte 0xe9)"),
        ("a.csv", b'text,label\n"a\nb",x\n\xff,y\n', "row 2 is not valid UTF-8 (byte 0xff)"),
        ("a.csv", b"t\xe9xt,label\na,x\n", "the header is not valid UTF-8"),
        ("a.csv", b"Text,label\na,x\n", "no column 'text'; columns found: Text, label"),
        ("a.csv", b"text,text,label\na,b,x\n", "more than one column 'text'"),
        ("a.csv", b"text,label\na,x\nb,y,z\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"text,label\na,b,x\nc,d,y\n", "rows have more fields than the header"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.tsv", b"text\tlabel\n", "a table is a .jsonl, .csv, .parquet file"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = complaint(lambda: read_table(path, WANTED))
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_missing_parquet_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "score": [1]}), path)
    assert "no column 'label'; columns found: text, score" in complaint(lambda: read_table(path, WANTED))


def test_reading_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\n")
    read_table(path, WANTED)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_reading_a_local_file_uses_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def ask(*_: object, **__: object) -> None:
        pytest.fail("a local file was read with the help of the network")

    monkeypatch.setattr("socket.getaddrinfo", ask)
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["a"], "label": ["x"]}), path)
    else:
        path.write_text("text,label\na,x\n" if name == "a.csv" else '{"text": "a", "label": "x"}\n')
    assert read_table(path, WANTED).columns == {"text": ["a"], "label": ["x"]}
