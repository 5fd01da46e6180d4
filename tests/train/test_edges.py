"""Small data, combined switches, and memory that runs out while prepared batches wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aang_ray.config import load_config
from aang_ray.errors import UserError
from aang_ray.train import text as text_module
from aang_ray.train.loop import prefetched
from aang_ray.train.run import run_cell
from tests.train.running import parameters, run_steps, stepper, tiny_config

NO_DROPOUT = ("encoder.dropout=0.0", "encoder.head_dropout=0.0")


def test_batches_that_wait_are_cut_anew_when_memory_runs_out(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 of 48 texts fit, so pieces are halved once, and not once for each prepared batch."""
    original = text_module.segment_losses

    def limited(encoder: Any, heads: Any, piece: Any) -> Any:
        if len(piece.inputs.lengths_E) > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(encoder, heads, piece)

    monkeypatch.setattr(text_module, "segment_losses", limited)
    made = stepper(tiny_config(tiny))
    assert made.micro.texts == 48
    for prepared in prefetched(made.prepare, 0, 6):
        made.step(prepared)
    assert made.micro.texts == 24


def test_published_clipping_below_the_bound_changes_nothing(tiny: dict[str, Any]) -> None:
    """No gradient norm of an objective exceeds 10, so published clipping gives the same update as sound clipping."""
    gradients = []
    for clipping in ("sound", "published"):
        made = stepper(tiny_config(tiny, *NO_DROPOUT, "method=static", f"optim.clipping={clipping}"), torch.float64)
        made._gradients(made.prepare(0))
        gradients.append(torch.cat([p.grad.flatten() for p in made.setup.encoder.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_published_visibility_is_the_objectives_alone(tiny: dict[str, Any]) -> None:
    published = "objectives.visibility=published"
    assert tiny_config(tiny, "method=finetune", published).cell == tiny_config(tiny, "method=finetune").cell
    one = run_steps(tiny_config(tiny, *NO_DROPOUT, "method=finetune", published), 3, torch.float64)
    other = run_steps(tiny_config(tiny, *NO_DROPOUT, "method=finetune"), 3, torch.float64)
    torch.testing.assert_close(parameters(one), parameters(other))


def test_published_visibility_does_not_depend_on_the_pieces(tiny: dict[str, Any]) -> None:
    settings = (*NO_DROPOUT, "objectives.visibility=published", "method=static")
    one = run_steps(tiny_config(tiny, *settings), 3, torch.float64)
    other = run_steps(tiny_config(tiny, *settings, "batch.micro=4"), 3, torch.float64)
    torch.testing.assert_close(parameters(one), parameters(other), rtol=1e-6, atol=1e-9)


def test_queries_are_left_out_under_published_visibility(tiny: dict[str, Any]) -> None:
    space = stepper(tiny_config(tiny, "objectives.visibility=published")).setup.space
    assert space is not None
    assert len(space) == 22
    both = stepper(tiny_config(tiny, "objectives.visibility=published", "objectives.labels=published")).setup.space
    assert both is not None
    assert len(both) == 23


def test_n_beyond_the_space_is_one_line(tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"n: 99 exceeds the 23 objectives of space td"):
        run_cell(tiny_config(tiny, "n=99"))


def test_the_health_of_the_meta_signal_is_kept_for_every_step(tiny: dict[str, Any]) -> None:
    record = run_cell(tiny_config(tiny))
    steps = {int(name.split("/")[1]) for row in record.weights for name in row.health if "/" in name}
    assert steps == set(range(1, 21))
    assert [row.step for row in record.weights] == [row.step for row in record.history]


def test_published_joint_score_counts_under_dot_too(tiny: dict[str, Any]) -> None:
    runs = [
        run_steps(tiny_config(tiny, f"method={{score: dot, auxiliary_score: {reading}, sopt_lr: 1.0}}"), 3)
        for reading in ("sound", "published")
    ]
    lambdas = [float(vars(made.setup.method)["weighting"].lambda_) for made in runs]
    assert lambdas[0] != lambdas[1]


def small_task(folder: Path, dev: int, in_domain: list[str] | None = None) -> str:
    folder.mkdir()
    nouns = ["film", "plot", "scene", "music", "actor"]
    for split, count in (("train", 6), ("dev", dev), ("test", 4)):
        texts = []
        for i in range(count):
            word = ("great", "awful")[i % 2]
            texts.append(json.dumps({"text": f"the {nouns[i % 5]} was {'very ' * (i // 5)}{word}", "label": word}))
        (folder / f"{split}.jsonl").write_text("\n".join(texts) + "\n")
    if in_domain is not None:
        (folder / "in_domain.txt").write_text("\n".join(in_domain) + "\n")
    return str(folder)


@pytest.mark.parametrize("dev", [2, 3, 10])
@pytest.mark.parametrize("setting", ["n=all", "method.meta_dev_fraction=0.9", "method.dev_head=live"])
def test_tiny_data(tiny: dict[str, Any], tmp_path: Path, dev: int, setting: str) -> None:
    config = tiny_config(tiny, f"data.task={small_task(tmp_path / 'small', dev)}", "schedule.steps=4", setting)
    if dev == 2 and "fraction" in setting:
        with pytest.raises(UserError, match="too few"):
            run_cell(config)
        return
    assert run_cell(config).result.status == "done"


def test_a_dev_split_of_one_text_is_one_line(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, f"data.task={small_task(tmp_path / 'small', 1)}", "schedule.steps=4")
    with pytest.raises(UserError, match="dev has 1 example"):
        run_cell(config)


def test_a_space_whose_data_are_not_there_is_one_line(tiny: dict[str, Any], tmp_path: Path) -> None:
    nothing = small_task(tmp_path / "none", 4)
    only_dev = small_task(tmp_path / "dev", 4, ["the film was great"])
    given = r"no in-domain text is given; set data.in_domain"
    for task, message in ((nothing, given), (only_dev, "no in-domain text is left, all of it is text of dev or test")):
        with pytest.raises(UserError, match=message):
            run_cell(tiny_config(tiny, f"data.task={task}", "space=td_ed"))


def test_truth_values_and_pairs_that_do_not_go_together() -> None:
    for setting, fragment in (
        ("schedule.steps=true", "steps must be a number"),
        ("optim.betas=[1.0, 0.9]", "less than 1"),
        ("objectives.allocation=published", "does not go with"),
    ):
        with pytest.raises(UserError, match=fragment):
            load_config(None, ["method.update=sgd", "method.jacobian=softmax", setting])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("n=6", "batch.auxiliary=5"), "6"),
        (("n=all", "batch.auxiliary=5"), r"all \(22 objectives\)"),
        (("n=6", "batch.auxiliary=5", "method=diw"), None),
        (("n=6", "batch.auxiliary=5", "objectives.allocation=published"), None),
        (("n=6", "batch.auxiliary=6"), None),
        (("n=all", "batch.auxiliary=5", "space=bert"), None),
        (("n=all", "batch.auxiliary=5", "method=finetune"), None),
    ],
)
def test_every_objective_of_a_step_needs_an_example(
    tiny: dict[str, Any], settings: tuple[str, ...], named: str | None
) -> None:
    if named is None:
        tiny_config(tiny, *settings)
        return
    with pytest.raises(UserError, match=f"^n: {named} exceeds batch.auxiliary, 5: each objective") as error:
        tiny_config(tiny, *settings)
    assert "\n" not in str(error.value)


def test_what_only_the_encoder_decides_is_refused_when_it_is_known(tiny: dict[str, Any]) -> None:
    """22 objectives need no position ids, and this encoder also computes the 23rd."""
    config = tiny_config(tiny, "n=all", "batch.auxiliary=22", "method=static")
    with pytest.raises(UserError, match=r"^n: all \(23 objectives\) exceeds batch.auxiliary, 22"):
        stepper(config)
