"""What is known beforehand of the end tasks that have a name: metric, classes, batch sizes, origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from aang_ray.config import DataConfig
from aang_ray.data.task import Metric

_DSP = "the repository of Gururangan et al. 2020 (allenai/dont-stop-pretraining) names its download"
_VADER = "fetched with pip from the source distribution of vaderSentiment 3.3.2"


@dataclass(frozen=True)
class Card:
    """Defaults and origin of a named end task (semantics section 4, first table)."""

    name: str
    domain: str
    metric: Metric
    classes: int
    """Labels that the published splits have."""
    origin: str
    """Who made the data."""
    source: str
    """How to get them."""
    batch_end_task: int = 128
    batch_auxiliary: int = 256
    batch_dev_head: int = 32
    embedded: bool = False
    """Whether the program fetches the data by itself."""
    images: bool = False
    """Whether the examples are images."""


_PAPER = (
    Card("citation_intent", "computer science", "macro_f1", 6, "ACL-ARC, Jurgens et al. 2018", _DSP),
    Card("sciie", "computer science", "macro_f1", 7, "SciERC relations, Luan et al. 2018", _DSP),
    Card("chemprot", "biomedicine", "accuracy", 13, "ChemProt, Kringelum et al. 2016", _DSP),
    Card(
        "se2016", "tweets", "accuracy", 3, "SemEval-2016 task 6 (stance), Mohammad et al. 2016", "SemEval-2016, task 6"
    ),
    Card(
        "hyperpartisan",
        "news",
        "accuracy",
        2,
        "SemEval-2019 task 4 (hyperpartisan news), Kiesel et al. 2019",
        _DSP,
        batch_end_task=64,
        batch_auxiliary=128,
        batch_dev_head=8,
    ),
)
_EMBEDDED = tuple(
    Card(name, domain, "accuracy", 2, "Hutto & Gilbert 2014 (MIT licence)", _VADER, 32, 48, 32, embedded=True)
    for name, domain in (("movie", "movie reviews"), ("tweets", "tweets"))
)
_DIGITS = tuple(
    Card(
        f"digits-{side}",
        "superimposed digits",
        "accuracy",
        10,
        "Alpaydin & Kaynak 1998 (UCI), paired as in MultiMNIST",
        "made from the digits that scikit-learn ships",
        batch_end_task=256,
        batch_auxiliary=256,
        images=True,
    )
    for side in ("left", "right")
)
_ALIASES = {
    "stance": "se2016",
    "hyperpartisan_news": "hyperpartisan",
    "acl_arc": "citation_intent",
    "digits": "digits-left",
}

CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in (*_EMBEDDED, *_PAPER, *_DIGITS)})
"""The named end tasks."""


def card_named(name: str) -> Card | None:
    """The card of a name or one of its aliases (`stance`, `acl_arc`, `hyperpartisan_news`, `digits`)."""
    return CARDS.get(_ALIASES.get(name, name))


def card_of(data: DataConfig) -> Card | None:
    """The card whose defaults the end task takes: named itself, or by the last part of its folder."""
    return card_named(data.task) or card_named(Path(data.task).expanduser().absolute().name)
