"""The fields of a RayJob: those of KubeRay 1.6 (`ray.io/v1`) in full, those of Kubernetes as far as pods need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fields:
    """An object: its required fields and the others it may have, each with what it holds."""

    required: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Items:
    """A list."""

    of: Any


@dataclass(frozen=True)
class Values:
    """A map with keys of the user's own."""

    of: Any


@dataclass(frozen=True)
class OneOf:
    """One of some texts."""

    texts: tuple[str, ...]


TEXTS = Values(str)
QUANTITIES = Values((str, int))
RESOURCES = Fields(optional={"requests": QUANTITIES, "limits": QUANTITIES, "claims": Items(Values(str))})
KEY_REF = Fields(required={"name": str, "key": str}, optional={"optional": bool})
ENV = Fields(
    required={"name": str},
    optional={"value": str, "valueFrom": Fields(optional={"secretKeyRef": KEY_REF, "configMapKeyRef": KEY_REF})},
)
SECCOMP = Fields(required={"type": OneOf(("RuntimeDefault", "Localhost", "Unconfined"))})
USER = {"runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "seccompProfile": SECCOMP}
CONTAINER_SECURITY = Fields(
    optional={
        **USER,
        "allowPrivilegeEscalation": bool,
        "capabilities": Fields(optional={"add": Items(str), "drop": Items(str)}),
        "privileged": bool,
        "readOnlyRootFilesystem": bool,
    }
)
MOUNT = Fields(required={"name": str, "mountPath": str}, optional={"readOnly": bool, "subPath": str})
CONTAINER = Fields(
    required={"name": str, "image": str, "resources": RESOURCES, "securityContext": CONTAINER_SECURITY},
    optional={
        "command": Items(str),
        "args": Items(str),
        "env": Items(ENV),
        "imagePullPolicy": OneOf(("Always", "IfNotPresent", "Never")),
        "ports": Items(Fields(required={"containerPort": int}, optional={"name": str, "protocol": str})),
        "volumeMounts": Items(MOUNT),
        "workingDir": str,
    },
)
TOLERATION = Fields(
    optional={
        "key": str,
        "operator": OneOf(("Exists", "Equal")),
        "value": str,
        "effect": OneOf(("NoSchedule", "PreferNoSchedule", "NoExecute")),
        "tolerationSeconds": int,
    }
)
VOLUME = Fields(required={"name": str}, optional={"emptyDir": Fields(optional={"medium": str, "sizeLimit": str})})
POD = Fields(
    required={"containers": Items(CONTAINER), "securityContext": Fields(optional={**USER, "fsGroup": int})},
    optional={
        "imagePullSecrets": Items(Fields(required={"name": str})),
        "nodeSelector": TEXTS,
        "priorityClassName": str,
        "serviceAccountName": str,
        "terminationGracePeriodSeconds": int,
        "tolerations": Items(TOLERATION),
        "volumes": Items(VOLUME),
    },
)
METADATA = Fields(optional={"name": str, "namespace": str, "labels": TEXTS, "annotations": TEXTS})
TEMPLATE = Fields(required={"spec": POD}, optional={"metadata": METADATA})
AUTOSCALER = Fields(
    optional={
        "env": Items(ENV),
        "idleTimeoutSeconds": int,
        "image": str,
        "imagePullPolicy": OneOf(("Always", "IfNotPresent", "Never")),
        "resources": RESOURCES,
        "securityContext": CONTAINER_SECURITY,
        "upscalingMode": OneOf(("Default", "Aggressive", "Conservative")),
        "version": OneOf(("v1", "v2")),
        "volumeMounts": Items(MOUNT),
    }
)
HEAD = Fields(
    required={"template": TEMPLATE, "rayStartParams": TEXTS},
    optional={
        "enableIngress": bool,
        "labels": TEXTS,
        "resources": TEXTS,
        "serviceType": OneOf(("ClusterIP", "NodePort", "LoadBalancer")),
    },
)
WORKERS = Fields(
    required={"groupName": str, "minReplicas": int, "maxReplicas": int, "rayStartParams": TEXTS, "template": TEMPLATE},
    optional={
        "idleTimeoutSeconds": int,
        "labels": TEXTS,
        "numOfHosts": int,
        "replicas": int,
        "resources": TEXTS,
        "scaleStrategy": Fields(optional={"workersToDelete": Items(str)}),
        "suspend": bool,
    },
)
CLUSTER = Fields(
    required={"rayVersion": str, "headGroupSpec": HEAD, "workerGroupSpecs": Items(WORKERS)},
    optional={
        "authOptions": Fields(optional={"mode": OneOf(("disabled", "token")), "secretName": str}),
        "autoscalerOptions": AUTOSCALER,
        "enableInTreeAutoscaling": bool,
        "headServiceAnnotations": TEXTS,
        "managedBy": str,
        "suspend": bool,
    },
)
SPEC = Fields(
    required={"entrypoint": str, "rayClusterSpec": CLUSTER},
    optional={
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "entrypointNumCpus": (int, float),
        "entrypointNumGpus": (int, float),
        "entrypointResources": str,
        "jobId": str,
        "managedBy": str,
        "metadata": TEXTS,
        "preRunningDeadlineSeconds": int,
        "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool,
        "submissionMode": OneOf(("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")),
        "submitterConfig": Fields(optional={"backoffLimit": int}),
        "submitterPodTemplate": TEMPLATE,
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
)
RAY_JOB = Fields(
    required={
        "apiVersion": OneOf(("ray.io/v1",)),
        "kind": OneOf(("RayJob",)),
        "metadata": METADATA,
        "spec": SPEC,
    }
)


def misfits(value: Any, shape: Any, path: str = "") -> Iterator[str]:
    """Where a value has another shape: unknown and missing fields, wrong types."""
    match shape:
        case Fields():
            yield from _object(value, shape, path)
        case Items(of=of):
            if not isinstance(value, list):
                yield f"{path}: not a list"
                return
            for number, item in enumerate(value):
                yield from misfits(item, of, f"{path}[{number}]")
        case Values(of=of):
            if not isinstance(value, dict):
                yield f"{path}: not a map"
                return
            for key, item in value.items():
                yield from misfits(item, of, f"{path}.{key}")
        case OneOf(texts=texts):
            if value not in texts:
                yield f"{path}: {value!r} is none of {', '.join(texts)}"
        case _:
            types = shape if isinstance(shape, tuple) else (shape,)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                yield f"{path}: {value!r} is not of type {' or '.join(one.__name__ for one in types)}"


def _object(value: Any, shape: Fields, path: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: not an object"
        return
    known = {**shape.required, **shape.optional}
    for key in sorted(shape.required.keys() - value.keys()):
        yield f"{path}: {key} is missing"
    for key, item in value.items():
        if key in known:
            yield from misfits(item, known[key], f"{path}.{key}" if path else key)
        else:
            yield f"{path}: unknown field {key}"
