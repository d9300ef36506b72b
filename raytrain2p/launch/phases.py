"""The two phases, as a launch sees them: names, and what each does in the driver and on the workers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytrain2p.phases import alignment, answers, dialogues, instruction


@dataclass(frozen=True)
class Phase:
    """One phase.

    Args:
        name: of its directory under `output.root`, and the beginning of its runs' names.
        artifact: file name of its result.
        experiment: MLflow experiment, unless another is set.
        survey: settings to everything that training needs, checked.
        build: settings, splits, steps and precision to the LightningModule.
        online: module and splits to splits whose pictures are encoded in the step.
        evaluate: module, splits, test splits' names and world to metrics and tables.
        export: writes the artifact.
    """

    name: str
    artifact: str
    experiment: str
    survey: Callable[..., Any]
    build: Callable[..., Any]
    online: Callable[..., Any]
    evaluate: Callable[..., tuple[dict[str, float], dict[str, Any]]]
    export: Callable[..., None]


PHASES: dict[int, Phase] = {
    1: Phase(
        name="alignment",
        artifact="aligner.pt",
        experiment="phase1_alignment",
        survey=alignment.survey,
        build=alignment.build,
        online=alignment.online,
        evaluate=alignment.evaluate,
        export=alignment.export,
    ),
    2: Phase(
        name="phase2",
        artifact="model.pt",
        experiment="phase2_training_with_pretrained_aligner",
        survey=dialogues.survey,
        build=instruction.build,
        online=instruction.online,
        evaluate=answers.evaluate,
        export=instruction.export,
    ),
}
