"""Phase 2 over two real processes, sharded: the losses, measures and model.pt of whole copies, and what is gathered, counted in bytes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.data.batches import MicroBatch
from raytrain2p.data.chat import load_chat_format
from raytrain2p.models.artifacts import load_artifact
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.phases.base import whole
from raytrain2p.phases.instruction.data import InstructionSplit
from raytrain2p.phases.instruction.evaluate import evaluate
from raytrain2p.phases.instruction.module import InstructionModule, build, export
from raytrain2p.worker.finalize import restored
from raytrain2p.worker.lightning_trainer import ShardedStrategy
from tests.conftest import byte_tokenizer
from tests.phases.instruction.test_module import TRAINED, K, aligner_in, settings_of, split_in
from tests.two_workers import found_by_two

STEPS = 8
TUNINGS = ("lora", "full")


class Gathered(TorchDispatchMode):
    """Within, counts the bytes that come out of all-gathers, and those that are copied into other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if "all_gather" in name:
            self.bytes += found.numel() * found.element_size()
        if name == "copy_" and not isinstance(found, DTensor):
            self.copied += found.numel() * found.element_size()
        return found


@contextmanager
def most_whole(module: InstructionModule) -> Iterator[list[int]]:
    """Bytes of weights that are whole on this worker, at each layer's forward pass within."""
    found: list[int] = []

    def look(*_: Any) -> None:
        found.append(size(parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)))

    hooks = [layer.register_forward_pre_hook(look) for layer in module.assistant.layers()]
    yield found
    for hook in hooks:
        hook.remove()


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def module_of(folder: Path, tuning: str, strategy: str, sharded: Any = None, shard_workers: int | None = None) -> InstructionModule:
    """As a worker builds it, with a language model in bf16, or one that trains."""
    models = json.loads((folder / "models.json").read_text())
    more = {
        "model": {"tuning": tuning},
        "launch": {"strategy": strategy, "num_workers": 8, "shard_workers": shard_workers},
        "training": {"global_batch_size": 8},
        "evaluation": {"batch_size": 2, "max_new_tokens": 6, "samples": 3},
    }
    torch.manual_seed(0)
    module = build(settings_of(Path(models["language_model"]), Path(models["aligner"]), **more), STEPS, "bf16")
    module.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    module._device_mesh = sharded
    module.configure_model()
    return module


def losses_of(module: InstructionModule, split: InstructionSplit, rank: int) -> list[float]:
    """Of a few steps, each worker with half of the records; the mean over the workers."""
    optimizer = torch.optim.AdamW(module.trained_parameters(), lr=3e-3, fused=True)
    batch, tokens, found = split[MicroBatch(TRAINED[rank::2], 1)], int(split.supervised[TRAINED].sum()), list[float]()
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(batch) * (2 / tokens)
        loss.backward()
        for parameter in module.trained_parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:  # what DDP does
                parameter.grad = WorkerGroup.current().mean(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(WorkerGroup.current().mean(loss.detach())))
    return found


def checkpoint_of(module: InstructionModule, path: Path, rank: int) -> dict[str, Any]:
    """Written as the strategy gathers it."""
    strategy = ShardedStrategy.__new__(ShardedStrategy)  # Ray's context gives it no more than the number of workers
    strategy._lightning_module = module
    right = {name: whole(parameter.detach()) for name, parameter in module.named_parameters() if parameter.requires_grad}
    with Gathered() as gathered:
        state = strategy.lightning_module_state_dict()
    if rank == 0:
        torch.save({"state_dict": state}, path)
    dist.barrier()
    return {"names": list(state), "gathered": gathered.bytes, "right": [name for name in state if torch.equal(state[name], right[name])]}


def sharded_and_whole(rank: int, folder: Path, tuning: str, mesh: Any) -> dict[str, Any]:
    """What the tests look at, of the same steps with whole copies and with shards."""
    group, copy = WorkerGroup.current(), module_of(folder, tuning, "ddp")
    chat = load_chat_format(Path(copy.settings.model.language_model), {"image": K}, None)
    split = split_in(folder / str(rank), chat)
    module = module_of(folder, tuning, "fsdp", mesh)
    copies = module_of(folder, tuning, "fsdp", mesh, shard_workers=1)
    found: dict[str, Any] = {"losses": [losses_of(one, split, rank) for one in (copy, module, copies)]}
    found["copied"] = size(parameter.to_local() for parameter in copies.parameters())
    found["bytes"] = {
        "layer": max(size(layer.parameters()) for layer in copy.assistant.layers()),
        "embeddings": size(copy.assistant.language_model.get_input_embeddings().parameters()),
        "whole": size(copy.parameters()),
        "trained": size(copy.trained_parameters()),
        "shards": size(parameter.to_local() for parameter in module.parameters()),
    }
    found["checkpoint"] = checkpoint_of(module, folder / f"{tuning}.ckpt", rank)

    with torch.no_grad():
        for parameter in module.trained_parameters():
            parameter.add_(1)
    with Gathered() as gathered:
        restored(module, folder / f"{tuning}.ckpt", torch.device("cpu"), group)
    found["restored"] = {"gathered": gathered.bytes, "copied": gathered.copied}

    export(module, folder / f"{tuning}.pt", {})
    with most_whole(module) as bytes_whole, torch.autocast("cpu", torch.bfloat16):
        found["measures"] = [evaluate(module, {"seen": split}, ["seen"], group)]
    found["bytes"]["most whole"] = max(bytes_whole)
    dist.barrier()
    copy.assistant.load_state_dict(load_artifact(folder / f"{tuning}.pt", INSTRUCTION)["state_dict"], strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        found["measures"].append(evaluate(copy.eval(), {"seen": split}, ["seen"], WorkerGroup()))
    return found


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    found = {tuning: sharded_and_whole(rank, Path(folder), tuning, mesh) for tuning in TUNINGS}
    torch.save(json.dumps(found), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> Path:
    """The folder of a Llama of four layers in bfloat16, and an aligner."""
    folder = tmp_path_factory.mktemp("sharded")
    tokenizer = byte_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, **size))
    model.to(torch.bfloat16).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    for rank in range(2):
        (folder / str(rank)).mkdir()
    models = {"language_model": str(folder / "llama"), "aligner": str(aligner_in(folder, tiny_vit))}
    (folder / "models.json").write_text(json.dumps(models))
    return folder


@pytest.fixture(scope="module")
def found(models: Path) -> list[dict[str, Any]]:
    """By rank and tuning."""
    return [json.loads(one) for one in found_by_two(one_of_two, models, seconds=120)]


@pytest.mark.parametrize(("tuning", "noise"), [("lora", 1e-6), ("full", 1e-3)])
def test_sharded_workers_have_the_losses_of_whole_copies(found: list[dict[str, Any]], tuning: str, noise: float) -> None:
    """Under LoRA nothing is rounded differently; a language model that trains is gathered in bfloat16, norms and embeddings with it."""
    whole, sharded, copies = found[0][tuning]["losses"]
    assert sharded == pytest.approx(whole, rel=noise)
    assert copies == pytest.approx(whole, rel=noise), "groups of one worker each, which reduce their gradients"
    assert found[0][tuning]["copied"] == found[0][tuning]["bytes"]["whole"]
    assert whole[-1] < 0.95 * whole[0]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_checkpoint_gathers_what_trains_and_not_the_frozen_base(found: list[dict[str, Any]], tuning: str) -> None:
    first, second = (one[tuning] for one in found)
    assert first["bytes"]["trained"] <= first["checkpoint"]["gathered"] < 1.01 * first["bytes"]["trained"], "shards are of equal size"
    assert any("lora_" in name for name in first["checkpoint"]["names"]) == (tuning == "lora")
    assert any("embed_tokens" in name for name in first["checkpoint"]["names"]) == (tuning == "full")
    assert first["checkpoint"]["right"] == first["checkpoint"]["names"]
    assert second["checkpoint"] == {"names": [], "right": [], "gathered": first["checkpoint"]["gathered"]}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_worker_takes_its_shards_of_a_checkpoint_and_no_more(found: list[dict[str, Any]], tuning: str) -> None:
    restored = [one[tuning]["restored"] for one in found]
    assert sum(one["copied"] for one in restored) == found[0][tuning]["bytes"]["trained"]
    assert [one["gathered"] for one in restored] == [0, 0]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_sharded_workers_measure_and_export_what_a_whole_copy_would(found: list[dict[str, Any]], tuning: str) -> None:
    """The whole copy has its weights from the model.pt that the sharded workers have written."""
    for one in found:
        (sharded, answers), (whole, expected) = one[tuning]["measures"]
        assert sharded == pytest.approx(whole, rel=1e-3)
        assert answers == expected


@pytest.mark.parametrize("tuning", TUNINGS)
def test_no_worker_has_all_weights_at_once_to_evaluate(found: list[dict[str, Any]], tuning: str) -> None:
    """It has its shards, the embeddings, and one layer after the other."""
    for one in found:
        counted = one[tuning]["bytes"]
        gathered = 0.5 if tuning == "full" else 1  # a language model that trains is in float32, and gathered in bfloat16
        assert counted["shards"] < 0.51 * counted["whole"]
        assert counted["most whole"] == pytest.approx(gathered * (counted["embeddings"] + counted["layer"]), rel=0.01)


@pytest.mark.parametrize(("shards", "share"), [(None, 8), (4, 4), (2, 2)])
def test_weights_are_sharded_among_all_workers_or_within_groups_of_them(models: Path, shards: int | None, share: int) -> None:
    """One of eight workers, whose others are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (8, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        module = module_of(models, "lora", "fsdp", mesh, shards)
        layers = list(module.assistant.layers().parameters())
        held = size(one.to_local() for one in layers if isinstance(one, DTensor))
        assert held == pytest.approx(size(layers) / share, rel=0.1), "small ones are padded"
    finally:
        dist.destroy_process_group()


def test_full_tuning_keeps_no_whole_weights_for_the_backward_pass(models: Path) -> None:
    """One of eight workers, whose others are not there: what it keeps does not depend on what they would send."""
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        module = module_of(models, "full", "fsdp", init_device_mesh("cpu", (8, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
        layers = module.assistant.layers()
        shards, weights = list(layers.parameters()), sum(one.numel() for one in layers.parameters())
        shapes = {tuple(one.shape) for one in shards if one.ndim == 2}
        batch = split_in(models / "0", load_chat_format(models / "llama", {"image": K}, None))[MicroBatch(TRAINED, 1)]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one), torch.autocast("cpu", torch.bfloat16):
            layers[0].register_forward_pre_hook(lambda *_: saved.clear())  # the projector comes first, and is gathered as it is
            module(batch)
        of_weights = [one.untyped_storage() for one in saved if {tuple(one.shape), tuple(one.shape[::-1])} & shapes]
        assert len(of_weights) >= 7 * len(layers), "each product keeps its weights"
        assert {storage.nbytes() for storage in of_weights} == {0}, "and they are given back"
        assert size(one.to_local() for one in shards if isinstance(one, DTensor)) / weights == 4 / 8
    finally:
        dist.destroy_process_group()
