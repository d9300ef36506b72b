"""The model of a server: a predictor with one thread that writes the answers, and others that look at what is asked."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from raytrain2p.config import InputError
from raytrain2p.data.records import USER, Message, Record
from raytrain2p.inference.predictor import Predictor
from raytrain2p.serving.limits import RefusedError

CHECKERS = 2  # threads that decode media and count tokens
log = logging.getLogger("raytrain2p.serving")
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is asked, with the most tokens of its answer."""

    record: Record
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What is answered.

    Args:
        completion_tokens: of the text.
        is_cut: whether it has as many tokens as were allowed, and might go on.
        batch: how many answers were written together.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    is_cut: bool
    batch: int = 1


class Model(Protocol):
    """What the HTTP side asks of a model, wherever that is. Each method raises RefusedError."""

    async def ready(self) -> None:
        """Return once it answers."""

    async def answer(self, question: Question) -> Answer: ...

    def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        """An empty piece once the question is accepted, pieces of text as they are written, and at last the whole answer."""


class LoadedModel:
    """A model in this process. Loading begins at once, in the thread that will write the answers.

    Args:
        path: of a model.pt.
        device: where it computes.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        self.writer = ThreadPoolExecutor(1, "writer")
        self.checkers = ThreadPoolExecutor(CHECKERS, "checker")
        self.loading = self.writer.submit(self._load, path, device)

    def _load(self, path: Path, device: str | None) -> Predictor:
        """The predictor, after a first answer, with all its encoders."""
        predictor = Predictor(path, device=device)
        for modality in predictor.trained:
            predictor.encoder(modality)
        list(predictor.answers([Record("the first question", (Message(USER, ("Hello",)),))], max_new_tokens=1))
        return predictor

    async def ready(self) -> None:
        """Wait for the first answer.

        Raises:
            InputError: the model cannot be used.
        """
        await asyncio.shield(asyncio.wrap_future(self.loading))

    async def check(self, question: Question) -> None:
        """Look at a question before it waits for its turn.

        Raises:
            RefusedError: media do not decode or are of a kind that the model has not learnt, or it is too long.
        """
        predictor = await self._loaded()
        await self._run(self.checkers, lambda: _check(predictor, question))

    async def answers(self, questions: Sequence[Question]) -> list[Answer | RefusedError]:
        """Answers to checked questions. Those that fill no other's forward pass with padding are written together."""
        predictor = await self._loaded()
        return await self._run(self.writer, lambda: _answers(predictor, questions))

    async def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        """As in Model, of a checked question. To close it stops the writer."""
        predictor, loop = await self._loaded(), asyncio.get_running_loop()
        pieces, unread = asyncio.Queue[str | Answer | BaseException](), threading.Event()

        def write() -> None:
            def put(piece: str | Answer | BaseException) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            try:
                text = ""
                with closing(predictor.stream(question.record, question.max_tokens)) as stream:  # type: ignore[type-var]  # a generator
                    while not unread.is_set() and (piece := next(stream, None)) is not None:
                        text += piece
                        put(piece)
                put(_answer(predictor, question, text, 1))
            except BaseException as error:
                put(error)

        self.writer.submit(write)
        try:
            yield ""
            while True:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise _internal(piece)
                yield piece
                if isinstance(piece, Answer):
                    return
        finally:
            unread.set()

    async def _loaded(self) -> Predictor:
        await self.ready()
        return self.loading.result()

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _check(predictor: Predictor, question: Question) -> None:
    try:
        predictor.check([question.record], question.max_tokens)
    except InputError as error:
        what = error.problems[0].what.replace(f"{question.record.where} ", "")
        code = "context_length_exceeded" if "context" in what else "invalid_media" if "decode" in what else "invalid_messages"
        raise RefusedError(400, code, what, "messages") from None


def _answers(predictor: Predictor, questions: Sequence[Question]) -> list[Answer | RefusedError]:
    groups: dict[tuple[int, int], list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault((question.max_tokens, _prompt_tokens(predictor, question)), []).append(number)
    found: dict[int, Answer | RefusedError] = {}
    for numbers in groups.values():
        try:
            found |= _together(predictor, questions, numbers)
        except Exception as error:
            for number in numbers:  # alone: one that fails is not to fail the others
                try:
                    found |= _together(predictor, questions, [number]) if len(numbers) > 1 else {number: _internal(error)}
                except Exception as its_own:
                    found[number] = _internal(its_own)
    return [found[number] for number in range(len(questions))]


def _together(predictor: Predictor, questions: Sequence[Question], numbers: Sequence[int]) -> dict[int, Answer | RefusedError]:
    records, count = [questions[number].record for number in numbers], len(numbers)
    texts = list(predictor.answers(records, batch_size=count, max_new_tokens=questions[numbers[0]].max_tokens))
    return {number: _answer(predictor, questions[number], text, count) for number, text in zip(numbers, texts, strict=True)}


def _answer(predictor: Predictor, question: Question, text: str, batch: int) -> Answer:
    tokens = min(len(predictor.chat.tokenizer(text, add_special_tokens=False)["input_ids"]), question.max_tokens)
    return Answer(text, _prompt_tokens(predictor, question), tokens, tokens >= question.max_tokens, batch)


def _prompt_tokens(predictor: Predictor, question: Question) -> int:
    return len(predictor.chat.prompt(question.record.messages))


def _internal(error: BaseException) -> RefusedError:
    """What the client reads of a bug; the rest is in the log."""
    log.error("no answer", exc_info=error)
    return RefusedError(500, "internal_error", "the model failed on this request")
