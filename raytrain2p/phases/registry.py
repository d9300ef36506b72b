"""Phase number to its functions: what the driver reads, and what a worker builds, measures and exports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from raytrain2p.config import Settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.phases.inputs import PhaseInputs, Split

if TYPE_CHECKING:  # Lightning
    from raytrain2p.models.distributed import WorkerGroup
    from raytrain2p.phases.base import Answer, PhaseModule

SettingsT = TypeVar("SettingsT", bound=Settings)
ModuleT = TypeVar("ModuleT", bound="PhaseModule")
SplitT = TypeVar("SplitT", bound=Split)


def read_inputs(settings: Settings, phase: int) -> PhaseInputs:
    """Read and check all that a phase trains on. Imports nothing that trains: the driver starts seconds sooner.

    Raises:
        InputError: every problem with models, records and images.
    """
    from raytrain2p.phases.alignment import data as alignment
    from raytrain2p.phases.instruction import data as instruction

    readers: dict[int, Callable[..., PhaseInputs]] = {ALIGNMENT.number: alignment.read_inputs, INSTRUCTION.number: instruction.read_inputs}
    return readers[phase](settings)


@dataclass(frozen=True)
class TypedPhaseFunctions(Generic[SettingsT, ModuleT, SplitT]):
    """What a worker does in one phase.

    Args:
        build: settings, steps and precision to the LightningModule.
        online: module and splits to splits whose images are encoded in the step.
        evaluate: module, splits, test splits' names and worker group to metrics and sample answers.
        export: writes the artifact: module, path, configuration, training split.
    """

    build: Callable[[SettingsT, int, str], ModuleT]
    online: Callable[[ModuleT, Mapping[str, SplitT]], Mapping[str, SplitT]]
    evaluate: "Callable[[ModuleT, Mapping[str, SplitT], list[str], WorkerGroup], tuple[dict[str, float], list[Answer]]]"
    export: Callable[[ModuleT, Path, dict[str, Any], SplitT], None]


PhaseFunctions = TypedPhaseFunctions[Settings, "PhaseModule", Split]  # of whichever phase


def phase_functions(phase: int) -> PhaseFunctions:
    """The functions of a phase; imports Lightning."""
    if phase == ALIGNMENT.number:
        from raytrain2p.phases.alignment import module as alignment

        functions = TypedPhaseFunctions(alignment.build, alignment.online, alignment.evaluate, alignment.export)
        return cast(PhaseFunctions, functions)
    assert phase == INSTRUCTION.number
    from raytrain2p.phases.instruction import evaluate, module

    return cast(PhaseFunctions, TypedPhaseFunctions(module.build, module.online, evaluate.evaluate, module.export))
