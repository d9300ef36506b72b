"""The identity of a run on its workers: rank 0 makes or finds it, and is the only one that writes to it."""

from contextlib import AbstractContextManager

import ray

from raytrain2p.config import Settings
from raytrain2p.config.phases import PHASES
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.storage.lease import Lease
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter, open_run_writer, resolved_config
from raytrain2p.worker.job import TrainJob, TrialContext


def attach_run(job: TrainJob, group: WorkerGroup) -> Run:
    """Rank 0 gets or creates the run; every worker then uses the same one."""
    if job.trial is not None and group.is_first:
        report_placement(job.trial)
    phase = PHASES[job.phase]
    return group.from_first(lambda: get_or_create_run(job.settings, phase.name, phase.experiment, job.launch_id, job.tags))


def precision_setting(settings: Settings, run: Run, group: WorkerGroup) -> str:
    """As set; where other nodes may take the run over, `auto` is what it began with: in another precision its losses would be others."""
    setting: str = settings.training.precision
    if setting == "auto" and settings.launch.is_elastic:
        return group.from_first(lambda: (run.files.read_config() or {}).get("training", {}).get("precision", setting))
    return setting


def report_placement(trial: TrialContext) -> None:
    """Report the workers' placement group to the sweep. When Tune stops a trial, its process is killed, with Ray Train's
    controller in it, and the group would stay: what removes it then asks Ray's dashboard, and a local Ray has none.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        trial.channel.put_placement(trial.number, group.id.hex())


def open_writer(job: TrainJob, run: Run, precision: str, lease: Lease | None) -> AbstractContextManager[RunWriter]:
    """The context in which rank 0 writes to the run.

    Args:
        lease: of the run, if it is in an object storage.
    """
    config = resolved_config(job.settings, {"training.precision": precision, "launch.cpus_per_worker": job.threads})
    return open_run_writer(
        run,
        job.settings.tracking.uri,
        {"config": config, "command": job.command, "facts": job.facts, "launched": job.launched},
        job.channel.say,
        lease,
    )
