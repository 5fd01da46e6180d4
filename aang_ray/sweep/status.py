"""`aang status`: how far a sweep or a run is, from its store, while it runs and after it died; its cluster's nodes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs
from rich.console import Console
from rich.table import Table

from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.store.files import Location, open_location
from aang_ray.sweep.cluster import NoAnswer, Node, ask, describe_nodes, one_line, own_cluster
from aang_ray.sweep.plan import duration
from aang_ray.sweep.progress import FOLDER, CellProgress

SILENT_SECONDS = 90.0
"""A driver that has not written for longer is taken for dead: four of its longest pauses, and delays of clocks."""

CellState = Literal["done", "running", "stopped", "cut", "failed", "waiting"]
"""`stopped`: it ran when its driver stopped or died; `cut`: a scheduler ended it early, or will continue it."""

STATES: tuple[CellState, ...] = ("done", "running", "stopped", "cut", "failed", "waiting")
"""In the order in which they are shown."""


@dataclass(frozen=True)
class CellStatus:
    """One cell: what its driver wrote last, and its row, if it has one."""

    progress: CellProgress
    state: CellState
    row: Mapping[str, Any] | None


@dataclass(frozen=True)
class SweepStatus:
    """A sweep at one moment."""

    name: str
    """Name of the sweep file, without its folder and suffix."""
    started_at: str
    alive: bool
    """Whether its driver runs, as far as one can tell."""
    silent: float
    """Seconds since the driver wrote last."""
    cells: tuple[CellStatus, ...]

    def having(self, *states: CellState) -> list[CellStatus]:
        """The cells in some states."""
        return [cell for cell in self.cells if cell.state in states]

    @property
    def seconds_left(self) -> float | None:
        """(Texts left) x (seconds a text) / (trials that run now); None when nothing runs or nothing was measured.

        Seconds a text are those of all done cells, and of the running ones up to their last evaluation. Waiting and
        stopped cells count whole, though a stopped one may continue from a checkpoint; failed ones do not count,
        because only the next start runs them again. With early stopping it is an upper bound.
        """
        running = self.having("running")
        past = [_past(cell) for cell in self.having("done", "running")]
        texts, seconds = sum(work for work, _ in past), sum(spent for _, spent in past)
        if not running or texts <= 0 or seconds <= 0:
            return None
        left = sum(cell.progress.work - _past(cell)[0] for cell in running)
        left += sum(cell.progress.work for cell in self.having("waiting", "stopped"))
        return left * seconds / texts / len(running)


def read_status(store: Store, sweep: Path | None = None, now: datetime | None = None) -> SweepStatus:
    """Read the sweep that was last started on a store, of a sweep file's name if one is given.

    A done row decides, whatever the driver wrote. A trial of a living driver is running, also where an earlier attempt
    left a failed row.

    Raises:
        UserError: where no such sweep was started.
    """
    content = _newest(open_location(store.uri), sweep)
    written = datetime.fromisoformat(content["updated_at"])
    silent = max(0.0, ((now or datetime.now(UTC)) - written).total_seconds())  # not negative where clocks differ
    alive = not content["ended"] and silent <= SILENT_SECONDS
    cells = [_cell(cell) for cell in content["cells"]]
    names = {cell.cell for cell in cells}
    rows = {row["cell"]: row for row in store.results().to_pylist() if row["cell"] in names}
    return SweepStatus(
        content["name"],
        content["started_at"],
        alive,
        silent,
        tuple(CellStatus(cell, _state(cell, rows.get(cell.cell), alive), rows.get(cell.cell)) for cell in cells),
    )


def show_status(status: SweepStatus, console: Console, now: datetime | None = None) -> None:
    """Print counts, hosts, the time left, the trials that run or stopped, and the errors of those that failed."""

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    counts = Counter(cell.state for cell in status.cells)
    parts = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    line(f"{status.name}: {len(status.cells)} cells: {parts}")
    hosts = Counter(cell.progress.host for cell in status.having("running") if cell.progress.host)
    if hosts:
        line(f"trials run on {', '.join(f'{host} ({trials})' for host, trials in sorted(hosts.items()))}")
    line(_time_left(status))
    active = [*status.having("running"), *status.having("stopped")]
    if active:
        console.print(_table(active, now or datetime.now(UTC)))
    for cell in status.having("failed"):
        error = cell.row["error"] if cell.row is not None else None
        line(f"failed: {cell.progress.title}: {error}")


def _newest(location: Location, sweep: Path | None) -> Mapping[str, Any]:
    """The content of the progress file of the sweep that was last started."""
    folder = fs.FileSelector(location.path(*FOLDER), allow_not_found=True)
    infos = location.filesystem.get_file_info(folder)
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File and info.path.endswith(".json"))
    with ThreadPoolExecutor() as pool:  # the files are small: waiting for each is what takes time
        found = [content for content in pool.map(lambda path: _read(location, path), paths) if content is not None]
    wanted = [content for content in found if sweep is None or content["name"] == sweep.stem]
    if not wanted and found:
        names = ", ".join(sorted({content["name"] for content in found}))
        raise UserError(f"store {location.uri} knows no sweep {sweep}; it knows {names}")
    if not wanted:
        raise UserError(f"no sweep was started on store {location.uri}; start one with `aang sweep FILE --store URI`")
    return max(wanted, key=lambda content: str(content["started_at"]))


def _read(location: Location, path: str) -> Mapping[str, Any] | None:
    """The content of a progress file; None for one of another version, and for one that has vanished meanwhile."""
    try:
        with location.filesystem.open_input_file(path) as stream:
            content: Mapping[str, Any] = json.loads(stream.read())
        datetime.fromisoformat(content["updated_at"])
        _ = [content[name] for name in ("name", "started_at", "ended")], [_cell(cell) for cell in content["cells"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return content


def _cell(content: Mapping[str, Any]) -> CellProgress:
    """Fields that a newer version has added are left out."""
    return CellProgress(**{field.name: content[field.name] for field in fields(CellProgress)})


def _state(progress: CellProgress, row: Mapping[str, Any] | None, alive: bool) -> CellState:
    if row is not None and row["status"] == "done":
        return "done"
    if progress.state in ("running", "stopped"):  # since it began again, an earlier row of the cell says nothing
        return "running" if alive and progress.state == "running" else "stopped"
    if row is not None:
        return "cut" if row["status"] == "cut" else "failed"
    return "waiting"


def _past(cell: CellStatus) -> tuple[float, float]:
    """Texts that went through the body of a cell, and the seconds they took."""
    progress = cell.progress
    if cell.state == "done" and cell.row is not None:
        return progress.work * min(cell.row["steps"] / max(progress.steps, 1), 1.0), cell.row["seconds"]
    return progress.work * min(progress.step / max(progress.steps, 1), 1.0), progress.seconds


def _time_left(status: SweepStatus) -> str:
    if not status.having("running"):
        if not status.having("waiting", "stopped"):
            return "nothing runs, nothing is left to run"
        if status.alive:
            return "no trial runs yet: they wait for resources, or are being started"
        return f"not running: its process last wrote {duration(status.silent)} ago; start it again to go on"
    left = status.seconds_left
    return "time left: not known before the first evaluation" if left is None else f"about {duration(left)} left"


def _table(cells: Sequence[CellStatus], now: datetime) -> Table:
    table = Table("cell", "state", "step", "dev", "host", "last report")
    for cell in cells:
        progress = cell.progress
        score = "" if progress.score is None else f"{100 * progress.score:.2f} {progress.metric}"
        ago = ""
        if progress.updated_at:
            silent = (now - datetime.fromisoformat(progress.updated_at)).total_seconds()
            ago = f"{duration(max(silent, 0.0))} ago"
        step = f"{progress.step}/{progress.steps}"
        table.add_row(progress.title, cell.state, step, score, progress.host, ago)
    return table


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
    except NoAnswer as reason:
        return [f"the cluster at {address} does not answer: {reason}"]
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
    yield f"{describe_nodes(node.total_resources for node in up)}; {_use(up)}"
    if leaving:
        yield f"drained, going away: {describe_nodes(leaving)}"
    kinds = Counter(node.ray_node_type_name for node in autoscaler.pending_instances)
    for request in autoscaler.pending_instance_requests:
        kinds[request.ray_node_type_name] += request.count
    if kinds:
        yield f"being started: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
    yield from _failed_launches(autoscaler.failed_instance_requests, now)
    pending = ((request.request.resources_bundle, request.count) for request in cluster.pending_resource_requests)
    if waiting := _requested(pending, cluster.pending_gang_resource_requests):
        yield f"waiting for room: {waiting}"
    refusals = ((request.resources_bundle, 1) for request in autoscaler.infeasible_resource_requests)
    if refused := _requested(refusals, autoscaler.infeasible_gang_resource_requests):
        yield f"no node is added for {refused}: their number has reached its limit, or no type is large enough"


def _use(nodes: Sequence[Any]) -> str:
    """`7 of 8 CPU and 1.5 of 2 GPU in use`."""
    parts = []
    for name in ("CPU", "GPU"):
        total = sum(node.total_resources.get(name, 0.0) for node in nodes)
        free = sum(node.available_resources.get(name, 0.0) for node in nodes)
        if total or name == "CPU":
            parts.append(f"{round(total - free, 4):g} of {total:g} {name}")
    return " and ".join(parts) + " in use"


def _failed_launches(launches: Iterable[Any], now: float) -> Iterator[str]:
    """A line for each kind of node and reason: a node is requested again and again while there is no capacity."""
    counts: Counter[tuple[str, str]] = Counter()
    last: dict[tuple[str, str], int] = {}
    for launch in launches:
        key = (launch.ray_node_type_name, one_line(launch.reason))
        counts[key] += launch.count
        last[key] = max(last.get(key, 0), launch.failed_ts)
    for (kind, reason), count in sorted(counts.items()):
        ago = duration(max(now - last[kind, reason], 0.0))
        yield f"not started: {count} {kind}, {'the last ' if count > 1 else ''}{ago} ago: {reason}"


def _requested(singles: Iterable[tuple[Node, int]], gangs: Iterable[Any]) -> str:
    """`3 x 1 CPU, 1 x (2 x 0.99 CPU and 1 GPU)`; what is in brackets is placed whole or not at all."""
    counts: Counter[str] = Counter()
    for bundle, count in singles:
        if not any("_group_" in name for name in bundle):  # those wait for their placement group, not for a node
            counts[_amount(bundle)] += count
    for gang in gangs:
        bundles = Counter(_amount(request.resources_bundle) for request in gang.requests)
        counts[f"({_times(bundles)})" if bundles.total() > 1 else next(iter(bundles))] += 1
    return _times(counts)


def _amount(bundle: Node) -> str:
    """`4 CPU and 1 GPU`, other resources after them."""
    names = sorted(bundle, key=lambda name: (name not in ("CPU", "GPU"), name))
    return " and ".join(f"{bundle[name]:g} {name}" for name in names)


def _times(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))
