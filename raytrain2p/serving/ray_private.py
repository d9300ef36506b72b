"""The one change to a private module of Ray Serve; tests/serving/test_run.py looks at the sockets. Version: launch/ray_private.py."""

from typing import Any

from ray._common.tls_utils import add_port_to_grpc_server
from ray.serve._private import replica

ALL_INTERFACES, LOOPBACK = "[::]:", "127.0.0.1:"


def listen_on_loopback() -> None:
    """Called in a process of a deployment while it starts: it would take calls of other deployments on all interfaces, though with
    Ray's token. No public option names the address.
    """

    def add_port(server: Any, address: str) -> Any:
        return add_port_to_grpc_server(server, address.replace(ALL_INTERFACES, LOOPBACK))

    replica.add_port_to_grpc_server = add_port
