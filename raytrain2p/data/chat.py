"""From messages to tokens, through the tokenizer's own chat template."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from raytrain2p.config import Findings, Problem
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, SYSTEM, Message, Record

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # a media item's position in the rendered text


Packed = tuple[np.ndarray, np.ndarray, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a record.

    Args:
        ids: token IDs; a negative one is a soft token, see `soft_codes`.
        supervised: whether the model learns to write the token.
        prompt: number of tokens before the last answer.
    """

    ids: list[int]
    supervised: list[bool]
    prompt: int

    def packed(self) -> Packed:
        """The same in arrays, 5 bytes a token instead of 48."""
        return np.array(self.ids, np.int32), np.array(self.supervised, bool), self.prompt


def soft_codes(soft_tokens: Mapping[str, int]) -> dict[str, int]:
    """The ID that is in place of a modality's soft tokens until the batch is made: -1, -2, …"""
    return {modality: -number for number, modality in enumerate(soft_tokens, 1)}


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the rendered text that is tokenized on its own; `answer` is what the assistant says in it, None elsewhere."""

    text: str
    answer: str | None = None


@dataclass(frozen=True)
class ChatFormat:
    """How messages become tokens.

    The text of a base model, which has no template, is the messages alone: a newline after each, after an answer a stop token.

    Args:
        tokenizer: of transformers.
        stop_ids: tokens that end an answer.
        soft_tokens: number for one item of each modality.
        system_prompt: system message of records without one; None leaves it to the template. Base models ignore it.
        loss_on: which answers are supervised.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    soft_tokens: Mapping[str, int]
    system_prompt: str | None = None
    loss_on: Literal["all", "last"] = "all"

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Tokens of messages that end with an answer, up to and with its stop token.

        Raises:
            ValueError: the template refuses, drops, repeats or rewrites messages, a text holds a special token, or a supervised
                answer has no token.
        """
        assert messages[-1].role == ASSISTANT, "encode needs an answer at the end"
        chat = self._chat(messages)
        pieces = self._context(chat[:-1], strict=self.loss_on == "all")
        context, whole = "".join(piece.text for piece in pieces), self._render(chat, generate=False)
        # some templates rewrite the prompt once it is answered
        text = whole[len(context) :] if whole.startswith(context) else chat[-1]["content"]
        pieces.append(Piece(text, answer=chat[-1]["content"]))
        ids: list[int] = []
        supervised: list[bool] = []
        prompt = end = 0
        for piece, tokens in zip(pieces, self._tokens(pieces, messages), strict=True):
            learnt = self._through_stop(tokens) if piece.answer is not None and (self.loss_on == "all" or piece is pieces[-1]) else 0
            if learnt and all(token in self.stop_ids for token in tokens[:learnt]):
                raise ValueError(f"the answer {piece.answer!r} is empty after tokenizing")
            prompt, end = len(ids), len(ids) + learnt
            ids += tokens
            supervised += [token >= 0 for token in tokens[:learnt]] + [False] * (len(tokens) - learnt)
        return Encoded(ids[:end], supervised[:end], prompt)

    def encode_each(self, records: Iterable[Record], findings: Findings) -> Iterator[tuple[int, Record, Encoded]]:
        """Number, record and tokens of those that `encode` takes; the others are added to `findings`."""
        for number, record in enumerate(records):
            try:
                yield number, record, self.encode(record.messages)
            except ValueError as error:
                findings.add(Problem(record.where, str(error), "change the record, or take another language model"))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the last answer begins, whether it is there or not.

        Raises:
            ValueError: the template refuses, drops or repeats messages, or a text holds a special token.
        """
        if messages[-1].role == ASSISTANT:
            messages = messages[:-1]
        return [token for tokens in self._tokens(self._context(self._chat(messages)), messages) for token in tokens]

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def _chat(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages as templates take them."""
        if messages[0].role == SYSTEM and any(isinstance(part, MediaRef) for part in messages[0].parts):
            raise ValueError("a system message holds media; some templates move it, and the media would change places")
        chat = [
            {
                "role": message.role,
                "content": "".join(part.replace(MARK, "") if isinstance(part, str) else MARK for part in message.parts),
            }
            for message in messages
        ]
        if self.system_prompt is not None and self.tokenizer.chat_template is not None and messages[0].role != SYSTEM:
            chat.insert(0, {"role": SYSTEM, "content": self.system_prompt.replace(MARK, "")})
        for message in chat:
            if self.special and (found := self.special.search(message["content"])):
                raise ValueError(f"a message of the {message['role']} has `{found[0]}`, which the tokenizer takes for a special token")
        return chat

    @cached_property
    def special(self) -> re.Pattern[str] | None:
        """The tokenizer's special tokens as text: in a message, they would end its turn and begin others."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted(added.union(map(str, self.tokenizer.all_special_tokens)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def _context(self, chat: list[dict[str, str]], strict: bool = False) -> list[Piece]:
        """The text that the next answer follows; each earlier answer is a piece, as it was when it was generated.

        If the template rewrites earlier turns, the text is one piece, or an error if `strict`.
        """
        whole = self._render(chat, generate=True)
        pieces, start = [], 0
        for place, message in enumerate(chat):
            if message["role"] != ASSISTANT:
                continue
            prompt = self._render(chat[:place], generate=True)
            end = self._answer_end(chat[: place + 1], whole, len(prompt)) if whole.startswith(prompt) else None
            if end is None and not strict:
                return [Piece(whole)]
            if end is None:
                raise ValueError(
                    "the chat template of the language model rewrites earlier turns, so that their answers "
                    "do not follow the prompts they had: set data.loss_on=last"
                )
            pieces += [Piece(whole[start : len(prompt)]), Piece(whole[len(prompt) : end], answer=message["content"])]
            start = end
        return [*pieces, Piece(whole[start:])]

    def _answer_end(self, chat: list[dict[str, str]], whole: str, start: int) -> int | None:
        """Where the last answer of `chat`, which begins at `start`, ends in the text of a longer chat; None if that is unclear."""
        closed = self._render(chat, generate=False)
        if len(closed) >= start and whole.startswith(closed):
            return len(closed)
        # some templates write the newest answer differently, for example with an empty block of reasoning
        stops = (str(self.tokenizer.convert_ids_to_tokens(stop)) for stop in self.stop_ids)
        found = min(((place, stop) for stop in stops if (place := whole.find(stop, start)) >= 0), default=None)
        if found is None or whole[start : found[0]].strip() not in chat[-1]["content"]:
            return None
        return found[0] + len(found[1])

    def _render(self, chat: list[dict[str, str]], generate: bool) -> str:
        if self.tokenizer.chat_template is None:
            return "".join(message["content"] + ("" if message["role"] == ASSISTANT else "\n") for message in chat)
        try:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template of the language model refuses these messages: {error}") from None

    def _tokens(self, pieces: list[Piece], messages: Sequence[Message]) -> list[list[int]]:
        """Tokens of each piece, media included; answers without a stop token get one."""
        modalities = [part.modality for message in messages for part in message.parts if isinstance(part, MediaRef)]
        found = sum(piece.text.count(MARK) for piece in pieces)
        if found != len(modalities):
            raise ValueError(f"the messages hold {len(modalities)} media items, the text that the chat template makes of them {found}")
        codes, media = soft_codes(self.soft_tokens), iter(modalities)
        result = []
        for piece in pieces:
            first, *others = piece.text.split(MARK)
            tokens = self._plain(first)
            for text in others:
                modality = next(media)
                tokens += [codes[modality]] * self.soft_tokens[modality] + self._plain(text)
            if piece.answer is not None and not any(token in self.stop_ids for token in tokens):
                tokens += self.stop_ids[:1]
            result.append(tokens)
        return result

    def _through_stop(self, tokens: list[int]) -> int:
        """Number of tokens up to and with the first stop token."""
        return next((place for place, token in enumerate(tokens, 1) if token in self.stop_ids), len(tokens))

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def load_chat_format(
    directory: Any, soft_tokens: Mapping[str, int], system_prompt: str | None, loss_on: Literal["all", "last"] = "all"
) -> ChatFormat:
    """The format of a model directory, with the stop tokens of its tokenizer and its generation config.

    Raises:
        ValueError: there is no token that could end an answer. transformers raises anything for foreign files.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    stops = [tokenizer.eos_token_id]
    try:
        named = GenerationConfig.from_pretrained(directory).eos_token_id
        stops += named if isinstance(named, list) else [named]
    except OSError:
        pass  # no generation_config.json: only the tokenizer's end token
    stop_ids = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
    if not stop_ids:
        raise ValueError("its tokenizer has no end token")
    return ChatFormat(tokenizer, stop_ids, soft_tokens, system_prompt, loss_on)
