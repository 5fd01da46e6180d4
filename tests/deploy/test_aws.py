"""deploy/aws.yaml gives the machines of cluster.yaml their roles, and those roles little."""

from __future__ import annotations

from typing import Any

from tests.deploy.files import load

CLUSTER = load("cluster.yaml")
RESOURCES: dict[str, dict[str, Any]] = load("deploy/aws.yaml")["Resources"]
POLICIES: list[dict[str, Any]] = [RESOURCES["StoragePolicy"]["Properties"]["PolicyDocument"]] + [
    policy["PolicyDocument"] for policy in RESOURCES["HeadRole"]["Properties"]["Policies"]
]
STATEMENTS: list[dict[str, Any]] = [statement for policy in POLICIES for statement in policy["Statement"]]


def actions(statement: dict[str, Any]) -> list[str]:
    named = statement["Action"]
    return named if isinstance(named, list) else [named]


def test_the_profiles_are_those_of_the_nodes() -> None:
    wanted = {node["node_config"]["IamInstanceProfile"]["Name"] for node in CLUSTER["available_node_types"].values()}
    made = {
        resource["Properties"]["InstanceProfileName"]
        for resource in RESOURCES.values()
        if resource["Type"] == "AWS::IAM::InstanceProfile"
    }
    assert made == wanted


def test_actions_are_named_one_by_one() -> None:
    assert all("*" not in action for statement in STATEMENTS for action in actions(statement))


def test_only_describing_reaches_every_resource() -> None:
    for statement in STATEMENTS:
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions(statement))


def test_storage_is_one_bucket() -> None:
    for statement in STATEMENTS:
        if any(action.startswith("s3:") for action in actions(statement)):
            assert "s3:::${Bucket}" in statement["Resource"]["Fn::Sub"]


def test_workers_have_the_bucket_alone() -> None:
    worker = RESOURCES["WorkerRole"]["Properties"]
    assert worker["ManagedPolicyArns"] == [{"Ref": "StoragePolicy"}]
    assert "Policies" not in worker


def test_the_head_starts_workers_machines_and_ends_its_own() -> None:
    types = CLUSTER["available_node_types"]
    workers = {node["node_config"]["InstanceType"] for name, node in types.items() if name != CLUSTER["head_node_type"]}
    conditions = [(actions(one), one.get("Condition", {}).get("StringEquals", {})) for one in STATEMENTS]
    started = {equal["ec2:InstanceType"] for _, equal in conditions if "ec2:InstanceType" in equal}
    assert started == workers
    (ends,) = [equal for names, equal in conditions if "ec2:TerminateInstances" in names]
    assert ends == {"ec2:ResourceTag/ray-cluster-name": CLUSTER["cluster_name"]}


def test_results_outlive_the_stack() -> None:
    assert RESOURCES["Storage"]["DeletionPolicy"] == "Retain"
