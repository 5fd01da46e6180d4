"""Bad configurations get one clear line; good ones keep what was said."""

from __future__ import annotations

from pathlib import Path

import pytest

from aang_ray.config import load_config, parse_config
from aang_ray.config.methods import AangConfig, AttittudConfig, StaticConfig
from aang_ray.errors import UserError


@pytest.mark.parametrize(
    ("setting", "fragments"),
    [
        ("optim.bdy_lr=1", ["unknown key optim.bdy_lr", "did you mean optim.body_lr?"]),
        ("optim.body_lr=-1", ["optim.body_lr", "greater than 0", "got -1"]),
        ("method.name=aangg", ["method.name", "finetune, ", "static, ", "did you mean aang?"]),
        ("method.aux_lrr=1", ["unknown key method.aux_lrr", "did you mean method.aux_lr?"]),
        ("n=0", ["n: must be greater than 0 or 'all'"]),
        ("n=some", ["n: must be a valid integer or 'all'", "'some'"]),
        ("precision=bf17", ["precision", "'bf16'", "did you mean bf16?"]),
        ("seed=1.5", ["seed", "valid integer"]),
        ("data.task=null", ["data.task", "valid string"]),
        ("final_finetune=100", ["final_finetune: must be settings such as {steps: ...}, got 100"]),
        ("optim=3", ["optim: must be settings such as {algorithm: ...}, got 3"]),
        ("method=null", ["method: must be a name, or settings such as {name: finetune}, got None"]),
        ("data.external=3", ["data.external: must be a list such as [a, b], got 3"]),
        ("method.nosuch=1", ["unknown key method.nosuch; allowed: aux_lr, "]),
        ("colour=red", ["unknown key colour", "allowed: batch, data"]),
        ("optim", ["--set optim", "key.path=value"]),
        ("n.x.y=[", ["not valid YAML"]),
        ("seed.x=1", ["seed"]),
    ],
)
def test_bad_settings_are_one_line_that_names_the_key(setting: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [setting])
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("mapping", "end"),
    [
        ({"method": {"name": "tapt", "nosuch": 1}}, "method.nosuch; allowed: batch, epochs, head_lr, lr, .*"),
        ({"method": "nosuch"}, "'nosuch' is not one of finetune, .*, diw"),
        ({"data": {"metric": "f1"}}, "use 'accuracy' or 'macro_f1'"),
    ],
)
def test_what_is_like_nothing_gets_the_list_and_no_guess(mapping: dict[str, object], end: str) -> None:
    with pytest.raises(UserError, match=f"{end}$") as caught:
        parse_config(mapping, "test")
    assert "did you mean" not in str(caught.value)


def test_one_external_data_set_is_a_list_of_one() -> None:
    alone, listed = load_config(None, ["data.external=tweets"]), load_config(None, ["data.external=[tweets]"])
    assert alone.data.external == ("tweets",)
    assert alone == listed
    assert alone.cell == listed.cell


def test_several_problems_are_counted() -> None:
    with pytest.raises(UserError, match="and 1 more"):
        load_config(None, ["n=0", "seed=-1"])


def test_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: static\nn: 3\noptim: {body_lr: 1e-5}\n")
    config = load_config(path, ["optim.head_lr=2e-3", "data.task=tweets"])
    assert isinstance(config.method, StaticConfig)
    assert (config.n, config.optim.body_lr, config.optim.head_lr, config.data.task) == (3, 1e-5, 2e-3, "tweets")


@pytest.mark.parametrize(
    "overrides", [["method=attittud", "method.eta_minus=0"], ["method.eta_minus=0", "method=attittud"]]
)
def test_a_method_and_its_settings_in_any_order(overrides: list[str]) -> None:
    config = load_config(None, overrides)
    assert isinstance(config.method, AttittudConfig)
    assert config.method.eta_minus == 0


def test_a_method_set_on_the_command_line_replaces_the_files_with_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: {name: aang, aux_lr: 1.0}\n")
    assert load_config(path, ["method=static"]).method == StaticConfig()
    assert load_config(path, ["method.sopt_lr=0.5", "method.sopt_lr=0.25"]).method == AangConfig(
        aux_lr=1.0, sopt_lr=0.25
    )


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "missing.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,\nb: 2")
    with pytest.raises(UserError, match="not valid YAML") as caught:
        load_config(bad)
    assert "\n" not in str(caught.value)
    bad.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(bad)
    bad.write_text("- 1\n")
    with pytest.raises(UserError, match="mapping"):
        load_config(bad)


def test_settings_without_a_method_name_are_aangs() -> None:
    config = parse_config({"method": {"aux_lr": 0.5}}, "test")
    assert isinstance(config.method, AangConfig)
    assert config.method.aux_lr == 0.5
