"""`verify`: every run has its directory, its MLflow run and whole files, and both hold the same."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.runs.checks_in_mlflow import check_artifacts, check_points, check_record
from raytrain2p.runs.checks_of_lineage import LineageChecks, check_launch_of, check_launches, check_without_directory
from raytrain2p.runs.checks_on_disk import check_content, check_small_files
from raytrain2p.runs.difference import RECONCILE, REPAIRED, SEND_AGAIN, Difference, difference, readable
from raytrain2p.runs.output import human_bytes, print_json
from raytrain2p.runs.reconcile import reconcile, reconcile_unborn
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import size_of
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking.damage import DamagedFileError, reading_once
from raytrain2p.tracking.find import find_run, is_alive, is_empty, read_run, run_directories
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.mlflow_errors import store_problem
from raytrain2p.tracking.mlflow_runs import RemoteRun, our_runs
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, store_exists
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import RUN_FOLDERS, Run, has_launches, original_of
from raytrain2p.tracking.run_directory import RunDirectory

SECONDS_BETWEEN_LINES = 0.2  # of the progress in a terminal
CLEAR = "\r\x1b[K"  # the line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fast",
        action="store_true",
        help="leave out what takes long: points one by one, digests, checkpoints, plots and downloads",
    )
    parser.add_argument(
        "--repair", action="store_true", help="do what `sync` and `reconcile` can, send what MLflow has lost, and verify again"
    )


@dataclass
class Verified:
    """What was verified, and what was found.

    Args:
        refused: what MLflow will never take, a line each: it differs, and is no difference.
        under_way: runs that a process works on, which were checked as far as they are.
        points, bytes: that were read.
    """

    differences: list[Difference] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    runs: int = 0
    under_way: int = 0
    points: int = 0
    bytes: int = 0
    seconds: float = 0.0


def run(request: Request) -> int:
    """Verify the runs named, or all, and print each difference. Returns 0 if there is none.

    Raises:
        InputError: a name fits no run; or there are no runs at all.
    """
    findings = verify(request)
    if request.options.repair and any(one.fix in REPAIRED for one in findings.differences):
        repair(request, findings.differences)
        findings = verify(request)
    if request.options.json:
        print_json(findings)
    else:
        for one in findings.differences:
            say(str(one))
        for line in findings.refused:
            say(line)
        say(summary(findings, request.options.fast))
    return FAILED if findings.differences else 0


def verify(request: Request) -> Verified:
    """Check what is there, run by run."""
    began, found = time.monotonic(), Verified()
    runs, everything = runs_of(request, found), not request.names
    stores = Stores(request, runs, found)
    lineage = LineageChecks(request.root, deep=not request.options.fast)
    if everything:
        found.differences += check_launches(request.root)
    for each in with_progress(runs):
        with reading_once():
            found.differences += dict.fromkeys(readable(each, check(each, request, stores, lineage, found)))
    if everything:
        here = {RunDirectory(path).run_id for path in run_directories(request.root, RUN_FOLDERS) if not is_empty(path)}
        here |= {one.run_id for one in found.differences}
        found.differences += check_without_directory(request.root, stores.all_runs(), here)
    found.runs, found.seconds = len(runs), time.monotonic() - began
    return found


def check(run: Run, request: Request, stores: "Stores", lineage: LineageChecks, found: Verified) -> Iterator[Difference]:
    """All checks of one run. What a run under way still writes, or sends, is not a difference."""
    alive, deep = is_alive(run, request.root), not request.options.fast
    found.under_way += alive
    on_disk = list(check_small_files(run, alive))
    if deep:
        on_disk += check_content(run, alive)
        found.points += sum(1 for _ in read_points(run.files.metrics))
        found.bytes += size_of(run.path)
    yield from on_disk
    if (original := original_of(run)) is not None:
        yield difference(run, run.directory, f"is a copy; the run itself is {original}", "remove it, or begin a new run")
        return
    orphaned = not alive and run.files.read_status()["status"] == "RUNNING"
    if orphaned:
        yield difference(run, run.files.status, "has RUNNING, and no process works on it", RECONCILE)
    yield from check_launch_of(run)
    yield from readable(run, lineage.check(run))
    yield from stores.check(run, alive or orphaned, deep, {one.where for one in on_disk})


def runs_of(request: Request, found: Verified) -> list[Run]:
    """The runs named, or all; a damaged run.json is a difference.

    Raises:
        InputError: a name fits no run; or there are no runs at all.
    """
    directories = [path for path in run_directories(request.root, RUN_FOLDERS) if not is_empty(path)] if not request.names else []
    if not request.names and not directories and not has_launches(request.root):
        raise request.nothing_here()
    named = [partial(find_run, request.root, RUN_FOLDERS, name, "RUN") for name in request.names]
    runs = list[Run]()
    for read in named or [partial(read_run, directory) for directory in directories]:
        try:
            runs.append(read())
        except DamagedFileError as error:
            problem, files = error.problems[0], RunDirectory(Path(error.problems[0].where).parent)
            found.differences.append(Difference(files.path.parent.name, files.run_id, problem.where, problem.what, problem.fix))
    return runs


class Stores:
    """The MLflow stores that runs were sent to. Each is asked once for all of its runs, which come page by page while others are
    checked; one that does not answer is reported once, and not asked again.

    Args:
        request: with the tracking URI, if it was given; else each run has its own on record.
    """

    def __init__(self, request: Request, runs: list[Run], found: Verified) -> None:
        self.given, self.found = request.uri, found
        uris = {self.uri_of(run) for run in runs}
        uri = request.settings.tracking.uri
        if not request.names and uri not in uris and store_exists(uri) and (request.uri or not runs):
            uris.add(uri)
        self.coming = {uri: our_runs(uri) for uri in sorted(uris)}
        self.remotes: dict[str, dict[str, RemoteRun]] = {uri: {} for uri in self.coming}  # that came

    def uri_of(self, run: Run) -> str:
        return self.given or run.tracking_uri

    def receive(self, uri: str, until: str = "") -> None:
        """Receive runs until that one has come; else all."""
        try:
            for remote in self.coming[uri]:
                self.remotes[uri][remote.run_id] = remote
                if remote.run_id == until:
                    return
        except StorageError as error:
            self.not_compared(uri, str(error))

    def not_compared(self, uri: str, why: str) -> None:
        del self.coming[uri]
        self.found.differences.append(Difference("MLflow", "", uri, f"was not compared: {why}", "verify again when it answers"))

    def all_runs(self) -> Iterator[RemoteRun]:
        for uri in [*self.coming]:
            self.receive(uri)
        for uri in self.coming:
            yield from self.remotes[uri].values()

    def check(self, run: Run, unfinished: bool, deep: bool, damaged_files: set[str]) -> Iterator[Difference]:
        """A run against its store.

        Args:
            unfinished: what MLflow lacks is sent by the process that works on it, or by `reconcile`.
        """
        uri = self.uri_of(run)
        if uri in self.coming and run.run_id not in self.remotes[uri]:
            self.receive(uri, run.run_id)
        if uri not in self.coming:
            return
        remote, sync = self.remotes[uri].get(run.run_id), MlflowSync(run, uri)
        for name, reason in sync.refusals().items():
            self.found.refused.append(f"{run.phase} {run.run_id[:8]}  MLflow does not take {name} ({reason}); the directory has it")
        yield from check_record(run, sync, remote, unfinished)
        if not deep or remote is None or remote.lifecycle == "deleted" or sync.damage:
            return
        try:
            yield from check_points(run, sync, remote, unfinished or str(run.files.metrics) in damaged_files)
            if not unfinished:
                yield from check_artifacts(run, sync, remote, damaged_files)
        except STORE_ERRORS as error:
            if str(getattr(error, "filename", "")).startswith(run.directory):
                raise  # the run's own disk
            self.not_compared(uri, str(store_problem(error)))


def repair(request: Request, differences: list[Difference]) -> None:
    """Do what `sync` and `reconcile` do for the runs that need it; of those of which MLflow has lost something, all is sent again that it
    does not have. Nothing is deleted, and nothing on disk is overwritten by what MLflow has."""
    needed = {one.run_id for one in differences if one.fix in REPAIRED}
    again = {one.run_id for one in differences if one.fix == SEND_AGAIN}
    uri = request.settings.tracking.uri
    runs = runs_of(request, Verified())
    if not request.names:
        for store in dict.fromkeys([*(request.uri or each.tracking_uri for each in runs), uri]):
            if store_exists(store):
                reconcile_unborn(request.root, store, report)
    for each in runs:
        try:
            if each.run_id not in needed or original_of(each) is not None:
                continue
            if each.run_id in again and not is_alive(each, request.root):
                with each.files.lock.held(5.0) as holder:
                    if holder is None:
                        MlflowSync(each, request.uri or each.tracking_uri).forget()
            reconcile(each, request.root, request.uri, report)
        except DamagedFileError as error:
            report(f"{each.phase} {each.run_id[:8]}  damaged: {error.line}")


def with_progress(runs: list[Run]) -> Iterator[Run]:
    """The runs, one by one; in a terminal a line shows how far it is."""
    shown_at = 0.0
    for number, each in enumerate(runs, 1):
        if sys.stderr.isatty() and time.monotonic() - shown_at >= SECONDS_BETWEEN_LINES:
            shown_at = time.monotonic()
            print(f"{CLEAR}verifying run {number:,} of {len(runs):,}", end="", file=sys.stderr, flush=True)
        yield each
    if shown_at:
        print(CLEAR, end="", file=sys.stderr, flush=True)


def summary(found: Verified, fast: bool) -> str:
    """As in `1,000 runs, 300,000 points, 1.2 GB in 41 s: nothing differs`."""
    read = "" if fast else f", {found.points:,} points, {human_bytes(found.bytes)}"
    under_way = f"; {found.under_way} under way" if found.under_way else ""
    count = len(found.differences)
    verdict = "nothing differs" if not count else f"{count:,} difference{'s' if count > 1 else ''}"
    return f"{found.runs:,} run{'' if found.runs == 1 else 's'}{read} in {found.seconds:.3g} s{under_way}: {verdict}"
