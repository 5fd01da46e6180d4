"""What is suspicious in an end task of texts, though a run can use it: one sentence each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from aang_ray.config import DataConfig
from aang_ray.data.read import LabelledTexts, Split

_SHOWN = 5
_MISSING = {"nan", "none", "null"}
"""Labels, in lower case, that programs write for a label that is missing."""


def warnings_of(
    splits: Mapping[Split, LabelledTexts], names: Sequence[str], data: DataConfig, dropped: int
) -> Iterator[str]:
    """Yield what a user should look at before training.

    Args:
        splits: The splits as read, before train is cut to its size.
        names: The labels of train.
        data: The configuration of the end task.
        dropped: How many rows `data.bad_rows` has left out.
    """
    if dropped:
        yield f"{dropped} rows are left out (data.bad_rows=drop): empty texts, no labels, or labels that train lacks"
    if data.text == data.label:
        yield f"the text and the label are the same column, {data.text!r}"
    if data.text_b is not None and data.text_b in (data.text, data.label):
        yield f"data.text_b is also another column of the task, {data.text_b!r}"
    for name in names:
        if name.lower() in _MISSING:
            yield f"{name!r} is a class: is it a label that is missing?"
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[" ".join(name.lower().split())].append(name)
    for group in alike.values():
        if len(group) > 1:
            shown = ", ".join(map(repr, group[:_SHOWN]))
            yield f"labels that differ only by case or spaces are different classes: {shown}"
    for split, texts in splits.items():
        labels: dict[str, set[str]] = defaultdict(set)
        for key, label in zip(texts.texts.keys(), texts.labels, strict=True):
            labels[key].add(label)
        contradicting = [key for key, found in labels.items() if len(found) > 1]
        if contradicting:
            first = contradicting[0]
            shown = first if len(first) <= 60 else f"{first[:60]} ..."
            found = ", ".join(sorted(labels[first])[:_SHOWN])
            yield f"{split} has {len(contradicting)} texts with contradicting labels, the first is {shown!r} ({found})"
    missing = sorted(set(names) - set(splits["dev"].labels))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        yield f"dev has no example of {', '.join(map(repr, missing[:_SHOWN]))}{more}: it cannot tell how well they do"
