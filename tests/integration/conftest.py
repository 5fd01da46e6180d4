"""A tiny task, a tiny random encoder, and processes that are always ended, by their ids, after a test."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PROJECT = Path(__file__).parents[2]


def make_encoder(folder: Path) -> None:
    """A random 2-layer, 16-wide BERT with a word-level tokenizer of 65 tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **{f"{kind}_token": token for kind, token in names.items()}
    )
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **size))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def make_task(folder: Path) -> None:
    """Two classes that prefer different words."""
    source = random.Random(0)
    folder.mkdir()
    for split, count in (("train", 60), ("dev", 30), ("test", 40)):
        lines = []
        for number in range(count):
            label = ("neg", "pos")[number % 2]
            words = WORDS[:40] if label == "neg" else WORDS[20:]
            text = " ".join(source.choices(words, k=source.randint(4, 12)))
            lines.append(json.dumps({"text": text, "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `encoder/` and `task/`."""
    folder = tmp_path_factory.mktemp("tiny")
    make_encoder(folder / "encoder")
    make_task(folder / "task")
    return folder


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path, as Ray's sockets need it; killed processes leave things in it."""
    folder = Path(tempfile.mkdtemp(prefix="aang-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def environment(tmp_path: Path, short_folder: Path) -> dict[str, str]:
    """This environment with a cache and a temporary folder of its own, no cluster, this interpreter first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AANG_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    own = {"AANG_CACHE": str(tmp_path / "cache"), "TMPDIR": str(short_folder), "PATH": path, "HF_HUB_OFFLINE": "1"}
    return environment | own


@pytest.fixture
def sweep_file(tmp_path: Path, tiny: Path) -> Callable[..., Path]:
    """Writes a sweep of the tiny task; `more` are further fields of the file."""

    def write(methods: Sequence[str | dict[str, Any]], seeds: int, steps: int, **more: Any) -> Path:
        base = {
            "encoder": {"name": str(tiny / "encoder")},
            "batch": {"end_task": 8, "auxiliary": 6, "dev": 8, "dev_head": 8},
            "schedule": {"steps": steps, "eval_every": 5, "patience": 1_000_000},
            "precision": "fp32",
            "n": 3,
        }
        task = str(tiny / "task")
        spec = {"base": base, "tasks": [task], "methods": list(methods), "seeds": list(range(seeds)), **more}
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
        return path

    return write


@dataclass
class Started:
    """A process and its descendants, which are ended by their ids."""

    process: subprocess.Popen[bytes]
    log: Path
    family: dict[int, psutil.Process] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """Output of the process so far, stderr included."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def look(self) -> list[psutil.Process]:
        """The process and all its descendants; those that were ever seen are remembered."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for member in [root, *root.children(recursive=True)]:
                self.family[member.pid] = member
        return list(self.family.values())

    def named(self, word: str) -> list[int]:
        """Ids of the members whose command line contains the word."""
        found = []
        for member in self.look():
            with suppress(psutil.NoSuchProcess):
                if word in " ".join(member.cmdline()):
                    found.append(member.pid)
        return found

    def kill(self) -> None:
        """Send SIGKILL to all members, the newest (the trials) first."""
        for member in sorted(self.look(), key=lambda member: member.pid, reverse=True):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(timeout=30)
        psutil.wait_procs(list(self.family.values()), timeout=10)

    def wait(self, seconds: float) -> int:
        """Wait for the process to end; return its exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.look()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"not over after {seconds} s:\n{self.output}")
            time.sleep(0.2)
        return self.process.returncode

    def wait_for(self, condition: Callable[[], object], seconds: float, pause: float = 0.1) -> None:
        """Wait until the condition holds; it is an error if the process ends first."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.output}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not after {seconds} s:\n{self.output}")
            time.sleep(pause)

    def interrupt(self) -> None:
        """Send SIGINT as Ctrl-C does: a terminal sends it to all foreground processes."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM, as `ray job stop` or a system shutdown does."""
        self.process.terminate()


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path, short_folder: Path) -> Iterator[Start]:
    """Starts a process in the project's folder, and kills what is left of it at the end of the test."""
    started: list[Started] = []

    def run(command: Sequence[str], environment: Mapping[str, str]) -> Started:
        log = tmp_path / f"log-{len(started)}.txt"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=PROJECT,
                start_new_session=True,
            )
        started.append(Started(process, log))
        return started[-1]

    yield run
    for one in started:
        one.kill()


def progress_of(store: Path | str) -> dict[str, dict[str, Any]]:
    """Content of the progress file of a store's only sweep, by cell; empty while there is no file."""
    for path in Path(store).glob(".progress/sweeps/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        return {cell["cell"]: cell for cell in content["cells"]}
    return {}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass(frozen=True)
class Head:
    """The head of a Ray cluster on this machine alone."""

    process: Started
    address: str
    jobs: str
    """Address of its job server."""


def start_head(start: Start, environment: Mapping[str, str], folder: Path, *, cpus: int, **more: object) -> Head:
    """Start a head that listens on the loopback, and wait for its job server. `more` are options of `ray start`."""
    port, dashboard, client, agent = free_ports(4)
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "num-cpus": cpus,
        "object-store-memory": 160 * 2**20,
        "temp-dir": folder / "head",
        **more,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    process = start(["ray", "start", "--head", "--block", "--include-dashboard=true", *flags], environment)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", dashboard)) == 0

    process.wait_for(listens, 60)
    process.look()
    return Head(process, f"127.0.0.1:{options['port']}", f"http://127.0.0.1:{dashboard}")


@pytest.fixture
def head(start: Start, environment: dict[str, str], short_folder: Path) -> Head:
    """A head with two CPUs, and no autoscaler; processes that are started later find it."""
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
    return start_head(start, environment, short_folder, cpus=2)
