"""Which runs `prune` deletes, and why each other one stays."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from raytrain2p.config import InputError, Problem, flatten_tree
from raytrain2p.config.phases import ALIGNMENT, PHASES_BY_NAME, SWEEPS
from raytrain2p.runs.lineage import ORIGINS
from raytrain2p.runs.removal import KEEP, is_in_place
from raytrain2p.runs.summary import ORPHANED, RunSummary, direction, origin_digest, origin_of, summary_of
from raytrain2p.tracking.damage import DamagedFileError, read_as
from raytrain2p.tracking.find import is_alive, is_empty, read_run, run_directories
from raytrain2p.tracking.run import PRUNED_DIRECTORY, PRUNED_TAG, ROOT_TAG, RUN_FOLDERS, SWEEP_TAG, Run, beginning_launches
from raytrain2p.tracking.run_directory import RunDirectory, RunStatus


@dataclass(frozen=True)
class Criteria:
    """A run goes if it meets all of the first group that are given, and none of `keep_last` and `keep_best` keeps it.

    Args:
        named: directories of the runs that were named; None if none was.
        phase: name of a phase, or `sweeps`.
        older_than: seconds since the run ended, or, if it did not, since it was made.
        keep_last: this many of each phase, whatever their status.
        keep_best: this many finished ones of each phase, by the metric `by`.
        mode: `min` or `max`: which values of that metric are better; empty if its name says it.
    """

    named: frozenset[Path] | None = None
    phase: str | None = None
    statuses: frozenset[str] = frozenset()
    older_than: float | None = None
    keep_last: int | None = None
    keep_best: int | None = None
    by: str = ""
    mode: str = ""


class Remote(NamedTuple):
    """What MLflow has of a run."""

    tags: Mapping[str, str]
    params: Mapping[str, str]
    registered: bool


NOTHING = Remote({}, {}, False)


@dataclass
class Candidate:
    """A run directory.

    Args:
        summary: None if a file of it is damaged.
        status: as it was when that was made.
        why: why it stays; empty if it goes.
        damage: a line about the damaged file.
    """

    path: Path
    phase: str
    run: Run | None = None
    summary: RunSummary | None = None
    status: RunStatus | None = None
    why: str = ""
    damage: str = ""

    @property
    def run_id(self) -> str:
        return RunDirectory(self.path).run_id


def read_candidates(root: str) -> list[Candidate]:
    """All runs under an output root, the oldest first."""
    found = []
    for path in run_directories(root, RUN_FOLDERS):
        if is_empty(path):
            continue
        one = Candidate(path, path.parent.name)
        try:
            run = read_run(path)
            one.status = run.files.read_status()
            one.summary, one.run = summary_of(run, root), run
        except DamagedFileError as error:
            one.why, one.damage = "damaged", error.line
        found.append(one)
    return found


def decide(
    found: list[Candidate],
    root: str,
    criteria: Criteria,
    remote: Mapping[str, Remote],
    checkpoints_only: bool = False,
    unsent: Callable[[Run], bool] = lambda run: False,
) -> None:
    """Set why each run stays, where it does.

    Args:
        found: all runs of the root.
        remote: what MLflow has, by run ID.
        unsent: whether a run's directory has what its run in MLflow lacks, and would never get.

    Raises:
        InputError: the metric to choose the best by is not that of any run, or nothing says whether less of it is better.
    """
    last, best, begins = _last(found, criteria), _best(found, criteria), beginning_launches(root)
    for one in found:
        if one.run is not None and one.summary is not None:
            known = remote.get(one.run_id, NOTHING)
            one.why = _protected(one, one.summary, root, known) or _not_chosen(one.summary, one.path, criteria)
            one.why = one.why or ("last" if one.path in last else best.get(one.path, ""))
            if not one.why and checkpoints_only and not one.run.checkpoints.is_dir():
                one.why = "no checkpoints"
            if not one.why and is_alive(one.run, root):
                one.why = "running"
            if not one.why and unsent(one.run):
                one.why = "unsent"
            if not one.why and one.phase != SWEEPS and not checkpoints_only and begins:
                one.why = f"parent of launch {begins[0]}?"
    _keep_parents(found, root, remote)


def _protected(one: Candidate, summary: RunSummary, root: str, known: Remote) -> str:
    """Why a run never goes, whatever the criteria are."""
    if summary.status in ("RUNNING", ORPHANED):
        return summary.status.lower()
    if not is_in_place(one.path, root):
        return "link"
    if KEEP in summary.tags or KEEP in known.tags:
        return "tag"
    return "registered" if known.registered else ""


def _not_chosen(summary: RunSummary, path: Path, criteria: Criteria) -> str:
    if criteria.named is not None and path.resolve() not in criteria.named:
        return "not named"
    if criteria.phase not in (None, summary.phase):
        return "phase"
    if criteria.statuses and summary.status not in criteria.statuses:
        return "status"
    if criteria.older_than is not None and time.time() - ended(path, summary) < criteria.older_than:
        return "newer"
    return ""


def ended(path: Path, summary: RunSummary) -> float:
    """When a run ended, or was made, whichever is later; seconds since 1970."""
    made = 0.0
    with suppress(ValueError, OverflowError):
        made = time.mktime(time.strptime(summary.timestamp, "%Y%m%d_%H%M%S"))
    return max(made, RunDirectory(path).read_status()["at"])


def _last(found: list[Candidate], criteria: Criteria) -> set[Path]:
    kept = set[Path]()
    for phase in RUN_FOLDERS if criteria.keep_last else ():
        kept |= {one.path for one in [one for one in found if one.phase == phase and one.summary is not None][-(criteria.keep_last or 0) :]}
    return kept


def _best(found: list[Candidate], criteria: Criteria) -> dict[Path, str]:
    """Why runs are kept by `keep_best`: they are the best, or no finished run of their phase has the metric."""
    if criteria.keep_best is None:
        return {}
    summaries = {one.path: one.summary for one in found if one.summary is not None}
    ordered = best_first(summaries, criteria.by, criteria.mode, "--by")
    kept = dict[Path, str]()
    for phase in RUN_FOLDERS:
        of_phase = [path for path in ordered if summaries[path].phase == phase]
        kept |= dict.fromkeys(of_phase[: criteria.keep_best], "best")
        if not of_phase:
            kept |= {path: f"no {criteria.by}" for path, summary in summaries.items() if summary.phase == phase}
    return kept


def best_first(summaries: Mapping[Path, RunSummary], metric: str, mode: str, option: str) -> list[Path]:
    """The finished runs that have a metric, the best first.

    Args:
        mode: `min` or `max`; empty if the metric's name says it.
        option: that names the metric, for messages.

    Raises:
        InputError: no finished run has it, or nothing says whether less of it is better.
    """
    values = {path: value_of(summary, metric) for path, summary in summaries.items() if summary.status == "FINISHED"}
    values = {path: value for path, value in values.items() if not math.isnan(value)}
    if not values:
        names = sorted({name for one in summaries.values() for name in (one.monitor, *one.metrics) if name})
        what = f"is not a metric of a finished run; there are {', '.join(names)}" if names else "is not a metric of a finished run"
        raise InputError(Problem(f"{option} {metric}", what, "name one of them"))
    mode = mode or direction(summaries.values(), metric)
    if not mode:
        raise InputError(Problem(f"{option} {metric}", "its name does not say whether less or more of it is better", "add --min or --max"))
    return sorted(values, key=lambda path: values[path], reverse=mode == "max")


def value_of(summary: RunSummary, metric: str) -> float:
    """The value of a metric at the best checkpoint if it was chosen by that, else the last one; NaN if there is none."""
    value = summary.best if summary.monitor == metric and summary.best is not None else summary.metrics.get(metric)
    return math.nan if value is None else float(value)


def _keep_parents(found: list[Candidate], root: str, remote: Mapping[str, Remote]) -> None:
    """Keep what kept runs were made from: aligners, weights that they began with, sweeps of trials; and the best trial of a kept sweep."""
    origins = {one.run_id: one for one in found if one.phase != SWEEPS}
    waiting = [one for one in found if one.why]
    outside = _used_elsewhere(found, root, remote)
    by_id = dict[str, list[Candidate]]()
    for one in found:
        by_id.setdefault(one.run_id, []).append(one)

    def keep(needed: Candidate, why: str) -> None:
        if not needed.why:
            needed.why = why
            waiting.append(needed)

    for run_id, child in outside.items():
        for needed in by_id.get(run_id, ()):
            keep(needed, f"parent of {child[:8]}")
    while waiting:
        one = waiting.pop()
        needs, unknown = lineage(one, remote.get(one.run_id, NOTHING), origins)
        for run_id, why in needs.items():
            for needed in by_id.get(run_id, ()):
                keep(needed, why)
        for needed in found if unknown else ():
            if needed.phase in unknown:
                keep(needed, f"parent of {one.run_id[:8]}?")


def _used_elsewhere(found: list[Candidate], root: str, remote: Mapping[str, Remote]) -> dict[str, str]:
    """Runs of this root whose artifacts runs of other output roots use, which MLflow knows: run ID, and that of such a run."""
    here = {one.run_id for one in found}
    outside = {run_id: known for run_id, known in remote.items() if run_id not in here and is_elsewhere(known, root)}
    return {
        origin: run_id
        for run_id, known in outside.items()
        for setting in ORIGINS
        if (origin := origin_of(known.params, setting)) is not None
    }


def is_elsewhere(known: Remote, root: str) -> bool:
    """Whether MLflow has a run as one of another output root, which is not pruned."""
    theirs = known.tags.get(ROOT_TAG, "")
    return bool(theirs) and Path(theirs).resolve() != Path(root).resolve() and known.tags.get(PRUNED_TAG) != PRUNED_DIRECTORY


def lineage(one: Candidate, known: Remote, origins: Mapping[str, Candidate]) -> tuple[dict[str, str], set[str]]:
    """The run IDs of what a run was made from, with what it is to each; and the phases in which such runs may be that
    cannot be told, since the run is damaged.

    Args:
        known: what MLflow has of it, which counts where its own files are damaged.
        origins: the runs of the root that another one may have begun with.
    """
    files, needs, unknown = RunDirectory(one.path), dict[str, str](), set[str]()
    parent = f"parent of {one.run_id[:8]}"
    tags, settings = known.tags, dict[str, Any](known.params)
    try:
        tags = files.tags() or tags
    except DamagedFileError:
        unknown |= {SWEEPS} if not tags and one.phase != SWEEPS else set()
    if sweep := tags.get(SWEEP_TAG):
        needs[sweep] = parent
    if one.phase == SWEEPS:
        try:
            best = (read_as(files.best_trial, dict[str, Any]) or {}).get("run_id")
            needs |= {str(best): f"best of {one.run_id[:8]}"} if best else {}
        except DamagedFileError:
            unknown |= {*PHASES_BY_NAME}
    try:
        settings = flatten_tree(files.read_config() or {}) or settings
    except DamagedFileError:
        may_be = {ALIGNMENT.name} if one.phase == ALIGNMENT.name else {*PHASES_BY_NAME}
        unknown |= may_be if not settings else set()
    for setting in ORIGINS:
        named = origin_of(settings, setting)
        if named in origins:
            needs[str(named)] = parent
        elif settings.get(setting):
            needs |= dict.fromkeys(_origins_like(files, setting, origins), parent)
    return needs, unknown


def _origins_like(files: RunDirectory, setting: str, origins: Mapping[str, Candidate]) -> list[str]:
    """The runs whose artifact has the content that a run began with, wherever it took it from."""
    record: dict[str, Any] = {}
    with suppress(DamagedFileError):
        record = files.read_record() or {}
    if (wanted := origin_digest(record.get("inputs", {}), setting)) is None:
        return []
    return [run_id for run_id, one in origins.items() if not one.why and _digest(one.path, one.phase) == wanted]


@cache  # many runs may have taken copies
def _digest(path: Path, phase: str) -> str | None:
    files = RunDirectory(path)
    with suppress(DamagedFileError):
        if (known := files.artifact_digest()) is not None:
            return known
    from raytrain2p.models.artifacts import recorded_digest  # with torch, which takes seconds: runs of earlier versions need it

    return recorded_digest(files.artifact(PHASES_BY_NAME[phase]))


def as_json(one: Candidate) -> dict[str, Any]:
    """A run of the plan, for `--json`."""
    summary = {"status": one.summary.status, "bytes": one.summary.bytes} if one.summary else {"status": None, "bytes": None}
    return {"run_id": one.run_id, "phase": one.phase, "directory": str(one.path), **summary, "stays": one.why or None}
