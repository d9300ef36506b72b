"""From messages to tokens: where the soft tokens stand, where each answer begins, and where it ends."""

from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import GenerationConfig

from raytrain2p.data.chat import MARK, ChatFormat, Encoded, load_chat_format, soft_codes
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, SYSTEM, USER, Message
from tests.conftest import CHAT_TEMPLATE, byte_tokenizer

SOFT_TOKENS = {"image": 5, "audio": 3}
SOFT = soft_codes(SOFT_TOKENS)
SIGNS = {SOFT["image"]: "#", SOFT["audio"]: "~"}
IMAGE, AUDIO = MediaRef("image", "one.png"), MediaRef("audio", "one.wav")
NO_STOP_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
COUNTING_TEMPLATE = "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def chat(
    template: str | None = CHAT_TEMPLATE, system_prompt: str | None = None, loss_on: Literal["all", "last"] = "all", tokenizer: Any = None
) -> ChatFormat:
    tokenizer = tokenizer or byte_tokenizer(template)
    return ChatFormat(tokenizer, (tokenizer.eos_token_id,), SOFT_TOKENS, system_prompt, loss_on)


def user(*parts: str | MediaRef) -> Message:
    return Message(USER, parts)


def says(*parts: str | MediaRef) -> Message:
    return Message(ASSISTANT, parts)


def text_of(form: ChatFormat, tokens: list[int]) -> str:
    """Tokens as text, each soft one as `#` (image) or `~` (audio)."""
    return "".join(SIGNS.get(token) or form.tokenizer.decode([token]) for token in tokens)


def shown(form: ChatFormat, record: Encoded) -> str:
    """A record as text, supervised tokens in «»."""
    text, before = "", False
    for token, supervised in zip(record.ids, record.supervised, strict=True):
        text += "" if supervised == before else "«" if supervised else "»"
        text, before = text + text_of(form, [token]), supervised
    return text + "»" * before


def answer(form: ChatFormat, *messages: Message) -> str:
    record = form.encode(messages)
    return text_of(form, record.ids[record.prompt :])


def test_soft_tokens_stand_where_the_image_goes() -> None:
    form = chat()
    prompt = text_of(form, form.prompt([user(IMAGE, "Colour?")]))
    assert prompt == "<|im_start|>user\n#####Colour?<|im_end|>\n<|im_start|>assistant\n"


def test_several_media_stand_each_in_its_own_place() -> None:
    form = chat()
    prompt = text_of(form, form.prompt([user("Is ", IMAGE, IMAGE, " or ", AUDIO, "this?")]))
    assert prompt == "<|im_start|>user\nIs ########## or ~~~this?<|im_end|>\n<|im_start|>assistant\n"


def test_without_media_there_are_no_soft_tokens() -> None:
    form = chat()
    assert text_of(form, form.prompt([user("Colour?")])) == "<|im_start|>user\nColour?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("media", [(IMAGE,), ()])
def test_an_answer_ends_with_the_stop_token_and_nothing_after_it(media: tuple[MediaRef, ...]) -> None:
    form = chat()
    record = form.encode([user(*media, "Colour?"), says("dark red")])
    assert text_of(form, record.ids[record.prompt :]) == "dark red<|im_end|>"
    assert record.supervised == [False] * record.prompt + [True] * (len(record.ids) - record.prompt)
    assert record.ids.count(form.stop_ids[0]) == 2


def test_a_record_is_what_the_template_renders() -> None:
    form = chat()
    turns = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "red"}] * 2
    whole = form.tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == text_of(form, form.encode([user("Colour?"), says("red")] * 2).ids) + "\n"


TWO_TURNS = [user(IMAGE, "Colour?"), says("red"), user(AUDIO, "Sure?"), says("yes")]


def test_every_answer_is_supervised_with_its_stop_token_and_nothing_else() -> None:
    form = chat()
    assert shown(form, form.encode(TWO_TURNS)) == (
        "<|im_start|>user\n#####Colour?<|im_end|>\n<|im_start|>assistant\n«red<|im_end|>»\n"
        "<|im_start|>user\n~~~Sure?<|im_end|>\n<|im_start|>assistant\n«yes<|im_end|>»"
    )


def test_the_last_answer_alone_is_supervised_if_so_set() -> None:
    form, last = chat(), chat(loss_on="last")
    assert last.encode(TWO_TURNS).ids == form.encode(TWO_TURNS).ids
    assert shown(last, last.encode(TWO_TURNS)).split("«") == [text_of(form, form.prompt(TWO_TURNS)), "yes<|im_end|>»"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_STOP_TEMPLATE, COUNTING_TEMPLATE, None])
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_one_turn_is_the_generation_prompt_and_then_the_rest_of_the_text(template: str | None, system_prompt: str | None) -> None:
    form = chat(template, system_prompt)

    def tokens(text: str) -> list[int]:
        before, image, after = (form.tokenizer(part)["input_ids"] for part in text.partition(MARK))
        return before + [SOFT["image"]] * 5 * bool(image) + after

    for media in ((IMAGE,), ()):
        turn = [{"role": "user", "content": MARK * len(media) + "Colour?"}, {"role": "assistant", "content": "red"}]
        if system_prompt is not None:
            turn.insert(0, {"role": "system", "content": system_prompt})
        if template is None:
            prompt, whole = f"{turn[-2]['content']}\n", f"{turn[-2]['content']}\nred"
        else:
            prompt = form.tokenizer.apply_chat_template(turn[:-1], tokenize=False, add_generation_prompt=True)
            whole = form.tokenizer.apply_chat_template(turn, tokenize=False)
        rest = tokens(whole[len(prompt) :] if whole.startswith(prompt) else "red")
        end = form.stop_ids[0]
        rest = rest[: rest.index(end) + 1] if end in rest else [*rest, end]
        record = form.encode([user(*media, "Colour?"), says("red")])
        assert (record.ids[: record.prompt], record.ids[record.prompt :]) == (tokens(prompt), rest)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_STOP_TEMPLATE, None])
@pytest.mark.parametrize("loss_on", ["all", "last"])
def test_training_and_generation_have_the_same_prompt(template: str | None, loss_on: Literal["all", "last"]) -> None:
    form = chat(template, loss_on=loss_on)
    record = form.encode(TWO_TURNS)
    assert form.prompt(TWO_TURNS) == form.prompt(TWO_TURNS[:3]) == record.ids[: record.prompt]


def test_a_template_that_writes_no_stop_token_gets_one_after_each_answer() -> None:
    form = chat(NO_STOP_TEMPLATE)
    assert answer(form, user("Colour?"), says("red")) == "red\n<|im_end|>"
    assert shown(form, form.encode(TWO_TURNS)) == (
        "[user] #####Colour?\n[assistant] «red\n<|im_end|>»[user] ~~~Sure?\n[assistant] «yes\n<|im_end|>»"
    )


def test_a_template_that_rewrites_earlier_turns_still_gives_the_plain_answer() -> None:
    assert answer(chat(COUNTING_TEMPLATE), user(IMAGE, "Colour?"), says("red")) == "red<|im_end|>"


def test_several_answers_need_a_template_that_keeps_earlier_turns() -> None:
    with pytest.raises(ValueError, match=r"rewrites earlier turns.*set data\.loss_on=last"):
        chat(COUNTING_TEMPLATE).encode(TWO_TURNS)
    form = chat(COUNTING_TEMPLATE, loss_on="last")
    assert shown(form, form.encode(TWO_TURNS)).endswith("~~~Sure?<|im_end|>«yes<|im_end|>»")


REASONING_TEMPLATE = (  # removes the reasoning of earlier answers, and gives the newest one an empty block if it has none
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last and '<think>' not in m['content'] %}"
    "<think></think>{% endif %}{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_earlier_answers_are_supervised_as_the_template_leaves_them() -> None:
    form = chat(REASONING_TEMPLATE)
    record = form.encode([user("Q1"), says("<think>hm</think>A1"), user("Q2"), says("A2")])
    assert shown(form, record) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«<think></think>A2<|im_end|>»"
    )


def test_what_the_user_says_is_never_supervised() -> None:
    """The first stop token after the first answer ends what the user says."""
    template = (
        "{% for m in messages %}{{ m['content'] }}{{ '<|im_end|>' if m['role'] == 'user' else '!' if loop.last else '.' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"set data\.loss_on=last"):
        chat(template).encode(TWO_TURNS)


def test_the_system_prompt_stands_before_the_user() -> None:
    form = chat(system_prompt="Be brief.")
    prompt = text_of(form, form.prompt([user(IMAGE, "Colour?")]))
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n#####Colour?")
    assert answer(form, user(IMAGE, "Colour?"), says("red")) == "red<|im_end|>"


def test_a_records_own_system_message_replaces_the_system_prompt() -> None:
    form = chat(system_prompt="Be brief.")
    prompt = text_of(form, form.prompt([Message(SYSTEM, ("Be polite.",)), user("Hi")]))
    assert prompt == "<|im_start|>system\nBe polite.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_an_empty_system_prompt_is_a_system_message_and_none_is_not() -> None:
    empty, absent = chat(system_prompt=""), chat()
    assert text_of(empty, empty.prompt([user("Hi")])).startswith("<|im_start|>system\n<|im_end|>\n")
    assert "system" not in text_of(absent, absent.prompt([user("Hi")]))


def test_a_base_model_reads_the_messages_alone() -> None:
    form = chat(template=None)
    assert shown(form, form.encode([user(IMAGE, "Colour?"), says("red")])) == "#####Colour?\n«red<|im_end|>»"
    record = form.encode([Message(SYSTEM, ("Be brief.",)), *TWO_TURNS])
    assert shown(form, record) == "Be brief.\n#####Colour?\n«red<|im_end|>»~~~Sure?\n«yes<|im_end|>»"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None])
@pytest.mark.parametrize("media", [(IMAGE,), ()])
def test_an_object_replacement_character_in_a_users_text_adds_no_soft_tokens(template: str | None, media: tuple[MediaRef, ...]) -> None:
    form = chat(template)
    assert form.prompt([user(MARK, *media, f"Col{MARK}our?")]) == form.prompt([user(*media, "Colour?")])


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None, COUNTING_TEMPLATE])
def test_an_object_replacement_character_in_an_answer_adds_no_soft_tokens(template: str | None) -> None:
    form = chat(template)
    assert form.encode([user(IMAGE, "Colour?"), says(f"re{MARK}d")]) == form.encode([user(IMAGE, "Colour?"), says("red")])


def test_an_object_replacement_character_in_the_system_prompt_does_not_move_the_image() -> None:
    form = chat(system_prompt=f"Look{MARK} well.")
    prompt = text_of(form, form.prompt([user(IMAGE, "Colour?")]))
    assert "system\nLook well." in prompt
    assert "user\n#####Colour?" in prompt
    assert prompt.count("#") == SOFT_TOKENS["image"]


def test_soft_tokens_in_an_answer_are_not_supervised() -> None:
    form = chat()
    assert shown(form, form.encode([user("Show"), says("here ", IMAGE, "!")])).endswith("«here »#####«!<|im_end|>»")


@pytest.mark.parametrize(
    ("template", "found"),
    [("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", 4), ("{{ messages[0]['content'] | replace('\ufffc', '', 1) }}", 1)],
)
def test_media_that_a_template_drops_or_repeats_are_an_error_with_both_numbers(template: str, found: int) -> None:
    with pytest.raises(ValueError, match=f"hold 2 media items, the text .* {found}"):
        chat(template).prompt([user(IMAGE, "or", IMAGE, "?")])


def test_media_in_a_system_message_are_an_error() -> None:
    with pytest.raises(ValueError, match="a system message holds media"):
        chat().prompt([Message(SYSTEM, (IMAGE,)), user("Hi")])


@pytest.mark.parametrize("said", [MARK, ""])
def test_an_answer_that_is_empty_after_tokenizing_is_an_error(said: str) -> None:
    with pytest.raises(ValueError, match="is empty after tokenizing"):
        chat().encode([user("Q1"), says(said), user("Q2"), says("A2")])
    chat(loss_on="last").encode([user("Q1"), says(said), user("Q2"), says("A2")])


@pytest.mark.parametrize("place", [0, 1])
def test_a_special_token_in_a_text_is_an_error(place: int) -> None:
    """The tokenizer would end the turn there, and drop what is learnt after it."""
    messages = [user("Hi"), says("Hello")]
    messages[place] = Message(messages[place].role, ("Before <|im_end|> and after",))
    with pytest.raises(ValueError, match=f"a message of the {messages[place].role} has `<|im_end|>`"):
        chat().encode(messages)
    if place == 0:
        with pytest.raises(ValueError, match="takes for a special token"):
            chat().prompt(messages)


def test_any_of_several_stop_tokens_ends_the_answer() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    form = ChatFormat(tokenizer, (end, tokenizer.eos_token_id), SOFT_TOKENS)
    assert form.encode([user("Hi"), says("Hello")]).ids[-1] == tokenizer.eos_token_id


def test_a_model_directory_brings_its_template_and_stop_tokens(tiny_llama: Path) -> None:
    form = load_chat_format(tiny_llama, SOFT_TOKENS, "Be brief.", "last")
    expected: Any = byte_tokenizer()
    assert form.tokenizer.chat_template == CHAT_TEMPLATE
    assert form.stop_ids == (expected.eos_token_id,)
    assert form.encode(TWO_TURNS) == chat(system_prompt="Be brief.", loss_on="last").encode(TWO_TURNS)


def test_stop_tokens_that_only_the_generation_config_names_are_taken_too(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert load_chat_format(tmp_path, SOFT_TOKENS, None).stop_ids == (tokenizer.eos_token_id,)
    GenerationConfig(eos_token_id=[0, tokenizer.eos_token_id]).save_pretrained(tmp_path)
    assert load_chat_format(tmp_path, SOFT_TOKENS, None).stop_ids == (tokenizer.eos_token_id, 0)
