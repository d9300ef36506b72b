"""What one training step computes, counted: budgets that a change may lower, and must not raise unnoticed."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raytrain2p.models.aligner import Aligner
from raytrain2p.models.assistant import AssistantBatch, AssistantShape, build_assistant
from tests.operations import Operations

WIDTH, SOFT = 10, 4
RECORDS, LENGTH, SUPERVISED = 3, 12, 2
WAITS = {"aten::nonzero", "aten::item", "aten::_local_scalar_dense", "aten::masked_select", "aten::masked_scatter"}
MOST_KERNELS = 165  # of a layer, forward and backward


class Step(NamedTuple):
    """What was dispatched, and the shape of the logits."""

    operations: Operations
    logits: torch.Size
    waits: set[str]


def step(folder: Path, tokenizer: Path, layers: int) -> Step:
    """Forward and backward of a Llama with LoRA on all linear layers, in bf16; each record has an image and two supervised tokens."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_hidden_layers=layers, max_position_embeddings=64, **size))
    model.save_pretrained(folder / str(layers))
    aligner = Aligner({"image": WIDTH, "text": 7}, hidden=16, dimension=12)
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
    shape = AssistantShape(str(folder / str(layers)), {"image": SOFT}, "lora", lora, aligner.shape)
    assistant = build_assistant(shape, "eager", torch.bfloat16).train()
    assistant.freeze("lora", train_aligner=False)
    ids = torch.randint(3, 200, (RECORDS, LENGTH))
    places = torch.arange(RECORDS * LENGTH).view(RECORDS, LENGTH)
    learnt = places[:, -SUPERVISED:].flatten()
    features = {"image": (torch.randn(RECORDS, 16, WIDTH), None)}
    soft = {"image": places[:, 1 : 1 + SOFT].flatten()}
    batch = AssistantBatch(ids, soft, features, supervised=learnt - 1, targets=ids.view(-1)[learnt])
    shapes: list[torch.Size] = []
    assistant.language_model.get_output_embeddings().register_forward_hook(lambda _, inputs, logits: shapes.append(logits.shape))
    with Operations() as operations, torch.autocast("cpu", torch.bfloat16):
        assistant(batch).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace, torch.autocast("cpu", torch.bfloat16):
        assistant(batch).backward()
    return Step(operations, shapes[0], WAITS & {event.name for event in trace.events()})


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[int, Step]:
    folder = tmp_path_factory.mktemp("models")
    return {layers: step(folder, tiny_llama, layers) for layers in (1, 3)}


def per_layer(steps: dict[int, Step], *names: str) -> float:
    """How many operations of these names a layer of the language model adds."""
    return sum(steps[3].operations.counts[name] - steps[1].operations.counts[name] for name in names) / 2


def test_a_layer_multiplies_matrices_as_often_as_its_form_needs(steps: dict[int, Step]) -> None:
    """Seven linear layers, which read four inputs: five products of each layer, three of each input.

    Attention has two products, with two more each backward.
    """
    assert per_layer(steps, "mm", "addmm", "addmm_") == 7 * 5 + 4 * 3
    assert per_layer(steps, "bmm", "baddbmm") == 6


def test_a_layer_casts_no_activation_but_in_its_norms_and_its_attention(steps: dict[int, Step]) -> None:
    """22 are of adapters and their gradients, where those of layers that read one input are one; 8 of what is computed in float32."""
    assert per_layer(steps, "_to_copy") == 22 + 8


def test_a_layer_takes_at_most_so_many_kernels(steps: dict[int, Step]) -> None:
    """With the layers of peft and the norms of transformers it were 245."""
    assert (steps[3].operations.kernels - steps[1].operations.kernels) / 2 <= MOST_KERNELS


def test_python_waits_for_no_number_in_a_step(steps: dict[int, Step]) -> None:
    """Each of these would make it wait for the GPU. Where tokens, images and targets are, the collate function says."""
    assert not steps[1].waits


def test_logits_are_computed_at_supervised_positions_alone(steps: dict[int, Step]) -> None:
    assert steps[1].logits[0] == RECORDS * SUPERVISED
