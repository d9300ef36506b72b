"""The two deployments of a server: one process that speaks HTTP, and one or more with the model, which answer in batches."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from raytrain2p.config import InputError, Problem
from raytrain2p.serving.chat_api import ChatApi
from raytrain2p.serving.limits import Limits, RefusedError
from raytrain2p.serving.model import Answer, LoadedModel, Question
from raytrain2p.serving.ray_private import listen_on_loopback

# Beyond our own limits, so that these are the ones that a client meets: they have words
ROOM = 1000


class ModelDeployment:
    """The model.

    Args:
        path: of its model.pt.
        batch_size: the most answers that are written together.
        device: where it computes.
    """

    def __init__(self, path: str, batch_size: int, device: str) -> None:
        listen_on_loopback()
        self.model = LoadedModel(Path(path), device, batch_size)

    async def unready(self) -> list[Problem]:
        """Wait until the model is loaded. Returns why it cannot be used, if so."""
        try:
            await self.model.ready()
        except InputError as error:
            return error.problems
        return []

    async def answer(self, question: Question) -> Answer | RefusedError:
        """Errors are returned, not raised: Ray would write their tracebacks."""
        try:
            return await self.model.answer(question)
        except RefusedError as refused:
            return refused

    async def stream(self, question: Question) -> AsyncIterator[str | Answer | RefusedError]:
        try:
            async with aclosing(self.model.stream(question)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    yield piece
        except RefusedError as refused:
            yield refused


class RemoteModel:
    """The model, as the process that speaks HTTP asks it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def ready(self) -> None:
        if await self.unready():
            raise RefusedError(503, "model_not_ready", "the model cannot be loaded")

    async def unready(self) -> list[Problem]:
        async with ray_errors():
            problems: list[Problem] = await self.handle.unready.remote()
        return problems

    async def answer(self, question: Question) -> Answer:
        async with ray_errors():
            answer = await self.handle.answer.remote(question)
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    async def stream(self, question: Question) -> AsyncIterator[str | Answer]:
        pieces = self.handle.options(stream=True).stream.remote(question)
        try:
            async with ray_errors():
                async for piece in pieces:
                    if isinstance(piece, RefusedError):
                        raise piece
                    yield piece
        finally:
            pieces.cancel()


@asynccontextmanager
async def ray_errors() -> AsyncIterator[None]:
    """Within, an error of Ray becomes an answer to the client: a process of the model has died, and another one is started."""
    try:
        yield
    except (RayError, RayServeException):
        raise RefusedError(503, "model_not_ready", "the model does not answer: try again") from None


class HttpDeployment:
    """HTTP; see ChatApi."""

    def __init__(self, model: DeploymentHandle, name: str, limits: Limits, token: str | None) -> None:
        listen_on_loopback()
        self.model = RemoteModel(model)
        self.api = ChatApi(self.model, name, limits, token)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self.api.app

    async def unready(self) -> list[Problem]:
        return await self.model.unready()

    async def drain(self, seconds: float) -> bool:
        return await self.api.drain(seconds)


def application(path: Path, name: str, limits: Limits, token: str | None, replicas: int, batch_size: int, cpus: int, gpus: float) -> Any:
    """What `serve.run` takes.

    Args:
        token: digest of the token that requests must bring, if any.
        cpus: of each process of the model, and its threads.
        gpus: of each.
    """
    model = serve.deployment(
        ModelDeployment,
        num_replicas=replicas,
        max_ongoing_requests=limits.max_queue + ROOM,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_timeout_s=120,
    )
    http = serve.deployment(serve.ingress()(HttpDeployment), max_ongoing_requests=ROOM, ray_actor_options={"num_cpus": 0})
    return http.bind(model.bind(str(path), batch_size, "cuda" if gpus else "cpu"), name, limits, token)
