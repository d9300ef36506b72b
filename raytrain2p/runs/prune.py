"""`prune`: delete runs that are not needed any more. Without `--yes` it prints what it would delete, and why each other run stays."""

import argparse
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import PHASES, PHASES_BY_NAME, SWEEPS
from raytrain2p.config.secrets import masked
from raytrain2p.runs.output import human_age, human_bytes, print_json, print_table
from raytrain2p.runs.prune_plan import Candidate, Criteria, Remote, as_json, decide, read_candidates
from raytrain2p.runs.removal import (
    KEEP,
    InUseError,
    checkpoints_of,
    finish,
    freed_by,
    half_pruned,
    launch_files,
    leftovers,
    name_of,
    remove_checkpoints,
    remove_run,
)
from raytrain2p.runs.request import Request, reporting_root
from raytrain2p.runs.summary import SECONDS, seconds_of
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.damage import reading_once
from raytrain2p.tracking.find import find_run, run_directories
from raytrain2p.tracking.run import ROOT_TAG, RUN_FOLDERS, Run, beginning_launches, launch_record, original_of

# MLflow is imported where it is asked: its import takes 2 s, and `--without-mlflow` needs none of it.

RULE = f"""A run goes if it meets all of RUN, --phase, --status and --older-than that are given, and neither --keep-last nor
--keep-best keeps it. Whatever is given, a run stays that is tagged `{KEEP}` (`runs tag RUN --set {KEEP}`), registered as a
model, running or damaged, or that a run that stays needs: its aligner, the run that it began with, its sweep, the best trial of
a sweep. So does one of which MLflow lacks something, unless --mlflow is given."""
COLUMNS = ("run", "phase", "status", "age", "size", "")
HINTS = {
    "orphaned": "`python -m raytrain2p.runs reconcile` sets orphaned runs FAILED",
    "unsent": "`python -m raytrain2p.runs sync` sends what MLflow lacks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = RULE
    parser.add_argument("--phase", choices=[*map(str, PHASES), SWEEPS], help="runs of this phase, or sweeps")
    parser.add_argument(
        "--status", type=str.upper, action="append", default=[], choices=["FINISHED", "FAILED", "KILLED"], help="runs with it; several: any"
    )
    parser.add_argument("--older-than", type=age, metavar="AGE", help="runs that ended longer ago, as in 12h, 30d or 8w")
    parser.add_argument("--keep-last", type=count, metavar="N", help="keep the last N of each phase, whatever their status")
    parser.add_argument("--keep-best", type=count, metavar="K", help="keep the best K of each phase that FINISHED, by the metric of --by")
    parser.add_argument("--by", metavar="METRIC", help="its value at the best checkpoint, if that was chosen by it, else the last one")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--min", dest="mode", action="store_const", const="min", help="less of that metric is better (losses: the default)")
    mode.add_argument(
        "--max", dest="mode", action="store_const", const="max", help="more of it is better (recall, exact match: the default)"
    )
    parser.add_argument("--checkpoints-only", action="store_true", help="delete the checkpoints alone: the run cannot be resumed then")
    parser.add_argument(
        "--mlflow", action="store_true", help="delete the runs in MLflow, too; `mlflow gc` removes them and their artifacts"
    )
    parser.add_argument("--without-mlflow", action="store_true", help="do not ask MLflow what is tagged or registered there, nor tell it")
    parser.add_argument("--yes", action="store_true", help="do it")


def age(text: str) -> float:
    if (seconds := seconds_of(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an age: write 12h, 30d or 8w")
    return seconds


def count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def run(request: Request) -> int:
    """Print the plan, or do it. Returns 0, or 1 if a run is damaged or could not be deleted.

    Raises:
        InputError: the criteria choose nothing or contradict each other; MLflow cannot be asked; a name fits no run.
    """
    options, root = request.options, request.root
    check_options(request)
    with reading_once():
        unfinished, found = leftovers(root), read_candidates(root)
        if not found and not unfinished:
            raise request.nothing_here()
        criteria = read_criteria(request, unfinished)
        remote = {} if options.without_mlflow else ask_mlflow(found, request)
        sent_or_not = options.mlflow or options.without_mlflow or options.checkpoints_only  # whether MLflow has it all
        unsent = (lambda run: False) if sent_or_not else partial(is_unsent, request)
        decide(found, root, criteria, remote, options.checkpoints_only, unsent)
    for one in found:
        if one.damage:
            report(f"left alone, it is damaged: {one.damage}")
    failed = Pruning(request).all(found, unfinished, criteria) if options.yes else show(found, unfinished, criteria, request)
    return FAILED if failed or any(one.damage for one in found) else 0


def check_options(request: Request) -> None:
    """Check that the options choose something, and fit each other."""
    options, problems = request.options, list[Problem]()
    if not (request.names or options.status or options.older_than is not None or options.keep_last or options.keep_best):
        fix = "name runs, or give --older-than, --status, --keep-last or --keep-best"
        problems.append(Problem("prune", "nothing says which runs are to go", fix))
    if bool(options.keep_best) != bool(options.by):
        problems.append(Problem("--keep-best and --by", "need each other", "give both, as in --keep-best 3 --by val/loss"))
    if options.mode and not options.by:
        problems.append(Problem(f"--{options.mode}", "is about the metric of --by, which is missing", "add --keep-best K --by METRIC"))
    if options.mlflow and (options.without_mlflow or options.checkpoints_only):
        other = "--without-mlflow" if options.without_mlflow else "--checkpoints-only"
        problems.append(Problem("--mlflow", f"contradicts {other}", "leave one of them out"))
    if problems:
        raise InputError(problems)


def read_criteria(request: Request, unfinished: list[Path]) -> Criteria:
    """The criteria as they were given. A name may be that of a run whose deletion was interrupted.

    Raises:
        InputError: a name fits no run of this root, or several.
    """
    options, named, findings = request.options, set[Path](), Findings()
    for name in request.names:
        if Path(name).name and any(name_of(path).startswith(Path(name).name) for path in unfinished):
            continue
        with findings:
            path = find_run(request.root, RUN_FOLDERS, name, "RUN", report).path
            if path.parent.parent.resolve() != Path(request.root).resolve():
                raise InputError(
                    Problem(f"RUN {name}", f"is not in output.root={request.root}", "set output.root to the one that it is in")
                )
            named.add(path.resolve())
    findings.raise_any()
    phase = PHASES[int(options.phase)].name if options.phase in map(str, PHASES) else options.phase
    return Criteria(
        frozenset(named) if request.names else None,
        phase,
        frozenset(options.status),
        options.older_than,
        options.keep_last,
        options.keep_best,
        options.by or "",
        options.mode or "",
    )


def ask_mlflow(found: list[Candidate], request: Request) -> dict[str, Remote]:
    """What the stores of these runs have, by run ID: of runs that are registered or tagged, of damaged ones, and of those of other roots.

    Raises:
        InputError: a store does not answer, or the one that was given is another: what is registered or tagged is not known.
    """
    from raytrain2p.tracking.mlflow_runs import our_runs, registered_versions

    mark = '"' if "'" in request.root else "'"
    conditions = [f"tags.{KEEP} LIKE '%'", f"tags.`{ROOT_TAG}` != {mark}{request.root}{mark}"]
    if damaged := [f"'{one.run_id}'" for one in found if one.damage]:
        conditions.append(f"attributes.run_id IN ({', '.join(damaged)})")
    uris = [request.uri] if request.uri else sorted({one.run.tracking_uri for one in found if one.run is not None})
    remote, findings = dict[str, Remote](), Findings()
    for uri in uris:
        try:
            versions = registered_versions(uri)
            remote |= {run_id: Remote({}, {}, True) for run_id in versions}
            others = {one.run_id for one in found if one.run is not None and one.run.tracking_uri != masked(uri)} if request.uri else set()
            if others and (lacking := others - {one.run_id for one in our_runs(uri)}):
                what = f"does not have {len(lacking)} of these runs, such as {min(lacking)}: what protects them is not known"
                findings.add(Problem(f"tracking.uri={masked(uri)}", what, "give the store that has them, or --without-mlflow"))
            for one in chain(*(our_runs(uri, condition) for condition in conditions)):
                remote[one.run_id] = Remote(one.tags, one.params, one.run_id in versions)
        except StorageError as error:
            what = f"cannot be asked what is tagged `{KEEP}` or registered ({error})"
            fix = "give tracking.uri=URI of where it is now, or --without-mlflow: then what the directories say is all that counts"
            findings.add(Problem(f"tracking.uri={masked(uri)}", what, fix))
    findings.raise_any()
    return remote


def is_unsent(request: Request, run: Run) -> bool:
    """Whether MLflow has a run of this directory, which stays, and lacks something of it.

    Raises:
        InputError: MLflow does not answer any more.
    """
    from raytrain2p.tracking.mlflow_runs import our_runs
    from raytrain2p.tracking.mlflow_sync import MlflowSync

    uri = request.uri or run.tracking_uri
    if original_of(run) is not None or MlflowSync(run, uri).complete():
        return False
    try:
        return any(one.lifecycle == "active" for one in our_runs(uri, f"attributes.run_id = '{run.run_id}'"))
    except StorageError as error:
        raise InputError(Problem(f"tracking.uri={masked(uri)}", f"does not answer any more ({error})", "try again")) from None


def show(found: list[Candidate], unfinished: list[Path], criteria: Criteria, request: Request) -> int:
    """Print what would be done."""
    options, root = request.options, request.root
    going = [one for one in found if not one.why]
    freed = freed_by(path for one in going for path in paths_of(one, root, options.checkpoints_only))
    if options.json:
        print_json(
            {
                "rule": sentence(criteria),
                "done": False,
                "bytes": freed,
                "unfinished": unfinished,
                "runs": [as_json(one) for one in found],
            }
        )
        return 0
    say(sentence(criteria))
    what = "delete its checkpoints" if options.checkpoints_only else "delete"
    rows = []
    for one in found:
        status, made, size = (one.summary.status, one.summary.timestamp, one.summary.bytes) if one.summary else ("", "", None)
        rows.append([one.run_id[:8], one.phase, status, human_age(made), human_bytes(size), f"stays: {one.why}" if one.why else what])
    print_table(COLUMNS, rows)
    for why, hint in HINTS.items():
        if any(one.why == why for one in found):
            say(hint)
    if unfinished:
        say(f"{len(unfinished)} deletions were interrupted; --yes finishes them")
    things = "runs" if not options.checkpoints_only else "runs' checkpoints"
    say(f"{len(going)} of {len(found)} {things} would be deleted, which frees {human_bytes(freed)}. Add --yes to do it")
    return 0


def paths_of(one: Candidate, root: str, checkpoints_only: bool) -> list[Path]:
    """All that is deleted of a run."""
    assert one.run is not None
    return list(checkpoints_of(one.run)) if checkpoints_only else [one.path, *launch_files(one.run, root)]


def sentence(criteria: Criteria) -> str:
    """The rule in words."""
    meets = [
        "is one of those named" if criteria.named is not None else "",
        f"is of {criteria.phase}" if criteria.phase else "",
        f"is {' or '.join(sorted(criteria.statuses))}" if criteria.statuses else "",
        f"ended more than {in_words(criteria.older_than)} ago" if criteria.older_than is not None else "",
    ]
    kept = [
        f"is not one of the last {criteria.keep_last} of its phase" if criteria.keep_last else "",
        f"is not one of the best {criteria.keep_best} of its phase by {criteria.by}" if criteria.keep_best else "",
    ]
    return f"A run goes if it {' and '.join(filter(None, [*meets, *kept]))}"


def in_words(seconds: float) -> str:
    return f"{seconds / SECONDS['d']:g} days" if seconds >= SECONDS["d"] else f"{seconds / SECONDS['h']:g} hours"


def changed_since(one: Candidate, found: list[Candidate], root: str) -> str:
    """Why a run stays though the plan lets it go: what happened since. Deleting large runs takes minutes."""
    if one.run is not None and one.run.files.read_status() != one.status:
        return "it was resumed meanwhile"
    new = {*run_directories(root, RUN_FOLDERS)} - {each.path for each in found}
    if one.phase != SWEEPS and (new or beginning_launches(root)):
        return f"a run has begun meanwhile, which may need its {PHASES_BY_NAME[one.phase].artifact}"
    return ""


class Pruning:
    """Does what the plan says."""

    def __init__(self, request: Request) -> None:
        self.request, self.options, self.root = request, request.options, request.root
        self.freed, self.failed, self.deleted = 0, 0, 0

    def all(self, found: list[Candidate], unfinished: list[Path], criteria: Criteria) -> int:
        """Finish what was interrupted, delete the runs, and print what was done. Returns how many failed.

        Raises:
            InputError: another prune is under way.
        """
        lock = Lock(launch_record(self.root, "any").with_name(".prune.lock"))
        with reporting_root(self.root, "nothing was deleted"), ExitStack() as stack:
            lock.path.parent.mkdir(exist_ok=True)
            holder = stack.enter_context(lock.held())
            if holder is not None:
                raise InputError(Problem(f"output.root={self.root}", f"another prune is under way: {holder}", "wait for its end"))
            unfinished, found = ([*filter(os.path.lexists, unfinished)], [one for one in found if os.path.lexists(one.path)])
            for path in unfinished:  # another prune may have deleted some since they were listed
                self._step(name_of(path)[:8], path.parent.name, [path], partial(finish, path, self.root, self._forget))
            for one in found:
                if one.run is None:
                    continue
                changed = changed_since(one, found, self.root) if not one.why else ""
                if changed:
                    one.why = changed
                    report(f"{one.phase} {one.run_id[:8]}  stays: {one.why}")
                elif not one.why and not self.options.checkpoints_only:
                    one.why = self._step(one.run_id[:8], one.phase, paths_of(one, self.root, False), partial(self._remove, one.run))
                elif not one.why or half_pruned(one.run):
                    paths = list(checkpoints_of(one.run))
                    one.why = self._step(one.run_id[:8], one.phase, paths, partial(self._remove_checkpoints, one.run)) or one.why
        if self.options.json:
            done = {"rule": sentence(criteria), "done": True, "bytes": self.freed, "failed": self.failed}
            print_json(done | {"runs": [as_json(one) for one in found]})
        else:
            what = "runs' checkpoints were deleted" if self.options.checkpoints_only else "runs were deleted"
            say(f"{self.deleted} {what}, which freed {human_bytes(self.freed)}{f'; {self.failed} failed' if self.failed else ''}")
            if self.options.mlflow and self.deleted:
                say("they are deleted in MLflow, too, where they can be restored until `mlflow gc` removes them and their artifacts")
        return self.failed

    def _step(self, run_id: str, phase: str, paths: list[Path], remove: Callable[[], None]) -> str:
        """Returns why the run stays; empty if it was deleted."""
        size = freed_by(paths)
        try:
            remove()
        except InUseError as error:
            report(f"{phase} {run_id}  stays: {error}")
            return str(error)
        except (StorageError, OSError) as error:
            self.failed += 1
            report(f"{phase} {run_id}  {error}; repeat the command to finish")
            return str(error)
        self.freed += size
        self.deleted += 1
        if not self.options.json:
            say(f"{phase} {run_id}  deleted, {human_bytes(size)}")
        return ""

    def _remove(self, run: Run) -> None:
        remove_run(run, self.root, self.options.mlflow, self._forget)

    def _remove_checkpoints(self, run: Run) -> None:
        remove_checkpoints(run, self.root, self._send)

    def _forget(self, run: Run, delete: bool) -> None:
        """Record in MLflow that the directory is gone."""
        if self.options.without_mlflow:
            return
        from raytrain2p.tracking.mlflow_runs import one_line_errors
        from raytrain2p.tracking.mlflow_store import client_of, record_pruned

        uri = self.request.uri or run.tracking_uri
        with one_line_errors(uri):
            record_pruned(client_of(uri), run.run_id, delete)

    def _send(self, run: Run) -> None:
        """Send the tag that says what was deleted; if MLflow is away, `sync` does later."""
        if self.options.without_mlflow or original_of(run) is not None:
            return
        from raytrain2p.tracking.mlflow_runs import one_line_errors
        from raytrain2p.tracking.mlflow_sync import MlflowSync

        uri = self.request.uri or run.tracking_uri
        try:
            with one_line_errors(uri):
                MlflowSync(run, uri).send()
        except StorageError as error:
            report(f"{run.phase} {run.run_id[:8]}  MLflow lacks its tag, which `runs sync` sends later: {error}")
