"""Settings may be added and defaults may change, but no stored run may lose its name or share it with another run.

`settings.json` lists every setting of release 0.1 with its default and its marks. It is never changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel

from aang_ray.config import RunConfig
from aang_ray.config.methods import method_sections
from aang_ray.config.sections import FinalFinetuneConfig, Neutral, NotInName, Section

FROZEN = Path(__file__).parent / "settings.json"
REQUIRED = "required"
"""Stands for the default of a setting that has none."""


def settings(model: type[Section], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dotted name of every setting, with its default and its marks as JSON values."""
    for name, field in model.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Neutral | NotInName)]
        if name == "method":  # one of many sections, listed one by one below
            continue
        if isinstance(field.default, Section) and not marks:
            yield from settings(type(field.default), f"{prefix}{name}.")
            continue
        default = REQUIRED if field.is_required() else field.get_default()
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json")
        known = {"default": default}
        for mark in marks:
            known["mark"] = {"neutral": mark.value} if isinstance(mark, Neutral) else "not in name"
        yield f"{prefix}{name}", json.loads(json.dumps(known))


def all_settings() -> dict[str, Any]:
    """Return all settings of a run: those of its sections, of every method, and of the last stage."""
    found = dict(settings(RunConfig))
    found |= settings(FinalFinetuneConfig, "final_finetune.")
    for method, section in method_sections().items():
        found |= settings(section, f"method={method}.")
    return found


def complaints(frozen: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the settings as they are `now`, one line for each."""
    methods = {name.partition(".")[0] for name in frozen if name.startswith("method=")}
    wrong = [f"{name} is gone: stored configurations hold it" for name in frozen if name not in now]
    for name, setting in now.items():
        new_method = name.startswith("method=") and name.partition(".")[0] not in methods
        if name in frozen:
            if frozen[name].get("mark") != setting.get("mark"):
                wrong.append(f"{name} has another mark than in release 0.1: stored runs get other names")
        elif "mark" not in setting and not new_method:
            wrong.append(
                f"{name} is new and renames stored runs: declare its type as Annotated[..., Neutral(VALUE)], where a "
                "run with VALUE is what runs were before"
            )
    return wrong


def test_no_setting_renames_stored_runs() -> None:
    assert complaints(json.loads(FROZEN.read_text(encoding="utf-8")), all_settings()) == []


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("method", method_sections())
def test_every_default_is_part_of_the_name(method: str) -> None:
    """So a default that changes later gives new names to the runs that relied on it, if it is not the neutral value."""
    config = RunConfig.model_validate({"method": method}) if method != "aang" else RunConfig()
    named = set(flat(config.identity()))
    method_settings = dict(settings(method_sections()[method], "method."))
    wanted = {name for name, setting in method_settings.items() if "mark" not in setting}
    if config.method.auxiliary and config.method.samples_dev:  # such a method uses all sections
        sections = dict(settings(RunConfig))
        wanted |= {name for name, setting in sections.items() if "mark" not in setting}
    assert wanted <= named


class First(Section):
    """A section as it was released."""

    rate: float = 0.1


class Added(Section):
    """The section with a setting that was added with a mark."""

    rate: float = 0.1
    momentum: Annotated[float, Neutral(0.0)] = 0.0


class Forgotten(Section):
    """The section with a setting that was added without a mark."""

    rate: float = 0.1
    momentum: float = 0.0


class Changed(Section):
    """Both defaults have changed since."""

    rate: float = 0.2
    momentum: Annotated[float, Neutral(0.0)] = 0.9


def test_an_added_setting_without_a_mark_is_found() -> None:
    frozen = dict(settings(First))
    assert complaints(frozen, dict(settings(Added))) == []
    (line,) = complaints(frozen, dict(settings(Forgotten)))
    assert line.startswith("momentum is new and renames stored runs")
    assert complaints(dict(settings(Added)), dict(settings(Forgotten))) == [
        "momentum has another mark than in release 0.1: stored runs get other names"
    ]
    assert complaints(dict(settings(Added)), frozen) == ["momentum is gone: stored configurations hold it"]


def test_what_enters_the_name() -> None:
    assert First().named_settings() == Added().named_settings() == {"rate": 0.1}
    assert Added(momentum=0.5).named_settings() == {"rate": 0.1, "momentum": 0.5}
    # A changed default is another name; and the old value, given by hand, is the old name.
    assert Changed().named_settings() == {"rate": 0.2, "momentum": 0.9}
    assert Changed(rate=0.1, momentum=0.0).named_settings() == First().named_settings()
