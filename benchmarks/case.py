"""What is trained in a comparison: the same records in the same order, and the same initial weights, in files for all.

`case.json` has the case, `batches<rank>.pt` the batches of each worker, `media<rank>.pt` their images, `initial.pt` the weights that
model.pt would have before training, `aligner.pt` an untrained aligner, since the speed does not depend on its weights.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"attention": list(ATTENTION), "all": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}
TARGET_NAMES = {"attention": "q, k, v, o", "all": "all linear layers"}
TOTAL_STEPS, WARM_UP, LEARNING_RATE, CLIP = 1000, 20, 1e-3, 1.0  # the schedule of all contestants; they are ended long before


@dataclass(frozen=True)
class Case:
    """Settings of a comparison.

    Args:
        folder: of the files.
        language_model, encoder: as the settings name them.
        records: as `data.train` names them.
        steps: number of batches in the files.
    """

    folder: str
    language_model: str = "smollm2-135m-instruct"
    encoder: str = "efficientnet-lite0"
    records: str = "emoji:train"
    targets: str = "all"
    batch: int = 16
    workers: int = 1
    steps: int = 40
    precision: str = "bf16"
    soft_tokens: int = 16

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "case.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "Case":
        return cls(**json.loads((folder / "case.json").read_text()))

    def overrides(self) -> list[str]:
        """Settings of the program."""
        return [
            f"data.train={self.records}",
            "data.val=null",
            "data.test={}",
            f"model.language_model={self.language_model}",
            f"model.encoders.image={self.encoder}",
            f"model.aligner={self.path / 'aligner.pt'}",
            'model.system_prompt=""',  # as the quickstart has it
            f"model.soft_tokens={self.soft_tokens}",
            "model.recall_tokens=0",
            f"model.lora.target_modules={json.dumps(TARGETS[self.targets])}",
            f"training.max_steps={TOTAL_STEPS}",
            f"training.warmup_steps={WARM_UP}",
            f"training.learning_rate={LEARNING_RATE}",
            f"training.gradient_clip={CLIP}",
            f"training.global_batch_size={self.batch}",
            f"training.precision={self.precision}",
            f"launch.num_workers={self.workers}",
            "launch.use_gpu=false",
            "launch.hang_timeout_s=86400",  # a suspended worker does not answer
            "checkpoint.every_steps=null",
        ]

    def settings(self) -> Any:
        from raytrain2p.config import load_settings

        return load_settings(2, None, self.overrides())

    def with_aligner(self, **changes: Any) -> "Case":
        """A case in a folder of its own that takes the aligner of this one."""
        other = replace(self, **changes)
        other.path.mkdir(parents=True, exist_ok=True)
        if not (other.path / "aligner.pt").exists():
            (other.path / "aligner.pt").hardlink_to(self.path / "aligner.pt")
        return other


def rate_factor(step: int) -> float:
    """Linear warm-up, then a cosine to zero, as the program has it; equal losses show that it is."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return (1 + math.cos(math.pi * (step - WARM_UP) / (TOTAL_STEPS - WARM_UP))) / 2


def write_aligner(case: Case) -> None:
    """An untrained one, of the usual shape."""
    from raytrain2p.config.phases import ALIGNMENT
    from raytrain2p.models.aligner import Aligner
    from raytrain2p.models.artifacts import save_artifact
    from raytrain2p.models.encoders import EncoderSpec
    from raytrain2p.models.pretrained import fingerprint

    spec = EncoderSpec("image", case.encoder, {})
    torch.manual_seed(0)
    aligner = Aligner({"image": spec.width()}, hidden=512, dimension=256)
    case.path.mkdir(parents=True, exist_ok=True)
    save_artifact(
        case.path / "aligner.pt",
        ALIGNMENT,
        {},
        {"image": {"name": case.encoder, "options": {}, "fingerprint": fingerprint(spec.directory())}},
        shape=aligner.shape,
        state_dict=aligner.state_dict(),
    )


def prepare(case: Case) -> None:
    """Write the files of a case, with features that are missing in the store computed first. Its folder has the aligner."""
    import pytorch_lightning as pl

    from raytrain2p.models.distributed import WorkerGroup
    from raytrain2p.phases.instruction import data as instruction_data
    from raytrain2p.phases.instruction import module as instruction
    from raytrain2p.worker.loaders import train_sampler

    case.write()
    settings = case.settings()
    inputs = instruction_data.read_inputs(settings)
    encode(inputs)
    split = inputs.prepare()["train"]
    records = inputs.splits["train"]
    for rank in range(case.workers):
        sampler = train_sampler(settings, split, WorkerGroup(rank, case.workers))
        batches, media = list[dict[str, Any]](), list[list[Any]]()
        while len(batches) < case.steps:
            sampler.set_epoch(len(batches) // sampler.steps)
            for part in sampler:
                batch = split[part]
                batches.append(batch | {"masks": masks(split.tokens, part.records, batch["tokens"])})
                media.append([ref for record in part.records for ref in records[record].media()])
        torch.save(batches[: case.steps], case.path / f"batches{rank}.pt")
        torch.save(media[: case.steps], case.path / f"media{rank}.pt")
    pl.seed_everything(settings.seed, verbose=False)
    module = instruction.build(settings, TOTAL_STEPS, case.precision)
    torch.save({name: value.detach() for name, value in module.assistant.own_weights().items()}, case.path / "initial.pt")


def masks(tokens: Any, records: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What others take in place of places: where there are tokens, where images are, and labels; all (B, L)."""
    ids = inputs["input_ids"]
    attention = (torch.arange(ids.shape[1]) < torch.from_numpy(tokens.lengths[records])[:, None]).long()
    soft, labels = torch.zeros(ids.shape, dtype=torch.bool), torch.full(ids.shape, -100)
    soft.view(-1)[inputs["soft"]["image"]] = True
    labels.view(-1)[inputs["supervised"] + 1] = inputs["targets"]
    return {"attention_mask": attention, "soft": soft, "labels": labels}


def encode(inputs: Any) -> None:
    """Compute the missing features, without Ray."""
    from raytrain2p.data.features import ENCODE_ITEMS, SHARD_ITEMS, write_shard
    from raytrain2p.data.media import MediaRef, decode

    for job in inputs.jobs:
        missing = job.store.missing(job.items)
        if not missing:
            continue
        encoder = job.spec.build()
        job.store.directory.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(missing), SHARD_ITEMS):
            keys, grids = missing[start : start + SHARD_ITEMS], []
            for first in range(0, len(keys), ENCODE_ITEMS):
                items = [job.items[key] for key in keys[first : first + ENCODE_ITEMS]]
                grids += [grid.numpy() for grid in encoder([decode(item) if isinstance(item, MediaRef) else item for item in items])]
            write_shard(job.store.directory, keys, grids)


def read_batches(case: Case, rank: int) -> list[dict[str, Any]]:
    """Of one worker, as the program collates them; a step repeats after `case.steps`."""
    found: list[dict[str, Any]] = torch.load(case.path / f"batches{rank}.pt", weights_only=False)  # written by `prepare`
    return found


def read_media(case: Case, rank: int) -> list[list[Any]]:
    """References to the images of each batch."""
    found: list[list[Any]] = torch.load(case.path / f"media{rank}.pt", weights_only=False)
    return found
