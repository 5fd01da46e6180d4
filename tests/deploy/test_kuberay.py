"""deploy/kuberay.yaml has the fields of a RayJob, and is pinned, closed, and cheap while nothing runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.deploy.files import PROJECT, Mutation, load, mutated, pinned
from tests.deploy.kuberay_fields import RAY_JOB, misfits

JOB = load("deploy/kuberay.yaml")


def problems(job: Mapping[str, Any]) -> list[str]:
    """Every rule that a job breaks, a line each."""
    return list(misfits(dict(job), RAY_JOB)) or [*rules(job["spec"])]


def rules(spec: Mapping[str, Any]) -> Iterator[str]:
    cluster = spec["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    if not spec.get("shutdownAfterJobFinishes") or not spec.get("ttlSecondsAfterFinished"):
        yield "the cluster outlives its job"
    if spec.get("backoffLimit", 0):
        yield "a bug is tried again"
    if cluster["rayVersion"] != pinned("ray"):
        yield "rayVersion is not the pinned one"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "no token authentication"
    if not cluster.get("enableInTreeAutoscaling"):
        yield "no autoscaling"
    if head.get("serviceType") != "ClusterIP" or head.get("enableIngress"):
        yield "the dashboard is exposed"
    if head["rayStartParams"].get("num-cpus") != "0" or head["rayStartParams"].get("num-gpus") != "0":
        yield "trials could run on the head"
    for group in groups:
        if group["minReplicas"] > group["maxReplicas"]:
            yield "minReplicas above maxReplicas"
        if group["minReplicas"] or group.get("replicas", 0):
            yield "workers that cost while nothing runs"
    for template in [head["template"], *(group["template"] for group in groups)]:
        yield from pod_rules(template["spec"])
    for group in groups:
        if any("nvidia.com/gpu" not in one["resources"].get("limits", {}) for one in containers(group)):
            yield "a worker without a GPU"


def containers(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = group["template"]["spec"]["containers"]
    return found


def pod_rules(pod: Mapping[str, Any]) -> Iterator[str]:
    security = pod["securityContext"]
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "a pod runs as root"
    for container in pod["containers"]:
        name, image = container["name"], container["image"]
        if not re.fullmatch(rf"\S+:\d+\.\d+\.\d+-ray{re.escape(pinned('ray'))}", image):
            yield f"{name}: image {image} is not pinned"
        if container["resources"].get("requests") != container["resources"].get("limits"):
            yield f"{name}: requests differ from limits"
        if container["securityContext"].get("allowPrivilegeEscalation") is not False:
            yield f"{name}: privileges can grow"
        for variable in container.get("env", []):
            if "value" in variable and re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY", variable["name"]):
                yield f"{name}: a secret in {variable['name']}"


def cluster(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["spec"]["rayClusterSpec"]
    return spec


def worker(job: dict[str, Any]) -> dict[str, Any]:
    return containers(cluster(job)["workerGroupSpecs"][0])[0]


def head_pod(job: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = cluster(job)["headGroupSpec"]["template"]["spec"]
    return pod


def test_nothing_is_wrong() -> None:
    assert problems(JOB) == []


MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "an unknown field of the job": (lambda j: j["spec"].update(shutdownAfterJobFinish=True), "unknown field"),
    "an unknown field of the cluster": (lambda j: cluster(j).update(autoscaling=True), "unknown field"),
    "an unknown field deep in a container": (lambda j: worker(j).update(gpu=1), "unknown field gpu"),
    "an unknown field of authOptions": (lambda j: cluster(j)["authOptions"].update(token="x"), "unknown field token"),
    "no entrypoint": (lambda j: j["spec"].pop("entrypoint"), "entrypoint is missing"),
    "no head": (lambda j: cluster(j).pop("headGroupSpec"), "headGroupSpec is missing"),
    "no image": (lambda j: worker(j).pop("image"), "image is missing"),
    "another kind": (lambda j: j.update(kind="RayCluster"), "none of RayJob"),
    "an old version of the interface": (lambda j: j.update(apiVersion="ray.io/v1alpha1"), "none of ray.io/v1"),
    "a number where Ray wants text": (
        lambda j: cluster(j)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "is not of type str",
    ),
    "text where a number is wanted": (lambda j: j["spec"].update(ttlSecondsAfterFinished="600"), "is not of type int"),
    "a truth value where a number is wanted": (lambda j: j["spec"].update(backoffLimit=True), "is not of type int"),
    "one group instead of a list": (
        lambda j: cluster(j).update(workerGroupSpecs=cluster(j)["workerGroupSpecs"][0]),
        "not a list",
    ),
    "a cluster that stays": (lambda j: j["spec"].update(shutdownAfterJobFinishes=False), "outlives its job"),
    "another Ray": (lambda j: cluster(j).update(rayVersion="2.59.0"), "rayVersion"),
    "authentication off": (lambda j: cluster(j).update(authOptions={"mode": "disabled"}), "token authentication"),
    "no authentication": (lambda j: cluster(j).pop("authOptions"), "token authentication"),
    "a dashboard for everybody": (
        lambda j: cluster(j)["headGroupSpec"].update(serviceType="LoadBalancer"),
        "dashboard is exposed",
    ),
    "trials on the head": (
        lambda j: cluster(j)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        "could run on the head",
    ),
    "min above max": (lambda j: cluster(j)["workerGroupSpecs"][0].update(minReplicas=9), "above maxReplicas"),
    "workers that stay": (lambda j: cluster(j)["workerGroupSpecs"][0].update(minReplicas=1), "cost while nothing"),
    "root": (lambda j: head_pod(j)["securityContext"].update(runAsNonRoot=False), "runs as root"),
    "the latest image": (lambda j: worker(j).update(image="rayproject/ray:latest"), "is not pinned"),
    "requests below limits": (
        lambda j: worker(j)["resources"].update(requests={"cpu": "1"}),
        "requests differ from limits",
    ),
    "no GPU": (lambda j: worker(j).update(resources={"requests": {"cpu": 4}, "limits": {"cpu": 4}}), "without a GPU"),
    "a token in the file": (
        lambda j: worker(j).update(env=[{"name": "RAY_AUTH_TOKEN", "value": "abc"}]),
        "a secret in RAY_AUTH_TOKEN",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_found(name: str) -> None:
    mutate, expected = MUTATIONS[name]
    wrong = problems(mutated(JOB, mutate))
    assert any(expected in line for line in wrong), wrong


def test_the_entrypoint_exists_in_the_image() -> None:
    python, *arguments = JOB["spec"]["entrypoint"].split()
    assert python == "python"
    for name in arguments[:2]:
        assert (PROJECT / name).is_file()
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", (PROJECT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert {"jobs", "aang_ray", "search_spaces", "pyproject.toml", "constraints.txt"} <= set(" ".join(copied).split())


def test_the_image_is_made_of_the_pinned_ray() -> None:
    first = re.search(r"^FROM (\S+)$", (PROJECT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert first is not None
    assert first.group(1) == f"rayproject/ray:{pinned('ray')}-py311-gpu"
