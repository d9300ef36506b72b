"""Records through the chat templates of five model families, literally.

`chat_templates/smollm2.jinja` is the file of the packaged model. The others were written for these tests: they render what the
models' own templates render of system, user and assistant messages (Qwen/Qwen2.5-0.5B-Instruct, meta-llama/Llama-3.1-8B-Instruct,
google/gemma-2-2b-it, mistralai/Mistral-7B-Instruct-v0.3), refusals included, and leave out tools.
"""

from pathlib import Path

import pytest

from raytrain2p.data.chat import ChatFormat
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import SYSTEM, Message
from tests.conftest import byte_tokenizer
from tests.data.test_chat import IMAGE, chat, says, shown, text_of, user

SPECIAL = {  # of each template: tokens that begin a text and end an answer, and other markers
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "qwen2.5": ("<|im_start|>", "<|im_end|>"),
    "llama3.1": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "gemma2": ("<bos>", "<end_of_turn>", "<start_of_turn>"),
    "mistral_v0.3": ("<s>", "</s>", "[INST]", "[/INST]"),
}
# Text before the first user message
SMOLLM2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
)
LLAMA_USER, LLAMA_ASSISTANT = "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"
CHATML_TURNS = (
    "<|im_start|>user\n#####Colour?<|im_end|>\n<|im_start|>assistant\n«dark red<|im_end|>»\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»"
)
TURNS = {
    "smollm2": SMOLLM2 + CHATML_TURNS,
    "qwen2.5": QWEN + CHATML_TURNS,
    "llama3.1": (
        f"{LLAMA}{LLAMA_USER}#####Colour?<|eot_id|>{LLAMA_ASSISTANT}«dark red<|eot_id|>»"
        f"{LLAMA_USER}Sure?<|eot_id|>{LLAMA_ASSISTANT}«yes<|eot_id|>»"
    ),
    "gemma2": (
        "<bos><start_of_turn>user\n#####Colour?<end_of_turn>\n<start_of_turn>model\n«dark red<end_of_turn>»\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n«yes<end_of_turn>»"
    ),
    "mistral_v0.3": "<s>[INST] #####Colour?[/INST]« dark red</s>»[INST] Sure?[/INST]« yes</s>»",
}
CHATML_IMAGES = "<|im_start|>user\nFirst ##### then #####: same?<|im_end|>\n<|im_start|>assistant\n«no<|im_end|>»"
IMAGES = {
    "smollm2": SMOLLM2 + CHATML_IMAGES,
    "qwen2.5": QWEN + CHATML_IMAGES,
    "llama3.1": f"{LLAMA}{LLAMA_USER}First ##### then #####: same?<|eot_id|>{LLAMA_ASSISTANT}«no<|eot_id|>»",
    "gemma2": "<bos><start_of_turn>user\nFirst ##### then #####: same?<end_of_turn>\n<start_of_turn>model\n«no<end_of_turn>»",
    "mistral_v0.3": "<s>[INST] First ##### then #####: same?[/INST]« no</s>»",
}
TWO_TURNS = [user(IMAGE, "Colour?"), says("dark red"), user("Sure?"), says("yes")]
TWO_IMAGES = [user("First ", IMAGE, " then ", MediaRef("image", "two.png"), ": same?"), says("no")]


def form_of(name: str, **settings: str) -> ChatFormat:
    tokenizer = byte_tokenizer((Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text())
    tokenizer.add_tokens(list(SPECIAL[name]), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = SPECIAL[name][:2]
    return chat(tokenizer=tokenizer, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECIAL)
def test_a_record_of_two_turns(name: str) -> None:
    form = form_of(name)
    assert shown(form, form.encode(TWO_TURNS)) == TURNS[name]


@pytest.mark.parametrize("name", SPECIAL)
def test_a_record_of_two_images(name: str) -> None:
    form = form_of(name)
    assert shown(form, form.encode(TWO_IMAGES)) == IMAGES[name]


@pytest.mark.parametrize("name", SPECIAL)
def test_the_prompt_of_training_is_that_of_generation(name: str) -> None:
    form, last = form_of(name), form_of(name, loss_on="last")
    for record in (TWO_TURNS, TWO_IMAGES):
        encoded = form.encode(record)
        assert form.prompt(record[:-1]) == encoded.ids[: encoded.prompt] == last.encode(record).ids[: encoded.prompt]


@pytest.mark.parametrize("name", SPECIAL)
def test_markers_are_single_tokens(name: str) -> None:
    """Without which the tests above would show the same text of quite other tokens."""
    tokenizer = form_of(name).tokenizer
    assert all(len(tokenizer(marker)["input_ids"]) == 1 for marker in SPECIAL[name])


SYSTEM_PROMPTS = {
    "smollm2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "qwen2.5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "llama3.1": f"{LLAMA.removesuffix('<|eot_id|>')}Be brief.<|eot_id|>{LLAMA_USER}Hi<|eot_id|>{LLAMA_ASSISTANT}",
    "mistral_v0.3": "<s>[INST] Be brief.\n\nHi[/INST]",
}


@pytest.mark.parametrize("name", SYSTEM_PROMPTS)
def test_a_system_message(name: str) -> None:
    form = form_of(name, system_prompt="Be brief.")
    assert text_of(form, form.prompt([user("Hi")])) == SYSTEM_PROMPTS[name]


def test_a_template_without_a_system_role_refuses_one() -> None:
    with pytest.raises(ValueError, match="refuses these messages: System role not supported"):
        form_of("gemma2").encode([Message(SYSTEM, ("Be brief.",)), user("Hi"), says("Hello")])


@pytest.mark.parametrize("name", ["gemma2", "mistral_v0.3"])
def test_a_template_that_needs_roles_to_alternate_refuses_others(name: str) -> None:
    with pytest.raises(ValueError, match=r"refuses these messages: .*onversation roles must alternate"):
        form_of(name).encode([user("Hi"), user("there"), says("Hello")])


def test_mistral_moves_the_system_message_so_that_only_the_last_answer_can_be_supervised() -> None:
    with pytest.raises(ValueError, match=r"set data\.loss_on=last"):
        form_of("mistral_v0.3", system_prompt="Be brief.").encode(TWO_TURNS)
    form = form_of("mistral_v0.3", system_prompt="Be brief.", loss_on="last")
    assert shown(form, form.encode(TWO_TURNS)) == "<s>[INST] #####Colour?[/INST] dark red</s>[INST] Be brief.\n\nSure?[/INST]«yes</s>»"
