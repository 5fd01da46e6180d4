"""Search spaces: the file, its legal objectives (docs/semantics.md, section 1), and how they are displayed."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import sysconfig
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aang_ray.config.load import describe_error, read_yaml
from aang_ray.config.sections import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives import DOMAINS
from aang_ray.objectives.objective import EXTERNAL, STAGES, Objective, Rule, ruled_out
from aang_ray.objectives.primitives import BUILT_IN, Primitives, digest
from aang_ray.objectives.visibility import PUBLISHED

TEXT: Final = "text"
"""The domain of a space file that names none."""
INSTALLED: Final = "share/aang_ray/search_spaces"
"""Where an installation puts the files of `search_spaces/`, below its data path."""


class Taxonomy(Protocol):
    """What a domain offers at the four stages, and which combinations are objectives."""

    def names(self, stage: str) -> tuple[str, ...]:
        """Return the names that can be chosen at a stage."""

    def rules(self, objective: Objective) -> Sequence[Rule]:
        """Return the rules that can forbid the objective."""

    def conflicts(self, objectives: Collection[Objective], labels: Semantics) -> dict[Objective, str]:
        """Return the objectives that must go because of the others of the space, with the reasons."""


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
    """Python files that add primitives, relative to the space file."""
    domain: str = TEXT
    """What the objectives are about: text, or a domain of `aang_ray.objectives.DOMAINS`."""

    @cached_property
    def known(self) -> Primitives:
        return BUILT_IN.plus(self.primitives)

    @cached_property
    def taxonomy(self) -> Taxonomy:
        if self.domain == TEXT:
            return self.known
        taxonomy: Taxonomy = importlib.import_module(DOMAINS[self.domain]).TAXONOMY
        return taxonomy

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.domain != TEXT and self.domain not in DOMAINS:
            raise ValueError(f"{self.domain!r} is no domain; allowed: {', '.join((TEXT, *DOMAINS))}")
        if self.domain != TEXT and self.primitives:
            raise ValueError(f"primitives: files that add primitives are for spaces on text, not on {self.domain}")
        for block, stage in itertools.product(self.blocks, STAGES):
            allowed = self.taxonomy.names(stage)
            for name in getattr(block, stage):
                external = stage == "data" and name.startswith(EXTERNAL) and f"{EXTERNAL}NAME" in allowed
                if name not in allowed and not external:
                    raise ValueError(f"{name!r} is no {stage}; allowed: {', '.join(allowed)}")
        return self

    @property
    def fingerprint(self) -> str:
        """Return a hash of the blocks and of the content of the files, wherever they lie."""
        # A space on text has no `domain` in its hash: it had none before there were other domains.
        value = self.model_dump(mode="json", exclude={"primitives"} | ({"domain"} if self.domain == TEXT else set()))
        if self.primitives:
            value["primitives"] = [digest(file) for file in self.primitives]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Space:
    """The search space A: every legal objective, in the order of the blocks' products, and what was ruled out."""

    name: str
    objectives: tuple[Objective, ...]
    ruled_out: Mapping[Objective, str]
    """The reason for each objective that is not in the space."""
    left_out: frozenset[Objective] = frozenset()
    """Those that are legal by themselves, but not with this end task, this encoder or the rest of the space."""
    primitives: Primitives = BUILT_IN

    def __len__(self) -> int:
        return len(self.objectives)

    def only(self, keys: Collection[str]) -> Space:
        """Return the space with the objectives of these keys alone.

        Raises:
            UserError: if one of them is not in the space; the message says why.
        """
        known = {objective.key: objective for objective in self.objectives}
        reasons = {objective.key: reason for objective, reason in self.ruled_out.items()}
        for key in keys:
            if key not in known:
                raise UserError(f"method.weights: {key} is not in space {self.name}: {reasons.get(key, 'unknown')}")
        dropped = {k: "it has no weight in method.weights" for key, k in known.items() if key not in keys}
        kept = tuple(objective for objective in self.objectives if objective.key in keys)
        return replace(self, objectives=kept, ruled_out={**self.ruled_out, **dropped})

    def factors(self) -> dict[str, tuple[str, ...]]:
        """Name the entries of the factors: `A` by objective key; `D`, `T`, `R` and `O` by primitive."""
        named = {"A": tuple(k.key for k in self.objectives)}
        for letter, stage in zip("DTRO", STAGES, strict=True):
            named[letter] = tuple(dict.fromkeys(str(getattr(k, stage)) for k in self.objectives))
        return named


# Files


def space_path(name: str) -> Path:
    """Find a space file by path, or by name in `search_spaces/`: here, next to the package, then where it is installed.

    Raises:
        UserError: if there is no such file.
    """
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
    """Read and check a space file, given its name or path.

    Raises:
        UserError: in one line that names the file, the key and what is allowed.
    """
    path = space_path(name)
    mapping: dict[str, Any] = read_yaml(path)
    files = mapping.get("primitives")
    if isinstance(files, list):
        mapping["primitives"] = [str(path.parent / str(file)) for file in files]
    try:
        return SpaceFile.model_validate(mapping)
    except ValidationError as error:
        raise UserError(f"{path.name}: {describe_error(error, SpaceFile)}") from None


def masked_lm(data: Sequence[str]) -> SpaceFile:
    """Return the space of masked language modelling (as in BERT, TAPT and DAPT) on each kind of data."""
    choice = Block(data=tuple(data), transform=("bert-op",), representation=("bidirectional",), output=("denoise",))
    return SpaceFile(blocks=(choice,))


def other_labels(names: Sequence[str]) -> SpaceFile:
    """Return the space of the labels of other data sets, given their names."""
    data = tuple(f"{EXTERNAL}{name}" for name in names)
    choice = Block(data=data, transform=("no-op",), representation=("bidirectional",), output=("supervised",))
    return SpaceFile(blocks=(choice,))


# Legality


@dataclass(frozen=True)
class Capabilities:
    """What an end task, an encoder and the settings allow objectives to do."""

    positions_given: bool = True
    data: frozenset[str] = frozenset({"end-task", "in-domain", "out-of-domain"})
    sound_visibility: bool = True
    """`objectives.visibility` is `sound`. Appended queries need it: they see by rank."""
    shared_heads: bool = True


def enumerate_space(
    name: str,
    file: SpaceFile,
    legality: Semantics = "sound",
    labels: Semantics = "sound",
    capabilities: Capabilities | None = None,
) -> Space:
    """List all objectives of a space: the union of its blocks' products, less what is illegal.

    Sizes in `published` semantics: TD 24, TD+ED 40, X+Y+Z 3 (Dery et al. 2023, Table 2). With `capabilities`, what this
    end task and encoder cannot compute is left out, too.

    Raises:
        UserError: if no objective is left.
    """
    legal: dict[Objective, None] = {}  # a set that keeps its order
    illegal: dict[Objective, str] = {}
    left_out: set[Objective] = set()
    for block in file.blocks:
        names = (tuple(dict.fromkeys(getattr(block, stage))) for stage in STAGES)
        for choice in itertools.product(*names):
            objective = Objective(*choice)
            reason = ruled_out(objective, legality, file.taxonomy.rules(objective))
            if reason is None and capabilities is not None:
                reason = unavailable(objective, capabilities, labels)
                left_out.update([objective] if reason is not None else [])
            if reason is None:
                legal[objective] = None
            else:
                illegal[objective] = reason
    conflicts = file.taxonomy.conflicts(legal, labels)
    illegal |= conflicts
    left_out |= conflicts.keys()
    objectives = tuple(objective for objective in legal if objective not in conflicts)
    if not objectives:
        reasons = "; ".join(dict.fromkeys(illegal.values()))
        raise UserError(f"space {name}: no objective is left: {reasons}")
    return Space(name, objectives, illegal, frozenset(left_out), file.known)


def unavailable(objective: Objective, capabilities: Capabilities, labels: Semantics) -> str | None:
    """Return why a legal objective on text cannot be computed for this end task and encoder, or None if it can."""
    if objective.data not in capabilities.data:
        return f"no {objective.data} text is given; {how_to_give(objective.data)}"
    # Tokens are predicted at queries that are appended to the text (`Labels.by_queries`).
    outputs = {"next-token", "denoise"} if labels == "sound" else {"next-token"}
    in_random_order = (objective.transform, objective.representation) == ("no-op", "random-factorized")
    if in_random_order and objective.output in outputs:
        if not capabilities.positions_given:
            return "its queries need an encoder whose position ids can be given"
        if not capabilities.sound_visibility:
            return "its queries need sound visibility (objectives.visibility), or objectives.labels: published"
    if objective.representation not in PUBLISHED and not capabilities.sound_visibility:
        return "the released code has no such visibility (objectives.visibility: sound)"
    if objective.output == "real-synthetic" and not capabilities.shared_heads:
        return "its replacements come from one denoise head (objectives.heads: shared)"
    return None


def how_to_give(data: str) -> str:
    """Name the setting that supplies a kind of data."""
    if data.startswith(EXTERNAL):
        return f"list {data.removeprefix(EXTERNAL)} in data.external"
    if data == "retrieved":
        return "set data.retrieve_from"
    return f"set data.{data.replace('-', '_')}"


# Display


def render_space(name: str, legality: Semantics, console: Console) -> None:
    """Print a space: for its kinds of data a grid, outputs and transforms down, representations across."""
    space = enumerate_space(name, read_space(name), legality)
    everything = (*space.objectives, *space.ruled_out)
    console.print(f"{escape(name)}: {len(space)} objectives ({legality} semantics)", highlight=False)
    representations = tuple(dict.fromkeys(k.representation for k in everything))
    mark = {**dict.fromkeys(space.ruled_out, "–"), **dict.fromkeys(space.objectives, "yes")}
    grids: dict[tuple[tuple[str, str, tuple[str, ...]], ...], list[str]] = {}  # kinds of data with one grid share it
    for data in dict.fromkeys(k.data for k in everything):
        pairs = sorted({(k.output, k.transform) for k in mark if k.data == data})
        rows = (
            (output, transform, tuple(mark.get(Objective(data, transform, r, output), "") for r in representations))
            for output, transform in pairs
        )
        grids.setdefault(tuple(rows), []).append(data)
    for grid, data_names in grids.items():
        table = Table(title=escape(", ".join(data_names)), title_justify="left")
        for column in ("output, transform", *representations):
            # A line break after the first hyphen keeps the table within a terminal of 80 columns.
            table.add_column(escape(column.replace("-", "-\n", 1)))
        for output, of_output in itertools.groupby(grid, key=lambda row: row[0]):
            table.add_section()
            table.add_row(f"[bold]{escape(output)}[/bold]")
            for _, transform, marks in of_output:
                table.add_row(f"  {escape(transform)}", *marks)
        console.print(table)
    if space.ruled_out:
        console.print("Ruled out:")
        for reason, count in Counter(space.ruled_out.values()).items():
            console.print(f"  {count:3d}  {reason}", highlight=False)
