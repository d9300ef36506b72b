"""From the body of a chat completion request to a record. https://platform.openai.com/docs/api-reference/chat/create"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from raytrain2p.config import InputError
from raytrain2p.data.reading import records_in_memory
from raytrain2p.data.records import ASSISTANT, Record
from raytrain2p.serving.limits import Limits, RefusedError, check_size

MESSAGES, MODEL, STREAM, STREAM_OPTIONS = "messages", "model", "stream", "stream_options"
MAX_TOKENS = ("max_completion_tokens", "max_tokens")
# Answers are greedy, and one model has one answer: these change nothing.
WITHOUT_EFFECT = {"temperature", "top_p", "seed", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# These would change the answer, so only the value that does not is taken.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "logprobs": (False,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
KNOWN = {MESSAGES, MODEL, STREAM, STREAM_OPTIONS, *MAX_TOKENS, *WITHOUT_EFFECT, *NEUTRAL}
LONGEST_SHOWN = 60  # characters of a name in a message


@dataclass(frozen=True)
class ChatRequest:
    """What is asked.

    Args:
        max_tokens: of the answer.
        stream: whether the answer is sent while it is written.
        include_usage: whether the last part of a stream counts the tokens.
    """

    record: Record
    max_tokens: int
    stream: bool
    include_usage: bool


def read_chat_request(body: bytes, model: str, limits: Limits) -> ChatRequest:
    """Read and check a request, but for what only the model knows.

    Args:
        model: the name of the one that answers.

    Raises:
        RefusedError: with what is wrong and where.
    """
    fields = _parsed(body)
    for key, value in fields.items():
        if key not in KNOWN:
            raise RefusedError(400, "unknown_parameter", f"unknown parameter `{_short(key)}`", _short(key))
        if key in NEUTRAL and not any(value == one and type(value) is type(one) for one in _with_floats(NEUTRAL[key])):
            only = " or ".join(json.dumps(one) for one in NEUTRAL[key])
            raise RefusedError(400, "unsupported_parameter", f"`{key}` is not supported; leave it out, or send {only}", key)
    if fields.get(MODEL, model) != model:
        raise RefusedError(404, "model_not_found", f"the model here is `{model}`", MODEL)
    options = fields.get(STREAM_OPTIONS, {})
    if not isinstance(options, Mapping) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise RefusedError(400, "invalid_value", 'required is {"include_usage": true}', STREAM_OPTIONS)
    record = _record(fields)
    if (length := sum(len(message.text) for message in record.messages)) > limits.characters:
        what = f"the messages have {length:,} characters, the most are {limits.characters:,}"
        raise RefusedError(400, "context_length_exceeded", what, MESSAGES)
    check_size(record.media(), limits)
    return ChatRequest(record, _max_tokens(fields, limits), _flag(fields, STREAM), _flag(options, "include_usage"))


def _parsed(body: bytes) -> dict[str, Any]:
    """The fields that are not null."""

    def not_json(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        fields = json.loads(body.decode(), parse_constant=not_json)
    except UnicodeDecodeError:
        raise RefusedError(400, "invalid_json", "the body is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(400, "invalid_json", f"the body is not JSON: {what}") from None
    if not isinstance(fields, dict):
        raise RefusedError(400, "invalid_type", f"the body is a {type(fields).__name__}, required is a JSON object")
    return {key: value for key, value in fields.items() if value is not None}


def _record(fields: Mapping[str, Any]) -> Record:
    if MESSAGES not in fields:
        raise RefusedError(400, "missing_parameter", "there are no `messages`", MESSAGES)
    messages = fields[MESSAGES]
    try:
        (record,) = records_in_memory({"the request": {MESSAGES: messages}}, local_files=False)
    except InputError as error:
        problem, more = error.problems[0], len(error.problems) - 1
        what = "; ".join(part for part in (problem.what, problem.fix) if part) + (f" (and {more} more problems)" if more else "")
        raise RefusedError(400, "invalid_messages", what, MESSAGES) from None
    except RecursionError:
        raise RefusedError(400, "invalid_messages", "they are nested too deeply", MESSAGES) from None
    if record.messages[-1].role == ASSISTANT:
        raise RefusedError(400, "invalid_messages", "the last message is the assistant's: end with one of the user", MESSAGES)
    return record


def _max_tokens(fields: Mapping[str, Any], limits: Limits) -> int:
    for key in MAX_TOKENS:
        if key in fields:
            value = fields[key]
            if type(value) is not int or not 1 <= value <= limits.max_tokens:
                raise RefusedError(400, "invalid_value", f"`{key}` must be a whole number from 1 to {limits.max_tokens}", key)
            return value
    return limits.max_tokens


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key, False)
    if not isinstance(value, bool):
        raise RefusedError(400, "invalid_type", f"`{key}` must be true or false", key)
    return value


def _with_floats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Also `0.0` where `0` is taken."""
    return (*values, *(float(one) for one in values if type(one) is int))


def _short(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()[:LONGEST_SHOWN]
