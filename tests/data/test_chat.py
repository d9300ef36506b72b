"""From a record to tokens: where the soft tokens stand, where the answer begins, and where it ends."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from raytrain2p.data.chat import IMAGE_MARK, SOFT, ChatFormat, load_chat_format
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer

SOFT_TOKENS = 5


def chat(template: str | None = CHAT_TEMPLATE, system_prompt: str | None = None) -> ChatFormat:
    tokenizer = byte_tokenizer(template)
    return ChatFormat(tokenizer, (tokenizer.eos_token_id,), SOFT_TOKENS, system_prompt)


def text_of(form: ChatFormat, tokens: list[int]) -> str:
    """Tokens as text, each soft one as `#`."""
    return "".join("#" if token == SOFT else form.tokenizer.decode([token]) for token in tokens)


def test_soft_tokens_stand_where_the_image_goes() -> None:
    form = chat()
    assert text_of(form, form.prompt("Colour?", True)) == "<|im_start|>user\n#####Colour?<|im_end|>\n<|im_start|>assistant\n"


def test_without_an_image_there_are_no_soft_tokens() -> None:
    form = chat()
    assert text_of(form, form.prompt("Colour?", False)) == "<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("with_image", [True, False])
def test_a_response_ends_with_the_stop_token_and_nothing_after_it(with_image: bool) -> None:
    form = chat()
    response = form.response("Colour?", with_image, "dark red")
    assert text_of(form, response) == "dark red<|im_end|>"
    assert response[-1] == form.stop_ids[0]
    assert response.count(form.stop_ids[0]) == 1


def test_prompt_and_response_together_are_what_the_template_renders() -> None:
    form = chat()
    messages = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}]
    whole = form.tokenizer.apply_chat_template(messages, tokenize=False)
    tokens = form.prompt("Colour?", False) + form.response("Colour?", False, "red")
    assert whole == text_of(form, tokens) + "\n"


def test_a_template_that_writes_no_stop_token_gets_one() -> None:
    form = chat(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    assert text_of(form, form.response("Colour?", False, "red")) == "red\n<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_still_gives_the_plain_response() -> None:
    form = chat("{{ messages | length }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    assert text_of(form, form.response("Colour?", True, "red")) == "red<|im_end|>"


def test_the_system_prompt_stands_before_the_user() -> None:
    form = chat(system_prompt="Be brief.")
    prompt = text_of(form, form.prompt("Colour?", True))
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n#####Colour?")
    assert text_of(form, form.response("Colour?", True, "red")) == "red<|im_end|>"


def test_an_empty_system_prompt_is_a_system_message_and_none_is_not() -> None:
    empty, absent = chat(system_prompt=""), chat()
    assert text_of(empty, empty.prompt("Hi", False)).startswith("<|im_start|>system\n<|im_end|>\n")
    assert "system" not in text_of(absent, absent.prompt("Hi", False))


def test_a_tokenizer_without_a_template_works() -> None:
    form = chat(template=None)
    assert text_of(form, form.prompt("Colour?", True)) == "#####Colour?\n"
    assert text_of(form, form.response("Colour?", True, "red")) == "red<|im_end|>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
@pytest.mark.parametrize("with_image", [True, False])
def test_an_object_replacement_character_in_the_instruction_adds_no_soft_tokens(template: str | None, with_image: bool) -> None:
    form = chat(template)
    assert form.prompt(f"{IMAGE_MARK}Col{IMAGE_MARK}our?", with_image) == form.prompt("Colour?", with_image)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None, "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_an_object_replacement_character_in_the_response_adds_no_soft_tokens(template: str | None) -> None:
    form = chat(template)
    assert SOFT not in form.response("Colour?", True, f"re{IMAGE_MARK}d")


def test_an_object_replacement_character_in_the_system_prompt_does_not_move_the_image() -> None:
    form = chat(system_prompt=f"Look{IMAGE_MARK} well.")
    prompt = text_of(form, form.prompt("Colour?", True))
    assert "user\n#####Colour?" in prompt
    assert prompt.count("#") == SOFT_TOKENS
    assert SOFT not in form.prompt("Colour?", False)


def test_any_of_several_stop_tokens_ends_the_response() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    form = ChatFormat(tokenizer, (end, tokenizer.eos_token_id), SOFT_TOKENS)
    assert form.response("Hi", False, "Hello")[-1] == tokenizer.eos_token_id


def test_a_model_directory_brings_its_template_and_stop_tokens(tiny_llama: Path) -> None:
    form = load_chat_format(tiny_llama, SOFT_TOKENS, "Be brief.")
    expected: Any = byte_tokenizer()
    assert form.tokenizer.chat_template == CHAT_TEMPLATE
    assert form.stop_ids == (expected.eos_token_id,)
    assert form.prompt("Hi", True) == chat(system_prompt="Be brief.").prompt("Hi", True)


def test_stop_tokens_that_only_the_generation_config_names_are_taken_too(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert load_chat_format(tmp_path, 1, None).stop_ids == (tokenizer.eos_token_id,)
    GenerationConfig(eos_token_id=[0, tokenizer.eos_token_id]).save_pretrained(tmp_path)
    assert load_chat_format(tmp_path, 1, None).stop_ids == (tokenizer.eos_token_id, 0)
