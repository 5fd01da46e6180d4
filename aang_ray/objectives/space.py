"""A search space: the union of blocks of choices per stage, less what is illegal."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from aang_ray.config.load import describe_error, read_yaml
from aang_ray.config.section import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives.images.taxonomy import IMAGE_PRIMITIVES, IMAGE_RULES
from aang_ray.objectives.legality import RULES, Capabilities, Rule, ruled_out, unavailable
from aang_ray.objectives.objective import PRIMITIVES, STAGES, Objective

Choices = Annotated[tuple[str, ...], Field(min_length=1)]


class Block(BaseModel):
    """Choices at every stage; their product is the block's objectives."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    primitives: ClassVar[Mapping[str, tuple[str, ...]]] = PRIMITIVES

    data: Choices
    transform: Choices
    representation: Choices
    output: Choices

    @field_validator(*STAGES)
    @classmethod
    def _known(cls, names: tuple[str, ...], info: object) -> tuple[str, ...]:
        stage = str(getattr(info, "field_name", ""))
        for name in names:
            if name not in cls.primitives[stage]:
                raise ValueError(f"{name!r} is no {stage}; allowed: {', '.join(cls.primitives[stage])}")
        return names


class ImageBlock(Block):
    """Choices for images."""

    primitives: ClassVar[Mapping[str, tuple[str, ...]]] = IMAGE_PRIMITIVES


class SpaceFile(BaseModel):
    """The contents of a file of `search_spaces/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rules: ClassVar[tuple[Rule, ...]] = RULES

    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]

    @property
    def fingerprint(self) -> str:
        """Hash of the blocks: two files that say the same are the same space."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class ImageSpaceFile(SpaceFile):
    """A space of objectives on images; the file says `domain: images`."""

    rules: ClassVar[tuple[Rule, ...]] = IMAGE_RULES

    domain: Literal["images"]
    blocks: Annotated[tuple[ImageBlock, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Space:
    """A: every legal objective, in the order of the blocks' products, and what was ruled out."""

    name: str
    objectives: tuple[Objective, ...]
    ruled_out: Mapping[Objective, str]
    """Reason by objective."""

    def __len__(self) -> int:
        return len(self.objectives)

    def factors(self) -> dict[str, tuple[str, ...]]:
        """Names of the factor tensors' entries: `A` by objective key, D, T, R, O by primitive."""
        named = {"A": tuple(k.key for k in self.objectives)}
        for letter, stage in zip("DTRO", STAGES, strict=True):
            named[letter] = tuple(dict.fromkeys(str(getattr(k, stage)) for k in self.objectives))
        return named


def space_path(name: str) -> Path:
    """Where a space lies: a path as given, or a file of `search_spaces/` here or beside the package."""
    given = Path(name)
    if given.suffix in {".yaml", ".yml"}:
        if given.is_file():
            return given
        raise UserError(f"space: no file {name}")
    folders = [Path("search_spaces"), Path(__file__).resolve().parents[2] / "search_spaces"]
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
    for block in file.blocks:
        for choice in itertools.product(block.data, block.transform, block.representation, block.output):
            objective = Objective(*choice)
            reason = ruled_out(objective, legality, file.rules)
            if reason is None and capabilities is not None:
                reason = unavailable(objective, capabilities, labels)
            if reason is None:
                legal[objective] = None
            else:
                illegal[objective] = reason
    if not legal:
        reasons = "; ".join(dict.fromkeys(illegal.values()))
        raise UserError(f"space {name}: no objective is left: {reasons}")
    return Space(name, tuple(legal), illegal)
