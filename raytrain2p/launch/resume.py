"""Going on with a run: which one, with which settings, and what must not change."""

from typing import Any

from pydantic import ValidationError

from raytrain2p.config import InputError, Problem, Settings, flatten, flatten_tree
from raytrain2p.config.secrets import without_passwords
from raytrain2p.phases.inputs import planned_steps
from raytrain2p.storage.files import read_json
from raytrain2p.tracking.run import Run
from raytrain2p.worker.job import Outcome

# What a checkpoint holds is made from these: with others it would not load, or would silently not be what they say.
FIXED = (
    "seed",
    "model.",
    "data.train",
    "training.learning_rate",
    "training.warmup_steps",
    "training.weight_decay",
    "checkpoint.monitor",
    "checkpoint.mode",
    "launch.strategy",
    "output.root",
    "tracking.",
)
FREE = ("model.attention", "tracking.system_metrics")
GLOBAL_BATCH = ("training.batch_size", "training.accumulate", "launch.num_workers")


def check_resumable(run: Run, settings: Settings, records: int | None) -> None:
    """Whether these settings can go on with this run.

    Args:
        run: to go on with.
        settings: with the aligner resolved to a path.
        records: training records; None if they could not be read.

    Raises:
        InputError: every setting that differs and must not.
    """
    config = run.files.read_config()
    if config is None:
        return  # it died before it wrote down its settings, and so before it trained
    before, after = flatten_tree(config), without_passwords(flatten(settings))
    problems = [
        Problem(f"{key}={value}", f"cannot change: run {run.run_id[:8]} began with {before.get(key)}", f"set {key}={before.get(key)}")
        for key, value in after.items()
        if key.startswith(FIXED) and not key.startswith(FREE) and before.get(key, value) != value
    ]
    if run.phase == "alignment" and (before["training.accumulate"], before["launch.num_workers"] * before["training.batch_size"]) != (
        after["training.accumulate"],
        after["launch.num_workers"] * after["training.batch_size"],
    ):
        problems.append(
            Problem(
                f"training.accumulate={after['training.accumulate']}",
                "cannot change in phase 1: a pass of another size has other negatives",
                f"set training.accumulate={before['training.accumulate']}",
            )
        )
    if (had := global_batch(before)) != (has := global_batch(after)):
        problems.append(
            Problem(
                " x ".join(f"{key}={after[key]}" for key in GLOBAL_BATCH),
                f"is a step of {has} records; run {run.run_id[:8]} began with {had}, and its position in the data would be lost",
                f"set training.batch_size so that the product is {had}",
            )
        )
    facts = run.files.read_record() or {}
    if records is not None and facts.get("train_records", records) != records:
        problems.append(
            Problem(
                f"data.train={settings.data.train}",
                f"has {records} records; run {run.run_id[:8]} began with {facts['train_records']}, and its position in them would be lost",
                "give the records that it began with, or begin a new run",
            )
        )
    if problems:
        raise InputError(problems)


def global_batch(flat: dict[str, Any]) -> int:
    """Records of one optimizer step."""
    size = 1
    for key in GLOBAL_BATCH:
        size *= int(flat[key])
    return size


def finished_outcome(run: Run, settings: Settings, records: int) -> Outcome | None:
    """What a run that has ended well left, unless these settings ask for more steps."""
    outcome, status = read_json(run.files.result), run.files.read_status()
    config = run.files.read_config()
    if outcome is None or config is None or status["status"] != "FINISHED":
        return None
    try:
        before = type(settings).model_validate(config)
    except ValidationError:
        return None  # of another version: train() says what it makes of it
    planned, trained = (planned_steps(one.training, records, one.launch.num_workers) for one in (settings, before))
    if planned > trained:
        return None
    return Outcome(**outcome)
