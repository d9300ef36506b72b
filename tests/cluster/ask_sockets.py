"""`python -m tests.cluster.ask_sockets ADDRESS`, on a node: prints what each socket that listens there answers without a token, as JSON."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil

from tests.launch.sockets import Listener, answers, listeners


def ask(one: Listener) -> tuple[str, list[str]]:
    """The title of the process, and what its socket answers."""
    return one.process, sorted(answers(one.port, sys.argv[1]))


if __name__ == "__main__":
    found = {one for process in psutil.process_iter() for one in listeners(process.pid) if not one.on_loopback}
    with ThreadPoolExecutor(8) as pool:
        print(json.dumps(list(pool.map(ask, found))))
