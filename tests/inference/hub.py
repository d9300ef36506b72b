"""A stand-in for a model hub: the few endpoints that uploads and downloads need, over HTTP, with all files kept in memory."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants


class Hub(http.server.ThreadingHTTPServer):
    """Takes what has the token.

    Attributes:
        files: what the repository that is uploaded to holds, by path.
        private: whether it was made private.
        commits: of the repositories that are downloaded from, files by commit.
        branches: the commit of each branch, by `repository@branch`.
        requests: method and path of each.
    """

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.files, self.objects = token, dict[str, bytes](), dict[str, bytes]()
        self.private: bool | None = None
        self.commits, self.branches = dict[str, dict[str, bytes]](), dict[str, str]()
        self.requests = list[str]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repository: str, folder: Path, branch: str = "main") -> str:
        """The files of a folder as a new commit of a branch; returns its hash."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        commit = hashlib.sha1(repr((repository, files)).encode()).hexdigest()
        self.commits[commit], self.branches[f"{repository}@{branch}"] = files, commit
        return commit

    def downloads(self) -> list[str]:
        """The files that were sent, in order, as `repository/resolve/commit/file`."""
        return [request.removeprefix("GET /") for request in self.requests if request.startswith("GET ") and "/resolve/" in request]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def download(self, path: str) -> None:
        """Of a published repository: what a revision is, its files, or one of them."""
        hub, api = self.server, path.startswith("/api/models/")
        parts = path.removeprefix("/api/models" * api).strip("/").split("/", 4)
        repository, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        commit = hub.branches.get(f"{repository}@{revision}", revision)
        if (files := hub.commits.get(commit)) is None:
            return self.answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        if what == "revision":
            return self.answer({"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        digests = {name: hashlib.sha1(held).hexdigest() for name, held in files.items()}
        if what == "tree":
            return self.answer([{"type": "file", "path": name, "size": len(files[name]), "oid": digests[name]} for name in files])
        return self.answer(files[parts[4]], X_Repo_Commit=commit, ETag=f'"{digests[parts[4]]}"')

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
        if any(one.partition("@")[0] in path for one in hub.branches):
            return self.download(path)
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
    thread = threading.Thread(target=hub.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def reached(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes models from the hub, into a cache in `home`; huggingface_hub has read its variables by now."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", hub.token)
