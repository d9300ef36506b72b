"""What waits for the model is answered in batches, the oldest first; nothing is computed for a client that went away."""

import asyncio
import threading
from pathlib import Path

import pytest

from raytrain2p.data.records import USER, Message, Record
from raytrain2p.inference.predictor import Predictor
from raytrain2p.serving.limits import RefusedError
from raytrain2p.serving.model import Answer, LoadedModel, Question


def question(text: str, max_tokens: int = 3) -> Question:
    return Question(Record("here", (Message(USER, (text,)),)), max_tokens)


@pytest.fixture
def model(tiny_model: Path) -> LoadedModel:
    return LoadedModel(tiny_model, "cpu", batch_size=4)


async def asked_while_busy(model: LoadedModel, questions: list[Question], gone: int | None = None) -> list[Answer | BaseException]:
    """The results of questions that came in this order while the model wrote another answer. `gone`: the client that went away."""
    await model.ready()
    busy = threading.Event()
    model.writer.submit(busy.wait)
    tasks = []
    for number, one in enumerate(questions):
        tasks.append(asyncio.create_task(model.answer(one)))
        while model.writing is None or len(model.waiting) != number:  # the first one is in the writer's queue
            await asyncio.sleep(0.01)
    if gone is not None:
        tasks[gone].cancel()
        await asyncio.sleep(0)
    busy.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_those_of_one_kind_that_wait_are_written_together_and_answered_as_alone(model: LoadedModel) -> None:
    texts = ["first", "one", "two", "fourth", "six", "ten", "other", "who", "why"]  # bytes are tokens: kinds by length
    found = asyncio.run(asked_while_busy(model, [question(text) for text in texts]))
    assert [answer.batch for answer in found if isinstance(answer, Answer)] == [1, 4, 4, 1, 4, 4, 1, 2, 2]
    predictor: Predictor = model.loading.result()
    alone = [next(iter(predictor.answers([question(text).record], 1, 3))) for text in texts]
    assert [answer.text for answer in found if isinstance(answer, Answer)] == alone
    assert (model.waiting, model.writing) == ([], None)


def test_other_lengths_of_answers_are_another_batch(model: LoadedModel) -> None:
    found = asyncio.run(asked_while_busy(model, [question("first"), question("one", 2), question("two", 3), question("six", 2)]))
    assert [answer.batch for answer in found if isinstance(answer, Answer)] == [1, 2, 1, 2]


def test_nothing_is_written_for_a_client_that_went_away(model: LoadedModel) -> None:
    found = asyncio.run(asked_while_busy(model, [question("first"), question("one"), question("two"), question("six")], gone=2))
    assert isinstance(found[2], asyncio.CancelledError)
    assert [answer.batch for answer in found if isinstance(answer, Answer)] == [1, 2, 2]
    found = asyncio.run(asked_while_busy(model, [question("first"), question("one")], gone=1))
    assert [answer.batch for answer in found if isinstance(answer, Answer)] == [1]
    assert (model.waiting, model.writing) == ([], None)


def test_one_that_fails_does_not_fail_the_others(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Predictor.answers

    def failing(self: Predictor, records: list[Record], *arguments: int, **options: int) -> object:
        if any("bad" in str(record.messages) for record in records):
            raise RuntimeError("a bug")
        return answers(self, records, *arguments, **options)

    monkeypatch.setattr(Predictor, "answers", failing)
    found = asyncio.run(asked_while_busy(model, [question("first"), question("one"), question("bad"), question("six")]))
    assert isinstance(found[2], RefusedError)
    assert found[2].status == 500
    assert [answer.batch for answer in found if isinstance(answer, Answer)] == [1, 1, 1]
    assert (model.waiting, model.writing) == ([], None)
