"""One trial of a sweep, in its own process: a launch like any other, which reports and can be stopped."""

import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from raytrain2p.config import Settings, flatten
from raytrain2p.launch.monitor import PreparedSplits, TrainingFailedError, TrialLaunch, train
from raytrain2p.launch.progress import Console
from raytrain2p.launch.quiet import quiet
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.sweep.results import LINEAGE_TAG, TRIAL_TAG, Inheritance, Trial, note_inheritance, row_of
from raytrain2p.sweep.settings import Sweep
from raytrain2p.tracking.checkpoints import LAST, write_checkpoint
from raytrain2p.tracking.run import Run, disk_gone, launch_lock, recorded_run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.worker.job import OBJECTIVE, TrialContext
from raytrain2p.worker.ray_reports import comparable

SECONDS_TO_INHERIT = 120.0  # a predecessor that was killed may take so long to let go
SECONDS_BETWEEN_WORDS = 2.0
# What the prepared splits depend on: trials that share these share them.
SPLIT_SETTINGS = (
    "data.",
    "seed",
    "evaluation.max_records",
    "model.language_model",
    "model.image_encoder",
    "model.text_encoder",
    "model.image_size",
    "model.soft_tokens",
    "model.system_prompt",
    "model.max_length",
    "model.aligner",
)


def splits_key(settings: Settings) -> str:
    """Equal for settings with equal splits."""
    return repr({key: value for key, value in flatten(settings).items() if key.startswith(SPLIT_SETTINGS)})


@dataclass(frozen=True)
class SweepJob:
    """What all trials of a sweep share.

    Args:
        sweep: what varies, and over which settings.
        launch_id: of the sweep; a trial's has its number behind it.
        command: shell line that started the sweep.
        parent: the sweep's run.
        tags: of each trial's run.
        splits: prepared ones, by `splits_key`.
        threads: CPUs of a worker.
        channel: where trials leave word for the sweep's driver.
        environment: variables that MLflow needs.
        verbose: let Ray's own output through.
    """

    sweep: Sweep = field(repr=False)  # its tracking URI may have a password
    launch_id: str
    command: str
    parent: Run
    tags: dict[str, str]
    splits: dict[str, PreparedSplits]
    threads: int
    channel: Any
    environment: dict[str, str] = field(repr=False)
    verbose: bool


def trial_launch_id(sweep: str, number: int) -> str:
    return f"{sweep}-{number:03d}"


def run_trial(config: dict[str, Any], plan: SweepJob) -> None:
    """The function that Ray Tune runs: train one trial, and go on with it if it has been begun before.

    Args:
        config: the trial's number and the settings that vary, flat.
        plan: what all trials share.
    """
    os.environ.update(plan.environment)
    if not plan.verbose:
        quiet()
    values = dict(config)
    number = values.pop("trial")
    settings = plan.sweep.settings(values)
    phase, root, launch_id = plan.sweep.options.phase, settings.output.root, trial_launch_id(plan.launch_id, number)
    console = TrialConsole(plan.channel, number)
    if (gone := disk_gone(root, launch_id)) is not None:  # or the lock would be on the disk below
        raise gone
    with launch_lock(root, launch_id).held(SECONDS_TO_INHERIT) as holder:
        if holder is not None:
            raise RuntimeError(f"trial {number} is under way already: {holder}")
        run = recorded_run(root, launch_id)
        trial, mode, by_step = Trial(number, values, launch_id), plan.sweep.options.mode, plan.sweep.options.scheduler != "pbt"
        if run is not None and run.files.read_status()["status"] == "FINISHED":
            report_end(trial, run, mode, by_step)
            return
        if run is not None and (checkpoint := tune.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                inherit(run, number, Path(folder), values)
        splits = plan.splits.get(splits_key(settings)) or prepare(settings, phase, console)
        exchange = plan.sweep.options.pbt.interval if plan.sweep.options.scheduler == "pbt" else None
        part = TrialLaunch(
            TrialContext(number, plan.sweep.options.metric, plan.channel),
            plan.tags | {TRIAL_TAG: str(number)},
            f"{plan.command}  # trial {number}",
            partial(reported, number=number, exchange=exchange),
        )
        try:
            train(settings, splits, phase, launch_id, plan.threads, console, part)
        except TrainingFailedError as error:
            reason = [line for line in str(error).splitlines() if line.strip()][-2:][0]
            console.say(f"failed: {reason}")
            raise
        run = recorded_run(root, launch_id)
        assert run is not None
        report_end(trial, run, mode, by_step)


def prepare(settings: Settings, phase: int, console: "TrialConsole") -> PreparedSplits:
    """Splits that no other trial was known to need."""
    from raytrain2p.launch.driver import encode, prepared
    from raytrain2p.phases.registry import read_inputs

    inputs = read_inputs(settings, phase)
    encode(inputs, settings, 1, console)
    return prepared(inputs)


class TrialConsole(Console):
    """What a trial has to say, on the sweep's channel.

    Args:
        channel: of the sweep.
        number: of the trial.
    """

    def __init__(self, channel: Any, number: int) -> None:
        super().__init__(sys.stderr)
        self.channel, self.number, self.told = channel, number, -SECONDS_BETWEEN_WORDS

    def say(self, line: str) -> None:
        with suppress(ray.exceptions.RayError):  # waited for: this process may be about to end
            ray.get(self.channel.say.remote(f"trial {self.number}: {line}"), timeout=10)

    def show(self, line: str) -> None:
        if time.monotonic() - self.told >= SECONDS_BETWEEN_WORDS:
            self.told = time.monotonic()
            self.channel.put.remote({"trial": self.number, "line": line})

    def clear(self) -> None:
        """Nothing is shown here."""


@contextmanager
def reported(channel: Any, number: int, exchange: int | None) -> Iterator[threading.Event]:
    """Within, a thread hands rank 0's reports to Tune, and tells rank 0 when it may go on. If Tune stops the trial or
    lets it pause, rank 0 never hears, and ends where it stands, with this process; the event that is yielded is set then.

    Args:
        channel: between the two.
        number: of the trial.
        exchange: steps between two moments at which trials are compared and may take over weights; None for never.
    """

    let_go = threading.Event()

    def pass_on() -> None:
        with suppress(ray.exceptions.RayError):  # this process or the worker is at its end
            while True:
                word = ray.get(channel.next_report.remote())
                try:
                    report(word, number, exchange)
                except SystemExit:  # Tune's way to end a trial's function
                    let_go.set()
                    raise
                except Exception as error:  # a full disk, for one: rank 0 must not wait for ever
                    ray.get(channel.go_on.remote(f"the report could not be passed on: {type(error).__name__}: {error}"))
                    return
                ray.get(channel.go_on.remote())

    threading.Thread(target=pass_on, name="reports", daemon=True).start()
    yield let_go


def report(word: dict[str, Any], number: int, exchange: int | None) -> None:
    """Hand one report to Tune; does not return if the trial ends or pauses there."""
    directory = Path(word.pop("directory"))
    if exchange is None:
        tune.report(word)
    elif word["step"] % exchange == 0 and not word["last"]:
        report_with_weights(word, directory, number)
    else:
        del word["step"]  # in between, and at its end, a trial is not compared
        tune.report(word)


def report_end(trial: Trial, run: Run, mode: str, compared_by_step: bool) -> None:
    """The last report once more: a trial that was killed after it has none otherwise, and Tune wants one of every trial."""
    step, objective = next(reversed(row_of(trial, run).reports), (0, math.nan))
    word = {OBJECTIVE: comparable(objective, mode), "last": True} | ({"step": step} if compared_by_step else {})
    tune.report(word)


def report_with_weights(word: dict[str, Any], directory: Path, number: int) -> None:
    """The weights of this very step, and whose they are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(RunDirectory(directory).last_checkpoint, folder / LAST)
        write_json(folder / "of.json", {"trial": number, "run_id": RunDirectory(directory).run_id, "step": word["step"]})
        tune.report(word, checkpoint=tune.Checkpoint.from_directory(folder))


def inherit(run: Run, number: int, folder: Path, values: dict[str, Any]) -> None:
    """Go on from another trial's weights, if they are another's: its checkpoint takes the place of this trial's last.

    Args:
        run: of this trial.
        number: of this trial.
        folder: with the checkpoint, and `of.json`, which says whose it is.
        values: the settings that this trial goes on with.

    Raises:
        RuntimeError: another process does not let go of the run.
    """
    source = read_json(folder / "of.json")
    if source["trial"] == number:
        return
    row = row_of(Trial(number, values, run.launch_id), run)
    one = Inheritance(row.steps, source["trial"], source["run_id"], source["step"], values)
    if row.lineage and (row.lineage[-1].from_run, row.lineage[-1].from_step) == (one.from_run, one.from_step):
        return  # it did so before it failed, and has gone on since
    checkpoint = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "best" in state:
            state["best"] = None  # the other trial's best file is not here
    with run.files.lock.held(SECONDS_TO_INHERIT) as holder:
        if holder is not None:
            raise RuntimeError(f"another process writes to {run.directory} ({holder}), and does not end")
        write_checkpoint(checkpoint, run.checkpoints / LAST, None)
        note_inheritance(run.path, one)
        line = "; ".join(f"at step {each.at_step} from trial {each.from_trial} at step {each.from_step}" for each in (*row.lineage, one))
        run.add_tags({LINEAGE_TAG: line})
