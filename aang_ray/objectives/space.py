"""A search space: the union of blocks of choices per stage, less what is illegal."""

from __future__ import annotations

import hashlib
import itertools
import json
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aang_ray.config.load import describe_error, read_yaml
from aang_ray.config.section import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives.images.taxonomy import IMAGE_PRIMITIVES, IMAGE_RULES
from aang_ray.objectives.legality import EXTERNAL, Capabilities, Rule, ruled_out, unavailable
from aang_ray.objectives.objective import STAGES, Objective
from aang_ray.objectives.primitives import BUILT_IN, Primitives, digest
from aang_ray.objectives.token_labels import ORDERED

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
