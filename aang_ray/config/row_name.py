"""What a run is called in a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from aang_ray.config.section import Section

if TYPE_CHECKING:
    from aang_ray.config.run import RunConfig

PAPER_ROWS = {
    ("aang", "gpt"): "gpt-style",
    ("aang", "xlnet"): "xlnet-style",
    ("aang", "bert"): "bert-style",
    ("aang", "tapt_dapt"): "meta-tartan-tapt_dapt",
}
"""By method and space, what AANG with one kind of objective is called (Dery et al. 2023, Table 2 and Figure 3)."""


def row_name(config: RunConfig) -> str:
    """`aang-td n=6`, with `+finetune` for a final stage and the `published` switches that are on.

    All switches that the method has: `aang-td (published) n=6`; some: `aang-td (published: labels, legality) n=6`.
    """
    method = config.method
    name: str = method.name
    if method.auxiliary:
        space = config.space.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
        name = PAPER_ROWS.get((method.name, space), f"{method.name}-{space}")
    if config.final_finetune is not None:
        name += "+finetune"
    switches = dict(published_switches(config))
    chosen = sorted(switch for switch, on in switches.items() if on)
    if chosen:
        name += " (published)" if len(chosen) == len(switches) else f" (published: {', '.join(chosen)})"
    return f"{name} n={config.n}" if method.auxiliary else name


def published_switches(config: RunConfig) -> Iterator[tuple[str, bool]]:
    """Every setting of the run's method that can be `published`, and whether it is."""
    sections: list[Section] = [config.optim, config.method]
    if config.method.auxiliary:
        sections.append(config.objectives)
        yield "heads", config.objectives.heads == "per_objective"  # one untied copy for each, as published
    for section in sections:
        for name, field in type(section).model_fields.items():
            if "published" in get_args(field.annotation):
                yield name, getattr(section, name) == "published"
