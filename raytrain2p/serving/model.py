"""The model of a server: a predictor with one thread that writes the answers, and others that look at what is asked."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from raytrain2p.config import InputError
from raytrain2p.data.records import USER, Message, Record
from raytrain2p.inference.predictor import Predictor
from raytrain2p.serving.limits import RefusedError

CHECKERS = 2  # threads that decode media and count tokens
SECONDS_TO_GATHER = 0.01  # for questions that are sent at once, while the model is idle; while it is busy, a batch gathers by itself
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


@dataclass(frozen=True, eq=False)
class Waiting:
    """A checked question whose answer is not written yet. Those of one kind fill no other's forward pass with padding.

    Args:
        kind: the most tokens of the answer, and the tokens of the prompt.
    """

    question: Question
    kind: tuple[int, int]
    answer: asyncio.Future[Answer | RefusedError]


class LoadedModel:
    """A model in this process. Loading begins at once, in the thread that will write the answers.

    Args:
        path: of a model.pt.
        device: where it computes.
        batch_size: the most answers that are written together.
    """

    def __init__(self, path: Path, device: str | None = None, batch_size: int = 1) -> None:
        self.batch_size, self.waiting = batch_size, list[Waiting]()
        self.writing: asyncio.Task[None] | None = None  # while questions wait
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

    async def answer(self, question: Question) -> Answer:
        """An answer, written together with those to questions of the same kind that wait.

        Not `serve.batch`: it closes a batch when its time is over, even while the model is busy, and they stay small (1.9 of 16).

        Raises:
            RefusedError: as `check`.
        """
        tokens = await self.check(question)
        one = Waiting(question, (question.max_tokens, tokens), asyncio.get_running_loop().create_future())
        self.waiting.append(one)
        if self.writing is None:
            self.writing = asyncio.create_task(self._write())
        answer = await one.answer
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    async def _write(self) -> None:
        """Answer all that wait."""
        try:
            predictor = await self._loaded()
            await asyncio.sleep(SECONDS_TO_GATHER)
            while batch := self._next_batch():
                answers = await self._run(self.writer, partial(_answers, predictor, [one.question for one in batch]))
                for one, answer in zip(batch, answers, strict=True):
                    if not one.answer.done():
                        one.answer.set_result(answer)
        finally:
            self.writing = None

    def _next_batch(self) -> list[Waiting]:
        """Take the oldest question and others of its kind. Those whose clients went away are dropped."""
        waiting = [one for one in self.waiting if not one.answer.done()]
        batch = [one for one in waiting if one.kind == waiting[0].kind][: self.batch_size]
        self.waiting = [one for one in waiting if one not in batch]
        return batch

    async def check(self, question: Question) -> int:
        """Look at a question before it waits for its turn. Returns the tokens of its prompt.

        Raises:
            RefusedError: media do not decode or are of a kind that the model has not learnt, or it is too long.
        """
        predictor = await self._loaded()
        return await self._run(self.checkers, partial(_check, predictor, question))

    async def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        """As in Model. To close it stops the writer."""
        await self.check(question)
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


def _check(predictor: Predictor, question: Question) -> int:
    try:
        predictor.check([question.record], question.max_tokens)
    except InputError as error:
        what = error.problems[0].what.replace(f"{question.record.where} ", "")
        code = "context_length_exceeded" if "context" in what else "invalid_media" if "decode" in what else "invalid_messages"
        raise RefusedError(400, code, what, "messages") from None
    return _prompt_tokens(predictor, question)


def _answers(predictor: Predictor, questions: Sequence[Question]) -> list[Answer | RefusedError]:
    """Of questions of one kind."""
    count, most = len(questions), questions[0].max_tokens
    try:
        texts = list(predictor.answers([question.record for question in questions], batch_size=count, max_new_tokens=most))
        return [_answer(predictor, question, text, count) for question, text in zip(questions, texts, strict=True)]
    except Exception as error:
        if count == 1:
            return [_internal(error)]
    return [_answers(predictor, [question])[0] for question in questions]  # one that fails is not to fail the others


def _answer(predictor: Predictor, question: Question, text: str, batch: int) -> Answer:
    tokens = min(len(predictor.chat.tokenizer(text, add_special_tokens=False)["input_ids"]), question.max_tokens)
    return Answer(text, _prompt_tokens(predictor, question), tokens, tokens >= question.max_tokens, batch)


def _prompt_tokens(predictor: Predictor, question: Question) -> int:
    return len(predictor.chat.prompt(question.record.messages))


def _internal(error: BaseException) -> RefusedError:
    """What the client reads of a bug; the rest is in the log."""
    log.error("no answer", exc_info=error)
    return RefusedError(500, "internal_error", "the model failed on this request")
