"""Whatever bytes the readers are given, they end with a value or a `UserError`, soon, and within little memory.

The tests draw the same examples each time. `FUZZ_EXAMPLES=20000 pytest tests/inputs/test_fuzz.py` draws so many
new ones of each kind.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aang_ray.config import DataConfig, RunConfig, load_config
from aang_ray.config.methods import method_sections
from aang_ray.data.sources import find_source, read_passages, read_task
from aang_ray.errors import UserError
from aang_ray.objectives.space import enumerate_space, read_space
from aang_ray.report import build_table
from aang_ray.store import Store
from aang_ray.store.upkeep import verify
from aang_ray.sweep.spec import SweepOverrides, check_space, expand, load_sweep
from tests.inputs.cases import BLOCKS

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "tests" / "frozen"
LONG = "FUZZ_EXAMPLES" in os.environ
SECONDS = int(os.environ.get("FUZZ_SECONDS", 60))
"""How long one input may take: far longer than the slowest one does, so that a busy machine fails nothing."""
MEMORY = 6 * 2**30
"""How much address space one input may add. Most of it is reserved by threads, and never used."""


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on many examples: the same few each time, or new ones."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    count = int(os.environ.get("FUZZ_EXAMPLES", 30))
    return settings(max_examples=count, derandomize=not LONG, deadline=None, suppress_health_check=checks)(test)


def survive(read: Callable[[], object]) -> None:
    """Call a reader. Fail if it raises anything but a `UserError`, or takes too long or too much memory."""

    def over(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it takes longer than {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, over), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    told = ""
    try:
        read()
    except UserError as error:
        told = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert len(told) < 5000, "nobody reads such a line"


# What is drawn

FRAGMENTS = [
    *rb"""' " \ \ud800 , : # | > [ ] { } &a *a <<: !a !!int !!boolx !!null !!set{ !!omap[ null true no .nan -.inf 1e999
    -1 0 99999999999999999999 1:60:60 2024-13-45 text label data method name""".split(),
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\n",
        b"\r",
        b"\t",
        b" ",
        b": ",
        b"- ",
        b"? ",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
    ),
    *(b"!!bool x", b"!!float x", b"!!timestamp x", b"!!binary x", b"%YAML 9\n---\n", "\U0001f600".encode()),
    *(b"0x" + b"f" * 5000, b"1" * 5000, b"[" * 500, b"a." * 500, b"{a: " * 500),
]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes of a good file of which some are cut out, replaced, repeated or added."""
    data = whole
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["cut", "end", "add", "replace", "flip", "repeat"])):
            case "cut":
                data = data[:at] + data[end:]
            case "end":
                data = data[:at]
            case "add":
                data = data[:at] + draw(st.sampled_from(FRAGMENTS)) + data[at:]
            case "replace":
                data = data[:at] + draw(st.binary(max_size=8)) + data[end:]
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
            case _:
                data = data[:at] + data[at:end] * draw(st.integers(2, 50)) + data[end:]
    return data


def names_of(model: Any, before: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for name, value in model.model_dump().items():
        yield before + name
        if isinstance(value, dict):
            yield from (f"{before}{name}.{inner}" for inner in value)


METHOD_KEYS = sorted({f"method.{name}" for section in method_sections().values() for name in section.model_fields})
KEYS = [*names_of(RunConfig()), *METHOD_KEYS]
WORDS = [
    *method_sections(),
    "td",
    "auto",
    "cpu",
    "cuda",
    "fp32",
    "digits-left",
    "nothing",
    "./x",
    "",
    "no",
    "\x00",
    "a\nb",
    "a" * 300,
]
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 2**31, 2**32, 2**63, 10**400, -1, 0.5, 1e-300])
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(WORDS) | st.text(max_size=8) | st.dates()
NAMES = st.sampled_from(KEYS) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8
)
SECTIONS = sorted(RunConfig.model_fields)
RUN_SETTINGS = st.dictionaries(
    st.sampled_from(SECTIONS) | st.text(max_size=4),
    VALUES | st.dictionaries(st.sampled_from(sorted({key.rpartition(".")[2] for key in KEYS})), VALUES, max_size=4),
    max_size=4,
)
SWEEP = st.fixed_dictionaries(
    {"methods": st.lists(st.sampled_from([*method_sections()]) | RUN_SETTINGS, max_size=3) | VALUES},
    optional={
        "base": RUN_SETTINGS,
        "tasks": st.lists(st.sampled_from(WORDS) | RUN_SETTINGS, max_size=3) | VALUES,
        "seeds": st.lists(st.integers(-1, 2**33), max_size=3) | VALUES,
        "grid": st.dictionaries(st.sampled_from(KEYS), st.lists(SCALARS, max_size=3) | VALUES, max_size=4),
        "search": st.fixed_dictionaries(
            {"samples": NUMBERS, "space": st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3)},
            optional={"seed": VALUES},
        )
        | VALUES,
        "other": VALUES,
    },
)
STAGES = {
    "data": ["end-task", "in-domain", "external:x", "retrieved", "external:"],
    "transform": ["no-op", "mask", "replace", "bert-op"],
    "representation": ["bidirectional", "left-to-right", "random-factorized"],
    "output": ["denoise", "next-token", "end-task", "supervised"],
}
BLOCK = st.fixed_dictionaries({stage: st.lists(st.sampled_from(names)) | VALUES for stage, names in STAGES.items()})
SPACE = st.fixed_dictionaries(
    {"blocks": st.lists(BLOCK | VALUES) | VALUES},
    optional={
        "primitives": st.lists(st.sampled_from(WORDS)) | VALUES,
        "domain": st.sampled_from(["text", "image", "x"]) | VALUES,
    },
)


def as_yaml(value: object) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def bomb(levels: int = 40) -> bytes:
    """A short YAML text whose value has 2 to the power of `levels` leaves."""
    return b"".join(b"- &l%d [*l%d, *l%d]\n" % (at, at - 1, at - 1) if at else b"- &l0 [x]\n" for at in range(levels))


RUN_FILE = (ROOT / "jobs" / "demo.yaml").read_bytes()
BOMBS = [
    b"n:\n" + bomb(),
    b"optim:\n" + bomb(),
    b"method:\n" + bomb(),
    b"data:\n  external:\n" + b"".join(b"  " + line + b"\n" for line in bomb().splitlines()),
    b"label: &a [*a]\n",
    b"data: &a {task: *a}\n",
    b"n: 0x" + b"f" * 5000 + b"\n",
    b"method: !!bool x\n",
    b"seed: !!timestamp x\n",
]


# Settings


def read_run(path: Path, data: bytes, overrides: tuple[str, ...] = ()) -> None:
    path.write_bytes(data)
    survive(lambda: load_config(path, overrides))


@fuzz
@given(
    data=damaged(RUN_FILE)
    | st.binary(max_size=200)
    | RUN_SETTINGS.map(as_yaml)
    | VALUES.map(as_yaml)
    | st.sampled_from(BOMBS)
)
def test_files_of_a_run(tmp_path: Path, data: bytes) -> None:
    read_run(tmp_path / "run.yaml", data)


GIVEN = SCALARS | st.text(max_size=8) | VALUES.map(lambda value: as_yaml(value).decode("utf-8", "replace"))
LONG_SETTINGS = ["a." * 5000 + "b=1", "method." * 2000 + "name=1", "n=" + "[" * 500, "n=" + "1:" * 5000 + "1"]
OVERRIDE = (
    st.builds("{}={}".format, NAMES, GIVEN)
    | st.text(max_size=30)
    | st.sampled_from([*LONG_SETTINGS, "n=!!bool x", f"method={bomb().decode()}"])
)


@fuzz
@given(overrides=st.lists(OVERRIDE, max_size=4))
def test_settings_of_the_command_line(overrides: list[str]) -> None:
    survive(lambda: load_config(None, overrides))


@fuzz
@given(
    data=damaged(RUN_FILE)
    | SWEEP.map(as_yaml)
    | st.sampled_from([b"methods: [aang]\nbase:\n  " + line for line in BOMBS])
)
@example(b"methods: [aang]\nbase: &a {data: *a}\n")
@example(
    b"methods: [aang]\ngrid: {"
    + b", ".join(b"%s: [1, 2, 3, 4, 5, 6, 7, 8]" % key.encode() for key in KEYS[:24])
    + b"}\n"
)
@example(b"methods: [aang]\nsearch: {samples: 99999999999999999999, space: {n: [1, 2]}}\n")
@example(b"methods: [aang]\nsearch: {samples: 2, space: {n: {integer: [1, 99999999999999999999999999999999]}}}\n")
@example(b"seeds: &s [1, 2]\ntasks: &t [a, a, a]\nmethods:\n" + b"- {method: aang, grid: {n: [1, 2]}}\n" * 50)
def test_files_of_a_sweep(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(data)

    def read() -> None:
        spec = load_sweep(path, SweepOverrides())
        runs = expand(spec, SweepOverrides(), str(path))
        if spec.search is not None:
            check_space(spec.search, runs)

    survive(read)


@fuzz
@given(
    data=damaged((ROOT / "search_spaces" / "td.yaml").read_bytes())
    | SPACE.map(as_yaml)
    | st.sampled_from(BOMBS)
    | VALUES.map(as_yaml)
)
@example(f"{BLOCKS}primitives: [/dev/null]\n".encode())
@example(f"{BLOCKS}primitives: [.]\n".encode())
@example(f"{BLOCKS}primitives: ['a\\0b']\n".encode())
@example(b"a: &a [no-op, no-op]\nblocks:\n- {data: [end-task]}\n")
@example(
    b"blocks: [{data: [%s], transform: [%s], representation: [%s], output: [%s]}]\n"
    % tuple(b", ".join([name] * 500) for name in (b"end-task", b"mask", b"bidirectional", b"denoise"))
)
def test_files_of_a_space(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(data)
    survive(lambda: enumerate_space("space", read_space(str(path))))


# Tables

ROWS = [
    {"text": f'text {row} of a film, "quoted"', "label": ("good", "bad")[row % 2], "more": row} for row in range(12)
]


def parquet(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    return sink.getvalue()


def as_csv() -> bytes:
    lines = [
        "text,label,more",
        *('"{}",{},{}'.format(row["text"].replace('"', '""'), row["label"], row["more"]) for row in ROWS),
    ]
    return "\n".join(lines).encode()


JSONL = "\n".join(json.dumps(row) for row in ROWS).encode()
COLUMNS: list[pa.DataType] = [
    *(pa.string(), pa.large_string(), pa.binary(), pa.int64(), pa.uint8(), pa.float16(), pa.bool_(), pa.null()),
    *(pa.date32(), pa.timestamp("ns", "UTC"), pa.time64("ns"), pa.duration("s"), pa.decimal128(5, 2)),
    *(pa.list_(pa.string()), pa.struct([("a", pa.int8())]), pa.dictionary(pa.int32(), pa.string())),
    pa.map_(pa.string(), pa.int64()),
]


@st.composite
def odd_tables(draw: st.DrawFn) -> bytes:
    """A Parquet file of columns of any types; where the type takes no text, its values are null."""
    columns: dict[str, pa.Array] = {}
    for name in draw(st.lists(st.sampled_from(["text", "label", "more"]), max_size=3, unique=True)):
        kind = draw(st.sampled_from(COLUMNS))
        values: list[Any] = draw(st.lists(st.none() | st.text(max_size=3), min_size=4, max_size=4))
        try:
            columns[name] = pa.array(values).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            columns[name] = pa.nulls(4, kind)
    return parquet(pa.table(columns).slice(0, draw(st.integers(0, 4))))


def read_table_of(path: Path, data: bytes, **fields: Any) -> None:
    path.write_bytes(data)
    config = DataConfig(task=str(path), **fields)

    def read() -> None:
        read_task(find_source(config), config)

    survive(read)
    survive(lambda: read_passages(path, "text"))


BAD_ROWS = st.sampled_from(["refuse", "drop"])


@fuzz
@given(data=damaged(JSONL) | st.binary(max_size=80), bad_rows=BAD_ROWS)
@example(b'{"text": "a", "label": ' + b"1" * 5000 + b"}\n", "drop")
@example(b'{"text": "a", "label": ' + b"[" * 100_000 + b"}\n", "drop")
@example(b'{"text": "a", "label": 1e400}\n', "refuse")
@example(b'{"text": "a\\u0000", "label": "\\ud800"}\n', "drop")
def test_tables_of_lines(tmp_path: Path, data: bytes, bad_rows: str) -> None:
    read_table_of(tmp_path / "task.jsonl", data, bad_rows=bad_rows)


@fuzz
@given(data=damaged(as_csv()) | st.binary(max_size=80) | damaged(b"text,label\n" + b"a,x\n" * 8), bad_rows=BAD_ROWS)
@example(b"text,label\n" + b'"' * 300_000, "drop")
@example(b"text,label\n" + b"a" * 300_000 + b",x\n\n\n,\n", "drop")
@example(b"\n\ntext,label\na,x\n", "drop")
@example(b"text,label\r\na\rb,x\r\n", "drop")
def test_tables_with_commas(tmp_path: Path, data: bytes, bad_rows: str) -> None:
    read_table_of(tmp_path / "task.csv", data, bad_rows=bad_rows)


@fuzz
@given(
    data=damaged(parquet(pa.Table.from_pylist(ROWS))) | odd_tables() | odd_tables().flatmap(damaged), bad_rows=BAD_ROWS
)
def test_tables_of_parquet(tmp_path: Path, data: bytes, bad_rows: str) -> None:
    read_table_of(tmp_path / "task.parquet", data, bad_rows=bad_rows)


# The store

ONE = Path("task=texts", "method=aang")
STORE = {
    path.relative_to(FROZEN / "store-v0.1"): path.read_bytes()
    for path in sorted((FROZEN / "store-v0.1").glob(f"*/{ONE}/*.parquet"))
}


@st.composite
def damaged_stores(draw: st.DrawFn) -> tuple[Path, bytes]:
    """A file of a store, and what it holds instead: damaged bytes, other columns, or what another file holds."""
    path = draw(st.sampled_from([*STORE]))
    match draw(st.sampled_from(["bytes", "empty", "end", "types", "lacks", "other", "odd"])):
        case "bytes":
            data = draw(damaged(STORE[path]))
        case "empty":
            data = b""
        case "end":
            data = STORE[path][: draw(st.integers(0, len(STORE[path])))]
        case "types":
            table = pq.read_table(io.BytesIO(STORE[path]), partitioning=None)
            at, kind = draw(st.integers(0, table.num_columns - 1)), draw(st.sampled_from(COLUMNS))
            table = table.set_column(at, table.schema.names[at], pa.nulls(table.num_rows, kind))
            data = parquet(table)
        case "lacks":
            table = pq.read_table(io.BytesIO(STORE[path]), partitioning=None)
            data = parquet(table.drop_columns([draw(st.sampled_from(table.schema.names))]))
        case "other":
            data = STORE[draw(st.sampled_from([*STORE]))]
        case _:
            data = draw(odd_tables())
    return path, data


@fuzz
@given(damage=damaged_stores())
def test_files_of_a_store(tmp_path_factory: pytest.TempPathFactory, damage: tuple[Path, bytes]) -> None:
    folder = tmp_path_factory.mktemp("store")
    for path, data in {**STORE, damage[0]: damage[1]}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    store = Store(folder)
    match damage[0].parts[0]:
        case "results":
            survive(lambda: build_table(store))
            survive(lambda: store.record(damage[0].stem))
        case "history":
            survive(lambda: store.history().to_pylist())
        case "weights":
            survive(lambda: store.weights().to_pylist())
    survive(lambda: verify(str(folder)))
