"""Outputs that ask for the class of a text: the end task's, and that of another data set."""

from __future__ import annotations

from aang_ray.objectives.legality import EXTERNAL, Rule
from aang_ray.objectives.outputs import Head, Labels, Output, View

READS_ALL = Rule(
    "the label of a text needs a representation that reads all of it",
    lambda k: k.representation in {"left-to-right", "right-to-left"},
)


def _class_of_text(view: View) -> Labels:
    if view.classes_E is None:
        raise ValueError(f"{view.objective.data} has no classes")
    return Labels(view.classes_E)


END_TASK = Output(
    "end-task",
    Head("text"),
    _class_of_text,
    rules=(
        Rule("an end-task label needs the end task's data", lambda k: k.data != "end-task"),
        READS_ALL,
    ),
)
SUPERVISED = Output(
    "supervised",
    Head("text"),
    _class_of_text,
    rules=(
        Rule(
            "labels of another data set need its data (external:NAME); the end task's are the output end-task",
            lambda k: not k.data.startswith(EXTERNAL),
        ),
        READS_ALL,
    ),
)
