"""A proxy in front of a real `mlflow server`: it does to requests what networks, load balancers and overloaded servers do."""

import http.client
import http.server
import threading
from dataclasses import dataclass

# What MLflow 3.17 answers with --app-name=basic-auth, what its own errors look like, and what load balancers answer.
ANSWERS = {
    401: b"You are not authenticated.",
    403: b"Permission denied",
    413: b"<html>413 Request Entity Too Large</html>",
    429: b'{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "too many requests"}',
    502: b"<html>502 Bad Gateway</html>",
    503: b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "try again"}',
    507: b'{"error_code": "RESOURCE_EXHAUSTED", "message": "the quota of this workspace is used up"}',
}


@dataclass
class Fault:
    """What happens to requests that write. Of `hangs`, `late` and `loses` the client sees no answer.

    Args:
        kind: an HTTP status that is answered instead of the server's, or: `hangs` (the server never gets it), `late` (it gets it once
            the client has given up), `loses` (it commits, and the answer is lost), `request twice`, `answer twice`.
        path: the part of the path of requests that it happens to.
        delay: seconds that `hangs` and `late` last.
    """

    kind: str | int
    path: str = ""
    delay: float = 3.0


class Proxy:
    """Passes requests on to a server, unless it has a fault."""

    def __init__(self, port: int) -> None:
        self.server_port, self.fault, self.met = port, None, 0  # type: int, Fault | None, int
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                proxy.handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        self.stopped = threading.Event()
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.fault
        if fault is None or request.command == "GET" or fault.path not in request.path:
            return answer(request, *self.forward(request, body))
        self.met += 1
        if isinstance(fault.kind, int):
            return answer(request, fault.kind, ANSWERS[fault.kind])
        if fault.kind in ("hangs", "late"):
            self.stopped.wait(fault.delay)
        if fault.kind in ("late", "loses"):
            self.forward(request, body)
        if fault.kind in ("hangs", "late", "loses"):
            request.close_connection = True
            return None
        if fault.kind == "request twice":
            self.forward(request, body)
        answered = self.forward(request, body)
        answer(request, *answered)
        if fault.kind == "answer twice":
            answer(request, *answered)
        return None

    def forward(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=60)
        try:
            headers = {key: value for key, value in request.headers.items() if key not in ("Host", "Connection", "Accept-Encoding")}
            connection.request(request.command, request.path, body, headers | {"Content-Length": str(len(body))})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def answer(request: http.server.BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    try:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
    except OSError:  # the client has given up
        request.close_connection = True
