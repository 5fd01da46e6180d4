"""What the cluster of RAY_ADDRESS does at this moment, for a person who waits for nodes.

One question to the cluster's control service (GCS), by gRPC: Ray's own client waits 40 s for a head that is gone, and
`ray.init` takes seconds and a place on a node.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from aang_ray.sweep.cluster import own_cluster
from aang_ray.sweep.cluster_report import describe_cluster, one_line

PATIENCE_SECONDS = 5.0
"""A head answers in milliseconds."""

TOKEN_HINT = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put the cluster's token into ~/.ray/auth_token"


class NoAnswer(Exception):
    """The cluster was asked and said nothing; the message says why, in one line."""


def cluster_lines() -> list[str]:
    """The cluster of RAY_ADDRESS in a few lines, or in one why it cannot be asked; none where RAY_ADDRESS names none.

    A sweep without RAY_ADDRESS has a cluster of its own, whose token nobody else has.
    """
    if own_cluster():
        return []
    address = os.environ["RAY_ADDRESS"]
    if "://" in address:
        return [f"the cluster at {address} is not asked: RAY_ADDRESS must be HOST:PORT of its head, or auto there"]
    try:
        reply = ask(address)
    except NoAnswer as reason:
        return [f"the cluster at {address} does not answer: {reason}"]
    nodes, *more = describe_cluster(reply, time.time())
    return [f"cluster at {address}: {nodes}", *(f"  {line}" for line in more)]


def ask(address: str) -> Any:
    """The `GetClusterStatusReply` of the cluster at `HOST:PORT`; `auto` is the one of this machine.

    Raises:
        NoAnswer: within about `PATIENCE_SECONDS`.
    """
    import grpc
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusRequest
    from ray.core.generated.autoscaler_pb2_grpc import AutoscalerStateServiceStub
    from ray.exceptions import AuthenticationError

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what it has to say of tokens is in our one line
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init` does
        # An address as given: Ray would put this machine's own in place of 127.0.0.1, where a tunnel may begin.
        target = canonicalize_bootstrap_address_or_die(address) if address == "auto" else address
        with init_grpc_channel(target, options=GLOBAL_GRPC_OPTIONS) as channel:
            service = AutoscalerStateServiceStub(channel)
            return service.GetClusterStatus(GetClusterStatusRequest(), timeout=PATIENCE_SECONDS)
    except grpc.RpcError as error:
        raise NoAnswer(_reason(error)) from error
    except AuthenticationError as error:  # there is no token to show
        raise NoAnswer(f"no token was found; {TOKEN_HINT}") from error
    except ConnectionError as error:
        raise NoAnswer("no Ray runs on this machine") from error
    except (OSError, RuntimeError) as error:  # certificates
        raise NoAnswer(one_line(str(error))) from error


def _reason(error: Any) -> str:
    """Of a `grpc.RpcError`."""
    match error.code().name:
        case "DEADLINE_EXCEEDED":
            return f"nothing came within {PATIENCE_SECONDS:g} s"
        case "UNAUTHENTICATED":
            return f"{one_line(error.details())}; {TOKEN_HINT}"
        case _:
            return one_line(error.details())
