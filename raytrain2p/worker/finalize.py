"""The end of a run: the best checkpoint becomes the artifact, is evaluated, and the run directory gets its results."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from raytrain2p.config.phases import PHASES_BY_NAME
from raytrain2p.data.media import MEDIA, MediaRef, decode
from raytrain2p.data.records import spread
from raytrain2p.models.artifacts import recorded_digest
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.phases.base import Answer, PhaseModule, take_over
from raytrain2p.phases.inputs import Split
from raytrain2p.phases.registry import PhaseFunctions
from raytrain2p.storage.errors import reporting_disk_errors
from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.tracking.checkpoints import best_checkpoint, damage, last_checkpoint
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.plots import answer_sheet, training_curve
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.callbacks.nonfinite import DivergedError
from raytrain2p.worker.channel import Stage
from raytrain2p.worker.job import Outcome, TrainJob
from raytrain2p.worker.resume import check_shared

ANSWERS_SHOWN = 20


def checkpoint_to_export(run: Run, group: WorkerGroup) -> Path:
    """Rank 0's choice, on every worker: listings of shared storage may differ from node to node for a while.

    Raises:
        FileNotFoundError: output.root is not on storage that all nodes share.
    """
    path = group.from_first(lambda: whole_checkpoint(run))
    assert path is not None, "training saves at its end"
    check_shared(path)
    return path


def whole_checkpoint(run: Run) -> Path | None:
    """The best checkpoint, or the last one if the best is damaged or there is none."""
    best = best_checkpoint(run.checkpoints)
    return best if best is not None and damage(best) is None else last_checkpoint(run.checkpoints)


def restored(module: PhaseModule, checkpoint: Path, device: torch.device, group: WorkerGroup) -> PhaseModule:
    """The module with a checkpoint's trained weights, in evaluation mode. What is sharded stays so.

    Raises:
        DivergedError: they are not finite: a version that did not check them saved them.
    """
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    finite = [take_over(parameter, weights[name]) for name, parameter in module.to(device).named_parameters() if name in weights]
    if not all(group.gather(all(finite))):
        raise DivergedError(f"{checkpoint} has weights that are not finite; begin a new run")
    return module.eval()


def export(phase: PhaseFunctions, module: PhaseModule, run: Run, steps: int, learnt: Split, group: WorkerGroup) -> None:
    """Rank 0 writes the artifact, with what the others have of it. Results of the earlier one that it replaces are moved away first.

    Raises:
        StorageError: the disk is full, or gone.
    """
    path = artifact_path(run)
    size = sum(weights.numel() * weights.element_size() for weights in module.parameters() if weights.requires_grad)
    with reporting_disk_errors(path, size):
        config = run.files.read_config()
        assert config is not None, "open_run_writer has written it"
        if group.is_first:
            set_aside_results(run, steps)
        phase.export(module, path, config, learnt)


def set_aside_results(run: Run, steps: int) -> None:
    """Move the results of an earlier model, which a resumed run has trained on, to a folder of their own."""
    files, result = run.files, read_json(run.files.result)
    if result is None or (before := result.get("steps", 0)) == steps:
        return
    folder = files.earlier / f"step_{before or 'unknown'}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (files.answers, files.answer_sheet, files.test_metrics, files.result):  # the result last: a kill in between is made good
        if path.is_file():
            path.replace(folder / path.name)


def artifact_path(run: Run) -> Path:
    return run.files.artifact(PHASES_BY_NAME[run.phase])


def evaluate(
    phase: PhaseFunctions, module: PhaseModule, data: Mapping[str, Split], job: TrainJob, group: WorkerGroup, precision: str
) -> tuple[dict[str, float], list[Answer]]:
    """Metrics on every test split, and sample answers."""
    if job.settings.data.features == "online":
        data = phase.online(module, data)
    tests = list(job.settings.data.test)
    if group.is_first and tests:
        job.channel.put(Stage(f"evaluating on {', '.join(tests)}"))
    as_it_is = torch.compiler.set_stance("force_eager") if module.compiled else nullcontext()  # each length of an answer would be compiled
    with as_it_is, torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return phase.evaluate(module, data, tests, group)


def finish(writer: RunWriter, metrics: dict[str, float], answers: list[Answer], steps: int) -> None:
    """Write tables, images and the outcome into the run directory, and send everything to MLflow; the run is FINISHED.

    Raises:
        StorageError: the disk is full, or gone.
    """
    run = writer.run
    with reporting_disk_errors(run.files.result, 1_000_000):
        training_curve(run.files.metrics, run.files.training_curve, f"{run.phase} run {run.run_id[:8]}")
        if answers:
            write_file(run.files.answers, "".join(json.dumps({"step": steps, **row}, ensure_ascii=False) + "\n" for row in answers))
            title = f"run {run.run_id[:8]}, step {steps}: answers on test records, drawn at random"
            answer_sheet(spread(answers, ANSWERS_SHOWN), _images_of, run.files.answer_sheet, title)
        write_json(run.files.test_metrics, metrics)
        write_json(run.files.result, asdict(outcome_of(run, metrics, steps)))
        writer.finish("FINISHED")


@contextmanager
def failed_if_diverged(writer: RunWriter | None) -> Iterator[None]:
    """Within, a DivergedError ends the run as FAILED, and this worker as one that is done: Ray would start a failed one again."""
    try:
        yield
    except DivergedError as error:
        if writer is not None:
            writer.finish("FAILED", str(error))


def outcome_of(run: Run, metrics: dict[str, float], steps: int) -> Outcome:
    best, last = best_checkpoint(run.checkpoints), last_checkpoint(run.checkpoints)
    return Outcome(
        run.run_id,
        run.directory,
        str(best) if best else None,
        str(last) if last else None,
        str(artifact_path(run)),
        metrics | last_values(run.files.metrics, ("val/loss", "train_loss")),
        steps,
        recorded_digest(artifact_path(run)),
    )


def last_values(metrics_file: Path, names: tuple[str, ...]) -> dict[str, float]:
    """The latest value of each of these metrics that was written."""
    found = {point.name: point.value for point in read_points(metrics_file) if point.name in names}
    return {name: found[name] for name in names if name in found}


def _images_of(row: Answer) -> list[Image.Image]:
    """The media of a sample answer, as images."""
    return [MEDIA[ref.modality].show(decode(ref)) for ref in (MediaRef(**media) for media in row["media"])]
