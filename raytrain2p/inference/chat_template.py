"""The chat format of training, as tokenizers of transformers keep it: special tokens for media, and one template."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken

from raytrain2p.data.chat import MARK, ChatFormat
from raytrain2p.data.records import ASSISTANT, SYSTEM


def with_placeholders(chat: ChatFormat) -> tuple[Any, dict[str, str]]:
    """The tokenizer with a token that stands for an item of each modality, and these tokens."""
    tokenizer, tokens = chat.tokenizer, {modality: f"<{modality}>" for modality in chat.soft_tokens}
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens.values()], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(chat.stop_ids[0])
    return tokenizer, tokens


def chat_template(chat: ChatFormat, tokens: Mapping[str, str]) -> str:
    """The language model's template, for messages with media in any place, and with the system message of training."""
    base = chat.tokenizer.chat_template
    if base is None:  # as `ChatFormat` renders for a model that has none
        stop = literal(str(chat.tokenizer.convert_ids_to_tokens(chat.stop_ids[0])))
        base = (
            "{% for message in messages %}{{ message['content'] }}{{ "
            + f"{stop} if message['role'] == '{ASSISTANT}'"
            + r" else '\n' }}{% endfor %}"
        )
        system = None
    else:
        system = chat.system_prompt
    lines = ["{%- set flat = namespace(messages=[]) %}"]
    if system is not None:
        message = f"{{'role': '{SYSTEM}', 'content': {literal(system.replace(MARK, ''))}}}"
        lines.append(f"{{%- if messages[0]['role'] != '{SYSTEM}' %}}{{%- set flat.messages = [{message}] %}}{{%- endif %}}")
    lines += [
        "{%- for message in messages %}",
        "{%- if message['content'] is string %}{%- set flat.messages = flat.messages + [message] %}",
        "{%- else %}{%- set parts = namespace(text='') %}{%- for part in message['content'] %}",
        "{%- if part['type'] == 'text' %}{%- set parts.text = parts.text + part['text'] %}",
        *(
            f"{{%- elif part['type'] == {literal(modality)} %}}{{%- set parts.text = parts.text + {literal(token)} %}}"
            for modality, token in tokens.items()
        ),
        "{%- else %}{{- raise_exception('the model has not learnt ' + part['type']) }}{%- endif %}{%- endfor %}",
        "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': parts.text}] %}{%- endif %}",
        "{%- endfor %}",
        "{%- set messages = flat.messages %}",
    ]
    return "\n".join(lines) + "{{- '' }}" + base


def literal(text: str) -> str:
    """Text as a string of Jinja's, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
