"""Every primitive in whole steps and runs: built-in ones, a user's own, and labels of another data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aang_ray.model.heads import ClassificationHead, TokenHead
from aang_ray.store.schema import HistoryRow
from aang_ray.train.run import run_cell
from tests.objectives.test_primitives import SHUFFLE, SHUFFLE_SPACE
from tests.train.running import parameters, run_steps, stepper, tiny_config

NO_DROPOUT = ("encoder.dropout=0", "encoder.head_dropout=0")
SPACE = """
blocks:
  - data: [end-task]
    transform: [mask, noised-embeddings, deletion, span-mask]
    representation: [bidirectional, right-to-left]
    output: [denoise, tf-idf]
  - data: [in-domain]
    transform: [no-op, replace]
    representation: [left-to-right, random-factorized]
    output: [next-token, tf, capitalisation, real-synthetic]
  - data: [end-task]
    transform: [deletion, replace]
    representation: [random-factorized]
    output: [end-task, capitalisation]
"""
OWN = """\
import numpy as np
from aang_ray.objectives.primitives import Head, Labels, Output, Representation

def length(view):  # of each text, as a multiple of ten tokens
    return Labels((view.original.lengths_E[:, None] / 10).astype(np.float32))

def pairs(texts):  # two tokens enter at a time
    return (texts.positions_T // 2 + 1).astype(np.int32)

PRIMITIVES = (Output("length", Head("text", 1), length), Representation("by-pairs", pairs))
"""


def space(folder: Path, text: str) -> str:
    path = folder / "space.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def everything(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small run with a space of all transforms and outputs."""
    folder = tmp_path_factory.mktemp("space")
    return {**tiny, "space": space(folder, SPACE), "n": "all", "batch": {**tiny["batch"], "auxiliary": 60}}


@pytest.mark.parametrize("other", ["gradients.engine=loop", "batch.micro=7"])
def test_single_pass_loop_and_accumulation_take_the_same_way(everything: dict[str, Any], other: str) -> None:
    one, two = (
        run_steps(tiny_config(everything, *NO_DROPOUT, "method.aux_lr=1.0", *settings), 4, torch.float64)
        for settings in ((), (other,))
    )
    torch.testing.assert_close(parameters(one), parameters(two), rtol=1e-6, atol=1e-9)
    factors = [made.setup.method.factors() or {} for made in (one, two)]
    assert factors[0]
    for letter, values in factors[0].items():
        torch.testing.assert_close(torch.from_numpy(values), torch.from_numpy(factors[1][letter]), rtol=1e-5, atol=1e-7)


def test_batches_are_a_function_of_seed_and_step(everything: dict[str, Any]) -> None:
    made, again = stepper(tiny_config(everything)), stepper(tiny_config(everything, "method=static"))
    made.prepare(0)
    one, other = made.prepare(3).batch, again.prepare(3).batch
    for a, b in zip(one.segments[2:], other.segments[2:], strict=True):
        for name in ("ids_T", "ranks_T", "labelled_M", "targets_M", "noised_N", "noise_NW"):
            assert (getattr(a, name) == getattr(b, name)).all()
        assert (a.drawn is None) == (b.drawn is None)
        if a.drawn is not None:
            assert (a.drawn.uniform_G == b.drawn.uniform_G).all()
    assert made.setup.space is not None
    objectives = made.setup.space.objectives
    noisy = {segment.name for segment in one.segments if len(segment.noised_N)}
    drawn = {segment.name for segment in one.segments if segment.drawn is not None}
    assert noisy == {k.key for k in objectives if k.transform == "noised-embeddings"}
    assert drawn == {k.key for k in objectives if k.output == "real-synthetic"}


def test_each_output_has_its_head(everything: dict[str, Any]) -> None:
    head_of = stepper(tiny_config(everything)).setup.head_of
    assert {name: type(head) for name, head in head_of.items()} == {
        "end-task": ClassificationHead,
        "denoise": TokenHead,
        "next-token": TokenHead,
        "tf-idf": ClassificationHead,
        "tf": ClassificationHead,
        "capitalisation": ClassificationHead,
        "real-synthetic": ClassificationHead,
        "label": ClassificationHead,
    }
    # Initial weights are drawn in this order: vocabulary heads come first, as they ever did.
    assert list(head_of)[:3] == ["end-task", "denoise", "next-token"]


@pytest.mark.parametrize(
    "settings", [("precision=bf16",), ("objectives.heads=per_objective", "n=6"), ("method=static",)]
)
def test_a_run_with_everything(everything: dict[str, Any], settings: tuple[str, ...]) -> None:
    record = run_cell(tiny_config(everything, "schedule.steps=4", "schedule.eval_every=2", *settings))
    assert record.result.status == "done", record.result.error
    losses = {name: value for row in record.history for name, value in row.losses.items()}
    named = {name.rsplit("/", 1)[1] for name in losses if "/" in name}
    expected = {"denoise", "next-token", "tf-idf", "tf", "capitalisation", "end-task", "real-synthetic"}
    if "objectives.heads=per_objective" in settings:
        assert "real-synthetic" not in named
    else:
        assert named == expected
    assert all(np.isfinite(value) for value in losses.values())


def test_a_worker_that_draws_tokens_may_read_any(everything: dict[str, Any]) -> None:
    """Workers agree on the shared rows of the table before the tokens are drawn, so any row may be needed."""
    domain = stepper(tiny_config(everything)).setup.domain
    batch = domain.batch(0, False, None)
    for number, segment in enumerate(batch.segments):
        if number > 1:
            ranges = [(0, 1) if n == number else (0, 0) for n in range(len(batch.segments))]
            drawn = segment.part(0, 1).drawn
            read = set(domain.entries_read(batch, ranges).tolist())
            if drawn is not None:
                assert read > set(drawn.vocabulary.ordinary_ids.tolist())
            else:
                assert read == {0, *segment.part(0, 1).ids_T.tolist()}


class Killed(BaseException):
    """Simulates a kill."""


def test_a_resumed_run_ends_as_one_that_was_not_stopped(everything: dict[str, Any], tmp_path: Path) -> None:
    """With dropout. Noise and statistics of train are computed again; sampled tokens use the restored parameters."""
    config = tiny_config(
        everything, "schedule.steps=6", "schedule.eval_every=2", "resources.checkpoint_minutes=0", "method.aux_lr=1.0"
    )

    def killed(row: HistoryRow, _: object) -> None:
        if row.step == 4:
            raise Killed

    plain = run_cell(config)
    with pytest.raises(Killed):
        run_cell(config, checkpoints=tmp_path, on_evaluation=killed)
    seen: list[int] = []
    resumed = run_cell(config, checkpoints=tmp_path, on_evaluation=lambda row, _: seen.append(row.step))
    assert seen == [4, 6], "it went on, not anew"
    assert [row.losses for row in resumed.history] == [row.losses for row in plain.history]
    assert resumed.weights == plain.weights
    assert resumed.result.test == plain.result.test


def test_a_noise_of_another_scale_is_another_cell(tiny: dict[str, Any]) -> None:
    assert tiny_config(tiny).cell == tiny_config(tiny, "objectives.noise_scale=1.0").cell
    assert tiny_config(tiny).cell != tiny_config(tiny, "objectives.noise_scale=0.5").cell


def test_the_noise_is_relative_to_the_pretrained_table(everything: dict[str, Any]) -> None:
    made = stepper(tiny_config(everything, "objectives.noise_scale=3.0"))
    table = made.setup.encoder.get_parameter("body.embeddings.word_embeddings.weight")
    segments = [s for step in range(10) for s in made.prepare(step).batch.segments if len(s.noised_N)]
    noise = np.concatenate([segment.noise_NW for segment in segments])
    assert noise.std() == pytest.approx(3.0 * float(table.detach().std()), rel=0.05)


def test_the_full_space_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    """All kinds of data, neural-LM text from a small model made here; every objective gets an example.

    `full_external` is `full` and an external data set.
    """
    folder = Path(tiny["data"]["task"])
    data = {**tiny["data"], "out_of_domain": str(folder / "in_domain.txt"), "neural_lm": "trained"}
    data |= {"neural_lm_passages": 20, "external": [str(other_task(tmp_path / "tweets"))]}
    settings = {**tiny, "data": data, "space": "full_external", "n": "all"}
    config = tiny_config(settings, "method=static", "batch.auxiliary=663", "schedule.steps=1", "schedule.eval_every=1")
    record = run_cell(config)
    assert record.result.status == "done", record.result.error
    losses = {name: value for name, value in record.history[0].losses.items() if "/" in name}
    assert len(losses) == 522 + 141
    assert sum(name.endswith("/supervised") for name in losses) == 14
    assert all(np.isfinite(value) for value in losses.values())


def test_the_readmes_transform_runs(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "shuffle.py").write_text(SHUFFLE)
    settings = {**tiny, "space": space(tmp_path, SHUFFLE_SPACE), "n": "all", "schedule": {"steps": 2, "eval_every": 2}}
    record = run_cell(tiny_config(settings, "method=static"))
    assert record.result.status == "done", record.result.error
    assert "end-task/shuffle/bidirectional/denoise" in record.history[-1].losses


def test_a_users_transform_output_and_representation(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "shuffle.py").write_text(SHUFFLE)
    (tmp_path / "own.py").write_text(OWN)
    text = """
primitives: [shuffle.py, own.py]
blocks:
  - {data: [end-task, in-domain], transform: [shuffle], representation: [by-pairs, bidirectional], output: [denoise]}
  - {data: [end-task], transform: [shuffle, mask], representation: [bidirectional], output: [length]}
"""
    settings = {**tiny, "space": space(tmp_path, text), "n": "all", "schedule": {"steps": 60, "eval_every": 20}}
    config = tiny_config(settings, "method=static", "batch.auxiliary=48")
    record = run_cell(config)
    assert record.result.status == "done", record.result.error
    first, last = record.history[0].losses, record.history[-1].losses
    assert {name for name in last if "/" in name} == {
        *(f"{d}/shuffle/{r}/denoise" for d in ("end-task", "in-domain") for r in ("by-pairs", "bidirectional")),
        *(f"end-task/{t}/bidirectional/length" for t in ("shuffle", "mask")),
    }
    assert last["end-task/mask/bidirectional/length"] < 0.5 * first["end-task/mask/bidirectional/length"]
    # Another program is another cell.
    (tmp_path / "own.py").write_text(OWN.replace("/ 10", "/ 5"))
    assert tiny_config(settings, "method=static", "batch.auxiliary=48").cell != config.cell


def other_task(folder: Path) -> Path:
    """Three classes, told by their first word."""
    folder.mkdir()
    for split, size in (("train", 60), ("dev", 9), ("test", 9)):
        rows = [
            {"text": f"{('film', 'plot', 'music')[i % 3]} was quite {i}", "label": "abc"[i % 3]} for i in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_labels_of_another_data_set_are_learned_with_a_head_of_their_own(
    tiny: dict[str, Any], tmp_path: Path, weights: str
) -> None:
    text = """
blocks:
  - {data: ['external:genre'], transform: [no-op, mask], representation: [bidirectional], output: [supervised]}
  - {data: ['external:genre'], transform: [mask], representation: [bidirectional], output: [denoise]}
"""
    data = {**tiny["data"], "external": [str(other_task(tmp_path / "genre"))], "class_weights": weights}
    settings = {**tiny, "data": data, "space": space(tmp_path, text), "n": "all"}
    settings["schedule"] = {"steps": 60, "eval_every": 20}
    config = tiny_config(settings, "method=static")
    made = stepper(config)
    assert list(made.setup.head_of) == ["end-task", "denoise", "supervised/external:genre"]
    (segment,) = [
        s for s in made.prepare(0).batch.segments if s.name == "external:genre/no-op/bidirectional/supervised"
    ]
    assert segment.normaliser == segment.examples == 8  # the end task's class weights are not these labels'
    losses = run_cell(config).history[-1].losses
    assert losses["external:genre/no-op/bidirectional/supervised"] < 0.5  # ln 3 = 1.1
