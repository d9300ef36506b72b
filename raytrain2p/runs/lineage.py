"""What came from what: an aligner's phase 2 runs, a warm start's run, a sweep's trials."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from raytrain2p.config import InputError
from raytrain2p.config.phases import Phase
from raytrain2p.config.settings import ALIGNER, INIT
from raytrain2p.runs.summary import RunSummary, origin_digest, origin_of

ORIGINS = (INIT, ALIGNER)  # settings that name the artifact of another run; a run's parent is that of the first which it has


def origin_paths(run: RunSummary) -> dict[str, str]:
    """The artifacts that a run's settings name, by setting, the parent's first."""
    return {setting: str(path) for setting in ORIGINS if (path := run.settings.get(setting))}


def origin_runs(runs: Sequence[RunSummary], setting: str) -> dict[str, str]:
    """The run whose artifact a setting of each run names, by run ID: that in whose directory the artifact was; of one that was taken
    from elsewhere, that from which another run took an artifact of the same content."""
    named = {run.run_id: origin_of(run.settings, setting) for run in runs}
    contents = {run.run_id: origin_digest(run.inputs, setting) for run in runs}
    by_content = {content: named[run_id] for run_id, content in contents.items() if content is not None and named[run_id] is not None}
    found = {run.run_id: named[run.run_id] or by_content.get(contents[run.run_id] or "") for run in runs}
    return {run_id: origin for run_id, origin in found.items() if origin is not None}


def parents(runs: Sequence[RunSummary]) -> dict[str, str]:
    """The run that each run came from, by run ID: a trial's sweep, else the run whose weights it began with, else the run of its
    aligner. It may not be among these runs."""
    return origin_runs(runs, ALIGNER) | origin_runs(runs, INIT) | {run.run_id: run.sweep for run in runs if run.sweep is not None}


def children_of(run: RunSummary, runs: Sequence[RunSummary], above: Mapping[str, str]) -> list[RunSummary]:
    """The runs that came from a run.

    Args:
        above: see `parents`.
    """
    return [one for one in runs if above.get(one.run_id) == run.run_id]


def content_of(path: Path, *phases: Phase) -> str:
    """The digest of an artifact of one of these phases.

    Raises:
        InputError: it is none, or damaged.
    """
    from raytrain2p.models.artifacts import load_artifact  # torch

    for phase in phases[:-1]:
        with suppress(InputError):
            return str(load_artifact(path, phase)["digest"])
    return str(load_artifact(path, phases[-1])["digest"])


def came_from(setting: str, run_id: str | None, content: str | None, run: RunSummary) -> bool:
    """Whether a run began with an artifact: one in the directory of this run, or one of this content, be it copied or moved."""
    named = run_id is not None and origin_of(run.settings, setting) == run_id
    return named or (content is not None and origin_digest(run.inputs, setting) == content)


def read_data(run: RunSummary, value: str) -> bool:
    """Whether a run read this file or embedded set, or records whose digest begins with it."""
    wanted = {value, str(Path(value).expanduser().absolute())}
    named = [str(setting) for key, setting in run.settings.items() if key.startswith("data.")]  # of a list: as Python writes it
    digests = [parts.get("records", "") for key, parts in run.inputs.items() if key.startswith("data.")]
    return any(text in wanted or any(repr(one) in text for one in wanted) for text in named) or any(
        len(value) >= 6 and digest.startswith(value) for digest in digests
    )
