"""Frozen encoders that run within the step (`data.features=online`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raytrain2p.data.features import Features, padded
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.frozen_encoder import FrozenEncoder
from raytrain2p.phases.inputs import MediaTable, Preprocess


class OnlineEncoders:
    """The encoders of a module, each built when it is first needed. Not a part of the module: its checkpoints have no weights of them."""

    def __init__(self, specs: Mapping[str, EncoderSpec]) -> None:
        self.specs = specs
        self.built: dict[str, FrozenEncoder] = {}

    def of(self, modality: str) -> FrozenEncoder:
        if modality not in self.built:
            self.built[modality] = self.specs[modality].build()
        return self.built[modality]

    def preprocess(self, tables: Mapping[str, MediaTable]) -> dict[str, Preprocess]:
        """By modality, of tables without features: decoded items to what their encoder takes, in the data loader's process."""
        return {modality: self.of(modality).preprocess for modality, table in tables.items() if table.online}

    def features(self, items: Mapping[str, Any], device: torch.device) -> dict[str, Features]:
        """Features by modality, on the device: as they were stored, or else of what `preprocess` made of the items."""
        return {
            modality: loaded if isinstance(loaded, Features) else self._encoded(modality, loaded, device)
            for modality, loaded in items.items()
        }

    def _encoded(self, modality: str, loaded: Sequence[torch.Tensor], device: torch.device) -> Features:
        """The encoder was built before Lightning moved the module to its device. On a CPU autocast takes no float16, which features are."""
        with torch.autocast("cpu", enabled=False):
            return padded(self.of(modality).to(device).encode(loaded)) if loaded else Features(padded([]).values.to(device))
