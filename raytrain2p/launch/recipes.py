"""The two phases, as a worker sees them: what is built, trained, measured and exported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytrain2p.phases import alignment, answers, instruction


@dataclass(frozen=True)
class Recipe:
    """One phase.

    Args:
        build: settings, splits, steps and precision to the LightningModule.
        online: module and splits to splits whose pictures are encoded in the step.
        evaluate: module, splits, test splits' names and world to metrics and tables.
        export: writes the artifact.
    """

    build: Callable[..., Any]
    online: Callable[..., Any]
    evaluate: Callable[..., tuple[dict[str, float], dict[str, Any]]]
    export: Callable[..., None]


RECIPES: dict[int, Recipe] = {
    1: Recipe(alignment.build, alignment.online, alignment.evaluate, alignment.export),
    2: Recipe(instruction.build, instruction.online, answers.evaluate, instruction.export),
}
