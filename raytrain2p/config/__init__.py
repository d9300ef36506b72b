"""Typed settings and their checks. Imports nothing else of the package."""

from raytrain2p.config.loading import load_settings
from raytrain2p.config.paths import base_directory
from raytrain2p.config.problems import Findings, InputError, Problem
from raytrain2p.config.scratch import cache_directory
from raytrain2p.config.settings import AlignmentSettings, InstructionSettings, Settings, flatten, flatten_tree

__all__ = [
    "AlignmentSettings",
    "Findings",
    "InputError",
    "InstructionSettings",
    "Problem",
    "Settings",
    "base_directory",
    "cache_directory",
    "flatten",
    "flatten_tree",
    "load_settings",
]
