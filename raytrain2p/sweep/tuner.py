"""A running sweep: Ray Tune runs the trials in a thread, while this process shows and records them."""

import math
import os
import random
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator, Searcher

from raytrain2p.config.console import Console
from raytrain2p.config.secrets import one_line
from raytrain2p.interrupts import StoppedError
from raytrain2p.launch.autoscaler import HEAD
from raytrain2p.launch.signals import StopSignals
from raytrain2p.storage.lease import LostLeaseError
from raytrain2p.sweep.callbacks import StopRequest, SweepCallback
from raytrain2p.sweep.finalize import TrialFinalizer, write_outcome
from raytrain2p.sweep.live_table import LiveTable
from raytrain2p.sweep.results import EARLY, FINISHED, KILLED, OVER, SweepOutcome, Trial, TrialRecords, TrialResult
from raytrain2p.sweep.schedulers import NO_LIMIT, scheduler_of
from raytrain2p.sweep.search import Search, TrialQueue, config_of, open_journal
from raytrain2p.sweep.space import Values
from raytrain2p.sweep.trial import SweepJob, run_trial, trial_launch_id
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.job import OBJECTIVE

SECONDS_TO_STOP = 30.0
MOST_AT_ONCE = 64  # fractions of the head's resource have a precision of 1/10,000


class SweepTuner:
    """Runs the trials of a sweep with Ray Tune.

    Args:
        job: what the trials share.
        writer: of the sweep's own run.
        at_once: how many trials run at once.
        ray_stays: this process had initialised Ray before, and keeps it.
    """

    def __init__(self, job: SweepJob, writer: RunWriter, at_once: int, console: Console, ray_stays: bool = False) -> None:
        self.job, self.writer, self.at_once, self.console, self.ray_stays = job, writer, at_once, console, ray_stays
        self.sweep, self.options, self.root = job.sweep, job.sweep.options, job.sweep.base.output.root
        self.records = TrialRecords(job.parent.path, self.root, writer.objects)
        self.stop = StopRequest(self.options.time_budget_s)
        self.finalizer = TrialFinalizer(job, self.records, self.stop, console)

    def run(self) -> SweepOutcome:
        """Run until all trials are over, or a signal comes.

        Raises:
            StoppedError: a signal came.
        """
        self.finalizer.settle_known()
        known = self.records.results()
        for result in known:
            if result.damage:
                self.console.say(f"trial {result.trial.number} is damaged and counts as failed: {result.damage}")
        unfinished = [replace(result.trial, values=result.values) for result in known if result.state not in OVER]
        if known:
            self.console.say(f"resuming: {len(known) - len(unfinished)} trials are over, {len(unfinished)} were begun")
        search = Search(self.sweep, open_journal(self.job.parent.files.study, self.console.say), known)
        queue = TrialQueue(unfinished, len(known), search, self._begin, self.records.result)
        table = LiveTable(self.records, self.sweep, self.job.channel, self.console)
        with table, StopSignals() as signals:
            arguments = self._tune_arguments(queue, known, table)
            thread = threading.Thread(target=self._tune, args=(arguments,), name="tune", daemon=True)
            thread.start()
            try:
                self._wait(thread, signals)
            except LostLeaseError:
                self.finalizer.executor.shutdown(wait=False, cancel_futures=True)
                self.stop.reason = KILLED
                raise
            self.finalizer.executor.shutdown()  # before the table is drawn for the last time
        return self._close(signals.received, search)

    def _wait(self, thread: threading.Thread, signals: StopSignals) -> None:
        """Wait for Tune's thread; after a signal, for `SECONDS_TO_STOP` or until the next signal.

        Raises:
            LostLeaseError: another driver has taken over.
        """
        deadline = float("inf")
        while thread.is_alive():
            if signals.received and self.stop.reason != KILLED:
                self.console.say("stopping the trials; `--resume` continues them (signal again: stop at once)")
                self.stop.reason = KILLED
                deadline = time.monotonic() + SECONDS_TO_STOP
            if self.stop.reason == KILLED and (len(signals.received) > 1 or time.monotonic() > deadline):
                break
            self.writer.check_lease()
            thread.join(0.3)

    def _tune_arguments(self, queue: TrialQueue, known: list[TrialResult], table: LiveTable) -> dict[str, Any] | None:
        """Arguments of `ray.tune.run`; None if no trial is left.

        `Tuner` is not used: it would pickle all of this, credentials included, into a file that nobody reads.
        """
        options, pbt = self.options, self.options.scheduler == "pbt"
        search: Searcher | BasicVariantGenerator = queue
        count, space = options.num_trials or NO_LIMIT, dict[str, Any]()
        if pbt:
            search, count, space = self._population(queue)
        elif not queue.unfinished and len(known) >= count:
            count = 0
        if not count:
            return None
        return {
            "run_or_experiment": tune.with_parameters(run_trial, job=self.job),
            "name": self.job.launch_id,
            "metric": OBJECTIVE,
            "mode": options.mode,
            "stop": self.stop,
            "config": space,
            "resources_per_trial": tune.PlacementGroupFactory([{HEAD: share_of_head(options.scheduler, self.at_once)}]),
            "num_samples": count,
            "storage_path": str(Path(self.root) / ".ray"),
            "search_alg": search,
            "scheduler": scheduler_of(self.sweep, known, next(iter(self.job.splits.values())).digests.train_records),
            "verbose": 0,
            "checkpoint_config": tune.CheckpointConfig(num_to_keep=4),  # only population-based training has any
            "max_failures": options.max_failures,
            "raise_on_failed_trial": False,
            "callbacks": [SweepCallback(table, self.job.channel, self.finalizer.trial_over, self.finalizer.trial_given_up)],
            "max_concurrent_trials": None if pbt else self.at_once,
        }

    def _population(self, queue: TrialQueue) -> tuple[BasicVariantGenerator, int, dict[str, Any]]:
        """All trials at once, their number, and a placeholder space: population-based training takes Tune's own search alone."""
        trials: list[Values] = []
        while (trial := queue.next_trial()) is not None:
            trials.append(config_of(trial))
        random.seed(self.options.seed)  # Tune's population-based training draws from both
        np.random.seed(self.options.seed)
        placeholder = config_of(Trial(0, self.sweep.default_values(), ""))
        space = {key: tune.choice([value]) for key, value in placeholder.items()}
        return BasicVariantGenerator(points_to_evaluate=trials), len(trials), space

    def _begin(self, number: int, values: Values) -> Trial:
        """Write the record of a new trial, before anything of it runs."""
        trial = Trial(number, values, trial_launch_id(self.job.launch_id, number))
        self.records.begin(trial)
        return trial

    def _tune(self, arguments: dict[str, Any] | None) -> None:
        """Run Ray Tune to its end."""
        if arguments is None:
            return
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # each trial has its metrics.jsonl
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        try:
            tune.run(**arguments)
        except Exception as error:  # Tune's own: the errors of trials are in their runs
            self.console.say(f"Ray Tune ended with {type(error).__name__}: {one_line(error)}; `--resume` continues")

    def _close(self, signals: list[int], search: Search) -> SweepOutcome:
        """Record the end of all trials and of the sweep.

        Raises:
            StoppedError: a signal ended the sweep.
        """
        if signals and not self.ray_stays:
            ray.shutdown()  # the workers end first, then their end is recorded
        self.writer.upload()  # first of all: another driver may have taken over
        self.finalizer.settle_all(signalled=bool(signals))
        results = self.records.results()
        outcome = write_outcome(self.job, results, self.writer, self.console)
        if signals:
            self.writer.finish("KILLED")
            raise StoppedError(signals[0])
        with suppress(OSError):  # the next driver would do it
            search.learn_all(results)
        if self.stop.reason:  # the time budget: what it cut off is over
            outcome = replace(outcome, unfinished=0)
        complete = not outcome.unfinished and any(result.state in (FINISHED, EARLY) for result in results)
        self.writer.finish("FINISHED" if complete else "FAILED")
        shutil.rmtree(Path(self.root) / ".ray" / self.job.launch_id, ignore_errors=True)  # Tune's bookkeeping
        return outcome


def share_of_head(scheduler: str, at_once: int) -> float:
    """The share of the head node's resource that a trial's driver takes.

    Population-based training starts all trials that fit, and pauses them: there, the share bounds how many run at once, and
    leaves a rest for the helpers of other launches. Otherwise Tune is given the number.
    """
    return math.floor(10_000 / (min(at_once, MOST_AT_ONCE) + 0.5)) / 10_000 if scheduler == "pbt" else 0.001
