"""The two phases, as the driver sees them: names, and how what they take in is read and checked. Nothing here trains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytrain2p.phases import dialogues, pairs


@dataclass(frozen=True)
class Phase:
    """One phase.

    Args:
        name: of its directory under `output.root`, and the beginning of its runs' names.
        artifact: file name of its result.
        experiment: MLflow experiment, unless another is set.
        survey: settings to everything that training needs, checked.
    """

    name: str
    artifact: str
    experiment: str
    survey: Callable[..., Any]


PHASES: dict[int, Phase] = {
    1: Phase("alignment", "aligner.pt", "phase1_alignment", pairs.survey),
    2: Phase("phase2", "model.pt", "phase2_training_with_pretrained_aligner", dialogues.survey),
}
