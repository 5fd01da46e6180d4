"""The hash names what determines the result, and nothing else."""

from __future__ import annotations

from typing import Annotated

import pytest

from aang_ray.config import RunConfig, load_config
from aang_ray.config.sections import Neutral, Section


def cell(*settings: str) -> str:
    return load_config(None, settings).cell


def test_the_hash_is_stable() -> None:
    # Written down once: a change means that every store made before is not recognised any more. What were the defaults
    # of AANG in release 0.1 are now settings.
    assert RunConfig().cell == load_config(None, ["seed=0"]).cell == "5885a0184ec136f2"
    paper = "{name: aang, aux_lr: 0.1, update: sgd, dev_head: refit, dev_calibration: false, dev_memory: 0}"
    assert load_config(None, [f"method={paper}"]).cell == "990c808b9f4ffa81"


def test_a_stored_configuration_keeps_its_name_when_defaults_change() -> None:
    """What a store does not state did not exist when the run was stored, and has its neutral value."""
    stored = {"method": {"name": "aang", "aux_lr": 0.1, "dev_head": "refit"}}
    assert RunConfig.stored(stored).cell == "990c808b9f4ffa81"
    now = RunConfig()
    assert RunConfig.stored(now.model_dump(mode="json")) == now
    assert RunConfig.stored(RunConfig.stored(stored).model_dump(mode="json")).cell == "990c808b9f4ffa81"


@pytest.mark.parametrize("setting", ["seed=1", "n=3", "optim.body_lr=1e-5", "method.aux_lr=0.5", "encoder.layers=2"])
def test_what_changes_the_result_changes_the_hash(setting: str) -> None:
    assert cell(setting) != cell()


@pytest.mark.parametrize("setting", ["resources.threads=2", "resources.device=cpu", "batch.micro=8"])
def test_what_does_not_change_the_result_keeps_the_hash(setting: str) -> None:
    assert cell(setting) == cell()


def test_a_method_without_auxiliaries_ignores_their_settings() -> None:
    assert cell("method=finetune", "n=3", "space=xyz") == cell("method=finetune")
    assert cell("method=finetune", "batch.dev=8") == cell("method=finetune")
    assert cell("method=static", "n=3") != cell("method=static", "n=6")
    assert cell("method=static", "batch.dev=8") == cell("method=static")


def test_content_replaces_names() -> None:
    one = ["data.task=/somewhere/movie", "fingerprints.data=abc", "fingerprints.encoder=def", "encoder.name=x/y"]
    two = ["data.task=elsewhere", "fingerprints.data=abc", "fingerprints.encoder=def", "encoder.name=z"]
    assert cell(*one) == cell(*two)
    assert cell(*one) != cell(*two[:1], "fingerprints.data=other", *two[2:])


def test_seeds_of_one_configuration_share_a_group() -> None:
    assert load_config(None, ["seed=1"]).group == load_config(None, ["seed=2"]).group
    assert load_config(None, ["seed=1", "n=3"]).group != load_config(None, ["seed=1"]).group


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["method=finetune"], "finetune"),
        (["method=static", "n=all"], "static-td n=all"),
        (["space=somewhere/mine.yaml"], "aang-mine n=6"),
    ],
)
def test_row_names(settings: list[str], name: str) -> None:
    assert load_config(None, settings).row_name == name


def test_a_written_configuration_states_added_settings_only_where_they_do_something() -> None:
    plain = RunConfig().model_dump(mode="json")
    assert "external_size" not in plain["data"]
    assert "until" not in plain["schedule"]
    assert plain["data"]["external"] == [], "a setting of release 0.1 is always stated"
    given = {"data": {"external_size": 3}, "schedule": {"until": "converged"}}
    written = RunConfig.model_validate(given).model_dump(mode="json")
    assert (written["data"]["external_size"], written["schedule"]["until"]) == (3, "converged")
    assert RunConfig.model_validate(written) == RunConfig.model_validate(given)
    assert RunConfig.model_validate(plain) == RunConfig()
    method = RunConfig.model_validate({"method": {"name": "finetune", "tied_compute": True}})
    assert method.model_dump(mode="json")["method"] == {"name": "finetune", "tied_compute": True}
    assert RunConfig.model_validate({"method": "finetune"}).model_dump(mode="json")["method"] == {"name": "finetune"}


class Raised(Section):
    """A section whose default has changed since the setting was added."""

    rate: Annotated[float, Neutral(0.0)] = 0.5


def test_a_neutral_value_that_is_no_default_is_stated() -> None:
    """Left out, it would be read back as the default."""
    assert Raised(rate=0.0).model_dump() == {"rate": 0.0}
    assert Raised.model_validate(Raised(rate=0.0).model_dump()).rate == 0.0
    assert Raised().model_dump() == {"rate": 0.5}
