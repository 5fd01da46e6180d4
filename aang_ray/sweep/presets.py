"""The grids of the AANG paper as sweeps: `paper/<task>/<row>` (Dery et al. 2023, Tables 4-7).

See docs/semantics.md, section 4. As the released code applied them: every `published` switch is on (but allocation
for MT-TARTAN, whose weights are equal), and the tables' "learning rate" is that of the heads, while the body learns at
1e-4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from aang_ray.config.load import nearest
from aang_ray.errors import UserError

TRAIN_SIZES = {"citation_intent": 1688, "sciie": 3219, "chemprot": 4169, "se2016": 2497, "hyperpartisan": 515}
"""Tasks, and examples of each one's train split (Table 4): a fine-tuning epoch is so many examples."""
SEEDS = (0, 1, 2)

_FINETUNE_BATCH = 16
_PUBLISHED: Mapping[str, Any] = {
    "encoder": {"name": "roberta-base"},
    "objectives": {
        "legality": "published",
        "allocation": "published",
        "visibility": "published",
        "labels": "published",
        "heads": "per_objective",
    },
    "optim": {"body_lr": 1e-4, "clipping": "published"},
}
_AANG = {
    "name": "aang",
    "dev_sample": "published",
    "auxiliary_score": "published",
    "update": "sgd",
    "dev_head": "refit",
    "dev_calibration": False,
    "dev_memory": 0.0,
    "aux_lr": 0.1,
}
_TABLE_5 = {"method.aux_lr": [1.0, 0.1], "method.sopt_lr": [0.1, 0.01], "optim.head_lr": [1e-3, 1e-4]}
_TABLE_6 = {"method.aux_lr": [1.0, 0.5, 0.1], "n": [6, 12, 24]}
_TABLE_7 = {"method.sopt_lr": [1.0, 0.1, 0.01], "optim.head_lr": [1e-3, 1e-4, 5e-5]}

ROWS: Mapping[str, Mapping[str, Any]] = {
    # Gururangan et al. 2020, no grid: body 2e-5, batch 16, 10 epochs, patience 3.
    "roberta": {"method": "finetune"},
    "tapt": {"method": "tapt"},
    "dapt": {"method": "dapt"},
    "tapt+dapt": {"method": "tapt_dapt"},
    # Table 7, which has no `aux_lr` for META-TARTAN: 0.1.
    "gpt": {"method": _AANG, "space": "gpt", "n": 1, "grid": _TABLE_7},
    "xlnet": {"method": _AANG, "space": "xlnet", "n": 1, "grid": _TABLE_7},
    "bert": {"method": _AANG, "space": "bert", "n": 1, "grid": _TABLE_7},
    "meta-tartan": {"method": _AANG, "space": "tapt_dapt", "n": "all", "grid": _TABLE_7},
    # docs/semantics.md, section 4, no grid: body 1e-4, heads 1e-3.
    "mt-tartan": {
        "method": "mt_tartan",
        "space": "tapt_dapt",
        "n": "all",
        "objectives": {"allocation": "equal"},
        "optim": {"head_lr": 1e-3},
    },
    # Table 5; `static` has no factors to learn, and X+Y+Z has three objectives.
    "static-td": {"method": "static", "space": "td", "grid": {"n": [3, 6], "optim.head_lr": [1e-3, 1e-4]}},
    "xyz": {"method": _AANG, "space": "xyz", "n": 3, "grid": _TABLE_5},
    "aang-td": {"method": _AANG, "space": "td", "grid": {**_TABLE_5, "n": [3, 6]}},
    "aang-td+ed": {
        "method": {**_AANG, "sopt_lr": 0.1},
        "space": "td_ed",
        "optim": {"head_lr": 1e-4},
        "batch": {"auxiliary": 1024},
        "grid": _TABLE_6,
    },
}
"""What a row changes about a run, in the form of a sweep file's `methods`."""


def preset_names() -> tuple[str, ...]:
    """All presets, tasks varying slowest."""
    return tuple(f"paper/{task}/{row}" for task in TRAIN_SIZES for row in ROWS)


def preset(name: str) -> dict[str, Any]:
    """A preset as the mapping that a sweep file holds. The task's data are not part of it: `--task FOLDER` gives them.

    Settings that it does not name have their default, or the value of the task's card.

    Raises:
        UserError: No preset has this name.
    """
    source, _, rest = name.partition("/")
    task, _, row = rest.partition("/")
    if source != "paper" or task not in TRAIN_SIZES or row not in ROWS:
        close = nearest(name, preset_names())
        hint = f"did you mean {close}?" if close else "`aang preset list` shows them"
        raise UserError(f"preset {name!r} is unknown; {hint}")
    epoch = math.ceil(TRAIN_SIZES[task] / _FINETUNE_BATCH)
    gururangan = {
        "encoder": {"name": "roberta-base", "dropout": 0.1, "head_dropout": 0.1},
        "batch": {"end_task": _FINETUNE_BATCH},
        "optim": {"body_lr": 2e-5, "head_lr": 2e-5},
        "schedule": {"steps": 10 * epoch, "eval_every": epoch, "patience": 3},
    }
    base = _PUBLISHED if "space" in ROWS[row] else gururangan
    # Copied, because callers may change it.
    return copy.deepcopy({"base": base, "tasks": [task], "methods": [ROWS[row]], "seeds": list(SEEDS)})
