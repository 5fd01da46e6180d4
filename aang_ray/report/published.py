"""What Dery et al. 2023 published in Tables 2 and 3: mean and deviation of the test scores in %.

The scores are of RoBERTa-base over three seeds, and the paper chose configurations on test.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import pandas as pd

TASKS = {
    "citation_intent": "ACL-ARC",
    "sciie": "SciERC",
    "chemprot": "ChemProt",
    "hyperpartisan": "H.Partisan",
    "se2016": "SE-2016-6",
}
"""Names of the tasks, here and in the paper. They are the columns of both tables, in this order."""

_TABLE_2 = """
no  | RoBERTa             | 1  | 66.03 3.55 | 77.96 2.96 | 82.10 0.98 | 93.39 2.26 | 70.37 1.51
no  | TAPT                | 1  | 67.74 3.68 | 79.53 1.93 | 82.17 0.65 | 93.42 2.87 | 70.74 1.21
no  | Static Multitask-TD | 24 | 69.60 3.80 | 83.37 0.58 | 83.42 0.26 | 97.95 0.73 | 71.02 0.43
yes | X. GPT-style        | 1  | 67.22 0.44 | 81.62 0.84 | 83.29 1.21 | 96.41 0.73 | 70.67 1.46
yes | Y. XLNet-style      | 1  | 69.76 2.42 | 81.81 0.42 | 83.39 0.31 | 96.41 1.92 | 71.18 0.58
yes | Z. BERT-style       | 1  | 70.08 4.70 | 81.48 0.82 | 84.49 0.50 | 96.84 1.72 | 72.70 0.60
yes | AANG-[X+Y+Z]        | 3  | 71.51 3.19 | 82.89 0.78 | 83.68 0.45 | 96.92 1.26 | 72.75 0.82
yes | AANG-TD             | 24 | 73.26 1.32 | 82.98 1.52 | 83.91 0.32 | 98.46 0.00 | 72.46 1.65
"""
_TABLE_3 = """
yes | AANG-TD n=3 | 24 | 72.11 2.12 | 82.35 1.76 | 83.91 0.32 | 98.46 0.00 | 72.46 1.65
yes | AANG-TD n=6 | 24 | 73.26 1.32 | 82.98 1.52 | 83.69 0.98 | 97.95 0.73 | 72.46 0.90
"""


def published(tasks: Collection[str], table: int = 2) -> pd.DataFrame | None:
    """Return the paper's table as text for those of its tasks that are asked for; None if there are none.

    Args:
        tasks: Names of tasks of a store.
        table: 2 (methods) or 3 (the number of sampled objectives).
    """
    lines = [[part.strip() for part in line.split("|")] for line in (_TABLE_2 if table == 2 else _TABLE_3).split("\n")]
    frame = pd.DataFrame(lines[1:-1], columns=["task-adaptive", "method", "#", *TASKS])
    wanted = [task for task in TASKS if task in tasks]
    frame = frame[["task-adaptive", "method", "#", *wanted]].rename(columns=TASKS)
    return frame.map(lambda text: re.sub(r"(\.\d\d) ", r"\1 ± ", text)) if wanted else None
