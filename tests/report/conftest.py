"""A store filled by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aang_ray.config import parse_config
from aang_ray.store import CellRecord, ResultRow, Scores, Store

Fill = Callable[..., Store]


def write_cell(
    store: Store,
    *,
    method: str = "finetune",
    seed: int = 0,
    dev: float = 0.5,
    test: float = 0.5,
    clean: float | None = None,
    task: str = "movie",
    majority: bool = False,
    failed: bool = False,
    cut: int | None = None,
    metric: str = "accuracy",
    seconds: float = 10.0,
    examples: int = 3200,
    **settings: Any,
) -> None:
    """A row of a run with the given settings, dotted names written with `__`; `cut` is the step it was cut short at."""
    mapping: dict[str, Any] = {
        "data": {"task": task},
        "method": {"name": method},
        "seed": seed,
        "batch": {"end_task": 32},
        "schedule": {"steps": 100},
        "fingerprints": {"data": f"print-of-{task}", "encoder": "e" * 16, "space": "s" * 16},
    }
    for name, value in settings.items():
        *path, last = name.split("__")
        inner = mapping
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    config = parse_config(mapping, "test")
    auxiliary = config.method.auxiliary

    def scores(value: float, examples: int) -> Scores:
        return Scores(value, value / 2, examples, {"neg": examples // 2, "pos": examples - examples // 2}, 0.5)

    store.write(
        CellRecord(
            ResultRow(
                cell=config.cell,
                group=config.group,
                row=config.row_name,
                task=task,
                method=method,
                space=config.space if auxiliary else None,
                n=str(config.n) if auxiliary else None,
                seed=seed,
                config=config.model_dump(mode="json"),
                metric=metric,
                status="failed" if failed else "done" if cut is None else "cut",
                error="loss is nan" if failed else None,
                log_tail=None,
                dev=None if failed else scores(dev, 500),
                test=None if failed or cut else scores(test, 1500),
                test_clean=None
                if failed or cut
                else scores(test if clean is None else clean, 1500 if clean is None else 1480),
                majority=None if failed else majority,
                best_step=None if failed else 60,
                steps=cut or 100,
                examples=examples,
                tokens=1_000_000,
                seconds=seconds,
                device="cpu",
                precision="fp32",
                versions={},
                finished_at="2026-01-02T03:04:05+00:00",
            )
        )
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def write() -> Callable[..., None]:
    return write_cell
