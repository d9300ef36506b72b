"""What came from what: an aligner's phase 2 runs, a sweep's trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.runs.summary import RunSummary, aligner_digest

ALIGNER = "model.aligner"


def aligner_path(run: RunSummary) -> str:
    """The aligner.pt that a run's settings name, or nothing."""
    return str(run.settings.get(ALIGNER) or "")


def aligner_content(run: RunSummary) -> str | None:
    """The digest of the aligner that a run began with, as its record has it."""
    return aligner_digest(run.inputs)


def aligner_runs(runs: Sequence[RunSummary]) -> dict[str, str]:
    """The phase 1 run of each run's aligner, by run ID: that whose directory the aligner was taken from; of one that was taken from
    elsewhere, that from which another run took an aligner of the same content."""
    by_content = {content: run.aligner for run in runs if run.aligner is not None and (content := aligner_content(run)) is not None}
    found = {run.run_id: run.aligner or by_content.get(aligner_content(run) or "") for run in runs}
    return {run_id: aligner for run_id, aligner in found.items() if aligner is not None}


def parents(runs: Sequence[RunSummary]) -> dict[str, str]:
    """The run that each run came from, by run ID: a trial's sweep, else the run of its aligner. It may not be among these runs."""
    return aligner_runs(runs) | {run.run_id: run.sweep for run in runs if run.sweep is not None}


def children_of(run: RunSummary, runs: Sequence[RunSummary], above: Mapping[str, str]) -> list[RunSummary]:
    """The runs that came from a run.

    Args:
        above: see `parents`.
    """
    return [one for one in runs if above.get(one.run_id) == run.run_id]


def content_of_aligner(path: Path) -> str:
    """The digest of an aligner.pt.

    Raises:
        InputError: it is none, or damaged.
    """
    from raytrain2p.models.artifacts import load_artifact  # torch

    return str(load_artifact(path, ALIGNMENT)["digest"])


def came_from_aligner(run: RunSummary, run_id: str | None, content: str | None) -> bool:
    """Whether a run began with an aligner: one in the directory of this run, or one of this content, be it copied or moved."""
    return (run_id is not None and run.aligner == run_id) or (content is not None and aligner_content(run) == content)


def read_data(run: RunSummary, value: str) -> bool:
    """Whether a run read this file or embedded set, or records whose digest begins with it."""
    wanted = {value, str(Path(value).expanduser().absolute())}
    named = [str(setting) for key, setting in run.settings.items() if key.startswith("data.")]  # of a list: as Python writes it
    digests = [parts.get("records", "") for key, parts in run.inputs.items() if key.startswith("data.")]
    return any(text in wanted or any(repr(one) in text for one in wanted) for text in named) or any(
        len(value) >= 6 and digest.startswith(value) for digest in digests
    )
