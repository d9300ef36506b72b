"""A node or the network between nodes fails while a job trains on them: one run, every step once, the weights of an undisturbed run."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.conftest import Judged
from tests.chaos.killing import Stopwatch, keep_up, verdict
from tests.cluster.local_nodes import Job, LocalNodes, job_in

pytestmark = pytest.mark.timeout(600)
CUT_SECONDS = 60


def disturbed(job: Job, disturb: Callable[[Stopwatch], None]) -> list[float]:
    """Train, and after some steps disturb the nodes. Returns the seconds to the next step."""
    job.start()
    job.wait_for_steps(60)
    stopwatch = Stopwatch(job)
    disturb(stopwatch)
    keep_up(job, stopwatch, lambda: False)
    return stopwatch.measured


def test_a_node_is_lost_and_started_again(nodes: LocalNodes, undisturbed: Job, tiny_config: Path, tmp_path: Path, judged: Judged) -> None:
    def disturb(stopwatch: Stopwatch) -> None:
        nodes.check("kill", "2")
        stopwatch.start(time.time())
        nodes.check("start", "2")

    job = job_in(tmp_path / "lost", tiny_config, nodes)
    waits = disturbed(job, disturb)
    assert job.starts == 1, job.log
    judged(verdict("a node lost, and started again", job, undisturbed, 1, waits))


def test_the_network_is_cut_for_a_minute(nodes: LocalNodes, undisturbed: Job, tiny_config: Path, tmp_path: Path, judged: Judged) -> None:
    """Ray gives a silent node up after 50 to 65 seconds. If it has, the node ends itself when it hears of it, and is started again."""

    def disturb(stopwatch: Stopwatch) -> None:
        nodes.check("cut", "2")
        stopwatch.start(time.time())
        time.sleep(CUT_SECONDS)
        nodes.check("join", "2")
        if keep_up(job, stopwatch, lambda: nodes.run("exec", "2", "true").returncode != 0):
            nodes.check("start", "2")

    job = job_in(tmp_path / "cut", tiny_config, nodes)
    waits = disturbed(job, disturb)
    judged(verdict("a node's network cut for 60 s", job, undisturbed, 1, waits))


def test_the_head_is_lost_and_the_job_submitted_again(
    nodes: LocalNodes, undisturbed: Job, tiny_config: Path, tmp_path: Path, judged: Judged
) -> None:
    """With its launch ID. The head's state is gone with it, so the other node joins the new one."""

    def disturb(stopwatch: Stopwatch) -> None:
        nodes.check("kill", "1")
        stopwatch.start(time.time())
        nodes.check("kill", "2")
        nodes.check("start", "1")
        nodes.check("start", "2")
        if job.running() and job.process:
            job.process.kill()  # it may never hear of it

    job = job_in(tmp_path / "head", tiny_config, nodes)
    waits = disturbed(job, disturb)
    assert job.starts == 2, job.log
    judged(verdict("the head lost, and the job submitted again", job, undisturbed, 1, waits))
