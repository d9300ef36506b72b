"""The assistant over small random language models of several families."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from raytrain2p.data.chat import Encoded
from raytrain2p.data.tokens import TokenRecords, left_padded, right_padded
from raytrain2p.models.assistant import (
    GRID_SIZE,
    Assistant,
    AssistantBatch,
    AssistantShape,
    LinearProjector,
    Projector,
    build_assistant,
    pool_grid,
)
from raytrain2p.models.tracing import Recorder, traced

K, WIDTH, DIMENSION = 4, 10, 12
SOFT = -1
LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
ALIGNER = {"widths": {"image": WIDTH, "text": 7}, "hidden": 16, "dimension": DIMENSION, "dropout": 0.2}
FAMILIES = ("llama", "gpt2", "qwen2")
PROMPTS = [[SOFT] * K + [40, 41, 42], [50, *[SOFT] * K, 51], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69]]
RESPONSES = [[70, 71, 2], [72, 2], [73, 74, 75, 76, 2]]
TOKENS = TokenRecords.of(
    [
        Encoded([*prompt, *response], [False] * len(prompt) + [True] * len(response), len(prompt))
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ],
    {"image": SOFT},
)


@pytest.fixture(scope="module")
def families(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of language models by family. GPT-2 and Qwen2 have tied embeddings, Llama has not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    folders = {"llama": tiny_llama}
    torch.manual_seed(6)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, **special)),
        "qwen2": Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                **special,
            )
        ),
    }
    for family, model in models.items():
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def built(
    directory: Path,
    tuning: str = "lora",
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    quantization: str | None = None,
    **more: Any,
) -> Assistant:
    torch.manual_seed(7)
    lora = LORA | {"dropout": dropout}
    shape = AssistantShape(str(directory), {"image": K}, tuning, lora, ALIGNER, quantization=quantization)
    assistant = build_assistant(shape, "eager", dtype, **more).eval()
    assistant.freeze(tuning, train_aligner=True)
    return assistant


def images(count: int = 2) -> torch.Tensor:
    """Grids of 16 positions, as they come out of the store."""
    return torch.randn(count, 16, WIDTH, generator=torch.Generator().manual_seed(8)).half()


def batch_of(*records: int) -> AssistantBatch:
    shown = [record for record in records if SOFT in PROMPTS[record]]
    return AssistantBatch(features={"image": (images()[shown], None)}, **right_padded(TOKENS, np.array(records)))


@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_supervised_logits_equal_the_full_forwards_at_the_supervised_positions(family: str, tuning: str, families: dict[str, Path]) -> None:
    assistant, batch = built(families[family], tuning), batch_of(0, 1, 2)
    with torch.inference_mode():
        logits, targets = assistant.supervised_logits(batch)
        lengths = torch.from_numpy(TOKENS.lengths)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # which a training batch does without
        whole = assistant.language_model(inputs_embeds=assistant.embed(batch), attention_mask=mask).logits
    torch.testing.assert_close(logits, whole.flatten(0, 1)[batch.supervised], rtol=1e-4, atol=1e-5)
    assert targets.tolist() == [token for response in RESPONSES for token in response]
    assert whole.shape[1] == batch.input_ids.shape[1], "the hook is gone after the call"


def test_the_loss_is_the_cross_entropy_summed_over_the_responses(families: dict[str, Path]) -> None:
    assistant = built(families["llama"])
    with torch.inference_mode():
        together = assistant(batch_of(0, 1, 2)).item()
        apart = sum(assistant(batch_of(record)).item() for record in range(3))
        logits, targets = assistant.supervised_logits(batch_of(0, 1, 2))
    assert together == pytest.approx(apart, rel=1e-4)
    assert together == pytest.approx(-logits.log_softmax(-1)[range(10), targets].sum().item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_its_adapters_in_float32_over_a_bfloat16_base(family: str, families: dict[str, Path]) -> None:
    assistant = built(families[family], "lora", torch.bfloat16)
    for name, parameter in assistant.language_model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    assert any("lora_" in name for name, _ in assistant.language_model.named_parameters())
    for part in (assistant.branch("image").map, assistant.projector):
        assert all(p.requires_grad and p.dtype == torch.float32 for p in part.parameters())
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in assistant.branch("image").query.parameters())


@pytest.mark.parametrize("train_aligner", [True, False])
@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
def test_freezing_reports_what_trains_by_part(tuning: str, train_aligner: bool, families: dict[str, Path]) -> None:
    assistant = built(families["qwen2"], tuning)  # its embeddings are tied, and count once
    report = assistant.freeze(tuning, train_aligner)
    assert list(report) == ["language model", "aligner", "projector"]
    for kind, trains in (("trained", True), ("frozen", False)):
        number = sum(p.numel() for p in assistant.parameters() if p.requires_grad == trains)
        assert sum(getattr(count, kind) for count in report.values()) == number
    adapters = sum(p.numel() for n, p in assistant.language_model.named_parameters() if "lora_" in n)
    whole = sum(p.numel() for p in assistant.language_model.parameters())
    assert report["language model"].trained == {"lora": adapters, "full": whole, "frozen": 0}[tuning]
    assert report["aligner"].trained == train_aligner * sum(p.numel() for p in assistant.branch("image").map.parameters())
    assert report["projector"].frozen == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_changes_nothing(family: str, families: dict[str, Path]) -> None:
    with torch.inference_mode():
        adapted = built(families[family], "lora").loss_sum(batch_of(2)).item()
        plain = built(families[family], "frozen").loss_sum(batch_of(2)).item()
    assert adapted == pytest.approx(plain, rel=1e-5)


def test_full_tuning_trains_every_weight_in_float32(families: dict[str, Path]) -> None:
    assistant = built(families["gpt2"], "full", torch.bfloat16)
    for name, parameter in assistant.named_parameters():
        assert parameter.requires_grad == (not name.startswith("branches.image.query.")), name
        assert parameter.dtype == torch.float32, name
    model: Any = assistant.language_model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "tied weights stay tied"


def test_a_frozen_language_model_lets_the_gradient_through_to_the_projector(families: dict[str, Path]) -> None:
    assistant = built(families["llama"], "frozen")
    assert not any(parameter.requires_grad for parameter in assistant.language_model.parameters())
    assistant(batch_of(0, 1)).backward()
    for parameter in (*assistant.projector.parameters(), *assistant.branch("image").map.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_text_only_batch_gives_the_projector_and_the_aligner_gradients_of_zero(dtype: torch.dtype, families: dict[str, Path]) -> None:
    """Else a worker whose share has no image would keep the others waiting for its gradients."""
    assistant = built(families["llama"], "lora", dtype)
    loss = assistant(batch_of(2))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in [*assistant.projector.named_parameters(), *assistant.branch("image").map.named_parameters()]:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    adapters = [p for n, p in assistant.language_model.named_parameters() if "lora_B" in n]
    assert any(p.grad is not None and p.grad.any() for p in adapters)


def test_a_text_only_batch_runs_every_part_without_gradients_too(families: dict[str, Path]) -> None:
    """Workers of FSDP gather the weights of each part together, in validation as in training."""
    assistant, ran = built(families["llama"], "lora"), []
    for name, part in (("map", assistant.branch("image").map), ("projector", assistant.projector)):
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        assistant(batch_of(2))
    assert ran == ["map", "projector"]


def test_a_batch_with_images_works_over_a_bfloat16_base_too(families: dict[str, Path]) -> None:
    loss = built(families["llama"], "lora", torch.bfloat16)(batch_of(0, 2))
    loss.backward()
    assert loss.isfinite()


def test_soft_tokens_stand_in_their_places_in_the_order_of_the_images(families: dict[str, Path]) -> None:
    assistant = built(families["llama"])
    with torch.inference_mode():
        embeddings = assistant.embed(batch_of(0, 2, 1))
        soft = assistant.projector(pool_grid(assistant.branch("image").grid(images().float()), K, square=True))
        words = assistant.language_model.get_input_embeddings()(torch.tensor([40, 60, 50]))
    torch.testing.assert_close(embeddings[0, :K], soft[0])
    torch.testing.assert_close(embeddings[2, 1 : 1 + K], soft[1])
    torch.testing.assert_close(torch.stack([embeddings[0, K], embeddings[1, 0], embeddings[2, 0]]), words)


def test_an_image_changes_only_its_own_records_answer(families: dict[str, Path]) -> None:
    assistant, batch = built(families["llama"]), batch_of(0, 1, 2)
    with torch.inference_mode():
        before, _ = assistant.supervised_logits(batch)
        features, _ = batch.features["image"]
        batch.features = {"image": (torch.cat([features[:1], features[1:] + 1]), None)}
        after, _ = assistant.supervised_logits(batch)
    changed = (before != after).any(dim=-1).tolist()
    assert changed == [False] * 3 + [True] * 2 + [False] * 5


def test_the_projector_starts_at_the_spread_of_the_models_embeddings(families: dict[str, Path]) -> None:
    assistant = built(families["gpt2"])
    spread = assistant.language_model.get_input_embeddings().weight.std().item()
    with torch.inference_mode():
        soft = assistant.projector(torch.randn(50, DIMENSION))
    assert soft.std().item() == pytest.approx(spread, rel=0.05)
    assert Projector(DIMENSION, 8, spread=0.25)(torch.randn(50, DIMENSION)).std().item() == pytest.approx(0.25, rel=0.05)
    assert LinearProjector(400, 300, spread=0.25)(GRID_SIZE * torch.randn(50, 400)).std().item() == pytest.approx(0.25, rel=0.05)


def test_pooling_averages_the_squares_of_a_square_grid() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)  # row-major: 0 1 2 3 / 4 5 6 7 / ...
    assert pool_grid(grid, 4, square=True).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_grid(grid, 1, square=True).flatten().tolist() == [7.5]
    assert pool_grid(grid, 4).flatten().tolist() == [1.5, 5.5, 9.5, 13.5], "of a sequence"


def test_pooling_keeps_images_and_widths_apart() -> None:
    grid = torch.randn(3, 16, 5)
    pooled = pool_grid(grid, 4, square=True)
    assert pooled.shape == (3, 4, 5)
    torch.testing.assert_close(pooled[1, 0], grid[1, [0, 1, 4, 5]].mean(dim=0))


def test_pooling_averages_neighbours_in_the_row_where_there_is_no_square() -> None:
    assert pool_grid(torch.arange(16.0).view(1, 16, 1), 8, square=True).flatten().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]
    assert pool_grid(torch.arange(6.0).view(1, 6, 1), 3).flatten().tolist() == [0.5, 2.5, 4.5]


def test_as_many_soft_tokens_as_positions_leave_the_grid_as_it_is() -> None:
    grid = torch.randn(2, 7, 3)
    assert torch.equal(pool_grid(grid, 7), grid)


def test_more_soft_tokens_than_positions_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"9 positions cannot give 16 soft tokens: set model\.soft_tokens to 9"):
        pool_grid(torch.randn(1, 9, 3), 16, square=True)


def test_sequences_of_different_lengths_are_each_pooled_as_they_are_alone() -> None:
    grid = torch.randn(4, 9, 3)
    positions = torch.tensor([9, 2, 5, 2])
    pooled = pool_grid(grid, 4, positions)
    for item, count in enumerate(positions.tolist()):
        torch.testing.assert_close(pooled[item], pool_grid(grid[item : item + 1, :count], 4)[0])
    assert pool_grid(torch.tensor([[[1.0], [2.0]]]), 4).flatten().tolist() == [1, 1, 2, 2], "a short one repeats positions"


def answers(assistant: Assistant, records: list[int], stop: list[int] = [2]) -> list[list[int]]:  # noqa: B006 - never changed
    """Generated answers up to the stop token."""
    shown = [record for record in records if SOFT in PROMPTS[record]]
    batch = AssistantBatch(features={"image": (images()[shown], None)}, **left_padded(TOKENS, np.array(records)))
    rows = assistant.generate(batch, 8, stop, stop[0]).tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in stop), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_in_a_padded_batch_is_answered_as_it_is_alone(family: str, families: dict[str, Path]) -> None:
    assistant = built(families[family])
    together = answers(assistant, [0, 1, 2])
    assert together == [answers(assistant, [record])[0] for record in range(3)]
    assert len({tuple(answer) for answer in together}) > 1, "answers that are all the same would prove little"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_what_the_full_forward_finds_most_likely_token_by_token(family: str, families: dict[str, Path]) -> None:
    assistant = built(families[family])
    batch = AssistantBatch(features={"image": (images()[:1], None)}, **left_padded(TOKENS, np.array([0])))
    generated: list[int] = []
    with torch.inference_mode():
        embeddings = assistant.embed(batch)
        for _ in range(8):
            token = assistant.language_model(inputs_embeds=embeddings).logits[0, -1].argmax()
            generated.append(int(token))
            embeddings = torch.cat([embeddings, assistant.language_model.get_input_embeddings()(token.view(1, 1))], dim=1)
    assert generated[: len(answers(assistant, [0])[0])] == answers(assistant, [0])[0]


def test_an_answer_ends_at_any_of_the_stop_tokens(families: dict[str, Path]) -> None:
    assistant = built(families["llama"])
    (free,) = answers(assistant, [2])
    (stopped,) = answers(assistant, [2], stop=[2, free[1]])
    assert stopped == free[: 1 + free.index(free[1])]


def test_answers_are_greedy_whatever_the_models_own_generation_settings_say(families: dict[str, Path], tmp_path: Path) -> None:
    """Qwen2's instruct models ship with sampling and a repetition penalty: exact match is defined without them."""
    model = Qwen2ForCausalLM.from_pretrained(families["qwen2"])
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.9, no_repeat_ngram_size=1, eos_token_id=2, pad_token_id=2
    )
    model.save_pretrained(tmp_path)
    plain = answers(built(families["qwen2"]), [0, 1, 2])
    assert max(len(answer) - len(set(answer)) for answer in plain) > 0, "without a repeated token the penalty would change nothing"
    assert answers(built(tmp_path), [0, 1, 2]) == plain


def test_an_assistant_can_be_counted_without_reading_weights(families: dict[str, Path]) -> None:
    with torch.device("meta"):
        empty = built(families["llama"], empty=True)
    whole = built(families["llama"])
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_shape_survives_as_plain_types(families: dict[str, Path]) -> None:
    shape = AssistantShape(str(families["llama"]), {"image": K}, "lora", LORA, ALIGNER)
    assert AssistantShape(**shape.to_dict()) == shape


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped into memory")
@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
def test_weights_as_stored_are_mapped_from_their_file_so_that_a_machine_has_one_copy(families: dict[str, Path], tuning: str) -> None:
    file = families["llama"] / "model.safetensors"
    assistant = built(families["llama"], tuning, torch.bfloat16, as_stored=True)
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    mapped = [range(*(int(end, 16) for end in span)) for span in spans]
    base = {name: weight for name, weight in assistant.language_model.named_parameters() if "lora_" not in name}
    assert [name for name, weight in base.items() if not any(weight.data_ptr() in span for span in mapped)] == []

    before = {name: weight.detach().clone() for name, weight in base.items()}
    assistant.convert(torch.bfloat16, torch.device("cpu"))
    for name, weight in base.items():
        assert weight.dtype == (torch.float32 if tuning == "full" else torch.bfloat16)
        assert torch.equal(weight, before[name].to(weight.dtype)), name
    assert all(weight.dtype == torch.float32 for name, weight in assistant.named_parameters() if weight.requires_grad)


def test_compiled_layers_share_their_graphs_at_any_length_and_compute_the_same(families: dict[str, Path]) -> None:
    """A graph for layers whose input needs a gradient, and one for a first layer whose input does not. No part of a layer is left out."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (built(families["llama"]).train() for _ in range(2))
    compiled.compile_layers("aot_eager")
    for numbers in ([0, 1], [1, 2], [0, 1, 2]):
        batch, found = batch_of(*numbers), []
        for assistant in (plain, compiled):
            loss = assistant(batch)
            found.append([loss, *torch.autograd.grad(loss, [weight for weight in assistant.parameters() if weight.requires_grad])])
        torch.testing.assert_close(found[1], found[0])
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
def test_a_pass_without_numbers_takes_as_much_memory_as_a_real_one(families: dict[str, Path], tuning: str, checkpointing: bool) -> None:
    """In bytes of tensors. The two differ in norms that wait for numbers to be replaced, and in what autograd frees a little sooner."""
    real, batch = built(families["llama"], tuning, torch.bfloat16).train(), batch_of(0, 1, 2)
    with torch.device("meta"):
        empty = built(families["llama"], tuning, torch.bfloat16, empty=True).train()
    for assistant in (real, empty) if checkpointing else ():
        assistant.checkpoint_layers()

    def loss(assistant: Assistant) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return assistant(batch)

    with Recorder() as recorder:
        loss(real).backward()
    assert traced(empty, partial(loss, empty)).most_bytes == pytest.approx(recorder.most, rel=0.1)
