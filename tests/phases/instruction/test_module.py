"""Phase 2: what is asked of records, and what the measures mean, on a tiny language model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from raytrain2p.config import InputError, InstructionSettings, flatten
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.data.batches import MicroBatch
from raytrain2p.data.chat import IMAGE_MARK, SOFT, ChatFormat, load_chat_format
from raytrain2p.data.features import FeatureTable
from raytrain2p.data.media import ImageRef
from raytrain2p.data.records import Record
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import load_artifact, save_artifact
from raytrain2p.models.assistant import AssistantShape, build_assistant
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.instruction.data import InstructionSplit, check_aligner, context_length, tokenize
from raytrain2p.phases.instruction.evaluate import choose, evaluate, score, shuffle_images
from raytrain2p.phases.instruction.module import InstructionModule, build, export

K, WIDTH = 4, 32
TRAINED, ALL = np.arange(4), np.arange(7)  # record numbers


def image_record(number: int, instruction: str, response: str, task: str = "colour") -> Record:
    return Record(f"data.jsonl:{number}", ImageRef(f"{number}.png"), instruction=instruction, response=response, task=task)


RECORDS = [
    image_record(1, "colour?", "red"),
    image_record(2, "colour?", "blue"),
    image_record(3, "the colour, please?", "green"),
    Record("data.jsonl:4", None, instruction="2+2?", response="4", task="sum"),
    image_record(5, "colour?", "purple"),
    image_record(6, "colour?", "red"),
    Record("data.jsonl:7", None, instruction="2+3?", response="5", task="sum"),
]


@pytest.fixture(scope="module")
def aligner(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> Path:
    """An aligner.pt for tiny_vit, as phase 1 leaves it."""
    torch.manual_seed(9)
    model = Aligner({"image": WIDTH, "text": 8}, hidden=16, dimension=12)
    path = tmp_path_factory.mktemp("aligner") / "aligner.pt"
    encoders = {"image_encoder": {"name": str(tiny_vit), "fingerprint": fingerprint(tiny_vit)}}
    save_artifact(path, ALIGNMENT, {}, encoders, image_size=None, shape=model.shape, state_dict=model.state_dict())
    return path


def settings_of(language_model: Path, aligner: Path, image_encoder: Path, **more: Any) -> InstructionSettings:
    model = {"language_model": str(language_model), "aligner": str(aligner), "image_encoder": str(image_encoder), "soft_tokens": K}
    training = {"max_steps": 1, "precision": "float32"} | more.pop("training", {})
    content = {"data": {"train": "x.jsonl"}, "training": training, "model": model | more.pop("model", {})}
    return InstructionSettings.model_validate(content | more)


@pytest.fixture(scope="module")
def settings(tiny_llama: Path, aligner: Path, tiny_vit: Path) -> InstructionSettings:
    evaluation = {"batch_size": 3, "max_new_tokens": 10, "samples": 2}
    return settings_of(tiny_llama, aligner, tiny_vit, model={"tuning": "full", "train_aligner": True}, evaluation=evaluation)


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> ChatFormat:
    return load_chat_format(tiny_llama, K, None)


@pytest.fixture(scope="module")
def split(chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> InstructionSplit:
    """The records with random features, one grid of 16 positions for each image."""
    shard = tmp_path_factory.mktemp("features") / "shard.npy"
    np.save(shard, np.random.default_rng(0).normal(size=(5, 16, WIDTH)).astype(np.float16))
    table = FeatureTable((str(shard),), np.zeros(5, np.int32), np.arange(5))
    image = np.array([0, 1, 2, -1, 3, 4, -1])
    return InstructionSplit(tokenize(RECORDS, chat, 256), image, table, tuple(record.task for record in RECORDS), tuple(RECORDS))


@pytest.fixture(scope="module")
def module(settings: InstructionSettings, split: InstructionSplit) -> InstructionModule:
    """Trained on four of the seven records until it answers them."""
    torch.manual_seed(10)
    module = build(settings, 1, "float32").train()
    optimizer = torch.optim.AdamW(module.assistant.parameters(), lr=5e-3)
    batch = split[MicroBatch(TRAINED, 1)]
    for _ in range(80):
        optimizer.zero_grad()
        module(batch).backward()
        torch.nn.utils.clip_grad_norm_(module.assistant.parameters(), 1.0)
        optimizer.step()
    return module.eval()


def answer(module: InstructionModule, split: InstructionSplit, record: int) -> list[int]:
    """The answer to one record, up to the stop token."""
    stop = [AutoTokenizer.from_pretrained(module.settings.model.language_model).eos_token_id]
    ids = module.assistant.generate(module.assemble(split.prompts(MicroBatch(np.array([record]), 0))), 16, stop, stop[0])[0].tolist()
    return ids[: ids.index(stop[0]) + 1] if stop[0] in ids else ids


@torch.inference_mode()
def scored(module: InstructionModule, split: InstructionSplit, chosen: np.ndarray) -> tuple[float, float]:
    return score(module, split, chosen, WorkerGroup())


def test_exact_match_is_what_greedy_generation_gives(module: InstructionModule, split: InstructionSplit) -> None:
    right = [answer(module, split, record) == split.tokens.responses[record].tolist() for record in ALL.tolist()]
    assert 0 < sum(right) < len(right), "some must be right and some wrong"
    assert [scored(module, split, np.array([record]))[1] for record in ALL] == [float(one) for one in right]
    assert scored(module, split, ALL)[1] == pytest.approx(np.mean(right))


def test_exact_match_depends_on_the_image(module: InstructionModule, split: InstructionSplit) -> None:
    swapped = replace(split, image=np.array([1, 0, 2, -1, 3, 4, -1]))
    assert scored(module, split, np.array([0, 1]))[1] == 1
    assert scored(module, swapped, np.array([0, 1]))[1] == 0


def test_the_scored_loss_is_the_mean_over_all_tokens_not_over_records(module: InstructionModule, split: InstructionSplit) -> None:
    lengths = split.supervised
    each = np.array([scored(module, split, np.array([record]))[0] for record in ALL])
    together = scored(module, split, ALL)[0]
    assert together == pytest.approx((each * lengths).sum() / lengths.sum(), rel=1e-4)
    assert together != pytest.approx(each.mean(), rel=1e-2), "records of equal length would not tell the two apart"


def test_the_shares_of_two_workers_add_up_to_the_score_of_one(module: InstructionModule, split: InstructionSplit) -> None:
    """Each worker's parts are caught where they would be gathered."""

    class Half(WorkerGroup):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return [value]

    parts: list[Any] = []
    with torch.inference_mode():
        for rank in range(2):
            score(module, split, ALL, Half(rank, 2))
    total, tokens, right = np.array(parts).sum(axis=0)
    assert (total / tokens, right / len(ALL)) == pytest.approx(scored(module, split, ALL), rel=1e-4)


def test_the_training_loss_is_the_mean_over_the_steps_supervised_tokens(
    tiny_llama: Path, aligner: Path, tiny_vit: Path, split: InstructionSplit
) -> None:
    settings = settings_of(tiny_llama, aligner, tiny_vit, training={"micro_batch_size": 8})
    module = build(settings, 1, "float32").eval()
    module.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    tokens = int(split.supervised[:4].sum())
    passes = [module.total_loss(split[MicroBatch(np.array(records), tokens)]).item() for records in ([0, 3], [1, 2])]
    assert np.mean(passes) == pytest.approx(scored(module, split, np.arange(4))[0], rel=1e-4)


def test_validation_counts_supervised_tokens(module: InstructionModule, split: InstructionSplit) -> None:
    with torch.inference_mode():
        total, count = module.val_sums(split[MicroBatch(ALL, 1)])
    assert count == split.supervised.sum()
    assert total.item() / count == pytest.approx(scored(module, split, ALL)[0], rel=1e-4)


def test_evaluation_is_by_task_with_majority_and_shuffled_images(module: InstructionModule, split: InstructionSplit) -> None:
    metrics, answers = evaluate(module, {"train": split, "seen": split}, ["seen"], WorkerGroup())
    colour = np.array([0, 1, 2, 4, 5])
    assert metrics["seen/exact_match/colour"] == pytest.approx(scored(module, split, colour)[1])
    assert metrics["seen/loss/colour"] == pytest.approx(scored(module, split, colour)[0], rel=1e-4)
    assert metrics["seen/majority/colour"] == pytest.approx(2 / 5)  # red
    shuffled = replace(split, image=shuffle_images(split.image, colour, module.settings.seed))
    assert metrics["seen/exact_match_shuffled/colour"] == pytest.approx(scored(module, shuffled, colour)[1])
    assert "seen/exact_match_shuffled/sum" not in metrics, "there is nothing to shuffle without images"
    assert len(answers) == 2
    for row in answers:
        number = next(n for n, r in enumerate(RECORDS) if (r.instruction, r.response) == (row["instruction"], row["expected"]))
        assert row["answer"] == row["expected"] or number not in TRAINED or RECORDS[number].response == "red"


def test_no_record_keeps_its_own_image_when_images_are_shuffled() -> None:
    image = np.array([4, 7, -1, 2, 9, 5, -1, 1])
    chosen = np.array([0, 1, 2, 4, 7])
    for seed in range(50):
        shuffled = shuffle_images(image, chosen, seed)
        with_image = np.array([0, 1, 4, 7])
        assert (shuffled[with_image] != image[with_image]).all()
        assert sorted(shuffled[with_image]) == sorted(image[with_image])


def test_records_that_are_not_chosen_or_have_no_image_are_left_as_they_are_by_the_shuffle() -> None:
    image = np.array([4, 7, -1, 2, 9, 5, -1, 1])
    before = image.copy()
    shuffled = shuffle_images(image, np.array([0, 1, 2, 4, 7]), 3)
    assert shuffled[[2, 3, 5, 6]].tolist() == [-1, 2, 5, -1]
    assert image.tolist() == before.tolist(), "the split itself stays as it is"


def test_no_record_keeps_its_own_image_when_several_ask_about_the_same_one() -> None:
    """Two questions about each of three images: an order without a kept image exists, and the measure needs it."""
    image = np.array([0, 0, 1, 1, 2, 2])
    kept = [int((shuffle_images(image, np.arange(6), seed) == image).sum()) for seed in range(20)]
    assert kept == [0] * 20


def test_shuffling_is_the_same_for_the_same_seed() -> None:
    image, chosen = np.arange(30), np.arange(30)
    assert shuffle_images(image, chosen, 1).tolist() == shuffle_images(image, chosen, 1).tolist()
    assert shuffle_images(image, chosen, 1).tolist() != shuffle_images(image, chosen, 2).tolist()


def test_records_of_a_task_are_chosen_by_seed(split: InstructionSplit) -> None:
    assert choose(split, "colour", None, 0).tolist() == choose(split, "colour", 5, 0).tolist() == [0, 1, 2, 4, 5]
    assert choose(split, "sum", None, 0).tolist() == [3, 6]
    drawn = [choose(split, "colour", 3, seed).tolist() for seed in range(20)]
    assert drawn == [choose(split, "colour", 3, seed).tolist() for seed in range(20)]
    assert len({tuple(one) for one in drawn}) > 1
    assert all(len(set(one)) == 3 and set(one) <= {0, 1, 2, 4, 5} and one == sorted(one) for one in drawn)


def test_soft_tokens_count_in_a_records_length(chat: ChatFormat) -> None:
    with_image, without = tokenize([RECORDS[0], replace(RECORDS[0], image=None)], chat, 256).lengths
    assert with_image == without + K


def test_every_record_that_is_too_long_is_listed_with_both_numbers(chat: ChatFormat) -> None:
    lengths = tokenize(RECORDS, chat, 256).lengths
    limit = int(np.sort(lengths)[-3])
    with pytest.raises(InputError) as caught:
        tokenize(RECORDS, chat, limit)
    too_long = [number for number, length in enumerate(lengths) if length > limit]
    assert too_long
    assert [problem.where for problem in caught.value.problems] == [RECORDS[number].where for number in too_long]
    assert f"is {lengths[too_long[0]]} tokens long" in str(caught.value)
    assert f"the limit is {limit}" in str(caught.value)


def test_a_record_of_exactly_the_limit_is_taken(chat: ChatFormat) -> None:
    longest = int(tokenize(RECORDS, chat, 256).lengths.max())
    assert len(tokenize(RECORDS, chat, longest).lengths) == len(RECORDS)


@pytest.mark.parametrize("response", [IMAGE_MARK, "<|im_end|>"])
def test_a_response_that_is_empty_after_tokenizing_is_listed(chat: ChatFormat, response: str) -> None:
    records = [RECORDS[0], replace(RECORDS[1], response=response), replace(RECORDS[2], instruction="x" * 300)]
    with pytest.raises(InputError) as caught:
        tokenize(records, chat, 256)
    assert [problem.where for problem in caught.value.problems] == ["data.jsonl:2", "data.jsonl:3"]
    assert "empty after tokenizing" in caught.value.problems[0].what
    assert "tokens long" in caught.value.problems[1].what


@pytest.mark.parametrize("template", ["the model's own", None])
def test_a_response_never_has_soft_tokens(chat: ChatFormat, tiny_llama: Path, template: str | None) -> None:
    """The placeholder is a character that a text may hold; as a soft token in a response it would be learnt as ID -1."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    if template is None:
        tokenizer.chat_template = None
    records = [replace(RECORDS[0], response=f"it is {IMAGE_MARK} red", instruction=f"what {IMAGE_MARK} is it?")]
    tokens = tokenize(records, replace(chat, tokenizer=tokenizer), 256)
    assert SOFT not in tokens.responses[0]
    assert (tokens.prompts[0] == SOFT).sum() == K


def test_the_context_is_the_models_or_less_if_so_set(tiny_llama: Path) -> None:
    assert context_length(tiny_llama, None) == 256
    assert context_length(tiny_llama, 100) == 100
    with pytest.raises(InputError, match=r"model\.max_length=257\n.*context has 256 tokens"):
        context_length(tiny_llama, 257)


def test_an_aligner_of_another_image_encoder_is_refused_with_both_named(
    settings: InstructionSettings, aligner: Path, tiny_vit: Path, tiny_bert: Path
) -> None:
    check_aligner(settings)
    other = settings.model_copy(update={"model": settings.model.model_copy(update={"image_encoder": str(tiny_bert)})})
    with pytest.raises(InputError) as caught:
        check_aligner(other)
    for needed in (str(tiny_bert), str(tiny_vit), str(aligner)):
        assert needed in str(caught.value)


def test_an_aligner_of_another_image_size_is_refused_with_both_sizes(settings: InstructionSettings) -> None:
    other = settings.model_copy(update={"model": settings.model.model_copy(update={"image_size": 48})})
    with pytest.raises(InputError, match=r"(?s)model\.image_size=48.*trained with None.*set model\.image_size=null"):
        check_aligner(other)


def test_the_module_begins_with_the_aligner_of_phase_1(settings: InstructionSettings, aligner: Path) -> None:
    module = build(settings, 1, "float32")
    state = load_artifact(aligner, ALIGNMENT)["state_dict"]
    for name, value in module.assistant.branch.state_dict().items():
        assert torch.equal(value, state[f"branches.image.{name}"]), name


@pytest.mark.parametrize("trains", [True, False])
def test_the_aligner_trains_on_only_if_asked_and_its_query_never(tiny_llama: Path, aligner: Path, tiny_vit: Path, trains: bool) -> None:
    module = build(settings_of(tiny_llama, aligner, tiny_vit, model={"train_aligner": trains}), 1, "float32")
    assert {p.requires_grad for p in module.assistant.branch.map.parameters()} == {trains}
    assert not any(p.requires_grad for p in module.assistant.branch.query.parameters())
    assert all(p.requires_grad for p in module.assistant.projector.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tuning", ["lora", "frozen", "full"])
def test_model_pt_has_what_was_trained_and_gives_the_same_logits_again(
    tuning: str, tied: bool, tiny_llama: Path, aligner: Path, tiny_vit: Path, split: InstructionSplit, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=tied, **shape)
    language_model = tmp_path / "qwen2"
    torch.manual_seed(11)
    Qwen2ForCausalLM(config).save_pretrained(language_model)
    tokenizer.save_pretrained(language_model)
    settings = settings_of(language_model, aligner, tiny_vit, model={"tuning": tuning})
    module = build(settings, 1, "float32").eval()
    for parameter in module.assistant.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    export(module, tmp_path / "model.pt", flatten(settings))

    artifact = load_artifact(tmp_path / "model.pt", INSTRUCTION)
    kept = {name for name in artifact["state_dict"] if name.startswith("language_model.")}
    assert {name for name in kept if "lora_" not in name} == (kept if tuning == "full" else set()), "the frozen base is not repeated"
    assert bool(kept) == (tuning != "frozen")
    again = build_assistant(AssistantShape(**artifact["shape"]), "eager", torch.float32).eval()
    assert not again.load_state_dict(artifact["state_dict"], strict=False).unexpected_keys
    batch = module.assemble(split[MicroBatch(ALL, 1)])
    with torch.inference_mode():
        torch.testing.assert_close(again.supervised_logits(batch)[0], module.assistant.supervised_logits(batch)[0])
