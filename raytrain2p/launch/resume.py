"""Resuming a run: whether its settings and inputs allow it, and whether it is finished already."""

from dataclasses import asdict, fields

from pydantic import ValidationError

from raytrain2p.config import InputError, Problem, Settings, flatten, flatten_tree
from raytrain2p.config.metadata import FIXED, belongs_to, known_keys, settings_where, value_at
from raytrain2p.config.secrets import without_passwords
from raytrain2p.phases.inputs import InputDigests, described, planned_steps
from raytrain2p.tracking.damage import read_as
from raytrain2p.tracking.mlflow_store import store_exists
from raytrain2p.tracking.run import Run
from raytrain2p.worker.job import Outcome


def check_resumable(run: Run, settings: Settings, digests: InputDigests | None) -> None:
    """Check that these settings and inputs can resume the run.

    Args:
        run: the run to resume.
        settings: with the aligner resolved to a path.
        digests: of the inputs; None if they could not be read.

    Raises:
        InputError: every setting that differs and must not, and other inputs; or the run is damaged, or of an older version.
    """
    run.files.check()
    config = run.files.read_config()
    if config is None:
        return  # it ended before it wrote its settings, and so before it trained
    before, after = flatten_tree(config), without_passwords(flatten(settings))
    if unknown := [key for key in before if not belongs_to(key, known_keys(type(settings)))]:
        older = f"began with settings that this version does not have: {', '.join(unknown)}"
        raise InputError(Problem(f"run {run.run_id[:8]}", older, "begin a new run"))
    fixed = settings_where(type(settings), lambda metadata: metadata.resume == FIXED)
    problems = [
        Problem(f"{key}={value}", f"cannot change: run {run.run_id[:8]} began with {began}", f"set {key}={began}")
        for key in dict.fromkeys([*after, *before])
        for value in [value_at(after, key, None)]
        for began in [value_at(before, key, value)]
        if belongs_to(key, fixed) and began != value and not (key == "tracking.uri" and not store_exists(str(began)))
    ]
    if digests is not None and (what := _changed_records(run, digests)):
        fix = "give the records that it began with, or begin a new run"
        problems.append(Problem(f"data.train={described(settings.data.train)}", what, fix))
    if problems:
        raise InputError(problems)


def _changed_records(run: Run, digests: InputDigests) -> str | None:
    """How the training records differ from those that the run began with. A run of an older version has no digest."""
    recorded = run.files.read_record() or {}
    before = InputDigests(**(asdict(digests) | {key: recorded[key] for key in asdict(digests) if key in recorded}))
    if before.train_records != digests.train_records:
        count = f"has {digests.train_records} records; run {run.run_id[:8]} began with {before.train_records}"
        return f"{count}, and its position in them would be lost"
    if before.train_digest != digests.train_digest:
        return f"has other records, or the same in another order, than the {before.train_records} that run {run.run_id[:8]} began with"
    return None


def finished_outcome(run: Run, settings: Settings, records: int) -> Outcome | None:
    """The outcome of a finished run, unless these settings ask for more steps."""
    outcome = read_as(run.files.result, Outcome, "remove it: the run is then evaluated again")
    status = run.files.read_status()
    config = run.files.read_config()
    if outcome is None or config is None or status["status"] != "FINISHED":
        return None
    try:
        before = type(settings).model_validate(config)
    except ValidationError:
        return None  # of another version: its settings are not known here
    planned, trained = (planned_steps(one.training, records) for one in (settings, before))
    if planned > trained:
        return None
    here = {key: value.replace(outcome["directory"], run.directory) for key, value in outcome.items() if isinstance(value, str)}
    return Outcome(**{field.name: (outcome | here)[field.name] for field in fields(Outcome)})
