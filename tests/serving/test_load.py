"""Many clients at once, malformed requests among them: each gets its answer. In short and without Ray; more is in tests/use."""

import asyncio
from pathlib import Path

from benchmarks.serve_load import MALFORMED, Load, question
from raytrain2p.serving.limits import Limits
from raytrain2p.serving.model import LoadedModel
from tests.serving.serving import ModelHere, png, served
from tests.waiting import until


def test_no_request_is_lost_and_none_that_is_malformed_gets_another_answer(tiny_model: Path) -> None:
    model = ModelHere(LoadedModel(tiny_model))
    bodies = [(number, question(f"Question {number}", png(), stream=number % 4 == 0)) for number in range(40)]
    with served(model, Limits(max_queue=5)) as (server, api):
        load = Load(server.port, bodies)
        asyncio.run(load.run(clients=20, malformed=2 * len(MALFORMED)))
        assert len(load.done) == 40 + 2 * len(MALFORMED)
        good = [one for one in load.done.values() if one.kind == "good"]
        assert [one.status for one in good] == [200] * 40
        assert all(one.text for one in good)
        wrong = [one for one in load.done.values() if one.kind != "good" and one.status != MALFORMED[one.kind][2]]
        assert wrong == []
        assert sum(one.refusals for one in load.done.values()) > 0, "the queue was full at times"
        assert server.ask("Still there?", max_tokens=1).status == 200
        until(lambda: api.busy == 0)  # the last byte is read before the server's coroutine ends
