"""What is wrong with a cluster launcher file: Ray's own schema, and what that does not see."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler._private.util import prepare_config, validate_config

SCHEMA_ERROR: type[Exception] = importlib.import_module("jsonschema").ValidationError  # it ships no types

# Parameters of EC2's RunInstances that a node may set; the launcher sets counts, subnets, key and tags itself.
NODE_CONFIG_KEYS = {
    "BlockDeviceMappings",
    "CapacityReservationSpecification",
    "CpuOptions",
    "CreditSpecification",
    "DisableApiTermination",
    "EbsOptimized",
    "IamInstanceProfile",
    "ImageId",
    "InstanceInitiatedShutdownBehavior",
    "InstanceMarketOptions",
    "InstanceType",
    "KeyName",
    "LaunchTemplate",
    "MetadataOptions",
    "Monitoring",
    "NetworkInterfaces",
    "Placement",
    "SecurityGroupIds",
    "SubnetIds",
    "TagSpecifications",
    "UserData",
}

INSTANCES = {"m6i.large": {"CPU": 2, "GPU": 0}, "g5.xlarge": {"CPU": 4, "GPU": 1}}
"""vCPUs and GPUs of the instance types in use, from EC2's list of instance types."""

# Each would else be inherited from Ray's defaults, which install a nightly wheel and open the dashboard.
OWN_COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")

TOKEN = "/home/ray/.ray/auth_token"
"""Where Ray looks for the token in its images."""


def problems(config: Mapping[str, Any], project: Path, ray_version: str) -> list[str]:
    """Every rule that a configuration breaks, a line each; none for a good one."""
    try:
        validate_config(prepare_config(copy.deepcopy(dict(config))))
    except (SCHEMA_ERROR, ValueError) as error:
        return [f"schema: {error}"]
    return [
        *_node_types(config),
        *_images(config, ray_version),
        *_commands(config),
        *_security(config),
        *_mounts(config, project),
    ]


def _node_types(config: Mapping[str, Any]) -> Iterator[str]:
    types = config["available_node_types"]
    for name, node in types.items():
        settings = node["node_config"]
        for key in settings.keys() - NODE_CONFIG_KEYS:
            yield f"{name}: unknown node_config key {key}"
        instance = INSTANCES.get(settings.get("InstanceType"))
        if instance is None:
            yield f"{name}: unknown instance type {settings.get('InstanceType')}"
            continue
        for resource, amount in node["resources"].items():
            if amount > instance.get(resource, amount):
                yield f"{name}: {amount} {resource} are more than the machine has"
        if node.get("min_workers", 0) > node.get("max_workers", config["max_workers"]):
            yield f"{name}: min_workers above max_workers"
        if not re.fullmatch(r"ami-[0-9a-f]{8,17}|resolve:ssm:/aws/service/\S+", settings.get("ImageId", "")):
            yield f"{name}: ImageId is neither an image nor one of Amazon's public parameters"
    yield from _roles_of_types(config)


def _roles_of_types(config: Mapping[str, Any]) -> Iterator[str]:
    """A head without work; GPU workers on spot machines, and a fallback that costs nothing unless it is needed."""
    types = dict(config["available_node_types"])
    head = types.pop(config["head_node_type"])
    if head["resources"].get("CPU") != 0 or head["resources"].get("GPU", 0):
        yield "head: trials could run there"
    if "InstanceMarketOptions" in head["node_config"]:
        yield "head: on a spot machine"
    spot = [name for name, node in types.items() if _is_spot(node)]
    others = [name for name in types if name not in spot]
    if not spot or not others:
        yield "workers: a spot type and an on-demand type are needed"
        return
    for name, node in types.items():
        if node.get("min_workers", 0):
            yield f"{name}: costs while nothing runs"
        if not node["resources"].get("GPU"):
            yield f"{name}: no GPU"
    if max(types[name].get("priority", 0) for name in others) >= min(types[name].get("priority", 0) for name in spot):
        yield "workers: on-demand is preferred to spot"


def _is_spot(node: Mapping[str, Any]) -> bool:
    options = node["node_config"].get("InstanceMarketOptions", {})
    return bool(options.get("MarketType") == "spot")


def _images(config: Mapping[str, Any], ray_version: str) -> Iterator[str]:
    docker = config.get("docker", {})
    images = {role: docker.get(f"{role}_image", docker.get("image", "")) for role in ("head", "worker")}
    for role, image in images.items():
        if not image.startswith(f"rayproject/ray:{ray_version}-py3"):
            yield f"docker: the {role}'s image {image!r} is not Ray {ray_version}"
    if not images["worker"].endswith("-gpu"):
        yield "docker: workers need an image with CUDA"


def _commands(config: Mapping[str, Any]) -> Iterator[str]:
    for key in OWN_COMMANDS:
        if key not in config:
            yield f"{key}: inherited from Ray's defaults"
    for key in OWN_COMMANDS:
        for command in config.get(key, []):
            if re.search(r"nightly|latest|\.dev\d|https?://", command):
                yield f"{key}: not pinned: {command}"
    installs = " ".join(config.get("setup_commands", []))
    if "-c constraints.txt" not in installs:
        yield "setup_commands: constraints.txt is not used"


def _security(config: Mapping[str, Any]) -> Iterator[str]:
    starts = [text for text in config.get("head_start_ray_commands", []) if "ray start" in text]
    start = starts[-1] if starts else ""
    if re.findall(r"--dashboard-host[= ](\S+)", start) != ["127.0.0.1"]:
        yield "head_start_ray_commands: the dashboard is not on the loopback"
    if "--disable-usage-stats" not in start:
        yield "head_start_ray_commands: usage statistics are on"
    options = config.get("docker", {}).get("run_options", [])
    if "--env=RAY_AUTH_MODE=token" not in options:
        yield "docker: run_options do not state token authentication"
    if TOKEN not in config.get("file_mounts", {}):
        yield "file_mounts: nodes do not get the token"
    for option in options:
        if re.search(r"RAY_AUTH_TOKEN=|SECRET|PASSWORD|AWS_ACCESS_KEY", option):
            yield f"docker: a secret in run_options: {option.partition('=')[0]}"
    for name, node in config["available_node_types"].items():
        settings = node["node_config"]
        if "IamInstanceProfile" not in settings:
            yield f"{name}: no profile: the head would get full rights, a worker none"
        if settings.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{name}: credentials can be read without a session token"


def _mounts(config: Mapping[str, Any], project: Path) -> Iterator[str]:
    for source in config.get("file_mounts", {}).values():
        if source == "~/.ray/auth_token":  # made on the machine that launches, by `ray get-auth-token --generate`
            continue
        if not (project / source).exists():
            yield f"file_mounts: {source} does not exist"
