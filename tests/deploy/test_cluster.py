"""cluster.yaml is valid, pinned, closed to the world, and cheap while nothing runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.deploy.cluster_rules import TOKEN, problems
from tests.deploy.files import PROJECT, Mutation, load, mutated, pinned

CONFIG = load("cluster.yaml")


def found(config: Mapping[str, Any]) -> list[str]:
    return problems(config, PROJECT, pinned("ray"))


def node(config: dict[str, Any], name: str) -> dict[str, Any]:
    settings: dict[str, Any] = config["available_node_types"][name]["node_config"]
    return settings


def start(config: dict[str, Any], old: str, new: str) -> None:
    commands = config["head_start_ray_commands"]
    config["head_start_ray_commands"] = [text.replace(old, new) for text in commands]


def test_nothing_is_wrong() -> None:
    assert found(CONFIG) == []


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "a misspelt top-level key": (lambda c: c.update(max_worker=3), "schema"),
    "a number as text": (lambda c: c.update(max_workers="8"), "schema"),
    "a head type that is not there": (lambda c: c.update(head_node_type="boss"), "schema"),
    "a misspelt node_config key": (
        lambda c: node(c, "gpu-spot").update(InstanceTyp="g5.xlarge"),
        "unknown node_config",
    ),
    "an instance type that does not exist": (
        lambda c: node(c, "gpu-spot").update(InstanceType="g5.xxlarge"),
        "unknown instance type",
    ),
    "more GPUs than the machine has": (
        lambda c: c["available_node_types"]["gpu-spot"].update(resources={"CPU": 4, "GPU": 2}),
        "more than the machine has",
    ),
    "min above max": (
        lambda c: c["available_node_types"]["gpu-on-demand"].update(min_workers=3),
        "min_workers above max_workers",
    ),
    "workers that stay": (lambda c: c["available_node_types"]["gpu-spot"].update(min_workers=1), "costs while nothing"),
    "trials on the head": (lambda c: c["available_node_types"]["head"].update(resources={}), "trials could run there"),
    "no spot": (lambda c: node(c, "gpu-spot").pop("InstanceMarketOptions"), "a spot type and an on-demand type"),
    "no fallback": (lambda c: c["available_node_types"].pop("gpu-on-demand"), "a spot type and an on-demand type"),
    "on-demand first": (
        lambda c: c["available_node_types"]["gpu-on-demand"].update(priority=20),
        "on-demand is preferred",
    ),
    "another Ray": (lambda c: c["docker"].update(head_image="rayproject/ray:2.59.0-py311-cpu"), "is not Ray"),
    "the latest Ray": (lambda c: c["docker"].update(worker_image="rayproject/ray:latest-py311-gpu"), "is not Ray"),
    "workers without CUDA": (
        lambda c: c["docker"].update(worker_image="rayproject/ray:2.60.0-py311-cpu"),
        "image with CUDA",
    ),
    "setup commands of Ray's defaults": (lambda c: c.pop("setup_commands"), "inherited from Ray's defaults"),
    "a nightly wheel": (
        lambda c: c["setup_commands"].append("pip install ray-3.0.0.dev0-cp311-cp311-manylinux2014_x86_64.whl"),
        "not pinned",
    ),
    "unpinned dependencies": (lambda c: c.update(setup_commands=["pip install ."]), "constraints.txt is not used"),
    "start commands of Ray's defaults": (lambda c: c.pop("head_start_ray_commands"), "not on the loopback"),
    "an open dashboard": (lambda c: start(c, "=127.0.0.1", "=0.0.0.0"), "not on the loopback"),
    "two dashboard hosts": (lambda c: start(c, "--head", "--head --dashboard-host 0.0.0.0"), "not on the loopback"),
    "usage statistics": (lambda c: start(c, "--disable-usage-stats", ""), "usage statistics"),
    "no authentication mode": (lambda c: c["docker"].update(run_options=[]), "token authentication"),
    "authentication off": (
        lambda c: c["docker"].update(run_options=["--env=RAY_AUTH_MODE=disabled"]),
        "token authentication",
    ),
    "no token on the nodes": (lambda c: c["file_mounts"].pop(TOKEN), "do not get the token"),
    "a token in the file": (lambda c: c["docker"]["run_options"].append("--env=RAY_AUTH_TOKEN=abc"), "a secret in"),
    "a mount of nothing": (lambda c: c["file_mounts"].update({"/home/ray/x": "no-such-folder"}), "does not exist"),
    "no machine image": (lambda c: node(c, "head").pop("ImageId"), "ImageId"),
    "full rights": (lambda c: node(c, "head").pop("IamInstanceProfile"), "no profile"),
    "credentials for any request": (lambda c: node(c, "gpu-spot").pop("MetadataOptions"), "session token"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_found(name: str) -> None:
    mutate, expected = MUTATIONS[name]
    wrong = found(mutated(CONFIG, mutate))
    assert any(expected in line for line in wrong), wrong


def test_the_installed_ray_is_the_pinned_one() -> None:
    import ray

    assert ray.__version__ == pinned("ray")


def test_an_unedited_file_reaches_no_bucket() -> None:
    # Names of buckets are lower-case, so nobody can own the placeholder and receive rows.
    (store,) = [text for text in CONFIG["docker"]["run_options"] if "AANG_STORE" in text]
    assert store == "--env=AANG_STORE=s3://YOUR-BUCKET/aang"


def test_everything_that_is_installed_is_mounted() -> None:
    # pyproject.toml names the readme and the licence: without them the package cannot be built on a node.
    mounted = set(CONFIG["file_mounts"].values())
    assert mounted >= {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "aang_ray", "search_spaces", "jobs"}
