"""An exported run is loaded by transformers, and gives the logits and the answers that it gave before."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from raytrain2p.config import InputError
from raytrain2p.data.chat import load_chat_format
from raytrain2p.data.media import MediaRef, decode
from raytrain2p.data.records import ASSISTANT, SYSTEM, USER, Message, Record
from raytrain2p.inference.chat_template import chat_template, with_placeholders
from raytrain2p.inference.export import Form, export
from raytrain2p.inference.predictor import Predictor
from raytrain2p.inference.questions import as_records
from raytrain2p.models.encoders import ENCODERS
from raytrain2p.storage.errors import StorageError
from tests.disks import Disk
from tests.inference.trained import trained_assistant
from tests.packages import needs_bitsandbytes

OURS = {"run_id": "a" * 32}
QUESTIONS = ("colour?", "what is it, please?", "2+2?")


def image(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8))


def chats(*modalities: str, items: Any = image) -> list[list[dict[str, Any]]]:
    """Conversations with an item of each modality; the last one has none."""
    media = [[{"type": one, one: items(number)} for one in modalities] for number in range(2)]
    return [
        [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        for parts, question in zip([*media, []], QUESTIONS, strict=True)
    ]


def records_of(conversations: list[list[dict[str, Any]]]) -> list[Record]:
    fields = [
        {part["type"] if part["type"] != "text" else "instruction": part.get(part["type"]) for part in chat[0]["content"]}
        for chat in conversations
    ]
    return as_records(fields)


def answers(model: Any, processor: Any, conversations: list[Any], tokens: int = 8) -> list[str]:
    """Of a model of transformers, as its model card has it."""
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **padding_of(processor)
    )
    found = model.generate(**inputs, max_new_tokens=tokens)[:, inputs["input_ids"].shape[1] :]
    return [processor.decode(answer, skip_special_tokens=True).strip() for answer in found]


def padding_of(processor: Any) -> dict[str, Any]:
    return {} if type(processor).__name__ == "AssistantProcessor" else {"processor_kwargs": {"padding": True, "padding_side": "left"}}


def loaded(folder: Path) -> tuple[Any, Any]:
    return (
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False, attn_implementation="eager"),
        AutoProcessor.from_pretrained(folder, trust_remote_code=False),
    )


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("tiny_whisper")
    shape = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    shape |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    WhisperModel(WhisperConfig(vocab_size=60, num_mel_bins=80, pad_token_id=0, eos_token_id=1, bos_token_id=1, **shape)).save_pretrained(
        folder
    )
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision tower of CLIP's on 32 px images in patches of 8, with a class token."""
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("tiny_clip")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_vit: Path) -> Path:
    return trained_assistant(tmp_path_factory.mktemp("run"), tiny_llama, {"image": tiny_vit})


@pytest.fixture(scope="module")
def llava_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_clip: Path) -> Path:
    """In the form that LLaVA has."""
    folder, shape = tmp_path_factory.mktemp("llava"), {"input_norm": False}
    return trained_assistant(folder, tiny_llama, {"image": tiny_clip}, shape=shape, projector="linear", soft_tokens=16)


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Its output layer has the weights of its embeddings."""
    folder = tmp_path_factory.mktemp("tied_llama")
    config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("llama", "tuning", "projector", "norm", "quantization"),
    [
        ("tied_llama", "lora", "mlp", True, None),
        ("tiny_llama", "full", "linear", False, None),
        ("tied_llama", "full", "mlp", True, None),
        pytest.param("tied_llama", "lora", "mlp", True, "nf4", marks=needs_bitsandbytes),
    ],
)
def test_the_exported_model_gives_the_same_logits_and_answers(
    llama: str,
    tuning: str,
    projector: str,
    norm: bool,
    quantization: str | None,
    tiny_vit: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """A language model in 4 bits becomes the numbers that it computed with."""
    language_model = request.getfixturevalue(llama)
    more: dict[str, Any] = {"tuning": tuning, "projector": projector, "quantization": quantization}
    path = trained_assistant(tmp_path / "run", language_model, {"image": tiny_vit}, shape={"input_norm": norm}, **more)
    predictor, records = Predictor(path), records_of(chats("image"))
    expected = list(predictor.answers(records, 8, 8))
    size = export(Predictor(path), Form(), tmp_path / "out", OURS, "card")
    assert size == sum(len(content) for content in content_of(tmp_path / "out").values())

    model, processor = loaded(tmp_path / "out")
    assert answers(model, processor, chats("image")) == expected
    inputs = processor.apply_chat_template(chats("image"), add_generation_prompt=True, tokenize=True, return_dict=True)
    prompts = [predictor.chat.prompt(record.messages) for record in records]
    placed = [row[mask == 1].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]
    token = model.config.media["image"]["token_id"]
    assert placed == [[token if code < 0 else code for code in prompt] for prompt in prompts]
    grids = torch.stack(predictor.encoder("image")([decode(ref) for record in records for ref in record.media()]))
    soft = inputs["input_ids"] == token
    embedded = predictor.assistant.language_model.get_input_embeddings()(inputs["input_ids"].masked_fill(soft, 0))
    with torch.no_grad():
        embedded = embedded.masked_scatter(soft.unsqueeze(-1), predictor.assistant.soft("image", grids, None))
        wanted = predictor.assistant.language_model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", [None, pytest.param("nf4", marks=needs_bitsandbytes)])
def test_lora_stays_an_adapter_beside_the_base_if_asked(quantization: str | None, tiny_llama: Path, tiny_vit: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = trained_assistant(tmp_path / "run", tiny_llama, {"image": tiny_vit}, quantization=quantization)
    expected = list(Predictor(model).answers(records_of(chats("image")), 8, 8))
    export(Predictor(model), Form(adapter=True), tmp_path / "out", OURS, "card")
    base, processor = loaded(tmp_path / "out")
    frozen = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    as_before = [torch.equal(value, base.assistant.language_model.state_dict()[name]) for name, value in frozen.items()]
    assert as_before.count(False) == (14 if quantization else 0)
    assert answers(base, processor, chats("image")) != expected
    assert answers(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter"), processor, chats("image")) == expected


def test_a_run_without_lora_has_no_adapter_to_keep(tiny_llama: Path, tiny_vit: Path, tmp_path: Path) -> None:
    path = trained_assistant(tmp_path / "run", tiny_llama, {"image": tiny_vit}, tuning="frozen")
    with pytest.raises(InputError, match=r"model\.tuning=frozen: it has no adapter"):
        export(Predictor(path), Form(adapter=True), tmp_path / "out", OURS, "card")
    assert not (tmp_path / "out").exists()


def test_sound_and_images_in_one_conversation(tiny_llama: Path, tiny_vit: Path, tiny_whisper: Path, tmp_path: Path) -> None:
    """Clips of different lengths have different numbers of positions; an option of an encoder, and what phase 1 knows, is kept."""
    for number in range(2):
        sound = np.sin(np.arange(4000 + 3000 * number) * (0.1 + number)).astype(np.float32)
        soundfile.write(tmp_path / f"{number}.wav", sound, 16000)
        image(number).save(tmp_path / f"{number}.png")

    def files(kind: str, number: int) -> str:
        return str(tmp_path / f"{number}.{'png' if kind == 'image' else 'wav'}")

    talks = [
        [
            {
                "role": "user",
                "content": [*({"type": kind, "path": files(kind, number)} for kind in ("audio", "image")), {"type": "text", "text": "?"}],
            }
        ]
        for number in range(2)
    ]
    encoders, options = {"image": tiny_vit, "audio": tiny_whisper}, {"audio": {"pool": 3}, "image": {"size": 48}}
    path = trained_assistant(tmp_path / "run", tiny_llama, encoders, options, soft_tokens={"image": 4, "audio": 3}, recall_tokens=2)
    records = as_records(
        [{"instruction": "<audio><image>?", **{kind: files(kind, number) for kind in ("image", "audio")}} for number in range(2)]
    )
    expected = list(Predictor(path).answers(records, 8, 8))
    export(Predictor(path), Form(), tmp_path / "out", OURS, "card")
    assert answers(*loaded(tmp_path / "out"), talks) == expected


def test_bf16_is_of_the_language_model_alone(tiny_llama: Path, tiny_vit: Path, tmp_path: Path) -> None:
    model = trained_assistant(tmp_path / "run", tiny_llama, {"image": tiny_vit}, recall_tokens=2)
    export(Predictor(model), Form(dtype="bf16"), tmp_path / "out", OURS, "card")
    found, processor = loaded(tmp_path / "out")
    for name, weight in found.named_parameters():
        assert weight.dtype == (torch.bfloat16 if "language_model" in name else torch.float32), name
    assert len(answers(found, processor, chats("image"))) == 3


def test_an_encoder_in_bf16_computes_in_bf16_once_exported(tiny_llama: Path, tiny_vit: Path, tmp_path: Path) -> None:
    path = trained_assistant(tmp_path / "run", tiny_llama, {"image": tiny_vit}, {"image": {"precision": "bf16"}})
    predictor, records = Predictor(path), records_of(chats("image"))
    expected = list(predictor.answers(records, 8, 8))
    export(Predictor(path), Form(), tmp_path / "out", OURS, "card")
    model, processor = loaded(tmp_path / "out")
    assert answers(model, processor, chats("image")) == expected
    items = [decode(ref) for record in records for ref in record.media()]
    assert {weight.dtype for weight in model.encoders["image"].parameters()} == {torch.bfloat16}
    again = ENCODERS["image"].part({"precision": "bf16"}, model.encoders["image"]).encode(predictor.encoder("image").preprocess(items))
    assert all(map(torch.equal, again, predictor.encoder("image")(items)))


@pytest.mark.parametrize("system", [None, "", 'Be "short".\nNo {{ braces }} or {% blocks %}, \u00e9\U0001f600.'])
@pytest.mark.parametrize("template", ["chatml", None])
def test_the_exported_template_writes_what_the_model_was_trained_on(system: str | None, template: str | None, tiny_llama: Path) -> None:
    chat = load_chat_format(tiny_llama, {"image": 2, "audio": 1}, system)
    if template is None:
        chat.tokenizer.chat_template = None
    item = {"type": "image"}
    turns = [(USER, ("What", item, " is it?")), (ASSISTANT, ("It is red.",)), (USER, ("And\nnow?",))]
    messages = [Message(role, tuple(MediaRef("image", "x.png") if part is item else str(part) for part in parts)) for role, parts in turns]
    talk = [
        {"role": role, "content": [part if part is item else {"type": "text", "text": part} for part in parts]} for role, parts in turns
    ]
    prompts = [chat.prompt(messages), chat.prompt([Message(SYSTEM, ("Be kind.",)), *messages])]
    tokenizer, tokens = with_placeholders(chat)
    made = chat_template(chat, tokens)
    for prompt, conversation in zip(prompts, [talk, [{"role": "system", "content": "Be kind."}, *talk]], strict=True):
        text = tokenizer.apply_chat_template(conversation, chat_template=made, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text.replace("<image>", "<image>" * 2), add_special_tokens=False)["input_ids"]
        assert ids == [tokenizer.convert_tokens_to_ids("<image>") if code < 0 else code for code in prompt]
    with pytest.raises(Exception, match="has not learnt video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], chat_template=made, tokenize=False)


def test_items_and_tokens_must_be_equally_many(model: Path, tmp_path: Path) -> None:
    export(Predictor(model), Form(), tmp_path / "out", OURS, "card")
    found, processor = loaded(tmp_path / "out")
    with pytest.raises(ValueError, match="the texts have 2 <image>, and 1 items of image are given"):
        processor(text="<image> and <image>?", images=[image(0)])
    inputs = processor(text=["<image>?", "<image>!"], images=[image(0), image(1)], return_tensors="pt")
    with pytest.raises(ValueError, match="1 items of image in `pixel_values`, and 8 tokens <image>; required are 4 for each"):
        found(**(dict(inputs) | {"pixel_values": inputs["pixel_values"][:1]}))


def test_an_exported_model_trains_on(model: Path, tmp_path: Path) -> None:
    """`labels` give a loss, whose gradient reaches the projector through features of the frozen encoder."""
    export(Predictor(model), Form(), tmp_path / "out", OURS, "card")
    found, processor = loaded(tmp_path / "out")
    inputs = processor(text="<image>What?", images=image(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = found.train()(**inputs, labels=inputs["input_ids"].clamp(max=9)).loss
    loss.backward()
    assert all(float(weight.grad.abs().max()) > 0 for name, weight in found.assistant.projector.named_parameters())
    assert all(weight.grad is None for weight in found.encoders.parameters())
    found.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert answers(*loaded(tmp_path / "again"), chats("image")) == answers(found.eval(), processor, chats("image"))


@pytest.mark.parametrize(
    ("llama", "quantization"), [("tied_llama", None), ("tiny_llama", None), pytest.param("tiny_llama", "nf4", marks=needs_bitsandbytes)]
)
def test_llavas_form_gives_the_same_logits_in_plain_transformers(
    llama: str, quantization: str | None, tiny_clip: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    language_model = request.getfixturevalue(llama)
    more: dict[str, Any] = {"projector": "linear", "soft_tokens": 16, "quantization": quantization}
    llava_model = trained_assistant(tmp_path, language_model, {"image": tiny_clip}, shape={"input_norm": False}, **more)
    predictor, records = Predictor(llava_model), records_of(chats("image"))
    expected = list(predictor.answers(records, 8, 8))
    export(Predictor(llava_model), Form(llava=True), tmp_path / "out", OURS, "card")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    options = {"processor_kwargs": {"padding": True, "padding_side": "left"}}
    inputs = processor.apply_chat_template(
        chats("image"), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    token = model.config.image_token_index
    placed = [row[mask == 1].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]
    assert placed == [[token if code < 0 else code for code in predictor.chat.prompt(record.messages)] for record in records]
    encoder, soft = predictor.encoder("image"), inputs["input_ids"] == token
    pixels = torch.stack(encoder.preprocess([decode(ref) for record in records for ref in record.media()]))
    assert torch.equal(pixels, inputs["pixel_values"])
    with torch.no_grad():
        embedded = predictor.assistant.language_model.get_input_embeddings()(inputs["input_ids"].masked_fill(soft, 0))
        for rounded, tolerance in ((False, 1e-5), (True, 5e-3)):  # training stores features in float16
            grids = torch.stack(encoder.encode(list(pixels))) if rounded else encoder.forward(pixels)
            given = embedded.masked_scatter(soft.unsqueeze(-1), predictor.assistant.soft("image", grids, None))
            wanted = predictor.assistant.language_model(inputs_embeds=given, attention_mask=inputs["attention_mask"]).logits
            found = model(**inputs).logits[..., : wanted.shape[-1]]
            assert torch.allclose(found[inputs["attention_mask"] == 1], wanted[inputs["attention_mask"] == 1], rtol=0, atol=tolerance)
    assert answers(model, processor, chats("image")) == expected


def test_another_form_is_refused_with_all_that_would_have_to_be_set(tiny_llama: Path, tiny_vit: Path, tmp_path: Path) -> None:
    path = trained_assistant(
        tmp_path / "run", tiny_llama, {"image": tiny_vit}, {"image": {"size": 48}}, shape={"hidden": 40}, recall_tokens=1
    )
    with pytest.raises(InputError) as caught:
        export(Predictor(path), Form(llava=True), tmp_path / "out", OURS, "card")
    for fix in (
        "model.input_norm=false",
        "model.projector=linear",
        "model.hidden=32 or less",
        "model.recall_tokens=0",
        "without model.encoders.image.size",
    ):
        assert fix in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tower_whose_hidden_states_are_not_its_features_is_refused(tiny_llama: Path, tiny_vit: Path, tmp_path: Path) -> None:
    """A ViT's features are normalized after its last hidden states."""
    shape = {"input_norm": False}
    path = trained_assistant(tmp_path / "run", tiny_llama, {"image": tiny_vit}, shape=shape, projector="linear", soft_tokens=16)
    with pytest.raises(InputError, match="its last hidden states are not its features"):
        export(Predictor(path), Form(llava=True), tmp_path / "out", OURS, "card")


def test_llava_has_no_precision_of_its_own_for_the_encoder(tiny_llama: Path, tiny_clip: Path, tmp_path: Path) -> None:
    options, shape = {"image": {"precision": "bf16"}}, {"input_norm": False}
    path = trained_assistant(tmp_path / "run", tiny_llama, {"image": tiny_clip}, options, shape, projector="linear", soft_tokens=16)
    with pytest.raises(InputError, match=r"without model\.encoders\.image\.precision"):
        export(Predictor(path), Form(llava=True), tmp_path / "out", OURS, "card")


def test_llava_pools_no_positions(tiny_llama: Path, tiny_clip: Path, tmp_path: Path) -> None:
    path = trained_assistant(tmp_path / "run", tiny_llama, {"image": tiny_clip}, shape={"input_norm": False}, projector="linear")
    with pytest.raises(InputError, match=r"model\.soft_tokens=16"):
        export(Predictor(path), Form(llava=True), tmp_path / "out", OURS, "card")


@pytest.mark.parametrize("form", [Form(), Form(adapter=True)], ids=["merged", "adapter"])
def test_exporting_twice_gives_the_same_bytes(form: Form, model: Path, tmp_path: Path) -> None:
    """The second export replaces the first."""
    export(Predictor(model), form, tmp_path / "out", OURS, "card")
    before = content_of(tmp_path / "out")
    (tmp_path / "out" / "more.txt").write_text("of an earlier version")
    export(Predictor(model), form, tmp_path / "out", OURS, "card")
    assert content_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any(str(model.parent.parent).encode() in content for content in before.values()), "no path of this machine"


def test_llavas_form_has_the_same_bytes_twice(llava_model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(Predictor(llava_model), Form(llava=True), tmp_path / name, OURS, "card")
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")
    assert not any(b"/tmp" in content for name, content in content_of(tmp_path / "one").items() if not name.endswith("safetensors"))


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ({"notes.txt": "mine"}, "is not empty"),
        ({"raytrain2p.json": json.dumps({"run_id": "b" * 32})}, f"holds an export of run {'b' * 32}"),
    ],
)
def test_what_is_not_an_earlier_export_of_the_run_is_left_alone(there: dict[str, str], what: str, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name, content in there.items():
        (target / name).write_text(content)
    with pytest.raises(InputError, match=what):
        export(Predictor(model), Form(), target, OURS, "card")
    assert {path.name: path.read_text() for path in target.iterdir()} == there


def test_a_full_disk_is_one_line_and_the_earlier_export_stays(model: Path, disk: Disk) -> None:
    export(Predictor(model), Form(), disk.folder / "out", OURS, "card")
    before = content_of(disk.folder / "out")
    disk.fill()
    with pytest.raises(StorageError, match=r"out cannot be written: no space left; needed .* MB, free .* MB$"):
        export(Predictor(model), Form(), disk.folder / "out", OURS, "card")
    assert content_of(disk.folder / "out") == before
    assert sorted(path.name for path in disk.folder.iterdir()) == ["filler", "out"]
