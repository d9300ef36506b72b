"""The end of trials that could not record it themselves, and the end of a sweep: tables, plots and its status."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from raytrain2p.config.console import Console
from raytrain2p.config.scratch import is_remote, public
from raytrain2p.config.secrets import one_line
from raytrain2p.storage.objects import PATIENCE
from raytrain2p.storage.remote import AT_ONCE
from raytrain2p.sweep.callbacks import StopRequest, remove_workers
from raytrain2p.sweep.plots import draw_sweep
from raytrain2p.sweep.results import (
    EARLY,
    FAILED,
    FINISHED,
    KILLED,
    OVER,
    SweepOutcome,
    TrialRecords,
    TrialResult,
    write_results,
)
from raytrain2p.sweep.trial import SweepJob, trial_launch_id
from raytrain2p.tracking.run import EARLY_TAG, Run, recorded_run
from raytrain2p.tracking.run_objects import fetch_launch
from raytrain2p.tracking.run_writer import RunWriter, end_run, send_rest
from raytrain2p.worker.job import OBJECTIVE


class TrialFinalizer:
    """Records the end of trials that could not do it: their process was stopped, or killed.

    A stopped trial is FINISHED with the tag EARLY_TAG, or KILLED, which a resume continues; one that Tune gave up is FAILED.
    """

    def __init__(self, job: SweepJob, records: TrialRecords, stop: StopRequest, console: Console) -> None:
        self.job, self.records, self.stop, self.console = job, records, stop, console
        self.uri, self.root = job.sweep.base.tracking.uri, job.sweep.base.output.root
        at_once = AT_ONCE if is_remote(self.root) else 1  # the lease of a worker that ended on another node is waited for
        self.executor = ThreadPoolExecutor(at_once, thread_name_prefix="finalize")  # Tune's thread must not wait for MLflow

    def settle_known(self) -> None:
        """Finish what an earlier driver left: trials tagged as stopped early whose runs were not ended."""
        for result in self.records.results():
            if result.reason and result.state not in OVER:
                self.settle(result.trial.number, EARLY)

    def trial_over(self, number: int) -> None:
        """Tune has ended a trial. One that did not end by itself was stopped early."""
        self.executor.submit(self._settle_logged, number)

    def trial_given_up(self, number: int, reason: str) -> None:
        """Tune does not try a trial again. Its process has reported that, unless it was killed or had no run yet."""
        self.records.give_up(number, reason)
        launch_id = trial_launch_id(self.job.launch_id, number)
        fetch_launch(self.root, launch_id, patience=PATIENCE)
        run = recorded_run(self.root, launch_id)
        if run is None or run.files.read_status()["status"] == "RUNNING":
            self.console.say(f"trial {number}: failed: {reason}")
            if run is not None:
                self.executor.submit(self._end, number, run, "FAILED")

    def settle(self, number: int, state: str) -> None:
        """Record how a trial ended, unless it did so itself."""
        result = self.records.result(self.records.trial(number))
        if result.run is None or result.state in OVER:
            return
        tags = None
        if state == EARLY:
            reason = result.reason or f"{self.stop.reason or self.job.sweep.options.scheduler} at step {result.steps}"
            tags = {EARLY_TAG: reason}
            if not is_remote(self.root):  # at once: its process may still hold the run's lock, and the next driver looks for the tag
                result.run.add_tags(tags)
        self._end(number, result.run, {EARLY: "FINISHED", KILLED: "KILLED"}[state], tags)

    def _end(self, number: int, run: Run, status: str, tags: dict[str, str] | None = None) -> None:
        try:
            end_run(run, self.uri, status, tags=tags)
        except RuntimeError as error:  # of an object storage
            self.console.say(f"trial {number} could not be recorded as {status}: {one_line(error)}")

    def settle_all(self, signalled: bool) -> None:
        """Record the end of every trial that has a run, once Tune is done."""

        def settle(result: TrialResult) -> None:
            if not signalled:
                remove_workers(self.job.channel, result.trial.number)
            early = result.reason or (self.stop.reason and not signalled)
            self.settle(result.trial.number, EARLY if early else KILLED)

        left = [result for result in self.records.results() if result.state not in OVER and result.run is not None]
        if not is_remote(self.root):
            for result in left:
                settle(result)
            return
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(settle, left))

    def _settle_logged(self, number: int) -> None:
        try:
            self.settle(number, EARLY)
        except Exception as error:  # in the executor, it would be lost
            self.console.say(f"trial {number} could not be recorded as stopped early: {one_line(error)}")


def write_outcome(job: SweepJob, results: Sequence[TrialResult], writer: RunWriter, console: Console) -> SweepOutcome:
    """Send what MLflow lacks, write tables, plots and the objective of each trial, and count the trials."""
    options, uri, directory = job.sweep.options, job.sweep.base.tracking.uri, job.parent.path
    if not all(send_rest(result.run, uri) for result in results if result.run is not None):
        later = f"tune --resume {job.parent.run_id[:8]}" if is_remote(job.sweep.base.output.root) else "runs sync"
        console.say(f"some trials are not complete in MLflow; send the rest later: python -m raytrain2p.{later}")
    settings = [axis.setting for axis in job.sweep.axes]
    best = write_results(directory, results, settings, options.mode, options.phase)
    try:
        draw_sweep(directory, results, job.sweep.axes, options.mode, options.metric)
    except Exception as error:  # a plot is not worth a sweep
        console.say(f"no plots: {type(error).__name__}: {one_line(error)}")
    for result in results:
        if (found := result.best(options.mode)) is not None and result.state in OVER:
            writer.write_metrics({OBJECTIVE: found[1]}, result.trial.number)
    count = [result.state for result in results].count
    finished, early, failed = count(FINISHED), count(EARLY), count(FAILED)
    unfinished = len(results) - finished - early - failed
    return SweepOutcome(job.parent.run_id, public(job.parent.directory), len(results), finished, early, failed, unfinished, best)
