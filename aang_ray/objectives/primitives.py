"""All primitives of the stages T, R and O: what is built in, and what a user's own files add.

A user's file imports what it needs from this module and ends with the primitives that it adds:

    from aang_ray.objectives.primitives import Corrupted, Transform

    def reverse(texts, selected_T, vocabulary):
        ...
        return Corrupted(ids_T)

    PRIMITIVES = (Transform("reverse", reverse),)

A space names the file under `primitives:`. Whatever a primitive returns is checked here, so that a mistake in a user's
file is one line that names the primitive.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from pathlib import Path
from types import FrameType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from aang_ray.config.load import require_file
from aang_ray.config.sections import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives.objective import EXTERNAL, Objective, Rule
from aang_ray.objectives.outputs import ORDERED, OUTPUTS, Head, Labels, Output, View
from aang_ray.objectives.texts import Bool, Int32, Texts, Vocabulary
from aang_ray.objectives.transforms import TRANSFORMS, Corrupted, Transform, select, select_spans
from aang_ray.objectives.visibility import HIGHEST, REPRESENTATIONS, Representation

LOAD_SECONDS = 60
"""How long a user's file may take to load. One with an endless loop would hold up all runs without a word."""

logger = logging.getLogger(__name__)

# What a user's file may import from here; these names stay.
__all__ = [
    "BUILT_IN",
    "Corrupted",
    "Head",
    "Labels",
    "Objective",
    "Output",
    "Primitives",
    "Representation",
    "Rule",
    "Texts",
    "Transform",
    "View",
    "Vocabulary",
    "select",
    "select_spans",
]

DATA: Final = ("end-task", "in-domain", "out-of-domain", "neural-lm", "retrieved", f"{EXTERNAL}NAME")
"""Kinds of text; NAME stands for a data set of `data.external`."""

_RESERVED_HEADS: Final = frozenset({"dev", "label"})
"""Heads that belong to no output. An output's head has the output's name, so these names cannot be used."""

Primitive = Transform | Representation | Output


@dataclass(frozen=True)
class Primitives:
    """The taxonomy of text: transforms, representations and outputs by name."""

    transforms: Mapping[str, Transform]
    representations: Mapping[str, Representation]
    outputs: Mapping[str, Output]

    @classmethod
    def of(cls, primitives: Iterable[Primitive]) -> Primitives:
        """Sort primitives by stage.

        Raises:
            UserError: if two primitives of a stage have the same name, or a name is reserved.
        """
        stages: dict[str, dict[str, Any]] = {"transform": {}, "representation": {}, "output": {}}
        for primitive in primitives:
            named = stages[primitive.stage]
            if primitive.name in named or primitive.name in _RESERVED_HEADS:
                raise UserError(f"there is a {primitive.stage} {primitive.name} already; give yours another name")
            named[primitive.name] = primitive
        return cls(stages["transform"], stages["representation"], stages["output"])

    def names(self, stage: str) -> tuple[str, ...]:
        return DATA if stage == "data" else tuple(getattr(self, f"{stage}s"))

    def rules(self, objective: Objective) -> tuple[Rule, ...]:
        return (
            *self.transforms[objective.transform].rules,
            *self.representations[objective.representation].rules,
            *self.outputs[objective.output].rules,
        )

    def conflicts(self, objectives: Collection[Objective], labels: Semantics) -> dict[Objective, str]:
        """Return the second names of objectives, and the objectives whose output needs one that is not in the space."""
        reasons: dict[Objective, str] = {}
        for objective in objectives:
            intact = (objective.transform, objective.output) == ("no-op", "denoise")
            next_token = replace(objective, output="next-token")
            if labels == "sound" and intact and objective.representation in ORDERED and next_token in objectives:
                reasons[objective] = "denoising an uncorrupted input is next-token, which is in the space, too"
        while True:  # an objective that goes may be the one that others need
            left = [objective for objective in objectives if objective not in reasons]
            outputs = {objective.output for objective in left}
            found = {
                objective: f"{objective.output} needs {', '.join(sorted(missing))} in the space, too"
                for objective in left
                if (missing := self.outputs[objective.output].needs - outputs)
            }
            if not found:
                return reasons
            reasons |= found

    def plus(self, files: Sequence[str]) -> Primitives:
        """Return these primitives and those of a user's files.

        Raises:
            UserError: for a file that cannot be loaded, or a name that is taken.
        """
        if not files:
            return self
        own = [primitive for file in files for primitive in _load(Path(file), digest(file))]
        return Primitives.of([*self.transforms.values(), *self.representations.values(), *self.outputs.values(), *own])


BUILT_IN: Final = Primitives.of((*TRANSFORMS, *REPRESENTATIONS, *OUTPUTS))


def digest(file: str) -> str:
    """Hash the content of a user's file; a `UserError` if it cannot be read."""
    require_file(Path(file), f"primitives: {file}")
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise UserError(f"primitives: {file}: {getattr(error, 'strerror', None) or error}") from None


@lru_cache(maxsize=64)
def _load(file: Path, content: str) -> tuple[Primitive, ...]:
    """Run a Python file and return its `PRIMITIVES`; an exception of one of their functions will name the primitive.

    Args:
        file: The file.
        content: The hash of its content: a process runs each content once, however often a space is read.
    """
    name = f"aang_primitives_{content}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"primitives: {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module that defines them
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), _time_limit(LOAD_SECONDS):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"primitives: {file}: {_one_line(error)}") from error
    if said := " ".join(printed.getvalue().split()):
        logger.warning("primitives: %s prints when it is loaded: %s", file, said[:200])
    found = getattr(module, "PRIMITIVES", None)
    if not isinstance(found, list | tuple) or not all(isinstance(p, Primitive) for p in found):
        raise UserError(f"primitives: {file}: say PRIMITIVES = (Transform(...), Representation(...), Output(...), ...)")
    return tuple(_with_named_errors(primitive) for primitive in found)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in a block that takes longer; on a thread that is not the main one there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _with_named_errors(primitive: Primitive) -> Primitive:
    """Wrap all functions of a primitive so that their exceptions become a `UserError` with its name."""

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except (Exception, SystemExit) as error:
                raise UserError(f"{primitive.stage} {primitive.name}: {_one_line(error)}") from error

        return call

    functions: dict[str, Any] = {name: named(value) for name, value in vars(primitive).items() if callable(value)}
    rules = tuple(replace(rule, forbids=named(rule.forbids)) for rule in primitive.rules)
    return replace(primitive, rules=rules, **functions)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# A call of each kind of primitive, with checks of what it returns. Without them a wrong array would fail far away, on
# the device, where no message names the primitive.


def corrupt(transform: Transform, texts: Texts, vocabulary: Vocabulary, rate: float) -> tuple[Bool, Corrupted]:
    """Return which tokens a transform selects, [T], about `rate` of the real ones, and the corrupted texts.

    Raises:
        UserError: if a function of the transform returned something of another type, shape or range.
    """
    name, tokens, real_T = f"transform {transform.name}", len(texts.ids_T), vocabulary.real(texts.ids_T)
    selected_T = transform.select(texts, real_T, rate)
    if not _is_mask(selected_T, tokens):
        raise UserError(f"{name}: select must return a truth value for each token of the texts, [T]")
    corrupted = transform.corrupt(texts, selected_T, vocabulary)
    if not isinstance(corrupted, Corrupted) or np.shape(corrupted.ids_T) != (tokens,):
        raise UserError(f"{name}: must return Corrupted(ids_T) with an id for each token of the texts, [T]")
    if not _are_indices(corrupted.ids_T, vocabulary.size):
        raise UserError(f"{name}: returned an id outside of the vocabulary, 0 to {vocabulary.size - 1}")
    for field, value_T in (("kept_T", corrupted.kept_T), ("noised_T", corrupted.noised_T)):
        if value_T is not None and not _is_mask(value_T, tokens):
            raise UserError(f"{name}: {field} must have a truth value for each token of the texts, [T]")
    if corrupted.kept_T is not None and not (corrupted.kept_T | real_T).all():
        raise UserError(f"{name}: deletes special tokens")
    return selected_T, corrupted


def order_of(representation: Representation, texts: Texts) -> Int32 | None:
    """Return the order in which a representation puts the tokens, [T], or None if all see all.

    Raises:
        UserError: if it is not one integer from 1 to 2^30 - 1 for each token.
    """
    if representation.order is None:
        return None
    name, tokens, highest = f"representation {representation.name}", len(texts.ids_T), HIGHEST // 2
    order_T = np.asarray(representation.order(texts))
    if order_T.shape != (tokens,) or order_T.dtype.kind not in "iu":
        raise UserError(f"{name}: order must return an integer for each token of the texts, [T]")
    if tokens and not 1 <= order_T.min() <= order_T.max() <= highest:
        raise UserError(f"{name}: order returned ranks {order_T.min()} to {order_T.max()}; allowed: 1 to {highest}")
    return order_T.astype(np.int32)


def label(output: Output, view: View) -> Labels:
    """Return the labels of an output.

    Raises:
        UserError: if it is not one for each text, or for some of the tokens that are read, in ascending order.
    """
    name, labels = f"output {output.name}", output.label(view)
    if output.head.kind == "text":
        texts = len(view.original.lengths_E)
        if not isinstance(labels, Labels) or labels.at_M is not None or len(labels.targets) != texts:
            raise UserError(f"{name}: must return Labels(targets) with one target for each text, and no at_M")
        return labels
    if not isinstance(labels, Labels) or labels.at_M is None or len(labels.targets) != len(labels.at_M):
        raise UserError(f"{name}: must return Labels(targets, at_M) with one target for each entry of at_M")
    if not _are_indices(labels.at_M, int(view.kept_T.sum())) or (np.diff(labels.at_M) < 0).any():
        raise UserError(f"{name}: at_M must be indices of tokens that are read, in ascending order")
    return labels


def check_targets(output: str, targets: npt.NDArray[Any], head: Head, vocabulary: int) -> None:
    """Check that an output's head can predict the targets: classes or token ids, [M], or real numbers, [M, C].

    Raises:
        UserError: for a class that the head does not have, or another number of real numbers than it has outputs.
    """
    size = vocabulary if head.size is None else head.size
    targets = np.asarray(targets)
    if np.issubdtype(targets.dtype, np.floating):
        if targets.shape[1:] != (size,):
            shape = targets.shape
            raise UserError(f"output {output}: its head predicts {size} numbers, its targets have shape {shape}")
    elif targets.ndim != 1 or not _are_indices(targets, size):
        raise UserError(f"output {output}: returned a label outside of its head's classes, 0 to {size - 1}")


def _is_mask(values: npt.NDArray[Any], count: int) -> bool:
    return np.shape(values) == (count,) and np.asarray(values).dtype == np.bool_


def _are_indices(values: npt.NDArray[Any], size: int) -> bool:
    values = np.asarray(values)
    return values.dtype.kind in "biu" and (len(values) == 0 or bool(values.min() >= 0 and values.max() < size))
