"""A sweep under way: Ray Tune runs the trials, and what they leave is kept in order meanwhile and at the end."""

import math
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray._private import auto_init_hook
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.search import BasicVariantGenerator

from raytrain2p.config.secrets import one_line
from raytrain2p.launch.progress import Console
from raytrain2p.launch.signals import StoppedError, StopSignals
from raytrain2p.sweep.callbacks import StopRequest, Watch, free_place
from raytrain2p.sweep.live_table import LiveTable
from raytrain2p.sweep.plots import draw_sweep
from raytrain2p.sweep.results import (
    EARLY,
    EARLY_TAG,
    FAILED,
    FINISHED,
    KILLED,
    OVER,
    SweepOutcome,
    Trial,
    TrialRecords,
    TrialResult,
    write_results,
)
from raytrain2p.sweep.schedulers import NO_LIMIT, scheduler_of
from raytrain2p.sweep.search import TrialQueue, config_of, learn_from, search_of
from raytrain2p.sweep.trial import SweepJob, run_trial, trial_launch_id
from raytrain2p.tracking.run import recorded_run
from raytrain2p.tracking.run_writer import RunWriter, end_run, send_rest
from raytrain2p.worker.job import OBJECTIVE

SECONDS_TO_STOP = 30.0
MOST_AT_ONCE = 64  # shares of it are counted in 1/10,000
HEAD = "node:__internal_head__"  # a resource of the cluster's first node, 1 in all: it bounds how many trials there are at once


class SweepTuner:
    """Lets Tune run the trials, and keeps what they leave in order meanwhile.

    Args:
        plan: what the trials share.
        writer: of the sweep's own run.
        at_once: trials.
        console: where progress goes.
    """

    def __init__(self, plan: SweepJob, writer: RunWriter, at_once: int, console: Console) -> None:
        self.plan, self.writer, self.at_once, self.console = plan, writer, at_once, console
        self.sweep, self.options, self.base = plan.sweep, plan.sweep.options, plan.sweep.base
        self.root, self.uri = self.base.output.root, self.base.tracking.uri
        self.trial_records = TrialRecords(plan.parent.path, self.root)
        self.settings = [axis.setting for axis in self.sweep.axes]
        self.stop = StopRequest(self.options.time_budget_s)
        self.hand = ThreadPoolExecutor(1, thread_name_prefix="bookkeeper")

    def run(self) -> SweepOutcome:
        """Until all trials are over, or a signal comes.

        Raises:
            StoppedError: it came.
        """
        for row in self.trial_records.rows():
            if row.reason and row.state not in OVER:  # stopped early, and the driver died before it could say so
                self.settle(row.trial.number, EARLY)
        known = self.trial_records.rows()
        unfinished = [replace(row.trial, values=row.values) for row in known if row.state not in OVER]
        if known:
            self.console.say(f"going on: {len(known) - len(unfinished)} trials are over, {len(unfinished)} were begun")
        search = search_of(self.sweep, len(known))
        learn_from(search, known)
        queue = TrialQueue(unfinished, len(known), search, self.begin, self.trial_records.row)
        table = LiveTable(self.trial_records, self.sweep, self.plan.channel, self.console)
        with table, StopSignals() as signals:
            thread = threading.Thread(target=self.tune, args=(self.tuning(queue, known, table),), name="tune", daemon=True)
            thread.start()
            deadline = float("inf")
            while thread.is_alive():
                if signals.received and self.stop.reason != KILLED:
                    self.console.say("stopping the trials; `--resume` goes on with them (again: at once)")
                    self.stop.reason = KILLED
                    deadline = time.monotonic() + SECONDS_TO_STOP
                if self.stop.reason == KILLED and (len(signals.received) > 1 or time.monotonic() > deadline):
                    break
                thread.join(0.3)
            self.hand.shutdown()  # before the table is drawn for the last time
        return self.close(signals.received)

    def tuning(self, queue: TrialQueue, known: list[TrialResult], table: LiveTable) -> dict[str, Any] | None:
        """Arguments of `ray.tune.run`; None if no trial is left.

        That, and not a `Tuner`, which would pickle all of it, credentials among it, into a file that nobody needs.
        """
        options = self.options
        search: Any = queue
        count, space = options.num_trials or NO_LIMIT, {}
        if options.scheduler == "pbt":  # it takes no search but Tune's own: hand it the trials one by one
            trials = []
            while (trial := queue.next_trial()) is not None:
                trials.append(config_of(trial))
            random.seed(options.seed)  # Tune's population-based training draws from both
            np.random.seed(options.seed)
            search, count = BasicVariantGenerator(points_to_evaluate=trials), len(trials)
            space = {key: tune.choice([value]) for key, value in config_of(Trial(0, self.sweep.default_values(), "")).items()}
        elif not queue.unfinished and len(known) >= count:
            count = 0
        if not count:
            return None
        return {
            "run_or_experiment": tune.with_parameters(run_trial, plan=self.plan),
            "name": self.plan.launch_id,
            "metric": OBJECTIVE,
            "mode": options.mode,
            "stop": self.stop,
            "config": space,
            "resources_per_trial": PlacementGroupFactory([{HEAD: share_of_head(options.scheduler, self.at_once)}]),
            "num_samples": count,
            "storage_path": str(Path(self.root) / ".ray"),
            "search_alg": search,
            "scheduler": scheduler_of(self.sweep, known, next(iter(self.plan.splits.values())).records),
            "verbose": 0,
            "checkpoint_config": tune.CheckpointConfig(num_to_keep=4),  # of population-based training alone
            "max_failures": options.max_failures,
            "raise_on_failed_trial": False,
            "callbacks": [Watch(table, self.plan.channel, self.over, self.gave_up)],
            "max_concurrent_trials": None if options.scheduler == "pbt" else self.at_once,
        }

    def begin(self, number: int, values: dict[str, Any]) -> Trial:
        """Write a new trial down, before anything of it runs."""
        trial = Trial(number, values, trial_launch_id(self.plan.launch_id, number))
        self.trial_records.begin(trial)
        return trial

    def tune(self, arguments: dict[str, Any] | None) -> None:
        """Until every trial is over."""
        if arguments is None:
            return
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # each trial has its metrics.jsonl
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        try:
            tune.run(**arguments)
        except Exception as error:  # Tune's own: the trials' are in their runs
            self.console.say(f"Ray Tune ended with {type(error).__name__}: {one_line(error)}; `--resume` goes on")

    def over(self, number: int) -> None:
        """Tune is done with a trial. One that did not end by itself was stopped early: say so, once its worker is gone."""
        self.hand.submit(self.settled, number)

    def settled(self, number: int) -> None:
        """`settle`, whose errors nobody else would hear of."""
        try:
            self.settle(number, EARLY)
        except Exception as error:
            self.console.say(f"trial {number} could not be written down as stopped early: {one_line(error)}")

    def gave_up(self, number: int, reason: str) -> None:
        """Tune does not try a trial again. Its process has said so itself, unless it was killed, or died before there was a run."""
        self.trial_records.give_up(number, reason)
        run = recorded_run(self.root, trial_launch_id(self.plan.launch_id, number))
        silent = run is None or run.files.read_status()["status"] == "RUNNING"
        if silent:
            self.console.say(f"trial {number}: failed: {reason}")
        if run is not None and silent:
            self.hand.submit(end_run, run, self.uri, "FAILED")

    def settle(self, number: int, state: str) -> None:
        """Write down how a trial ended that could not say so itself."""
        row = self.trial_records.row(self.trial_records.trial(number))
        if row.run is None or row.state in OVER:
            return
        if state == EARLY:
            row.run.add_tags({EARLY_TAG: row.reason or f"{self.stop.reason or self.options.scheduler} at step {row.steps}"})
        end_run(row.run, self.uri, {EARLY: "FINISHED", KILLED: "KILLED"}[state])

    def close(self, signals: list[int]) -> SweepOutcome:
        """The files for people, the sweep's status, and what came out.

        Raises:
            StoppedError: a signal ended the sweep.
        """
        if signals:
            auto_init_hook.enable_auto_connect = False  # Tune's thread may live on, and would start another Ray
            ray.shutdown()  # first the workers end, then it is said how
        for row in self.trial_records.rows():
            if row.state not in OVER and row.run is not None:
                if not signals:
                    free_place(self.plan.channel, row.trial.number)
                early = row.reason or (self.stop.reason and not signals)
                self.settle(row.trial.number, EARLY if early else KILLED)
        rows = self.trial_records.rows()
        if not all(send_rest(row.run, self.uri) for row in rows if row.run is not None):
            self.console.say("MLflow does not know all of the trials yet; later: python -m raytrain2p.runs sync")
        best = write_results(self.plan.parent.path, rows, self.settings, self.options.mode, self.options.phase)
        try:
            draw_sweep(self.plan.parent.path, rows, self.sweep.axes, self.options.mode, self.options.metric)
        except Exception as error:  # a image is not worth a sweep
            self.console.say(f"no images: {type(error).__name__}: {one_line(error)}")
        for row in rows:
            if (found := row.best(self.options.mode)) is not None and row.state in OVER:
                self.writer.write_metrics({OBJECTIVE: found[1]}, row.trial.number)
        if signals:
            self.writer.finish("KILLED")
            raise StoppedError(signals[0])
        whole = all(row.state in OVER for row in rows) or bool(self.stop.reason)
        self.writer.finish("FINISHED" if whole and any(row.state in (FINISHED, EARLY) for row in rows) else "FAILED")
        shutil.rmtree(Path(self.root) / ".ray" / self.plan.launch_id, ignore_errors=True)  # Tune's notes, which nobody needs
        count = [row.state for row in rows].count
        return SweepOutcome(
            self.plan.parent.run_id,
            self.plan.parent.directory,
            len(rows),
            count(FINISHED),
            count(EARLY),
            count(FAILED),
            0 if self.stop.reason else sum(row.state not in OVER for row in rows),  # what the time budget cut off is over
            best,
        )


def share_of_head(scheduler: str, at_once: int) -> float:
    """What a trial's driver takes of the head node. Population-based training starts all that fit, and pauses them: there,
    this bounds how many run at once, and leaves a rest for the helpers of other launches. Elsewhere Tune is told the number.
    """
    return math.floor(10_000 / (min(at_once, MOST_AT_ONCE) + 0.5)) / 10_000 if scheduler == "pbt" else 0.001
