"""A search space: the union of blocks of choices per stage, less what is illegal."""

from __future__ import annotations

import hashlib
import itertools
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aang_ray.config.load import describe_error, read_yaml
from aang_ray.config.sections import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives.images.taxonomy import IMAGE_PRIMITIVES, IMAGE_RULES
from aang_ray.objectives.objective import EXTERNAL, STAGES, Capabilities, Objective, Rule, ruled_out, unavailable
from aang_ray.objectives.outputs import ORDERED
from aang_ray.objectives.primitives import BUILT_IN, Primitives, digest

INSTALLED = "share/aang_ray/search_spaces"
"""Where an installation puts the files of `search_spaces/`, below its data path."""

Choices = Annotated[tuple[str, ...], Field(min_length=1)]


class Block(BaseModel):
    """Choices at every stage; their product is the block's objectives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Choices
    transform: Choices
    representation: Choices
    output: Choices


class SpaceFile(BaseModel):
    """The contents of a file of `search_spaces/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]
    primitives: tuple[str, ...] = ()
    """Python files that add primitives, relative to the space's own place."""

    @cached_property
    def known(self) -> Primitives:
        """What is built in, and what the files add."""
        return BUILT_IN.plus(self.primitives)

    def allowed(self, stage: str) -> tuple[str, ...]:
        """Names that can be chosen at a stage."""
        return self.known.names(stage)

    def rules(self, objective: Objective) -> Sequence[Rule]:
        """The rules of the objective's primitives."""
        return self.known.rules(objective)

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for block in self.blocks:
            for stage in STAGES:
                allowed = self.allowed(stage)
                for name in getattr(block, stage):
                    external = stage == "data" and name.startswith(EXTERNAL) and f"{EXTERNAL}NAME" in allowed
                    if name not in allowed and not external:
                        raise ValueError(f"{name!r} is no {stage}; allowed: {', '.join(allowed)}")
        return self

    @property
    def fingerprint(self) -> str:
        """Hash of the blocks and of the content of the files: two that say the same are the same space."""
        value = self.model_dump(mode="json", exclude={"primitives"})
        if self.primitives:
            value["primitives"] = [digest(file) for file in self.primitives]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class ImageSpaceFile(SpaceFile):
    """A space of objectives on images; the file says `domain: images`."""

    domain: Literal["images"]

    @field_validator("primitives")
    @classmethod
    def _built_in_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            raise ValueError("files that add primitives are for spaces on text; those on images have what is built in")
        return value

    def allowed(self, stage: str) -> tuple[str, ...]:
        """Names that can be chosen at a stage."""
        return IMAGE_PRIMITIVES[stage]

    def rules(self, objective: Objective) -> Sequence[Rule]:
        """All rules about images: each names the primitives that it is about."""
        return IMAGE_RULES


@dataclass(frozen=True)
class Space:
    """A: every legal objective, in the order of the blocks' products, and what was ruled out."""

    name: str
    objectives: tuple[Objective, ...]
    ruled_out: Mapping[Objective, str]
    """Reason by objective."""
    left_out: frozenset[Objective] = frozenset()
    """Those ruled out that are legal by themselves: the end task, the encoder or the rest of the space is why."""
    primitives: Primitives = BUILT_IN
    """What the names of objectives on text stand for."""

    def __len__(self) -> int:
        return len(self.objectives)

    def factors(self) -> dict[str, tuple[str, ...]]:
        """Names of the factor tensors' entries: `A` by objective key, D, T, R, O by primitive."""
        named = {"A": tuple(k.key for k in self.objectives)}
        for letter, stage in zip("DTRO", STAGES, strict=True):
            named[letter] = tuple(dict.fromkeys(str(getattr(k, stage)) for k in self.objectives))
        return named


def space_path(name: str) -> Path:
    """Where a space lies: a path as given, or a file of `search_spaces/` here, beside the package or installed."""
    given = Path(name)
    if given.suffix in {".yaml", ".yml"}:
        if given.is_file():
            return given
        raise UserError(f"space: no file {name}")
    installed = Path(sysconfig.get_path("data")) / INSTALLED
    folders = [Path("search_spaces"), Path(__file__).resolve().parents[2] / "search_spaces", installed]
    for folder in folders:
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(f"space: {name!r} is neither one of {', '.join(known)} nor a path to a .yaml file")


def read_space(name: str) -> SpaceFile:
    """Read and validate a space by name or path.

    Raises:
        UserError: with one line that names the file, the key and what is allowed.
    """
    path = space_path(name)
    mapping: dict[str, Any] = read_yaml(path)
    model = ImageSpaceFile if "domain" in mapping else SpaceFile
    files = mapping.get("primitives")
    if isinstance(files, list):
        mapping["primitives"] = [str(path.parent / str(file)) for file in files]
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        raise UserError(f"{path.name}: {describe_error(error, model)}") from None


def masked_lm(data: Sequence[str]) -> SpaceFile:
    """The masked-LM objective on each kind of data, as BERT, TAPT and DAPT have it."""
    choice = Block(data=tuple(data), transform=("bert-op",), representation=("bidirectional",), output=("denoise",))
    return SpaceFile(blocks=(choice,))


def enumerate_space(
    name: str,
    file: SpaceFile,
    legality: Semantics = "sound",
    labels: Semantics = "sound",
    capabilities: Capabilities | None = None,
) -> Space:
    """All objectives of a space: the union of its blocks' products, less what is illegal.

    With `capabilities`, also less what this end task and encoder cannot compute.
    Sizes in `published` semantics: TD 24, TD+ED 40, X+Y+Z 3 (Dery et al. 2023, Table 2).

    Raises:
        UserError: if nothing is left.
    """
    legal: dict[Objective, None] = {}
    illegal: dict[Objective, str] = {}
    left_out: set[Objective] = set()
    for block in file.blocks:
        for choice in itertools.product(block.data, block.transform, block.representation, block.output):
            objective = Objective(*choice)
            reason = ruled_out(objective, legality, file.rules(objective))
            if reason is None and capabilities is not None:
                reason = unavailable(objective, capabilities, labels)
                left_out.update([objective] if reason is not None else [])
            if reason is None:
                legal[objective] = None
            else:
                illegal[objective] = reason
    for objective, reason in _beside_others(legal, file.known, labels).items():
        del legal[objective]
        illegal[objective] = reason
        left_out.add(objective)
    if not legal:
        reasons = "; ".join(dict.fromkeys(illegal.values()))
        raise UserError(f"space {name}: no objective is left: {reasons}")
    return Space(name, tuple(legal), illegal, frozenset(left_out), file.known)


def _beside_others(legal: Mapping[Objective, None], known: Primitives, labels: Semantics) -> dict[Objective, str]:
    """Objectives that are none beside, or without, others of the space, with the reasons."""
    reasons: dict[Objective, str] = {}
    for objective in legal:
        intact = (objective.transform, objective.output) == ("no-op", "denoise") and objective.representation in ORDERED
        if labels == "sound" and intact and replace(objective, output="next-token") in legal:
            reasons[objective] = "denoising an input that nothing corrupted is next-token, which the space has, too"
    while True:  # what goes may be what others need
        stay = [objective for objective in legal if objective not in reasons]
        outputs = {objective.output for objective in stay}
        found = {}
        for objective in stay:
            output = known.outputs.get(objective.output)
            if output is not None and (lacking := output.needs - outputs):
                found[objective] = f"{output.name} needs {', '.join(sorted(lacking))} in the space, too"
        if not found:
            return reasons
        reasons |= found


# --- objectives.describe: What a person sees of a space: its grid, and what was ruled out and why.


def render_space(name: str, legality: Semantics, console: Console) -> None:
    """Print a space: for its kinds of data a grid, outputs and transforms down, representations across.

    Kinds of data with the same grid share it.
    """
    space = enumerate_space(name, read_space(name), legality)
    everything = (*space.objectives, *space.ruled_out)
    console.print(f"{escape(name)}: {len(space)} objectives ({legality} semantics)", highlight=False)
    representations = _distinct(k.representation for k in everything)
    grids: dict[Grid, list[str]] = {}
    for data in _distinct(k.data for k in everything):
        grids.setdefault(_grid(space, data, representations), []).append(data)
    for grid, data_names in grids.items():
        table = Table(title=escape(", ".join(data_names)), title_justify="left")
        for column in ("output, transform", *representations):
            # Broken in two, so that the table fits into a terminal of 80 columns.
            table.add_column(escape(column.replace("-", "-\n", 1)))
        for output, rows in grid:
            table.add_section()
            table.add_row(f"[bold]{escape(output)}[/bold]")
            for transform, marks in rows:
                table.add_row(f"  {escape(transform)}", *marks)
        console.print(table)
    if space.ruled_out:
        console.print("Ruled out:")
        for reason, count in Counter(space.ruled_out.values()).items():
            console.print(f"  {count:3d}  {reason}", highlight=False)


Rows = tuple[tuple[str, tuple[str, ...]], ...]
Grid = tuple[tuple[str, Rows], ...]
"""By output and transform a mark for each representation."""


def _grid(space: Space, data: str, representations: tuple[str, ...]) -> Grid:
    legal = frozenset(space.objectives)
    named = [k for k in (*space.objectives, *space.ruled_out) if k.data == data]

    def mark(objective: Objective) -> str:
        return "yes" if objective in legal else "–" if objective in space.ruled_out else ""

    def rows(output: str) -> Rows:
        transforms = sorted({k.transform for k in named if k.output == output})
        return tuple((t, tuple(mark(Objective(data, t, r, output)) for r in representations)) for t in transforms)

    return tuple((output, rows(output)) for output in sorted({k.output for k in named}))


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
