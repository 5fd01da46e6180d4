"""Everything that can be chosen at the four stages: what is built in, and what a user adds.

A Python file adds primitives by naming them: `PRIMITIVES = (Transform(...), Output(...), ...)`. A space that wants
them names the file. Built-in ones are made of the same parts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Final

from aang_ray.errors import UserError
from aang_ray.objectives.objective import EXTERNAL, Objective, Rule
from aang_ray.objectives.outputs import (
    CAPITALISATION,
    DENOISE,
    END_TASK,
    NEXT_TOKEN,
    REAL_SYNTHETIC,
    SUPERVISED,
    TF,
    TF_IDF,
    Output,
)
from aang_ray.objectives.transforms import TRANSFORMS, Transform
from aang_ray.objectives.visibility import REPRESENTATIONS, Representation

DATA: Final = ("end-task", "in-domain", "out-of-domain", "neural-lm", f"{EXTERNAL}NAME")
"""Kinds of text; NAME stands for another data set of `data.external`."""

_HEADS: Final = frozenset({"dev", "label"})
"""Names of heads that no output is named after; an output's head has the output's name."""

Primitive = Transform | Representation | Output


@dataclass(frozen=True)
class Primitives:
    """T, R and O by name. A name means something only together with its stage."""

    transforms: Mapping[str, Transform]
    representations: Mapping[str, Representation]
    outputs: Mapping[str, Output]

    @classmethod
    def of(cls, primitives: Iterable[Primitive]) -> Primitives:
        """Sort primitives by stage.

        Raises:
            UserError: for a name that is taken.
        """
        stages: dict[str, dict[str, Any]] = {"transform": {}, "representation": {}, "output": {}}
        for primitive in primitives:
            named = stages[primitive.stage]
            if primitive.name in named or primitive.name in _HEADS:
                raise UserError(f"there is a {primitive.stage} {primitive.name} already; give yours another name")
            named[primitive.name] = primitive
        return cls(stages["transform"], stages["representation"], stages["output"])

    def names(self, stage: str) -> tuple[str, ...]:
        """What can be chosen at a stage."""
        named: dict[str, Iterable[str]] = {
            "data": DATA,
            "transform": self.transforms,
            "representation": self.representations,
            "output": self.outputs,
        }
        return tuple(named[stage])

    def rules(self, objective: Objective) -> tuple[Rule, ...]:
        """The rules of the objective's primitives."""
        return (
            *self.transforms[objective.transform].rules,
            *self.representations[objective.representation].rules,
            *self.outputs[objective.output].rules,
        )

    def plus(self, files: Sequence[str]) -> Primitives:
        """These and those of a user's files.

        Raises:
            UserError: for a file that cannot be loaded, or a name that is taken.
        """
        if not files:
            return self
        everything: list[Primitive] = [*self.transforms.values(), *self.representations.values()]
        everything += self.outputs.values()
        for file in files:
            everything += load(Path(file))
        return Primitives.of(everything)


BUILT_IN: Final = Primitives.of(
    (
        *TRANSFORMS,
        *REPRESENTATIONS,
        *(DENOISE, NEXT_TOKEN, TF_IDF, TF, CAPITALISATION, REAL_SYNTHETIC, END_TASK, SUPERVISED),
    )
)


def digest(file: str) -> str:
    """Hash of a file's content.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"primitives: {file}: {error.strerror or error}") from None


def load(file: Path) -> Sequence[Primitive]:
    """The primitives that a Python file names in `PRIMITIVES`; runs the file.

    Raises:
        UserError: in one line, if it cannot be read or run, or names no primitives; and later, naming the primitive,
            if a function of its own raises.
    """
    name = f"aang_primitives_{digest(str(file))}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"primitives: {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"primitives: {file}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    named = getattr(module, "PRIMITIVES", None)
    if not isinstance(named, list | tuple) or not all(isinstance(p, Primitive) for p in named):
        raise UserError(f"primitives: {file}: say PRIMITIVES = (Transform(...), Representation(...), Output(...), ...)")
    return tuple(_answerable(primitive) for primitive in named)


def _answerable(primitive: Primitive) -> Primitive:
    """The same with functions whose exceptions name it."""
    values = {field.name: getattr(primitive, field.name) for field in fields(primitive)}
    own: dict[str, Any] = {name: _naming(primitive, value) for name, value in values.items() if callable(value)}
    rules = tuple(replace(rule, forbids=_naming(primitive, rule.forbids)) for rule in primitive.rules)
    return replace(primitive, rules=rules, **own)


def _naming(primitive: Primitive, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{primitive.stage} {primitive.name}: {message}") from error

    return call
