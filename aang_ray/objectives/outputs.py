"""O: what is asked of a text after T and R, and which head answers.

An output is a head, a function from a `View` to `Labels`, and the rules about what it goes with. Integer labels are
learned by cross-entropy, real ones by squared error; either is a mean over the step's labels. (semantics section 2.6)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from aang_ray.config.section import Semantics
from aang_ray.data.task import Ragged
from aang_ray.objectives.legality import Rule
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.texts import Bool, Int64, Texts, Vocabulary

DENOISE_HEAD = "denoise"
"""The shared vocabulary head of denoising, which also makes the replacements of `real-synthetic`."""


@dataclass(frozen=True)
class Head:
    """What answers."""

    kind: Literal["vocabulary", "token", "text"]
    """Logits over the vocabulary at labelled positions; or a two-layer perceptron on a position, or on a text."""
    size: int | None = None
    """Outputs of a perceptron; None: the classes of the objective's data set."""


@dataclass(frozen=True)
class View:
    """Texts after T and R, as an output sees them. Suffixes: T original tokens, N tokens that are read, E texts."""

    objective: Objective
    original: Texts
    """Before T."""
    real_T: Bool
    """Original tokens that are text, not special."""
    selected_T: Bool
    """Original tokens that T was to corrupt."""
    kept_T: Bool
    """Original tokens that T left where they are or put something in their place; the others are gone."""
    vocabulary: Vocabulary
    labels: Semantics
    classes_E: Int64 | None
    """Class of each text in its own data set, where that has classes."""
    fitted: Any
    """What the output's `fit` returned."""

    @cached_property
    def row_T(self) -> Int64:
        """Where each original token is read, or, if it is gone, the last one before it that is read."""
        return np.cumsum(self.kept_T) - 1


@dataclass(frozen=True)
class Labels:
    """What is asked. Suffix: M labels."""

    targets: npt.NDArray[Any]
    """[M] integers: classes or token ids; or [M, C] real numbers: values."""
    at_M: Int64 | None = None
    """Rows of the texts as they are read, ascending; None: one label a text, M = E."""
    by_queries: bool = False
    """Ask at mask-token queries appended to the text, one with the place of each row, instead of at the rows."""
    drawn_T: Bool | None = None
    """Original tokens in whose place the denoise head's own samples stand; the targets then are made on the device:
    1 where the sample differs from the original, else 0."""


@dataclass(frozen=True)
class Output:
    """A primitive of the stage O."""

    stage: ClassVar[str] = "output"

    name: str
    head: Head
    label: Callable[[View], Labels]
    rules: tuple[Rule, ...] = ()
    fit: Callable[[Ragged, Vocabulary], Any] | None = None
    """What the labels need to know of the end task's train texts, computed once."""
    needs: frozenset[str] = field(default_factory=frozenset)
    """Other outputs that a space must have, too."""
