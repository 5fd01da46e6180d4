"""The Ray cluster of a sweep: the one that RAY_ADDRESS names, else one on this machine; and what it has room for.

Ray's public interface lists nodes (`ray.nodes`), but neither what waits for resources, nor which nodes drain, nor what
the autoscaler cannot provide. `ask` gets all of these by one call to the cluster's control service (GCS). This is the
only file of the sweep that uses Ray's private modules.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

import psutil

from aang_ray.errors import RunFailure, UserError
from aang_ray.sweep.plan import Need, amounts, duration
from aang_ray.sweep.scratch import hold_folder, remove_left_folders
from aang_ray.train.control import Interrupted

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning in a trial
    "RAY_AIR_NEW_OUTPUT": "0",  # the new reporter prints tables at verbosity 0, too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about CUDA_VISIBLE_DEVICES
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `tune.Engine` handles signals: checkpoints are written first
}
"""Ray's settings by environment variable; what the user has set stays."""

OWN_CLUSTER = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
"""Further settings of a cluster of our own. Ray opens ports to the network, and nobody else has this token. When its
control service is killed, its other processes end after the last setting's seconds; Ray's own choice is 60."""

OBJECT_STORE_BYTES = 160 * 2**20
"""Trials share data through memory-mapped files; the object store only carries configurations."""

LONGEST_TEMP = 26
"""Ray adds up to 67 characters to its temporary folder, we add 14, and the path of a socket may have 107."""

AUTOSCALER_STARTS_SECONDS = 20.0
"""How long after the head an autoscaler may start; one that has not shown up by then does not exist."""

VERDICT_SECONDS = 45.0
"""How long to wait for the autoscaler's answer; it looks at demands every five seconds."""

DEATH_SECONDS = 0.5
"""Time between two looks whether our own cluster lives."""

STOPPED = "stopped by SIGTERM; what has finished is in the store, the same command continues from there"

RAY_ENDED = (
    "Ray has ended (a signal to the whole process group, or no memory?); what has finished is in the "
    "store, the same command continues from the last checkpoints"
)

ASK_SECONDS = 5.0
"""How long the control service may take to answer; it usually takes milliseconds."""

TOKEN_HINT = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put the cluster's token into ~/.ray/auth_token"

Node = Mapping[str, float]
Verdict = Literal["no autoscaler", "unknown", "can be added", "never"]
"""`no autoscaler`: none has reported yet."""


def own_cluster() -> bool:
    """Whether a sweep starts a cluster of its own: RAY_ADDRESS names none."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def in_ray_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job, whose folder is temporary."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def set_environment() -> None:
    """Set Ray's environment variables; to be called before Ray is imported, because it reads some only once."""
    for name, value in (SETTINGS | OWN_CLUSTER if own_cluster() else SETTINGS).items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_cluster() -> Iterator[Path | None]:
    """Connect to the cluster of RAY_ADDRESS, else start one on this machine and stop it afterwards.

    In the block SIGTERM raises `Interrupted`, as Ctrl-C raises `KeyboardInterrupt`: Ray's own handler would end all
    processes at once, before checkpoints are written. Python handles signals in the main thread only.

    The dashboard is on, on the loopback: without it Ray 2.60 never gives back the resources of a trial whose process
    was killed, and the sweep continues with one trial less at a time.

    Yields:
        The folder of a cluster of our own, which is deleted at the end; None for another's cluster.
    """
    set_environment()
    import ray

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(STOPPED)

    scratch: Path | None = None
    held: IO[str] | None = None
    options: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    main = threading.current_thread() is threading.main_thread()
    try:
        if own_cluster():
            usual = tempfile.gettempdir()
            short = usual if len(usual) <= LONGEST_TEMP or not Path("/tmp").is_dir() else "/tmp"
            remove_left_folders(Path(short))
            scratch = Path(tempfile.mkdtemp(prefix="aang-", dir=short))
            held = hold_folder(scratch)
            options |= {"address": "local", "include_dashboard": True, "dashboard_host": "127.0.0.1"}
            options |= {"object_store_memory": OBJECT_STORE_BYTES, "_temp_dir": str(scratch)}
        before = signal.signal(signal.SIGTERM, stop) if main else None
        with _temporary_files_in(scratch):
            _connect(**options)
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        if main:
            signal.signal(signal.SIGTERM, stop)  # Ray has installed its own
        try:
            with _ending_with(scratch):
                yield scratch
        finally:
            if main:  # None stands for a handler that was not installed from Python and cannot be put back
                signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    finally:
        ray.shutdown()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            held.close()


def _connect(**options: Any) -> None:
    """Connect to a cluster or start one.

    Raises:
        RunFailure: One of Ray's processes ended while it started, or the cluster of RAY_ADDRESS cannot be reached.
        Interrupted: After SIGTERM.
    """
    import ray

    try:
        ray.init(**options)
    except Interrupted:
        raise
    except SystemExit as stop:  # from Ray's own handler of SIGTERM
        raise Interrupted(STOPPED) from stop
    except Exception as error:  # Ray raises `Exception` itself, with the last lines of a log
        log = re.match(r"\s*The last \d+ lines of \S*?(\w+)\.(log|out|err)", str(error))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = f"its {log[1]} ended while it started" if log else lines[0][:300].rstrip(".")
        what = "be started" if own_cluster() else f"be reached at {os.environ['RAY_ADDRESS']}"
        raise RunFailure(f"Ray could not {what}: {reason}; the same command tries again") from error


@contextmanager
def _ending_with(scratch: Path | None) -> Iterator[None]:
    """End this process, with one line, soon after the control service or the raylet of our own cluster has died.

    A signal to the whole process group (`timeout` and some schedulers send SIGTERM so) ends them, or the kernel for
    want of memory. Ray would end this process as well, after 20 s of silence and with messages of its own, and leave
    its folder.

    Args:
        scratch: The folder of a cluster of our own; None: do nothing.
    """
    if scratch is None:
        yield
        return
    started = [process for process in psutil.Process().children() if str(scratch) in " ".join(process.cmdline())]
    # After SIGTERM the control service itself may live on for long, deaf.
    needed = [process for process in started if process.name() in ("gcs_server", "raylet")]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(DEATH_SECONDS):
            if all(map(_lives, needed)):
                continue
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    for member in (*process.children(recursive=True), process):  # trials are the raylet's children
                        member.kill()
            shutil.rmtree(scratch, ignore_errors=True)
            sys.stderr.write(f"error: {RAY_ENDED}\n")
            sys.stderr.flush()
            os._exit(1)

    threading.Thread(target=watch, name="watches Ray", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _temporary_files_in(folder: Path | None) -> Iterator[None]:
    """Have processes that start in the block, and theirs, put temporary files into a folder; None: where they like.

    Ray ends its processes by a signal, so they leave such files behind. They go away with the cluster's folder.
    """
    before = os.environ.get("TMPDIR")
    if folder is not None:
        os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TMPDIR"] = before
        else:
            os.environ.pop("TMPDIR", None)


def keep_logs(scratch: Path, store: str) -> Path:
    """Copy the logs of a cluster of our own to `<store>/.logs`, or to a temporary folder if the store is remote.

    Args:
        scratch: The folder of the cluster.
        store: URI of the store.

    Returns:
        The folder of the copies.
    """
    if "://" in store:
        folder = Path(tempfile.mkdtemp(prefix="aang-logs-"))
    else:
        folder = Path(store) / ".logs" / datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    with suppress(OSError):  # of a log that goes away while it is copied; the others are copied
        shutil.copytree(scratch / "session_latest" / "logs", folder, dirs_exist_ok=True)
    return folder


def living_nodes() -> list[Node]:
    """CPUs and GPUs of each node that is alive."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def describe_nodes(nodes: Iterable[Node]) -> str:
    """`1 node with 0 CPU, 2 nodes with 4 CPU and 1 GPU`."""
    kinds = Counter((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    parts = [
        f"{count} node{'s' if count > 1 else ''} with {amounts({'CPU': cpus} | ({'GPU': gpus} if gpus else {}))}"
        for (cpus, gpus), count in sorted(kinds.items())
    ]
    return ", ".join(parts) or "no node"


def check_fits(needs: Iterable[Need]) -> None:
    """Refuse a trial that fits neither a node nor one that the autoscaler can add: it would wait for ever.

    Takes less than a minute. A cluster of our own does not grow, so there the answer is immediate.

    Raises:
        UserError: A trial does not fit. The message names what it needs and what the cluster has.
        RunFailure: The autoscaler does not answer.
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


def _status() -> Any:
    import ray

    return ask(ray.get_runtime_context().gcs_address)


def _ask_autoscaler(need: Need) -> None:
    """Request the trial's resources, and wait for a node that fits or for the autoscaler's verdict."""
    from ray.util import placement_group, remove_placement_group

    began = time.monotonic()
    shortage = f"resources: a trial needs {need}, the cluster has {describe_nodes(living_nodes())}"
    group = placement_group(need.bundles)  # the autoscaler sees it
    question = PlacementQuestion(group.id.hex())
    try:
        while (waited := time.monotonic() - began) < VERDICT_SECONDS:
            if need.held_by(living_nodes()):
                return
            match question.verdict(_status()):
                case "can be added":
                    return
                case "never":
                    raise UserError(f"{shortage}, and its autoscaler can add none that holds it")
                case "no autoscaler" if waited > AUTOSCALER_STARTS_SECONDS:
                    raise UserError(f"{shortage}, and no autoscaler (version 2) that could add nodes")
            time.sleep(0.5)
    finally:
        remove_placement_group(group)
    raise RunFailure(
        f"{shortage}, and its autoscaler has not said within {VERDICT_SECONDS:g} s whether it can add nodes; "
        "look into its log, monitor.log on the head"
    )


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


def ask(address: str) -> Any:
    """Get the `GetClusterStatusReply` of a cluster. No connection by `ray.init` is needed, and none is made.

    Args:
        address: `HOST:PORT` of the head, or `auto` for the cluster of this machine.

    Raises:
        RunFailure: The cluster does not answer within about `ASK_SECONDS`. The message gives the reason in one line.
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
        cause, reason = error, _one_line(error.details())
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = f"nothing came within {ASK_SECONDS:g} s"
        elif error.code() == grpc.StatusCode.UNAUTHENTICATED:
            reason += f"; {TOKEN_HINT}"
    except AuthenticationError as error:
        cause, reason = error, f"no token was found; {TOKEN_HINT}"
    except ConnectionError as error:
        cause, reason = error, "no Ray runs on this machine"
    except (OSError, RuntimeError) as error:  # certificates
        cause, reason = error, _one_line(str(error))
    raise RunFailure(f"the cluster at {address} does not answer: {reason}") from cause


def cluster_lines() -> list[str]:
    """The cluster of RAY_ADDRESS in a few lines, or one line why it cannot be asked; none where RAY_ADDRESS is not set.

    A sweep without RAY_ADDRESS has a cluster of its own, whose token nobody else has.
    """
    if own_cluster():
        return []
    address = os.environ["RAY_ADDRESS"]
    if "://" in address:
        return [f"the cluster at {address} is not asked: RAY_ADDRESS must be HOST:PORT of its head, or auto there"]
    try:
        reply = ask(address)
    except RunFailure as reason:
        return [str(reason)]
    nodes, *more = describe_cluster(reply, time.time())
    return [f"cluster at {address}: {nodes}", *(f"  {line}" for line in more)]


def describe_cluster(reply: Any, now: float) -> Iterator[str]:
    """Describe a `GetClusterStatusReply`: nodes and their use, then what starts, leaves, failed to start and waits.

    Lines about starting nodes come from an autoscaler (version 2); without one there are none.
    """
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    cluster, autoscaler = reply.cluster_resource_state, reply.autoscaling_state
    living = [node for node in cluster.node_states if node.status != NodeStatus.DEAD]
    up = [node for node in living if node.status != NodeStatus.DRAINING]
    leaving = [node.total_resources for node in living if node.status == NodeStatus.DRAINING]
    use = []
    for name in ("CPU", "GPU"):
        total = sum(node.total_resources.get(name, 0.0) for node in up)
        free = sum(node.available_resources.get(name, 0.0) for node in up)
        if total or name == "CPU":
            use.append(f"{round(total - free, 4):g} of {total:g} {name}")
    yield f"{describe_nodes(node.total_resources for node in up)}; {' and '.join(use)} in use"
    if leaving:
        yield f"drained, going away: {describe_nodes(leaving)}"
    kinds = Counter(node.ray_node_type_name for node in autoscaler.pending_instances)
    for request in autoscaler.pending_instance_requests:
        kinds[request.ray_node_type_name] += request.count
    if kinds:
        yield f"being started: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
    # A line for each kind of node and reason: a node is requested again and again while there is no capacity.
    failures: Counter[tuple[str, str]] = Counter()
    last: dict[tuple[str, str], int] = {}
    for launch in autoscaler.failed_instance_requests:
        failure = (launch.ray_node_type_name, _one_line(launch.reason))
        failures[failure] += launch.count
        last[failure] = max(last.get(failure, 0), launch.failed_ts)
    for (kind, reason), count in sorted(failures.items()):
        ago = duration(max(now - last[kind, reason], 0.0))
        yield f"not started: {count} {kind}, {'the last ' if count > 1 else ''}{ago} ago: {reason}"
    pending = ((request.request.resources_bundle, request.count) for request in cluster.pending_resource_requests)
    if waiting := _requested(pending, cluster.pending_gang_resource_requests):
        yield f"waiting for room: {waiting}"
    refusals = ((request.resources_bundle, 1) for request in autoscaler.infeasible_resource_requests)
    if refused := _requested(refusals, autoscaler.infeasible_gang_resource_requests):
        yield f"no node is added for {refused}: their number has reached its limit, or no type is large enough"


def _requested(singles: Iterable[tuple[Node, int]], gangs: Iterable[Any]) -> str:
    """`3 x 1 CPU, 1 x (2 x 0.99 CPU and 1 GPU)`; what is in brackets is placed whole or not at all."""
    counts: Counter[str] = Counter()
    for bundle, count in singles:
        if not any("_group_" in name for name in bundle):  # those wait for their placement group, not for a node
            counts[amounts(bundle)] += count
    for gang in gangs:
        bundles = Counter(amounts(request.resources_bundle) for request in gang.requests)
        counts[f"({_times(bundles)})" if bundles.total() > 1 else next(iter(bundles))] += 1
    return _times(counts)


def _times(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))


def _one_line(text: str) -> str:
    """Without line breaks and indentation: reasons come from clouds and from gRPC."""
    return " ".join(text.split())
