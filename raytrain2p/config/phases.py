"""The facts of each phase, in one place: number, name, artifact, MLflow experiment, fields of its records."""

from dataclasses import dataclass

SWEEPS = "sweeps"  # directory of sweeps under `output.root`, beside those of the phases


@dataclass(frozen=True)
class Phase:
    """One phase.

    Args:
        number: as in `--phase`.
        name: directory of its runs under `output.root`, and the beginning of their names.
        artifact: file name of its result.
        experiment: MLflow experiment, unless another is set.
        required_fields: fields that each of its records must have.
        optional_fields: fields that its records may have.
    """

    number: int
    name: str
    artifact: str
    experiment: str
    required_fields: tuple[str, ...]
    optional_fields: tuple[str, ...] = ()


ALIGNMENT = Phase(1, "alignment", "aligner.pt", "phase1_alignment", ("text", "image"))
INSTRUCTION = Phase(2, "phase2", "model.pt", "phase2_training_with_pretrained_aligner", ("instruction", "response"), ("image", "task"))
PHASES = {phase.number: phase for phase in (ALIGNMENT, INSTRUCTION)}
PHASES_BY_NAME = {phase.name: phase for phase in PHASES.values()}
