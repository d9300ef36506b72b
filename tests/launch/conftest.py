"""An MLflow server for the launches of a test module."""

from collections.abc import Iterator

import pytest

from tests.chaos.mlflow_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()
