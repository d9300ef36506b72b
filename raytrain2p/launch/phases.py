"""Which module is which phase. Each has the same functions: survey, build, online, evaluate, export."""

from types import ModuleType

from raytrain2p.phases import alignment, instruction

PHASES: dict[int, ModuleType] = {1: alignment, 2: instruction}
