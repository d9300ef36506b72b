"""Where a run starts: at its beginning, or at a checkpoint that rank 0 found."""

from dataclasses import dataclass
from pathlib import Path

from raytrain2p.config import InstructionSettings, Settings
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.storage.objects import PATIENCE
from raytrain2p.storage.remote import fetch
from raytrain2p.tracking.checkpoints import resumable_checkpoint, step_of
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.channel import RunChannel


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint and its step; none and 0 at the beginning."""

    checkpoint: Path | None
    step: int


def agree_on_resume_point(run: Run, group: WorkerGroup, writer: RunWriter | None, channel: RunChannel) -> ResumePoint:
    """Rank 0's, on every worker; rank 0's writer skips the metrics that it has already written.

    Raises:
        FileNotFoundError: output.root is not on storage that all nodes share.
    """
    point = group.from_first(lambda: find_resume_point(run, channel))
    if writer is not None:
        writer.resume_from(point.step)
    if point.checkpoint is not None:
        check_shared(point.checkpoint)
    return point


def find_resume_point(run: Run, channel: RunChannel) -> ResumePoint:
    """The latest checkpoint that is whole; damaged ones are reported to the user."""
    path, complaints = resumable_checkpoint(run.checkpoints)
    step = (step_of(path) or 0) if path else 0
    for complaint in complaints:
        channel.say(f"{complaint}; resuming from {path.name if path else 'the beginning'} at step {step}")
    if path is not None:
        channel.say(f"resuming {run.phase} run {run.run_id[:8]} at step {step}")
    return ResumePoint(path, step)


def fetch_artifacts(settings: Settings) -> None:
    """Fetch what training begins with, if it is an object: the driver may have fetched it to another node."""
    named = (settings.model.init, settings.model.aligner if isinstance(settings, InstructionSettings) else None)
    for path in named:
        if path is not None:
            fetch(Path(path), PATIENCE)


def check_shared(path: Path) -> None:
    """What rank 0 found must be visible here. An object is fetched.

    Raises:
        FileNotFoundError: it is not.
    """
    fetch(path, PATIENCE)
    if not path.is_file():
        raise FileNotFoundError(f"rank 0 found {path}, which this node does not have: output.root must be on shared storage")
