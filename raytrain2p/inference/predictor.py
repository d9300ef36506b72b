"""A trained assistant for inference, from model.pt and the base models: without Ray, MLflow store or training data."""

import functools
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from raytrain2p.config import InputError, Problem
from raytrain2p.data.chat import ChatFormat, Encoded, soft_codes
from raytrain2p.data.features import padded
from raytrain2p.data.media import decode
from raytrain2p.data.records import Record
from raytrain2p.data.tokens import TokenRecords, left_padded
from raytrain2p.inference.model_file import ModelFile, WhichModel, find_model
from raytrain2p.inference.questions import Question, as_records
from raytrain2p.models.artifacts import check_weights
from raytrain2p.models.assistant import AssistantBatch, build_assistant
from raytrain2p.models.frozen_encoder import FrozenEncoder
from raytrain2p.models.precision import resolve_precision
from raytrain2p.models.pretrained import quiet_loading

Batch = tuple[int, list[str]]  # the position of the first record, and the answers to it and those after it
TORN = "\ufffd"  # the decoded beginning of a character whose other bytes are in the next token


class Predictor(ModelFile):
    """A trained assistant with its encoders, which answers questions. Threads may share one: they are answered one after the other.

    Args:
        run: path of a model.pt or of a run directory, a run ID or its start, a launch ID, a run, or `latest`.
        root: where run directories are (`output.root` of training).
        device: where it computes; by default a GPU if there is one.

    Raises:
        InputError: no such run; its model.pt is not readable, damaged or incomplete; or the language model differs from the one in
            training.
    """

    def __init__(self, run: WhichModel = "latest", root: str | Path = "checkpoints", device: str | None = None) -> None:
        super().__init__(find_model(run, root))
        self.lock = threading.RLock()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bf16 = resolve_precision(self.precision, self.device) == "bf16"
        attention = "sdpa" if self.device.type == "cuda" else "eager"
        with quiet_loading():
            assistant = build_assistant(self.shape, attention, dtype := torch.bfloat16 if self.bf16 else torch.float32)
        assistant.freeze(self.shape.tuning, train_aligner=False)
        assistant.convert(dtype, self.device)
        check_weights(self.path, self.weights, assistant.own_weights())
        assistant.load_state_dict(self.weights, strict=False)  # the rest is the language model's own
        self.weights = {}  # the assistant has them now
        self.assistant = assistant.to(self.device).eval()

    @overload
    def __call__(
        self, items: list[Any] | tuple[Any, ...], question: str | None = None, *, batch_size: int = 32, max_new_tokens: int = 32
    ) -> list[str]: ...
    @overload
    def __call__(self, items: Question, question: str | None = None, *, batch_size: int = 32, max_new_tokens: int = 32) -> str: ...
    def __call__(
        self,
        items: Question | list[Any] | tuple[Any, ...],
        question: str | None = None,
        *,
        batch_size: int = 32,
        max_new_tokens: int = 32,
    ) -> str | list[str]:
        """Answers to questions, or the answer to one that is not in a list.

        Args:
            items: see `as_records`.
            question: what to ask of those that bring none.
            batch_size: records per forward pass.
            max_new_tokens: the longest answer.

        Raises:
            InputError: every problem of every item.
        """
        if min(batch_size, max_new_tokens) < 1:
            raise InputError(Problem("batch_size, max_new_tokens", "must be at least 1"))
        several = isinstance(items, list | tuple)
        records = as_records(items if several else [items], question)  # type: ignore[arg-type, list-item]
        self.check(records, max_new_tokens)
        answers = list(self.answers(records, batch_size, max_new_tokens))
        return answers if several else answers[0]

    @functools.cache  # noqa: B019 - as long as the predictor
    def encoder(self, modality: str) -> FrozenEncoder:
        """Of a modality, loaded when it is first needed; raises as `spec`."""
        with quiet_loading():
            return self.spec(modality).build(self.device.type)

    def answers(self, records: Sequence[Record], batch_size: int = 32, max_new_tokens: int = 32) -> Iterator[str]:
        """Greedy answers to the last question of each record, in the order of the records.

        Raises:
            InputError: records have media that the model has not learnt, or an encoder differs from the one in training.
        """
        for _, found in self.batches(records, batch_size, max_new_tokens):
            yield from found

    def batches(self, records: Sequence[Record], batch_size: int, max_new_tokens: int) -> Generator[Batch]:
        """The same answers, a batch of records at once, each with the position of its first record."""
        for start in range(0, len(records), batch_size):
            ids = self._generate(records[start : start + batch_size], max_new_tokens)
            yield start, list(map(self.chat.text, ids))

    def stream(self, record: Record, max_new_tokens: int = 32) -> Iterator[str]:
        """The answer to a record in pieces, as it is generated; joined, they are what `answers` gives. Once the iterator is closed,
        the model stops.

        Raises:
            InputError: as `answers`.
        """
        tokens = TokenStream()

        def generate() -> None:
            try:
                self._generate([record], max_new_tokens, tokens)
            except Exception as error:  # raised in the thread that reads
                tokens.queue.put(error)
            else:
                tokens.queue.put(None)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from pieces(iter(tokens.next, None), self.chat)
        finally:
            tokens.closed.set()
            thread.join()

    def _generate(self, records: Sequence[Record], max_new_tokens: int, stream: "TokenStream | None" = None) -> list[list[int]]:
        """Token IDs of the greedy answers, which are as long as the longest."""
        prompts = [self.chat.prompt(record.messages) for record in records]
        tokens = TokenRecords.of(
            [Encoded(prompt, [False] * len(prompt), len(prompt)) for prompt in prompts], soft_codes(self.chat.soft_tokens)
        )
        batch = left_padded(tokens, np.arange(len(records)))
        media = [ref for record in records for ref in record.media()]
        items = {modality: [decode(ref) for ref in media if ref.modality == modality] for modality in {ref.modality for ref in media}}
        stop = list(self.chat.stop_ids)
        with self.lock, torch.inference_mode():
            grids = {modality: padded(self.encoder(modality)(decoded)) for modality, decoded in items.items()}
            soft = {modality: places.to(self.device) for modality, places in batch["soft"].items()}
            assembled = AssistantBatch(batch["input_ids"].to(self.device), soft, grids, batch["attention"].to(self.device))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                ids: Any = self.assistant.generate(assembled, max_new_tokens, stop, stop[0], stream)
        found: list[list[int]] = ids.tolist()
        return found


def in_order(batches: Iterable[Batch]) -> Iterator[str]:
    """Answers in the order of their records, from batches in any order."""
    waiting, following = dict[int, list[str]](), 0
    for start, answers in batches:
        waiting[start] = answers
        while following in waiting:
            yield from (ready := waiting.pop(following))
            following += len(ready)


class ClosedError(Exception):
    """Nobody reads the stream any more."""


class TokenStream(BaseStreamer):
    """Tokens on their way from the thread that generates them to the one that reads."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()
        self.closed = threading.Event()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with each token; first with the prompt's IDs, of which there are none: it is embeddings."""
        if self.closed.is_set():
            raise ClosedError
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        """Called by `generate` after the last token."""

    def next(self) -> list[int] | None:
        """The next tokens; None after the last. Raises what generating has raised."""
        found = self.queue.get()
        if isinstance(found, Exception):
            raise found
        return found


def pieces(tokens: Iterator[list[int]], chat: ChatFormat) -> Iterator[str]:
    """The text of tokens, as soon as it is certain: without the beginning of a character, and white space that may be the last."""
    ids, shown = list[int](), ""
    for more in tokens:
        ids += more
        text = chat.text(ids).rstrip(TORN).rstrip()
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    if rest := chat.text(ids)[len(shown) :]:
        yield rest
