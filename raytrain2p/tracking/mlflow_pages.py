"""What the pages of MLflow's UI show of a run beside its settings, metrics and files: its description, its data, its
model. All of it follows from the run directory, and may be sent again."""

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus

from raytrain2p.config.escaping import code_block, code_span
from raytrain2p.config.phases import PHASES_BY_NAME
from raytrain2p.config.secrets import masked
from raytrain2p.tracking.next_commands import use_command
from raytrain2p.tracking.run import COMMAND_TAG, DIRECTORY_TAG, SWEEP_TAG, Run
from raytrain2p.tracking.source import SOURCE_PREFIX, USER_TAG

NOTE_TAG, CONTEXT_TAG = "mlflow.note.content", "mlflow.data.context"
NAME_LENGTH, DIGEST_LENGTH, SOURCE_LENGTH = 500, 16, 60_000  # of a data set; MLflow takes 36 characters of a digest, and shows them all
ARTIFACT_TAG, STEPS_TAG = "raytrain2p.artifact", "raytrain2p.steps"


def run_description(run: Run, tags: dict[str, str]) -> str:
    """What a run is, as Markdown: what it trains, its directory, its command. The UI shows three lines, and the rest on demand.

    Args:
        tags: of its record.
    """
    phase = PHASES_BY_NAME.get(run.phase)
    what = f"Phase {phase.number}: {phase.meaning}" if phase else "A sweep; its trials are its child runs"
    trial = f", a trial of sweep {code_span(tags[SWEEP_TAG][:8])}" if SWEEP_TAG in tags else ""
    where, command = code_span(tags.get(DIRECTORY_TAG, run.directory)), code_block(tags.get(COMMAND_TAG, ""))
    use = f"\n\nUse it:\n\n{code_block(use_command(run, run.path.parent.parent.parent))}" if phase else ""
    return f"{what}{trial}, in {where}\n\n{command}{use}"


def data_of(record: dict[str, Any]) -> list[DatasetInput]:
    """The data of a run, one for each split; none in a record of an earlier version. The split is part of the name: MLflow takes two
    of one name and digest for the same.

    Args:
        record: run.json, with the number of records by `SETTING=SOURCES`.
    """
    found = []
    for where, records in record.get("split_records", {}).items():
        setting, _, sources = where.partition("=")
        digest = record["train_digest"] if setting == "data.train" else record["inputs"][where]["records"]
        split = setting.removeprefix("data.").removeprefix("test.")
        names = ", ".join(Path(source).name for source in sources.split(", "))
        data = Dataset(
            name=masked(f"{split}: {names}")[:NAME_LENGTH],
            digest=digest[:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": masked(sources)[:SOURCE_LENGTH]}),
            profile=json.dumps({"num_rows": records}),
        )
        found.append(DatasetInput(data, [InputTag(CONTEXT_TAG, setting.split(".")[1])]))
    return found


def record_model(client: MlflowClient, run: Run, tags: dict[str, str], steps: int) -> None:
    """Get or create the logged model of a finished run, which names the file among the run's artifacts. Its own folder of artifacts
    stays empty: the file is not kept twice.

    Whatever was killed between two of these requests, the next call finds what there is. A run that was trained for longer keeps its
    model, with another number of steps.

    Args:
        tags: of the run's record.
        steps: that it was trained.
    """
    found, phase = client.get_run(run.run_id), PHASES_BY_NAME[run.phase]
    name, folder = f"{run.phase}_{run.timestamp}", Path(phase.artifact).stem
    shown = {key: value for key, value in tags.items() if key == USER_TAG or key.startswith(SOURCE_PREFIX)}
    shown |= {ARTIFACT_TAG: f"runs:/{run.run_id}/{folder}/{phase.artifact}", STEPS_TAG: str(steps)}
    models = client.search_logged_models([found.info.experiment_id], f"source_run_id = '{run.run_id}' AND name = '{name}'")
    if models:
        model = models[0]
        client.set_logged_model_tags(model.model_id, shown)
    else:
        model = client.create_logged_model(
            found.info.experiment_id, name, run.run_id, shown | {NOTE_TAG: run_description(run, tags)}, model_type=folder
        )
    outputs = found.outputs.model_outputs if found.outputs else []
    if model.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, steps)])
    if model.status != LoggedModelStatus.READY:
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
