"""A stand-in for a model hub: the few endpoints that an upload needs, over HTTP, with what it was sent kept in memory."""

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Hub(http.server.ThreadingHTTPServer):
    """Takes what has the token.

    Attributes:
        files: what the repository holds, by path.
        private: whether it was made private.
    """

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.files, self.objects = token, dict[str, bytes](), dict[str, bytes]()
        self.private: bool | None = None
        self.requests = list[str]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self) -> None:
        hub, path, content = self.server, self.path.partition("?")[0], self.body()
        hub.requests.append(f"{self.command} {path}")
        if self.command == "PUT":
            hub.objects[path.rpartition("/")[2]] = content
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            fields = json.loads(content)
            hub.private = fields.get("visibility") == "private"
            name = f"{fields.get('organization') or 'someone'}/{fields['name']}"
            return self.answer({"url": f"{hub.address}/{name}", "name": name})
        if path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            kinds = [{"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"} for one in files]
            return self.answer({"files": [kind | {"shouldIgnore": False, "oid": None} for kind in kinds]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            upload = {one["oid"]: {"upload": {"href": f"{hub.address}/upload/{one['oid']}"}} for one in objects}
            return self.answer({"transfer": "basic", "objects": [one | {"actions": upload[one["oid"]]} for one in objects]})
        if path.endswith("/commit/main"):
            for line in content.splitlines():
                kind, value = (row := json.loads(line))["key"], row["value"]
                if kind == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
                elif kind == "deletedFile":
                    del hub.files[value["path"]]
            return self.answer({"commitUrl": f"{hub.address}/someone/model/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
        if path.endswith("/tree/main"):
            return self.answer([{"type": "file", "path": name, "size": len(held), "oid": "0" * 40} for name, held in hub.files.items()])
        return self.answer({})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@contextmanager
def running(token: str) -> Iterator[Hub]:
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
