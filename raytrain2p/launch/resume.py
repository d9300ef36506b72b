"""Resuming a run: whether its settings and inputs allow it, and whether it is finished already."""

from dataclasses import asdict, fields

from pydantic import ValidationError

from raytrain2p.config import InputError, Problem, Settings, flatten, flatten_tree
from raytrain2p.config.metadata import FIXED, belongs_to, known_keys, settings_where, value_at, with_defaults
from raytrain2p.config.scratch import public
from raytrain2p.config.secrets import without_passwords
from raytrain2p.phases.inputs import InputDigests, described, planned_steps
from raytrain2p.storage.remote import fetch
from raytrain2p.tracking.checkpoints import last_checkpoint, step_of
from raytrain2p.tracking.damage import read_as
from raytrain2p.tracking.mlflow_store import store_exists
from raytrain2p.tracking.run import PRUNED_CHECKPOINTS, PRUNED_TAG, Run
from raytrain2p.tracking.run_objects import reporting_storage
from raytrain2p.tracking.run_writer import TRAIN_INPUT, input_changes
from raytrain2p.worker.job import Outcome

ACCEPT = "--accept-changed-inputs"


def check_resumable(run: Run, settings: Settings, digests: InputDigests | None, accept_changed_inputs: bool = False) -> None:
    """Check that these settings and inputs can resume the run.

    Args:
        run: the run to resume.
        settings: with the aligner resolved to a path.
        digests: of the inputs; None if they could not be read.
        accept_changed_inputs: whether inputs may have other content than before.

    Raises:
        InputError: every setting that differs and must not, other inputs, and an end before the run's last checkpoint; or the run is
            damaged, or of an older version.
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
    if settings.launch.strategy == "fsdp":
        fixed += ("launch.num_workers",)  # a checkpoint of sharded states is that of one number of workers
    before = with_defaults(before, type(settings))
    problems = [
        Problem(f"{key}={value}", f"cannot change: run {run.run_id[:8]} began with {began}", f"set {key}={began}")
        for key in dict.fromkeys([*after, *before])
        for value in [value_at(after, key, None)]
        for began in [value_at(before, key, value)]
        if belongs_to(key, fixed) and began != value and not (key == "tracking.uri" and not store_exists(str(began)))
    ]
    if digests is not None and not accept_changed_inputs:
        problems += changed_inputs(run, settings, digests)
    if digests is not None:
        problems += ends_before_checkpoint(run, settings, digests.train_records)
        if run.files.tags().get(PRUNED_TAG) == PRUNED_CHECKPOINTS and finished_outcome(run, settings, digests.train_records) is None:
            what = "has no checkpoints any more: `runs prune --checkpoints-only` removed them"
            problems.append(Problem(f"run {run.run_id[:8]}", what, "begin a new run"))
    if problems:
        raise InputError(problems)


def changed_inputs(run: Run, settings: Settings, digests: InputDigests) -> list[Problem]:
    """A problem for each input with other content than the run has recorded."""
    record, name = run.files.read_record() or {}, run.run_id[:8]
    changed = input_changes(record, asdict(digests))
    problems = []
    for where, parts in changed.items():
        if where == TRAIN_INPUT:
            count = record.get("train_records", digests.train_records)
            what = f"has other records or media, or the same in another order, than the {count} that run {name} began with"
            if count != digests.train_records:
                what = f"has {digests.train_records} records; run {name} began with {count}, and its position in them would be lost"
            where = f"{where}={described(settings.data.train)}"
        else:
            what = f"has other content ({', '.join(parts)}) than run {name} began with"
        fix = f"give what it began with, begin a new run, or resume with {ACCEPT}, which records it in the run"
        problems.append(Problem(where, what, fix, cause=f"{where} has other content"))
    return problems


def ends_before_checkpoint(run: Run, settings: Settings, records: int) -> list[Problem]:
    """A problem if training is to end before the step that the run has reached."""
    last, planned = last_checkpoint(run.checkpoints), planned_steps(settings.training, records)
    if last is not None:
        with reporting_storage(str(last)):
            fetch(last)
    if last is None or (step := step_of(last)) is None or planned >= step:
        return []
    training = settings.training
    name = "max_steps" if training.max_steps == planned else "max_epochs"
    what = f"ends at step {planned}, but run {run.run_id[:8]} is at step {step} already"
    return [Problem(f"training.{name}={getattr(training, name)}", what, f"set training.max_steps={step} or more, or begin a new run")]


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
    here = {key: value.replace(outcome["directory"], public(run.directory)) for key, value in outcome.items() if isinstance(value, str)}
    known = {field.name for field in fields(Outcome)}
    return Outcome(**{name: value for name, value in (outcome | here).items() if name in known})
