"""`show`: everything that is known of a run."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytrain2p.config import InputError, Problem, flatten, load_settings
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS
from raytrain2p.runs.known import add_mlflow_argument, known_runs, remote_runs, summaries
from raytrain2p.runs.lineage import ORIGINS, children_of, origin_paths, origin_runs, parents
from raytrain2p.runs.output import human_age, human_bytes, human_time, number, print_json, print_table
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import OWN_TAGS, RunSummary
from raytrain2p.storage.files import read_json
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import find_runs
from raytrain2p.tracking.metrics_file import read_summary
from raytrain2p.tracking.run import COMMAND_TAG
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.tracking.source import VERSION_PREFIX

PLACES = ("output.root", "tracking.uri", "data.feature_store", *ORIGINS)  # shown elsewhere, or of the machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_mlflow_argument(parser)


def run(request: Request) -> int:
    """Print the runs.

    Raises:
        InputError: no run was named; a name fits none; or MLflow does not answer.
    """
    if not request.names:
        raise InputError(Problem("show", "needs a run", "name one: python -m raytrain2p.runs show latest"))
    runs, damaged = known_runs(request)
    others = known_beside(request, runs)
    found = list[dict[str, Any]]()
    for one in runs:
        try:
            found.append(details(one, others))
        except DamagedFileError as error:
            damaged.append(error.line)
    if request.options.json:
        print_json(found)
    else:
        for each in found:
            print_details(each)
    for line in damaged:
        report(line)
    return FAILED if damaged else 0


def known_beside(request: Request, runs: Sequence[RunSummary]) -> list[RunSummary]:
    """All runs, among which the lineage of these is found; a damaged one is reported in a line."""
    if not any(run.is_here for run in runs):
        return remote_runs(request) if runs else []
    damaged = list[str]()
    others = summaries(find_runs(request.root, [], report), request.root, damaged)
    for line in damaged:
        report(line)
    return others


def details(run: RunSummary, others: Sequence[RunSummary]) -> dict[str, Any]:
    """Everything, as plain values by section.

    Raises:
        DamagedFileError: a file of the run is damaged.
    """
    above, files = parents(others), RunDirectory(Path(run.directory or "/nowhere")) if run.is_here else None
    children = [child.run_id for child in children_of(run, others, above)]
    page = f"{run.tracking_uri.rstrip('/')}/#/runs/{run.run_id}" if run.tracking_uri.startswith("http") else None
    lineage: dict[str, Any] = {"sweep": run.sweep, "runs_of_it": children}
    for setting in ORIGINS:
        name = setting.removeprefix("model.")
        lineage |= {f"{name}_run": origin_runs(others, setting).get(run.run_id), name: origin_paths(run).get(setting)}
    known = asdict(run)
    metrics, tags, inputs = (known.pop(name) for name in ("metrics", "tags", "inputs"))
    return known | {
        "reason": files.read_status().get("reason") if files else None,
        "ended": files.read_status()["at"] if files and files.read_status()["status"] != "RUNNING" else None,
        "command": run.tags.get(COMMAND_TAG),
        "resumes": files.read_changes() if files else [],
        "mlflow": {"uri": run.tracking_uri, "experiment": run.experiment, "page": page, "complete": is_sent(files) if files else None},
        "changed_settings": changed_settings(run),
        "metrics": metrics_of(metrics, files),
        "lineage": lineage,
        "inputs": inputs,
        "tags": tags,
        "files": [{"path": name, "bytes": size} for name, size in files_in(files.path)] if files else [],
    }


def is_sent(files: RunDirectory) -> bool:
    """Whether MLflow has everything of a run that has ended, as far as is recorded here; `verify` asks MLflow."""
    try:
        state: dict[str, Any] = read_json(files.sync_state) or {}
        status, points = files.read_status(), files.metrics.stat().st_size if files.metrics.is_file() else 0
        ended = status["status"] != "RUNNING" and state.get("status") == status and state.get("sent") == points
        names = [*state.get("artifacts", {}), *state.get("refused", {})]
        paths = [inner for path, _ in files.mlflow_artifacts() for inner in (path.rglob("*") if path.is_dir() else [path])]
        sent = all(any(str(path.relative_to(files.path)) in name for name in names) for path in paths if path.is_file())
        return ended and sent and state.get("described") == (files.read_record() or {}).get("described")
    except (ValueError, AttributeError):
        return False  # a damaged state: `sync` asks MLflow what it has


def changed_settings(run: RunSummary) -> dict[str, list[Any]]:
    """Settings that are not the packaged ones of the phase, as [value, default]; those of the machine are left out."""
    phase = PHASES_BY_NAME[run.phase].number if run.phase in PHASES_BY_NAME else int(run.settings.get("sweep.phase") or 2)
    defaults = flatten(load_settings(phase))
    return {
        key: [value, defaults.get(key)]
        for key, value in run.settings.items()
        if str(value) != str(defaults.get(key)) and not key.startswith(PLACES)
    }


def metrics_of(last: dict[str, float], files: RunDirectory | None) -> dict[str, dict[str, Any]]:
    """The last value of each metric, and its extremes with their steps."""
    points = read_summary(files.metrics, files.metrics_summary) if files else {}
    return {name: {**points.get(name, {}), "last": value} for name, value in last.items()}


def files_in(folder: Path) -> Iterable[tuple[str, int]]:
    """Files with their sizes; not those of the program's own bookkeeping."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            yield str(path.relative_to(folder)), path.stat().st_size


def print_details(found: dict[str, Any]) -> None:
    """Sections for a person; those that are empty are left out."""
    mlflow, lineage = found["mlflow"], found["lineage"]
    sent = {True: "complete", False: f"not complete; send the rest: python -m raytrain2p.runs sync {found['run_id'][:8]}", None: ""}
    section(
        "",
        {
            "run": found["run_id"],
            "phase": found["phase"],
            "status": found["status"] + (f": {found['reason']}" if found["reason"] else ""),
            "made": found["timestamp"] + (f" ({age} ago)" if (age := human_age(found["timestamp"])) else ""),
            "ended": human_time(found["ended"]) if found["ended"] else "",
            "steps": found["steps"] or "",
            "best": f"{found['monitor']} {number(found['best'])}" if found["best"] is not None else "",
            "directory": found["directory"],
            "command": found["command"],
            "launch ID": found["launch_id"],
            "MLflow": f"{mlflow['uri']}, experiment {mlflow['experiment']}",
            "page": mlflow["page"],
            "sent": "" if found["status"] == "RUNNING" else sent[mlflow["complete"]],
        },
    )
    section("came from", {key.replace("_", " "): lineage[key] for key in lineage if key != "runs_of_it"})
    name = "its runs" if found["phase"] == SWEEPS else "what came from it"
    section("", {name: ", ".join(one[:8] for one in lineage["runs_of_it"])})
    for row in found["resumes"]:
        changes = {key: f"{new}, before {old}" for key, (old, new) in row["changes"].items()}
        section(f"resumed at {human_time(row['at'])}", {"command": row["command"]} | changes)
    section("settings that differ from the defaults", {key: changed(*pair) for key, pair in found["changed_settings"].items()})
    if found["metrics"]:
        say("\nmetrics")
        rows = [[name, *(number(one.get(key)) for key in ("last", "lowest", "highest"))] for name, one in found["metrics"].items()]
        print_table(("metric", "last", "lowest", "highest"), rows)
    if found["inputs"]:
        say("\ninputs, by digest")
    for where, parts in found["inputs"].items():
        for part, digest in parts.items():
            say(f"  {digest[:12]}  {where} ({part})")
    section("tags", {key: value for key, value in found["tags"].items() if not key.startswith(OWN_TAGS)})
    section("versions", {key: value for key, value in found["tags"].items() if key.startswith(VERSION_PREFIX)})
    section("files", {one["path"]: human_bytes(one["bytes"]) for one in found["files"]})


def changed(value: Any, default: Any) -> str:
    return f"{value}" if default is None else f"{value} (default {default})"


def section(heading: str, lines: dict[str, Any]) -> None:
    """Names and values in two columns, without those that have no value."""
    lines = {name: value for name, value in lines.items() if value not in (None, "")}
    if heading and lines:
        say(f"\n{heading}")
    width = max(map(len, lines), default=0)
    for name, value in lines.items():
        say(f"{'  ' * bool(heading)}{name:{width}}  {value}")
