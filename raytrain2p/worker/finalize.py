"""What rank 0 leaves in the run directory when training is over: which checkpoint counts, tables, images, the outcome."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytrain2p.data.media import ImageRef, decode_image
from raytrain2p.storage.files import write_file, write_json
from raytrain2p.tracking.checkpoints import best_checkpoint, damage, last_checkpoint
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.plots import answer_sheet, training_curve
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.job import Outcome

ANSWERS_SHOWN = 20


def whole_checkpoint(run: Run) -> Path | None:
    """What is exported: the best checkpoint, or the last one if the best is damaged or there is none."""
    best = best_checkpoint(run.checkpoints)
    return best if best is not None and damage(best) is None else last_checkpoint(run.checkpoints)


def finish(writer: RunWriter, artifact: str, metrics: dict[str, float], tables: dict[str, Any]) -> None:
    """Tables and images into the run directory; then the run is FINISHED, and all of it goes to MLflow."""
    run = writer.run
    training_curve(run.files.metrics, run.files.training_curve, f"{run.phase} run {run.run_id[:8]}")
    if answers := tables.get("answers"):
        write_file(run.files.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
        title = f"run {run.run_id[:8]}: answers on test images, drawn at random"
        answer_sheet(spread(answers, ANSWERS_SHOWN), _image_of, run.files.answer_sheet, title)
    write_json(run.files.test_metrics, metrics)
    best, last = best_checkpoint(run.checkpoints), last_checkpoint(run.checkpoints)
    outcome = Outcome(
        run.run_id,
        run.directory,
        str(best) if best else None,
        str(last) if last else None,
        str(run.path / artifact),
        metrics | last_values(run.files.metrics, ("val/loss", "train_loss")),
    )
    write_json(run.files.result, asdict(outcome))
    writer.finish("FINISHED")


def last_values(metrics_file: Path, names: tuple[str, ...]) -> dict[str, float]:
    """The latest value of each of these metrics that was noted."""
    found = {point.name: point.value for point in read_points(metrics_file) if point.name in names}
    return {name: found[name] for name in names if name in found}


def spread(rows: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly from the whole list."""
    return rows if len(rows) <= most else [rows[index * len(rows) // most] for index in range(most)]


def _image_of(row: dict[str, Any]) -> Any:
    return decode_image(ImageRef(row["image"], row["image_row"]).read()) if row["image"] else None
