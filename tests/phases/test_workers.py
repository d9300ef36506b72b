"""The same settings train the same on 1, 2 and 4 workers: the real modules and samplers, over Gloo, without Ray or Lightning's loop."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raytrain2p.config import AlignmentSettings, InstructionSettings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.batches import Ragged, StepSampler
from raytrain2p.data.chat import load_chat_format
from raytrain2p.data.features import FeatureTable
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message, Record
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.phases.alignment import module as alignment
from raytrain2p.phases.alignment.data import AlignmentSplit
from raytrain2p.phases.inputs import MediaTable
from raytrain2p.phases.instruction import module as instruction
from raytrain2p.phases.instruction.data import InstructionSplit
from raytrain2p.phases.instruction.tokenize import tokenize
from tests.inference.trained import known

RECORDS, WIDTH = 20, 32
RECALL = {"soft_tokens": 2, "recall_tokens": 1}
TRAINING = {"max_steps": 1, "global_batch_size": 8, "precision": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_vit: Path, tiny_bert: Path) -> Path:
    """`1.pt` and `2.pt`: the settings and the training records of each phase. Some records lack an image, many have a clip, whose
    lengths differ as those of the answers do; some steps have a modality on one worker alone, and no clip at all.
    """
    folder = tmp_path_factory.mktemp("workers")
    every = [[number] for number in range(RECORDS)]
    lacking = [[number] if number % 3 else [] for number in range(RECORDS)]
    rare = [[number] if number < 5 else [] for number in range(RECORDS)]
    tables = {
        "image": table(folder / "images.npy", lacking, 16),
        "audio": table(folder / "clips.npy", rare, 3, 9),
        "text": table(folder / "texts.npy", every, 1),
    }
    aligner = Aligner({"image": WIDTH, "audio": WIDTH, "text": 8}, hidden=16, dimension=12)
    encoder = {"name": str(tiny_vit), "options": {}, "fingerprint": ""}
    trained = {"image": encoder, "audio": encoder, "text": encoder}
    save_artifact(folder / "aligner.pt", ALIGNMENT, {}, trained, shape=aligner.shape, state_dict=aligner.state_dict(), known=known(12))
    records = [
        Record(f"x:{number}", (Message(USER, (*media(lacking, rare, number), "What?")), Message(ASSISTANT, ("la " * (1 + number % 7),))))
        for number in range(RECORDS)
    ]
    tokens = tokenize(records, load_chat_format(tiny_llama, {"image": 4, "audio": 4}, None), 256, "error", "data.train").tokens
    encoders = {"image": str(tiny_vit), "audio": str(tiny_vit), "text": str(tiny_bert)}
    models: dict[int, dict[str, Any]] = {
        1: {"encoders": encoders, "dimension": 16, "hidden": 32, "dropout": 0.0},
        2: {"language_model": str(tiny_llama), "aligner": str(folder / "aligner.pt"), "train_aligner": True} | RECALL,
    }
    splits = {
        1: AlignmentSplit(tables, np.arange(RECORDS) % 9),
        2: InstructionSplit(tokens, {name: tables[name] for name in ("image", "audio")}, ("all",) * RECORDS),
    }
    micro = {1: None, 2: 2}  # phase 2: four passes on one worker, one on each of four
    for phase, kind in ((1, AlignmentSettings), (2, InstructionSettings)):
        content = {"data": {"train": "x.jsonl"}, "training": TRAINING | {"micro_batch_size": micro[phase]}, "model": models[phase]}
        torch.save((kind.model_validate(content), splits[phase]), folder / f"{phase}.pt")
    return folder


def table(shard: Path, items: list[list[int]], *positions: int) -> MediaTable:
    """A random grid for each record, with one of these numbers of positions."""
    counts = np.resize(positions, RECORDS)
    np.save(shard, np.random.default_rng(counts[0]).normal(size=(counts.sum(), WIDTH)).astype(np.float16))
    features = FeatureTable((str(shard),), np.zeros(RECORDS, np.int32), np.cumsum(counts) - counts, counts)
    return MediaTable(Ragged(items), features)


def media(images: list[list[int]], clips: list[list[int]], number: int) -> list[MediaRef]:
    return [MediaRef("image", f"{item}.png") for item in images[number]] + [MediaRef("audio", f"{item}.wav") for item in clips[number]]


def losses(folder: Path, phase: int, workers: WorkerGroup) -> list[float]:
    """The loss of each of six steps, three epochs."""
    settings, split = torch.load(folder / f"{phase}.pt", weights_only=False)
    torch.manual_seed(0)
    module: Any = (alignment if phase == 1 else instruction).build(settings, 6, "float32")
    module.trainer = group = SimpleNamespace(world_size=workers.size)  # noqa: F841 - the module keeps a weak reference
    training = settings.training
    passes, micro = training.gradient_accumulation_steps(workers.size), training.micro_batch(workers.size)
    sampler = StepSampler(split.lengths, split.supervised, training.global_batch_size, micro, workers.rank, workers.size, 3)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    found = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        micro_batches = list(sampler)
        for start in range(0, len(micro_batches), passes):
            optimizer.zero_grad()
            step = torch.zeros(())
            for micro_batch in micro_batches[start : start + passes]:
                loss = module.total_loss(split[micro_batch]) / passes
                loss.backward()
                step += loss.detach()
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad = workers.mean(parameter.grad)
            optimizer.step()
            found.append(workers.mean(step).item())
    return found


def one_of_several(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{size}", rank=rank, world_size=size)
    found = {phase: losses(folder, phase, WorkerGroup(rank, size)) for phase in (1, 2)}
    if rank == 0:
        torch.save(found, folder / f"losses{size}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_settings_give_the_same_losses_on_several_workers(size: int, folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch and transformers are imported once for all workers
    workers = [context.Process(target=one_of_several, args=(rank, size, folder)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * size
    together = torch.load(folder / f"losses{size}.pt")
    for phase in (1, 2):
        alone = losses(folder, phase, WorkerGroup())
        assert together[phase] == pytest.approx(alone, abs=1e-5), f"phase {phase}"
        assert len(alone) == 6
        assert alone[-1] < alone[0]
