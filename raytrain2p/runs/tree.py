"""`tree`: which runs came from which: an aligner's phase 2 runs, warm starts, registered versions, a sweep's trials."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import SWEEPS
from raytrain2p.runs.known import add_mlflow_argument, known_runs, named
from raytrain2p.runs.lineage import origin_paths, parents
from raytrain2p.runs.output import human_age, number, print_json
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import RunSummary
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking.damage import reading_once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-mlflow", action="store_true", help="without registered versions, which MLflow alone knows: faster")
    add_mlflow_argument(parser)


@dataclass(frozen=True)
class Node:
    """A run with what came from it; or, if the run is not here, what is recorded of it."""

    run: RunSummary | None
    recorded: str
    registered: Sequence[str]
    children: Sequence["Node"]

    def plain(self) -> dict[str, Any]:
        keys = ("run_id", "phase", "status", "timestamp", "monitor", "best", "directory")
        known = {key: getattr(self.run, key) for key in keys} if self.run is not None else {"missing": self.recorded}
        return known | {"registered": list(self.registered), "children": [child.plain() for child in self.children]}

    def only(self, wanted: set[str]) -> "Node | None":
        """This node, if one of these runs is in it; of its children, those that lead to one."""
        if self.run is not None and self.run.run_id in wanted:
            return self
        kept = [found for child in self.children if (found := child.only(wanted)) is not None]
        return Node(self.run, self.recorded, self.registered, kept) if kept else None


def run(request: Request) -> int:
    """Print the trees.

    Raises:
        InputError: a name fits no run; there are no runs at all; or MLflow does not answer.
    """
    with reading_once():
        runs, damaged = known_runs(replace(request, names=[]))
    chosen = {one.run_id for one in named(runs, request.names)}
    registered = {} if request.options.no_mlflow else registered_in(request, runs)
    trees = [found for node in forest(runs, registered) if (found := node.only(chosen)) is not None]
    if request.options.json:
        print_json([tree.plain() for tree in trees])
    else:
        for tree in trees:
            for line in drawn(tree):
                say(line)
    for line in damaged:
        report(line)
    return FAILED if damaged else 0


def registered_in(request: Request, runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """The registered versions of each run, by run ID. A store that does not answer is reported in a line."""
    from raytrain2p.tracking.mlflow_runs import registered_versions

    versions = dict[str, list[str]]()
    for uri in dict.fromkeys([request.uri] if request.uri else [run.tracking_uri for run in runs] or [request.settings.tracking.uri]):
        try:
            versions |= registered_versions(uri)
        except StorageError as error:
            report(f"without registered versions: {error}")
    return versions


def forest(runs: Sequence[RunSummary], registered: Mapping[str, Sequence[str]]) -> list[Node]:
    """All trees, the oldest first. Runs whose parent is not here are under what is recorded of it."""
    above, here = parents(runs), {run.run_id for run in runs}
    below, missing = dict[str, list[RunSummary]](), dict[str, list[RunSummary]]()
    for run in runs:
        parent = above.get(run.run_id)
        if parent in here and parent is not None:
            below.setdefault(parent, []).append(run)
        elif parent is not None or origin_paths(run):
            setting, path = (SWEEPS, parent) if run.sweep is not None else next(iter(origin_paths(run).items()))
            missing.setdefault(f"{setting.removeprefix('model.')} {path}", []).append(run)

    def node(run: RunSummary) -> Node:
        return Node(run, "", registered.get(run.run_id, ()), [node(child) for child in below.get(run.run_id, ())])

    hanging = {run.run_id for found in (*below.values(), *missing.values()) for run in found}
    roots = [node(run) for run in runs if run.run_id not in hanging]
    return roots + [Node(None, recorded, (), [node(run) for run in found]) for recorded, found in missing.items()]


def drawn(tree: Node, first: str = "", rest: str = "") -> Iterator[str]:
    """The lines of a tree.

    Args:
        first: what is before its own line; `rest`: before the lines below.
    """
    yield first + (label(tree.run) if tree.run is not None else f"{tree.recorded} (not here)")
    for version in tree.registered:
        yield f"{rest}{'├─' if tree.children or version != tree.registered[-1] else '└─'} registered: {version}"
    for child in tree.children:
        branch, stem = ("└─ ", "   ") if child is tree.children[-1] else ("├─ ", "│  ")
        yield from drawn(child, rest + branch, rest + stem)


def label(run: RunSummary) -> str:
    """A run in a line."""
    best = f"{run.monitor} {number(run.best)}" if run.best is not None else ""
    return "  ".join(filter(None, [run.run_id[:8], run.phase, run.status, human_age(run.timestamp), best]))
