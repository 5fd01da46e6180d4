"""The Ray cluster of a sweep: the one that RAY_ADDRESS names, else one on this machine; and what it has room for.

Ray's public interface lists nodes (`ray.nodes`), but neither what waits for resources, nor which nodes drain, nor what
the autoscaler cannot provide. `ask` gets all of these by one call to the cluster's control service (GCS); it is the
only place of the sweep that uses Ray's private modules.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from aang_ray.errors import RunFailure, UserError
from aang_ray.sweep.plan import Need
from aang_ray.train.control import Interrupted

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in a trial
    "RAY_AIR_NEW_OUTPUT": "0",  # the new reporter prints tables at verbosity 0, too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about CUDA_VISIBLE_DEVICES
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `tune.run_trials` handles signals: checkpoints are written first
}
"""Ray's settings by environment variable; what the user has set stays."""

OWN_CLUSTER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""Further settings of a cluster of our own. Ray opens ports to the network, and nobody else has this token."""

OBJECT_STORE_BYTES = 160 * 2**20
"""Trials share data through memory-mapped files; the object store only carries configurations."""

LONGEST_TEMP = 26
"""Ray adds up to 67 characters to its temporary folder, we add 14, and the path of a socket may have 107."""

AUTOSCALER_STARTS_SECONDS = 20.0
"""How long after the head an autoscaler may start; one that has not shown up by then does not exist."""

VERDICT_SECONDS = 45.0
"""How long to wait for the autoscaler's answer; it looks at demands every five seconds."""

ASK_SECONDS = 5.0
"""How long the control service may take to answer; it usually takes milliseconds."""

TOKEN_HINT = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put the cluster's token into ~/.ray/auth_token"

Node = Mapping[str, float]
Verdict = Literal["no autoscaler", "unknown", "can be added", "never"]
"""`no autoscaler`: none has reported yet."""


def own_cluster() -> bool:
    """Whether a sweep starts a cluster of its own: RAY_ADDRESS names no other."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def in_ray_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job, whose folder is temporary."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def set_environment() -> None:
    """Set Ray's environment variables; to be called before Ray is imported, because it reads some only once."""
    for name, value in (SETTINGS | OWN_CLUSTER if own_cluster() else SETTINGS).items():
        os.environ.setdefault(name, value)


class KeptLogs:
    """Keeps Ray's logs of a cluster of our own, whose folder is deleted at the end."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch

    def keep(self, store: str) -> Path | None:
        """Copy the logs to `<store>/.logs`, or to a temporary folder if the store is remote.

        Returns:
            The folder; None for another's cluster, which keeps its own logs.
        """
        if self._scratch is None:
            return None
        if "://" in store:
            folder = Path(tempfile.mkdtemp(prefix="aang-logs-"))
        else:
            folder = Path(store) / ".logs" / datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        with suppress(OSError):  # of a log that goes away while it is copied; the others are copied
            shutil.copytree(self._scratch / "session_latest" / "logs", folder, dirs_exist_ok=True)
        return folder


@contextmanager
def ray_cluster() -> Iterator[KeptLogs]:
    """Connect to the cluster of RAY_ADDRESS, else start one on this machine and stop it afterwards.

    In the block SIGTERM raises `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`: Ray's own handler would end all
    processes at once, before checkpoints are written.

    The dashboard is on, on the loopback: without it Ray 2.60 never gives back the resources of a trial
    whose process was killed, and the sweep goes on with one trial less at a time.
    """
    set_environment()
    import ray

    own = own_cluster()
    scratch: Path | None = None
    common = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    try:
        if not own:
            ray.init(**common)
        else:
            usual = tempfile.gettempdir()
            short = usual if len(usual) <= LONGEST_TEMP or not Path("/tmp").is_dir() else "/tmp"
            scratch = Path(tempfile.mkdtemp(prefix="aang-", dir=short))
            ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(scratch),
                **common,
            )
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        with _sigterm_raises():
            yield KeptLogs(scratch)
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise `Interrupted` at SIGTERM; on a thread that is not the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(
            "stopped by SIGTERM; what has finished is in the store, the same command continues from there"
        )

    # None stands for a handler that was not installed from Python and cannot be put back.
    before = signal.signal(signal.SIGTERM, stop) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def living_nodes() -> list[Node]:
    """CPUs and GPUs of each node that is alive."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def describe_nodes(nodes: Iterable[Node]) -> str:
    """`1 node with 0 CPU, 2 nodes with 4 CPU and 1 GPU`."""
    kinds = Counter((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    parts = [
        f"{count} node{'s' if count > 1 else ''} with {cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        for (cpus, gpus), count in sorted(kinds.items())
    ]
    return ", ".join(parts) or "no node"


def check_fits(needs: Iterable[Need]) -> None:
    """Refuse a trial that fits neither a node nor one that the autoscaler can add: it would wait for ever.

    Takes less than a minute. A cluster of our own does not grow, so there the answer is immediate.

    Raises:
        UserError: naming what the trial needs and what the cluster has.
        RunFailure: where the autoscaler does not answer.
    """
    for need in sorted(set(needs)):
        if need.held_by(living_nodes()):
            continue
        if own_cluster():
            raise UserError(f"resources: a trial needs {need}, this machine has {describe_nodes(living_nodes())}")
        _ask_autoscaler(need)


def has_autoscaler() -> bool:
    """Whether an autoscaler (version 2) has reported to the cluster that this process is connected to."""
    return bool(_status().autoscaling_state.autoscaler_state_version)


def _ask_autoscaler(need: Need) -> None:
    """Request the trial's resources, and wait for a node that fits or for the autoscaler's verdict."""
    began = time.monotonic()
    with _requested(need) as question:
        while (waited := time.monotonic() - began) < VERDICT_SECONDS:
            if need.held_by(living_nodes()):
                return
            match question.verdict(_status()):
                case "can be added":
                    return
                case "never":
                    raise UserError(f"{_shortage(need)}, and its autoscaler can add none that holds it")
                case "no autoscaler" if waited > AUTOSCALER_STARTS_SECONDS:
                    raise UserError(f"{_shortage(need)}, and no autoscaler (version 2) that could add nodes")
            time.sleep(0.5)
    raise RunFailure(
        f"{_shortage(need)}, and its autoscaler has not said within {VERDICT_SECONDS:g} s whether it can add nodes; "
        "look into its log, monitor.log on the head"
    )


def _shortage(need: Need) -> str:
    return f"resources: a trial needs {need}, the cluster has {describe_nodes(living_nodes())}"


@contextmanager
def _requested(need: Need) -> Iterator[PlacementQuestion]:
    """A placement group of the trial's bundles, which the autoscaler sees."""
    from ray.util import placement_group, remove_placement_group

    group = placement_group(need.bundles)
    try:
        yield PlacementQuestion(group.id.hex())
    finally:
        remove_placement_group(group)


class PlacementQuestion:
    """Finds out whether the autoscaler can add nodes for a placement group that waits.

    The autoscaler looks every few seconds at a numbered state of the cluster, and lists the groups in it for which it
    can add no nodes. A group that was in a state that the autoscaler has seen, and is not listed, can be placed.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._asked: int | None = None
        """Number of a state of the cluster that contains the group."""

    def verdict(self, status: Any) -> Verdict:
        """Read the answer from a `GetClusterStatusReply`."""
        cluster, autoscaler = status.cluster_resource_state, status.autoscaling_state
        if not autoscaler.autoscaler_state_version:
            return "no autoscaler"
        if self._among(autoscaler.infeasible_gang_resource_requests):
            return "never"
        if self._asked is None and self._among(cluster.pending_gang_resource_requests):
            self._asked = cluster.cluster_resource_state_version
        seen = self._asked is not None and autoscaler.last_seen_cluster_resource_state_version >= self._asked
        return "can be added" if seen else "unknown"

    def _among(self, requests: Iterable[Any]) -> bool:
        return any(str(request.details).startswith(self._group) for request in requests)


class NoAnswer(Exception):
    """The cluster was asked and did not answer; the message gives the reason in one line."""


def _status() -> Any:
    """The status of the cluster that this process is connected to."""
    import ray

    try:
        return ask(ray.get_runtime_context().gcs_address)
    except NoAnswer as reason:
        raise RunFailure(f"the cluster does not answer: {reason}") from reason


def ask(address: str) -> Any:
    """Get the `GetClusterStatusReply` of a cluster. No connection by `ray.init` is needed, and none is made.

    Args:
        address: `HOST:PORT` of the head, or `auto` for the cluster of this machine.

    Raises:
        NoAnswer: within about `ASK_SECONDS`.
    """
    import grpc
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusRequest
    from ray.core.generated.autoscaler_pb2_grpc import AutoscalerStateServiceStub
    from ray.exceptions import AuthenticationError

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # its messages about tokens are in our one line
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init` does
        # An address as given: Ray would replace 127.0.0.1, where a tunnel may begin, by this machine's own.
        target = canonicalize_bootstrap_address_or_die(address) if address == "auto" else address
        with init_grpc_channel(target, options=GLOBAL_GRPC_OPTIONS) as channel:
            service = AutoscalerStateServiceStub(channel)
            return service.GetClusterStatus(GetClusterStatusRequest(), timeout=ASK_SECONDS)
    except grpc.RpcError as error:
        raise NoAnswer(_grpc_reason(error)) from error
    except AuthenticationError as error:  # no token was found
        raise NoAnswer(f"no token was found; {TOKEN_HINT}") from error
    except ConnectionError as error:
        raise NoAnswer("no Ray runs on this machine") from error
    except (OSError, RuntimeError) as error:  # certificates
        raise NoAnswer(one_line(str(error))) from error


def _grpc_reason(error: Any) -> str:
    match error.code().name:
        case "DEADLINE_EXCEEDED":
            return f"nothing came within {ASK_SECONDS:g} s"
        case "UNAUTHENTICATED":
            return f"{one_line(error.details())}; {TOKEN_HINT}"
        case _:
            return one_line(error.details())


def one_line(text: str) -> str:
    """Remove line breaks and indentation: reasons come from clouds and from gRPC."""
    return " ".join(text.split())
