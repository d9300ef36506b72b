"""Phase 1: an aligner is trained to map the features of frozen encoders into one space, by a contrastive loss."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from raytrain2p.config import AlignmentSettings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.batches import MicroBatch
from raytrain2p.data.media import TEXT
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.losses import ContrastiveLoss
from raytrain2p.models.parameters import count_parameters
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.alignment.data import AlignmentSplit, build_aligner, encoder_specs
from raytrain2p.phases.alignment.retrieval import retrieval_metrics
from raytrain2p.phases.base import Answer, PhaseModule, whole_on_first
from raytrain2p.phases.inputs import Batch
from raytrain2p.phases.online import OnlineEncoders

TEXTS_AT_ONCE = 256
LONGEST_BEGINNING = 200  # characters of a text that are kept: phase 2 reads its first few tokens


class AlignmentModule(PhaseModule):
    """The aligner and its loss as a LightningModule."""

    def __init__(self, settings: AlignmentSettings, total_steps: int) -> None:
        super().__init__(settings.training, settings.launch, settings.seed, total_steps)
        self.settings = settings
        self.aligner = build_aligner(settings.model)
        self.loss = ContrastiveLoss(settings.model.loss)
        self.parameter_counts = count_parameters({"aligner": self.aligner, "loss": self.loss})
        self.encoders = OnlineEncoders(encoder_specs(settings.model))

    def shardable(self) -> list[tuple[nn.Module, MixedPrecisionPolicy]]:
        parts: list[nn.Module] = [*self.aligner.branches.values(), self]
        return [(part, MixedPrecisionPolicy()) for part in parts]

    def vectors(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Unit vectors by modality of the items that the records have, (at most b, S)."""
        features = {}
        for modality, (values, positions) in self.encoders.features(batch["items"], self.device).items():
            if not len(values):  # DDP waits for gradients of every branch
                values = values.new_zeros(0, 1, self.aligner.shape["widths"][modality])
            features[modality] = (values.float(), positions)
        return self.aligner(features)

    def forward(self, batch: Batch, alone: bool = False) -> torch.Tensor:
        """The mean loss over all pairs of modalities; if `alone`, over those that have a positive pair in this batch."""
        present, whole = batch["present"], {}
        for modality, rows in self.vectors(batch).items():
            whole[modality] = (
                rows
                if len(rows) == len(batch["keys"])
                else rows.new_zeros(len(batch["keys"]), rows.shape[1]).masked_scatter(present[modality][:, None], rows)
            )
        losses = [
            self.loss(whole[left], whole[right], batch["keys"], (present[left], present[right]), alone)
            for left, right in itertools.combinations(whole, 2)
            if not alone or np.intersect1d(*(batch["keys"][present[modality]].cpu() for modality in (left, right))).size
        ]
        return torch.stack(losses).mean() if losses else self.loss.log_scale.new_zeros(())

    def total_loss(self, batch: Batch) -> torch.Tensor:
        return self(batch)

    def val_sums(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Negatives come from the batch alone: the batches of other workers may have another size."""
        count = batch["keys"].shape[0]
        return self(batch, alone=True) * count, count


def build(settings: AlignmentSettings, total_steps: int, precision: str) -> AlignmentModule:
    """The untrained module; all of it trains."""
    return AlignmentModule(settings, total_steps)


def warm_start(module: AlignmentModule, artifact: Mapping[str, Any]) -> None:
    """Load the branches of an aligner.pt of the modalities that both have, and the loss's scale, if it is of the same form.

    Args:
        artifact: of `model.init`, which `check_init` has looked at.
    """
    state = module.aligner.state_dict()
    module.aligner.load_state_dict({name: artifact["state_dict"].get(name, value) for name, value in state.items()})
    if (loss := artifact.get("loss", {})).get("form") == module.loss.form:
        module.loss.load_state_dict(loss["state_dict"])


def online(module: AlignmentModule, data: Mapping[str, AlignmentSplit]) -> dict[str, AlignmentSplit]:
    """The splits with the encoders' preprocessing, where media are encoded in the step."""
    return {name: replace(split, preprocess=module.encoders.preprocess(split.tables)) for name, split in data.items()}


@torch.inference_mode()
def evaluate(
    module: AlignmentModule, data: Mapping[str, AlignmentSplit], tests: list[str], group: WorkerGroup
) -> tuple[dict[str, float], list[Answer]]:
    """Recall at 1 and 5 from each modality to each other one, on each test split, and of random retrieval; on rank 0 alone."""
    metrics: dict[str, float] = {}
    for name in tests:
        split = data[name]
        vectors = split_vectors(module, split, group)
        if not group.is_first:
            continue
        concepts = np.unique(split.keys, return_inverse=True)[1]
        firsts, belongs = {}, {}
        for modality, table in split.tables.items():
            items = table.items.flat
            firsts[modality] = np.unique(items, return_index=True)[1]  # an item of many records is one candidate
            of_record = concepts[table.items.lengths > 0]
            belongs[modality] = coo_array((np.ones(len(items)), (items, of_record)), (items.max() + 1, concepts.max() + 1)).tocsr()
        for source, target in itertools.permutations(split.tables, 2):
            right = belongs[source] @ belongs[target].T
            asked, offered = firsts[source], firsts[target]
            found = retrieval_metrics(vectors[source][asked], vectors[target][offered], right)
            metrics |= {f"{name}/{source}_to_{target}_{metric}": value for metric, value in found.items()}
    return metrics, []


def split_vectors(module: AlignmentModule, split: AlignmentSplit, group: WorkerGroup) -> dict[str, np.ndarray]:
    """Unit vectors by modality, in the order of the records that have it. Each worker maps its share of the records."""
    vectors: dict[str, list[np.ndarray]] = {modality: [] for modality in split.tables}
    for records, counts in group.batches(np.arange(len(split)), module.settings.evaluation.batch_size):
        batch = module.transfer_batch_to_device(split[MicroBatch(records, 0)], module.device, 0)
        for modality, rows in module.as_forward(partial(module.vectors, batch)).items():
            if counts:
                vectors[modality].append(rows.cpu().numpy())
    parts = group.gather({modality: np.concatenate(rows) for modality, rows in vectors.items() if rows})
    whole: dict[str, np.ndarray] = {}
    for modality, table in split.tables.items():
        has = np.flatnonzero(table.items.lengths > 0)
        order = np.concatenate([has[np.isin(has, np.arange(rank, len(split), group.size))] for rank in range(group.size)])
        whole[modality] = np.concatenate([part[modality] for part in parts if modality in part])[np.argsort(order)]
    return whole


@torch.no_grad()
def text_vectors(module: AlignmentModule, split: AlignmentSplit) -> torch.Tensor:
    """Unit vectors of the split's texts, (N, S)."""
    numbers, table, vectors = np.array(list(split.texts.values()), np.int64), split.tables[TEXT], list[torch.Tensor]()
    for start in range(0, len(numbers), TEXTS_AT_ONCE):
        features = table.load(numbers[start : start + TEXTS_AT_ONCE], None)
        batch = module.transfer_batch_to_device({"items": {TEXT: features}}, module.device, 0)
        vectors.append(module.as_forward(partial(module.vectors, batch))[TEXT])
    return torch.cat(vectors).cpu()


def export(module: AlignmentModule, path: Path, config: dict[str, Any], learnt: AlignmentSplit | None = None) -> None:
    """Write aligner.pt. With it go the beginnings of texts of the training set, and their vectors, for `model.recall_tokens`.

    A collective: rank 0 writes.
    """
    known = {}
    if learnt is not None and learnt.texts:
        texts = [text[:LONGEST_BEGINNING] for text in learnt.texts]
        known = {"known": {"texts": texts, "vectors": text_vectors(module, learnt)}}
    weights, scale = (whole_on_first(part.state_dict().items()) for part in (module.aligner, module.loss))
    if not WorkerGroup.current().is_first:
        return
    save_artifact(
        path,
        ALIGNMENT,
        config,
        encoders={
            modality: {"name": spec.name, "options": dict(spec.options), "fingerprint": fingerprint(spec.directory())}
            for modality, spec in encoder_specs(module.settings.model).items()
        },
        shape=module.aligner.shape,
        state_dict=weights,
        loss={"form": module.loss.form, "state_dict": scale},
        **known,
    )
