"""What the actors of the channels hold, without Ray."""

import asyncio

from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.worker.channel import RunActor, Stage, TrialReport


def test_the_latest_update_stays_and_each_line_is_given_once() -> None:
    async def scenario() -> None:
        actor = RunActor()
        assert await actor.next(0.01) == (None, [])
        await actor.put(Stage("one"))
        await actor.put(Stage("two"))
        await actor.say("a line")
        assert await actor.next(60) == (Stage("two"), ["a line"])
        assert await actor.next(0.01) == (Stage("two"), [])

    asyncio.run(scenario())


def test_a_report_waits_until_it_is_accepted_and_brings_the_refusal() -> None:
    async def scenario() -> None:
        actor = RunActor()
        for refusal in ("", "a full disk"):
            report = TrialReport(step=1, epoch=0, last=False, directory="", metrics={})
            waiting = asyncio.create_task(actor.report(report))
            assert await actor.next_report() == report
            await asyncio.sleep(0.01)
            assert not waiting.done()
            await actor.accept_report(refusal)
            assert await waiting == refusal

    asyncio.run(scenario())


def test_a_request_to_start_again_reaches_the_group_that_trains_and_no_later_one() -> None:
    async def scenario() -> None:
        actor = RunActor()
        assert not await actor.request_regroup(), "it does not train yet"
        waiting = asyncio.create_task(actor.next_request())
        await asyncio.sleep(0)
        assert await actor.request_regroup()
        assert not await waiting
        again = asyncio.create_task(actor.next_request())
        await asyncio.sleep(0)
        assert not again.done()
        await actor.request_stop()
        assert await again
        assert await actor.next_request(), "a stop is for every group"

    asyncio.run(scenario())


def test_a_request_to_stop_finds_workers_only_while_they_train() -> None:
    async def scenario() -> None:
        actor = RunActor()
        assert not await actor.request_stop()
        assert await actor.next_request()
        assert await actor.request_stop()
        await actor.end_of_training()
        assert not await actor.request_stop()

    asyncio.run(scenario())


def test_metric_points_are_taken_once() -> None:
    async def scenario() -> None:
        actor, points = RunActor(), [MetricPoint("x", 1.0, 2, 3.0)]
        await actor.put_points(points)
        assert await actor.take_points() == points
        assert await actor.take_points() == []

    asyncio.run(scenario())
