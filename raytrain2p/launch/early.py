"""A Ray of the launch's own starts while the driver still reads its inputs, and so do the processes of its workers: both take seconds,
nearly all of it imports.
"""

import atexit
import os
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

import ray

from raytrain2p.config import InputError
from raytrain2p.config.cli import BAD_INPUT, INTERRUPTED
from raytrain2p.config.console import STDERR
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.cluster import existing_address, start_ray
from raytrain2p.launch.ray_private import SETUP_HOOK, NodeManagerServiceStub, PrestartWorkersRequest, init_grpc_channel

WORKER_ENVIRONMENT = {"env_vars": {SETUP_HOOK: "raytrain2p.launch.early.load"}}
SECONDS_KEPT = 600  # without a task: features may be computed first
SECONDS_TO_ANSWER = 10.0


class EarlyStart:
    """Within, `begin` starts Ray in a thread; `started` is then its result. Ray is stopped at the end, if nothing else has done so.

    The thread stays until then: the kernel ends Ray's processes with the thread, or the process, that has started them.

    Args:
        is_command: this process ends with the launch. Refused or interrupted, it waits neither for a Ray that starts nor for one to stop.
    """

    def __init__(self, verbose: bool, is_command: bool) -> None:
        self.verbose, self.is_command, self.over = verbose, is_command, threading.Event()
        self.started: Future[bool] | None = None

    def __enter__(self) -> "EarlyStart":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.started is None:
            return
        stopped = isinstance(error, InputError | KeyboardInterrupt)
        if self.is_command and stopped and (not self.started.done() or ray.is_initialized()):
            os.dup2(self.stderr, STDERR)  # it may be muted
            atexit.register(end_process, getattr(error, "exit_code", BAD_INPUT if isinstance(error, InputError) else INTERRUPTED))
            return
        if self.started.exception() is None:
            ray.shutdown()
        self.over.set()
        os.close(self.stderr)

    def begin(self, launch: LaunchSettings) -> None:
        """Begin to start Ray, and a process for each worker; unless there is a Ray already.

        Args:
            launch: resolved.
        """
        if self.started is None and not ray.is_initialized() and existing_address() is None:
            self.started, self.stderr = Future(), os.dup(STDERR)
            threading.Thread(target=self._start, args=(self.started, launch), name="ray", daemon=True).start()

    def _start(self, started: Future[bool], launch: LaunchSettings) -> None:
        try:
            starts = start_ray(launch, self.verbose)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(starts)
        if starts_early(launch):
            with suppress(Exception):  # without them the workers start later
                prestart_workers(launch.max_workers)
        self.over.wait()


def end_process(code: int) -> None:
    """Called first of what Python calls at its end; the others would wait for Ray."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def starts_early(launch: LaunchSettings) -> bool:
    """Whether processes of workers do. Ray sets the GPUs of a process when it becomes a worker, which is too late if what it has loaded
    has counted them.
    """
    return launch.use_gpu is False


def prestart_workers(count: int) -> None:
    """Let Ray start processes for workers on this node, which load what trains."""
    (node,) = ray.nodes()
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    request = PrestartWorkersRequest(job_id=job, num_workers=count, keep_alive_duration_secs=SECONDS_KEPT)
    request.runtime_env_info.serialized_runtime_env = ray.runtime_env.RuntimeEnv(**WORKER_ENVIRONMENT).serialize()
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=SECONDS_TO_ANSWER)


def load() -> None:
    """Ray calls it in a new process of a worker. What cannot be loaded is reported by the worker."""
    with suppress(Exception):
        import raytrain2p.phases.alignment.module
        import raytrain2p.phases.instruction.evaluate
        import raytrain2p.phases.instruction.module
        import raytrain2p.worker.train_loop  # noqa: F401
