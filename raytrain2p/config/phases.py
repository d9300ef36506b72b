"""The facts of each phase, in one place: number, name, artifact, MLflow experiment."""

from dataclasses import dataclass

SWEEPS = "sweeps"  # directory of sweeps under `output.root`, beside those of the phases


@dataclass(frozen=True)
class Phase:
    """One phase.

    Args:
        number: as in `--phase`.
        meaning: what it does, in a few words.
        name: directory of its runs under `output.root`, and the beginning of their names.
        artifact: file name of its result.
        experiment: MLflow experiment, unless another is set.
    """

    number: int
    meaning: str
    name: str
    artifact: str
    experiment: str


ALIGNMENT = Phase(1, "aligns frozen encoders", "alignment", "aligner.pt", "phase1_alignment")
INSTRUCTION = Phase(2, "instruction-tunes a language model", "phase2", "model.pt", "phase2_training_with_pretrained_aligner")
PHASES = {phase.number: phase for phase in (ALIGNMENT, INSTRUCTION)}
PHASES_BY_NAME = {phase.name: phase for phase in PHASES.values()}
