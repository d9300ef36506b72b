"""Phase 2: what is asked of records, and what the measures mean, on a tiny language model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from raytrain2p.config import InputError, InstructionSettings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.data.batches import MicroBatch, Ragged
from raytrain2p.data.chat import MARK, ChatFormat, load_chat_format
from raytrain2p.data.features import FeatureTable
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message, Record
from raytrain2p.data.scores import token_f1
from raytrain2p.data.tokens import TokenRecords
from raytrain2p.inference.predictor import Predictor
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import load_artifact, save_artifact
from raytrain2p.models.assistant import AssistantShape, build_assistant
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.inputs import MediaTable, SourceShare
from raytrain2p.phases.instruction.aligner import check_encoders
from raytrain2p.phases.instruction.checks import check_aligner, check_soft_tokens, longest_record
from raytrain2p.phases.instruction.data import InstructionSplit
from raytrain2p.phases.instruction.evaluate import choose, evaluate, f1_sum, score, shuffle_items
from raytrain2p.phases.instruction.module import InstructionModule, build, export
from raytrain2p.phases.instruction.tokenize import kept_shares, tokenize

K, WIDTH = 4, 32
TRAINED, ALL = np.arange(4), np.arange(7)  # record numbers


def record(number: int, question: str, answer: str, task: str = "colour", images: int = 1) -> Record:
    media = tuple(MediaRef("image", f"{number}-{place}.png") for place in range(images))
    return Record(f"data.jsonl:{number}", (Message(USER, (*media, question)), Message(ASSISTANT, (answer,))), task)


RECORDS = [
    record(1, "colour?", "red"),
    record(2, "colour?", "blue"),
    record(3, "the colour, please?", "green"),
    record(4, "2+2?", "4", "sum", images=0),
    record(5, "colour?", "purple"),
    record(6, "colour?", "red"),
    record(7, "2+3?", "5", "sum", images=0),
]


def tokens_of(records: list[Record], chat: ChatFormat, limit: int = 256, too_long: str = "error") -> TokenRecords:
    return tokenize(records, chat, limit, too_long, "data.train").tokens


def with_images(split: InstructionSplit, *items: list[int]) -> InstructionSplit:
    """The split with other images: item numbers by record."""
    return replace(split, tables={"image": replace(split.tables["image"], items=Ragged(items))})


@pytest.fixture(scope="module")
def aligner(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> Path:
    return aligner_in(tmp_path_factory.mktemp("aligner"), tiny_vit)


def aligner_in(folder: Path, vit: Path) -> Path:
    """An aligner.pt for an encoder of images, as phase 1 leaves it."""
    torch.manual_seed(9)
    model = Aligner({"image": WIDTH, "text": 8}, hidden=16, dimension=12)
    encoders = {"image": {"name": str(vit), "options": {}, "fingerprint": fingerprint(vit)}}
    save_artifact(folder / "aligner.pt", ALIGNMENT, {}, encoders, shape=model.shape, state_dict=model.state_dict())
    return folder / "aligner.pt"


def settings_of(language_model: Path, aligner: Path, **more: Any) -> InstructionSettings:
    model = {"language_model": str(language_model), "aligner": str(aligner), "soft_tokens": K}
    training = {"max_steps": 1, "precision": "float32"} | more.pop("training", {})
    content = {"data": {"train": "x.jsonl"}, "training": training, "model": model | more.pop("model", {})}
    return InstructionSettings.model_validate(content | more)


@pytest.fixture(scope="module")
def settings(tiny_llama: Path, aligner: Path) -> InstructionSettings:
    evaluation = {"batch_size": 3, "max_new_tokens": 10, "samples": 2}
    return settings_of(tiny_llama, aligner, model={"tuning": "full", "train_aligner": True}, evaluation=evaluation)


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> ChatFormat:
    return load_chat_format(tiny_llama, {"image": K}, None)


@pytest.fixture(scope="module")
def split(chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> InstructionSplit:
    return split_in(tmp_path_factory.mktemp("features"), chat)


def split_in(folder: Path, chat: ChatFormat) -> InstructionSplit:
    """The records with random features, one grid of 16 positions for each image."""
    shard = folder / "shard.npy"
    np.save(shard, np.random.default_rng(0).normal(size=(5 * 16, WIDTH)).astype(np.float16))
    features = FeatureTable((str(shard),), np.zeros(5, np.int32), 16 * np.arange(5), np.full(5, 16))
    images = MediaTable(Ragged([[0], [1], [2], [], [3], [4], []]), features)
    return InstructionSplit(tokens_of(RECORDS, chat), {"image": images}, tuple(one.task for one in RECORDS), tuple(RECORDS))


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
    return score(module, split, chosen, WorkerGroup())[:2]


def test_exact_match_is_what_greedy_generation_gives(module: InstructionModule, split: InstructionSplit) -> None:
    tokens = split.tokens
    right = [answer(module, split, number) == tokens.ids[number][tokens.prompts[number] :].tolist() for number in ALL.tolist()]
    assert 0 < sum(right) < len(right), "some must be right and some wrong"
    assert [scored(module, split, np.array([record]))[1] for record in ALL] == [float(one) for one in right]
    assert scored(module, split, ALL)[1] == pytest.approx(np.mean(right))


def test_exact_match_depends_on_the_image(module: InstructionModule, split: InstructionSplit) -> None:
    swapped = with_images(split, [1], [0], [2], [], [3], [4], [])
    assert scored(module, split, np.array([0, 1]))[1] == 1
    assert scored(module, swapped, np.array([0, 1]))[1] == 0


def test_the_scored_loss_is_the_mean_over_all_tokens_not_over_records(module: InstructionModule, split: InstructionSplit) -> None:
    lengths = split.supervised
    each = np.array([scored(module, split, np.array([record]))[0] for record in ALL])
    together = scored(module, split, ALL)[0]
    assert together == pytest.approx((each * lengths).sum() / lengths.sum(), rel=1e-4)
    assert together != pytest.approx(each.mean(), rel=1e-2), "records of equal length would not tell the two apart"


def test_the_shares_of_two_workers_add_up_to_the_score_of_one(module: InstructionModule, split: InstructionSplit) -> None:
    """The first worker's parts are caught where they would be gathered, and gathered by the second."""

    class Half(WorkerGroup):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return parts

    parts: list[Any] = []
    with torch.inference_mode():
        _, together = (score(module, split, ALL, Half(rank, 2)) for rank in range(2))
        alone = score(module, split, ALL, WorkerGroup())
    assert together[:2] == pytest.approx(alone[:2], rel=1e-4)
    assert sorted(together.wrong) == sorted(alone.wrong)


def test_the_training_loss_is_the_mean_over_the_steps_supervised_tokens(tiny_llama: Path, aligner: Path, split: InstructionSplit) -> None:
    settings = settings_of(tiny_llama, aligner, training={"micro_batch_size": 8})
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


def test_evaluation_is_by_task_with_majority_and_shuffled_images(
    module: InstructionModule, split: InstructionSplit, chat: ChatFormat
) -> None:
    metrics, answers = evaluate(module, {"train": split, "seen": split}, ["seen"], WorkerGroup())
    colour = np.array([0, 1, 2, 4, 5])
    assert metrics["seen/exact_match/colour"] == pytest.approx(scored(module, split, colour)[1])
    assert metrics["seen/loss/colour"] == pytest.approx(scored(module, split, colour)[0], rel=1e-4)
    texts = [chat.text(answer(module, split, number)) for number in ALL.tolist()]
    f1 = [token_f1(text, one.answers[-1]) for text, one in zip(texts, RECORDS, strict=True)]
    assert metrics["seen/token_f1/colour"] == pytest.approx(np.mean([f1[number] for number in colour]))
    assert metrics["seen/token_f1/sum"] == pytest.approx(np.mean([f1[3], f1[6]]))
    half = replace(split, tokens=tokens_of([record(1, "colour?", "red or blue"), *RECORDS[1:]], chat))
    assert f1_sum(module, half, np.array([0]), WorkerGroup(), chat) == pytest.approx(2 / 4), "it says `red`"
    assert metrics["seen/majority/colour"] == pytest.approx(2 / 5)  # red
    images = split.tables["image"]
    shuffled = replace(split, tables={"image": replace(images, items=shuffle_items(images.items, colour, module.settings.seed))})
    assert metrics["seen/exact_match_shuffled/colour"] == pytest.approx(scored(module, shuffled, colour)[1])
    assert "seen/exact_match_shuffled/sum" not in metrics, "there is nothing to shuffle without images"
    assert len(answers) == 2
    for row in answers:
        number = next(n for n, r in enumerate(RECORDS) if (r.question, r.answers[-1]) == (row["question"], row["expected"]))
        assert row["answer"] == row["expected"] or number not in TRAINED or RECORDS[number].answers == ["red"]


SHOWN = Ragged([[4], [7], [], [2], [9], [5], [], [1]])
CHOSEN = np.array([0, 1, 2, 4, 7])


def lists(items: Ragged) -> list[list[int]]:
    return [items[number].tolist() for number in range(len(items))]


def test_no_record_keeps_its_own_image_when_images_are_shuffled() -> None:
    for seed in range(50):
        shuffled = shuffle_items(SHOWN, CHOSEN, seed)
        moved = [(SHOWN[number][0], shuffled[number][0]) for number in (0, 1, 4, 7)]
        assert all(before != after for before, after in moved)
        assert sorted(before for before, _ in moved) == sorted(after for _, after in moved)


def test_each_of_several_images_of_a_record_is_shuffled() -> None:
    items = Ragged([[0, 1], [2, 3], [4, 5]])
    for seed in range(20):
        shuffled = shuffle_items(items, np.arange(3), seed)
        assert (shuffled.flat != items.flat).all()
        assert shuffled.lengths.tolist() == [2, 2, 2]
        assert sorted(shuffled.flat) == list(range(6))


def test_records_that_are_not_chosen_or_have_no_image_are_left_as_they_are_by_the_shuffle() -> None:
    before = lists(SHOWN)
    shuffled = lists(shuffle_items(SHOWN, CHOSEN, 3))
    assert [shuffled[number] for number in (2, 3, 5, 6)] == [[], [2], [5], []]
    assert lists(SHOWN) == before, "the split itself stays as it is"


def test_no_record_keeps_its_own_image_when_several_ask_about_the_same_one() -> None:
    """Two questions about each of three images: an order without a kept image exists, and the measure needs it."""
    items = Ragged([[0], [0], [1], [1], [2], [2]])
    kept = [int((shuffle_items(items, np.arange(6), seed).flat == items.flat).sum()) for seed in range(20)]
    assert kept == [0] * 20


def test_shuffling_is_the_same_for_the_same_seed() -> None:
    items, chosen = Ragged([[number] for number in range(30)]), np.arange(30)
    assert lists(shuffle_items(items, chosen, 1)) == lists(shuffle_items(items, chosen, 1))
    assert lists(shuffle_items(items, chosen, 1)) != lists(shuffle_items(items, chosen, 2))


def test_records_of_a_task_are_chosen_by_seed(split: InstructionSplit) -> None:
    assert choose(split, "colour", None, 0).tolist() == choose(split, "colour", 5, 0).tolist() == [0, 1, 2, 4, 5]
    assert choose(split, "sum", None, 0).tolist() == [3, 6]
    drawn = [choose(split, "colour", 3, seed).tolist() for seed in range(20)]
    assert drawn == [choose(split, "colour", 3, seed).tolist() for seed in range(20)]
    assert len({tuple(one) for one in drawn}) > 1
    assert all(len(set(one)) == 3 and set(one) <= {0, 1, 2, 4, 5} and one == sorted(one) for one in drawn)


def test_soft_tokens_count_in_a_records_length(chat: ChatFormat) -> None:
    without, one, two = tokens_of([record(1, "colour?", "red", images=count) for count in range(3)], chat).lengths
    assert (one, two) == (without + K, without + 2 * K)


def test_every_record_that_is_too_long_is_listed_with_both_numbers(chat: ChatFormat) -> None:
    lengths = tokens_of(RECORDS, chat).lengths
    limit = int(np.sort(lengths)[-3])
    with pytest.raises(InputError) as caught:
        tokens_of(RECORDS, chat, limit)
    too_long = [number for number, length in enumerate(lengths) if length > limit]
    assert too_long
    assert [problem.where for problem in caught.value.problems] == [RECORDS[number].where for number in too_long]
    assert f"is {lengths[too_long[0]]} tokens long" in str(caught.value)
    assert f"the limit is {limit}" in str(caught.value)


def test_a_record_of_exactly_the_limit_is_taken(chat: ChatFormat) -> None:
    longest = int(tokens_of(RECORDS, chat).lengths.max())
    assert len(tokens_of(RECORDS, chat, longest).lengths) == len(RECORDS)


def test_records_that_are_too_long_are_left_out_or_cut_if_so_set_and_counted(chat: ChatFormat) -> None:
    long = record(8, "x" * 100, "y" * 100)
    limit = int(tokens_of([long], chat).lengths[0]) - 50
    dropped = tokenize([RECORDS[0], long, RECORDS[1]], chat, limit, "drop", "data.train")
    assert dropped.records == [RECORDS[0], RECORDS[1]]
    assert dropped.kept == [0, 2]
    assert dropped.notes == (f"data.train: 1 records longer than {limit} tokens left out",)
    cut = tokenize([RECORDS[0], long], chat, limit, "truncate", "data.train")
    assert cut.tokens.lengths[1] == limit
    assert cut.records[1] == long
    assert cut.notes == (f"data.train: 1 records longer than {limit} tokens cut",)
    with pytest.raises(InputError, match="no record fits into 10 tokens"):
        tokenize([long], chat, 10, "drop", "data.train")


def test_a_cut_record_loses_the_turns_that_are_cut_off(chat: ChatFormat) -> None:
    image = [MediaRef("image", f"{number}.png") for number in range(2)]
    turns = (Message(USER, (image[0], "a?")), Message(ASSISTANT, ("b",)), Message(USER, (image[1], "c?")), Message(ASSISTANT, ("d",)))
    whole = Record("data.jsonl:1", turns)
    limit = int(tokens_of([whole], chat).prompts[0])  # with the second image and question, without their answer
    cut = tokenize([whole], chat, limit, "truncate", "data.train")
    assert cut.records == [Record("data.jsonl:1", turns[:2])]
    assert (cut.tokens.ids[0] == -1).sum() == K
    assert cut.tokens.supervised[0][-1]
    last = tokenize([whole], replace(chat, loss_on="last"), limit + 1, "truncate", "data.train")
    assert last.records == [whole]


def test_sources_lose_the_records_that_are_left_out() -> None:
    shares = (SourceShare(3, 2.0), SourceShare(0, None), SourceShare(4, None))
    assert kept_shares(shares, [0, 2, 3, 6]) == (SourceShare(2, 2.0), SourceShare(0, None), SourceShare(2, None))


@pytest.mark.parametrize(("response", "cause"), [(MARK, "empty after tokenizing"), ("<|im_end|>", "takes for a special token")])
def test_a_response_that_teaches_nothing_is_listed(chat: ChatFormat, response: str, cause: str) -> None:
    records = [RECORDS[0], record(2, "colour?", response), record(3, "x" * 300, "green")]
    with pytest.raises(InputError) as caught:
        tokens_of(records, chat)
    assert [problem.where for problem in caught.value.problems] == ["data.jsonl:2", "data.jsonl:3"]
    assert cause in caught.value.problems[0].what
    assert "tokens long" in caught.value.problems[1].what


@pytest.mark.parametrize("template", ["the model's own", None])
def test_a_response_never_has_soft_tokens(chat: ChatFormat, tiny_llama: Path, template: str | None) -> None:
    """The placeholder is a character that a text may hold; as a soft token in a response it would be learnt."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    if template is None:
        tokenizer.chat_template = None
    tokens = tokens_of([record(1, f"what {MARK} is it?", f"it is {MARK} red")], replace(chat, tokenizer=tokenizer))
    prompt = tokens.prompts[0]
    assert (tokens.ids[0][prompt:] >= 0).all()
    assert (tokens.ids[0][:prompt] == tokens.codes["image"]).sum() == K


def test_the_context_is_the_models_or_less_if_so_set(tiny_llama: Path) -> None:
    assert longest_record(tiny_llama, None) == 256
    assert longest_record(tiny_llama, 100) == 100
    with pytest.raises(InputError, match=r"model\.max_length=257\n.*context has 256 tokens"):
        longest_record(tiny_llama, 257)


def test_an_aligner_of_another_encoder_is_refused_with_both_named(tiny_llama: Path, aligner: Path, tiny_vit: Path, tiny_bert: Path) -> None:
    check_encoders(settings_of(tiny_llama, aligner, model={"encoders": {"image": str(tiny_vit)}}))
    with pytest.raises(InputError) as caught:
        check_encoders(settings_of(tiny_llama, aligner, model={"encoders": {"image": str(tiny_bert)}}))
    for needed in (str(tiny_bert), str(tiny_vit), str(aligner)):
        assert needed in str(caught.value)


def test_an_aligner_of_another_image_size_is_refused_with_both_sizes(tiny_llama: Path, aligner: Path, tiny_vit: Path) -> None:
    other = settings_of(tiny_llama, aligner, model={"encoders": {"image": {"name": str(tiny_vit), "size": 48}}})
    with pytest.raises(InputError, match=r"(?s)encoders\.image\.size=48.*trained with the default.*leave out model\.encoders\.image\.size"):
        check_encoders(other)


def test_an_encoder_of_a_modality_that_the_aligner_lacks_is_refused(tiny_llama: Path, aligner: Path, tiny_vit: Path) -> None:
    other = settings_of(tiny_llama, aligner, model={"encoders": {"audio": str(tiny_vit)}})
    with pytest.raises(InputError, match=r"(?s)encoders\.audio=.*aligns image.*train an aligner with model\.encoders\.audio"):
        check_encoders(other)


def test_an_aligner_that_lacks_weights_is_refused(tiny_llama: Path, aligner: Path, tmp_path: Path) -> None:
    artifact = load_artifact(aligner, ALIGNMENT)
    weights = {name: value for name, value in artifact["state_dict"].items() if name != "branches.image.query.bias"}
    save_artifact(tmp_path / "aligner.pt", ALIGNMENT, {}, artifact["encoders"], shape=artifact["shape"], state_dict=weights)
    with pytest.raises(InputError) as caught:
        check_aligner(settings_of(tiny_llama, tmp_path / "aligner.pt"))
    assert "lacks weights: branches.image.query.bias" in str(caught.value)
    check_aligner(settings_of(tiny_llama, aligner))


def test_the_module_begins_with_the_aligner_of_phase_1(settings: InstructionSettings, aligner: Path) -> None:
    module = build(settings, 1, "float32")
    state = load_artifact(aligner, ALIGNMENT)["state_dict"]
    assert list(module.assistant.branches) == ["image"]
    for name, value in module.assistant.branches.state_dict().items():
        assert torch.equal(value, state[f"branches.{name}"]), name


def test_parts_learn_at_rates_of_their_own(tiny_llama: Path, aligner: Path) -> None:
    model = {"tuning": "lora", "train_aligner": True, "rate_factors": {"projector": 2, "language_model": 0.5}}
    module = build(settings_of(tiny_llama, aligner, model=model, training={"learning_rate": 0.01, "warmup_steps": 0}), 10, "float32")
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    parts = {"branches": 0.01, "projector": 0.02, "language_model": 0.005}
    assert {name: rates[id(one)] for name, one in module.named_parameters() if one.requires_grad} == {
        name: parts[name.split(".")[1]] for name, one in module.named_parameters() if one.requires_grad
    }
    assert groups[0]["lr"] == 0.01, "which is the rate that is logged"


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        ({"rate_factors": {"aligner": 2}}, "set model.train_aligner=true"),
        ({"rate_factors": {"language_model": 2}, "tuning": "frozen"}, "set model.tuning=lora or full"),
        ({"quantization": "nf4", "tuning": "full"}, "set model.tuning=lora or frozen"),
        ({"quantization": "nf4", "compile": True}, "set model.compile=false"),
    ],
)
def test_a_setting_of_what_does_not_train_is_refused(tiny_llama: Path, aligner: Path, model: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValidationError, match=fix):
        settings_of(tiny_llama, aligner, model=model)


@pytest.mark.parametrize("trains", [True, False])
def test_the_aligner_trains_on_only_if_asked_and_its_query_never(tiny_llama: Path, aligner: Path, trains: bool) -> None:
    module = build(settings_of(tiny_llama, aligner, model={"train_aligner": trains}), 1, "float32")
    branch: Any = module.assistant.branches["image"]
    assert {p.requires_grad for p in branch.map.parameters()} == {trains}
    assert not any(p.requires_grad for p in branch.query.parameters())
    assert all(p.requires_grad for p in module.assistant.projector.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tuning", ["lora", "frozen", "full"])
def test_model_pt_has_what_was_trained_and_gives_the_same_logits_again(
    tuning: str, tied: bool, tiny_llama: Path, aligner: Path, split: InstructionSplit, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=tied, **shape)
    language_model = tmp_path / "qwen2"
    torch.manual_seed(11)
    Qwen2ForCausalLM(config).save_pretrained(language_model)
    tokenizer.save_pretrained(language_model)
    settings = settings_of(language_model, aligner, model={"tuning": tuning})
    module = build(settings, 1, "float32").eval()
    for parameter in module.assistant.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    export(module, tmp_path / "model.pt", settings.model_dump(mode="json"))

    artifact = load_artifact(tmp_path / "model.pt", INSTRUCTION)
    kept = {name for name in artifact["state_dict"] if name.startswith("language_model.")}
    assert {name for name in kept if "lora_" not in name} == (kept if tuning == "full" else set()), "the frozen base is not repeated"
    assert bool(kept) == (tuning != "frozen")
    predictor = Predictor(tmp_path / "model.pt")
    trained = module.assistant.own_weights()
    assert all(torch.equal(value, trained[name]) for name, value in predictor.assistant.own_weights().items())
    again = build_assistant(AssistantShape(**artifact["shape"]), "eager", torch.float32).eval()
    assert not again.load_state_dict(artifact["state_dict"], strict=False).unexpected_keys
    batch = module.assemble(split[MicroBatch(ALL, 1)])
    with torch.inference_mode():
        torch.testing.assert_close(again.supervised_logits(batch)[0], module.assistant.supervised_logits(batch)[0])


def test_a_model_pt_that_lacks_weights_or_parts_is_refused_by_name(tiny_llama: Path, aligner: Path, tmp_path: Path) -> None:
    settings = settings_of(tiny_llama, aligner, model={"tuning": "lora"})
    path, whole = tmp_path / "model.pt", tmp_path / "whole.pt"
    export(build(settings, 1, "float32"), whole, settings.model_dump(mode="json"))
    content = {key: value for key, value in load_artifact(whole, INSTRUCTION).items() if key not in ("digest", "phase", "format_version")}

    def refused(**changes: Any) -> str:
        save_artifact(path, INSTRUCTION, **content | changes)
        with pytest.raises(InputError) as caught:
            Predictor(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    Predictor(whole)
    weights = dict(content["state_dict"])
    del weights["projector.gain"]
    assert "lacks weights: projector.gain" in refused(state_dict=weights)
    adapters = [name for name in content["state_dict"] if "lora_" in name]
    assert f"lacks weights: {adapters[0]}" in refused(state_dict={n: v for n, v in content["state_dict"].items() if n not in adapters})
    assert "has unknown weights: more" in refused(state_dict=content["state_dict"] | {"more": torch.zeros(1)})
    shape = {key: value for key, value in content["shape"].items() if key != "tuning"}
    assert "lacks parts of a model.pt" in refused(shape=shape)
    assert "what it recalls, it recalls as an earlier version did" in refused(shape=content["shape"] | {"recall": (4, 2)})
    assert "lacks parts of a model.pt" in refused(language_model={"name": str(tiny_llama)})
    assert "lacks parts of a model.pt" in refused(config={})


def test_recalled_tokens_need_an_aligner_that_keeps_texts(tiny_llama: Path, aligner: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_soft_tokens(settings_of(tiny_llama, aligner, model={"recall_tokens": 3}), ["image"])
    (problem,) = caught.value.problems
    assert problem.where == "model.recall_tokens=3"
    assert problem.what == f"{aligner} keeps no texts, required are 3 or more"
    assert problem.fix == "set model.recall_tokens=0, or train another aligner"
