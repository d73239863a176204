"""A Hugging Face Hub of one user on the loopback, as much of it as huggingface_hub asks to push and pull."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_loopback"
USER = "someone"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """`repos`: name -> path -> content. `calls`: what was asked for. Half is sent of paths in `breaking`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.visibility: dict[str, str | None] = {}
        self.calls: list[str] = []
        self.breaking: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: bytes | dict[str, Any] = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        path = self.path.partition("?")[0]
        self.server.calls.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT" and (match := re.fullmatch(r"/large/(\w+)", path)):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.server.large[match[1]] = body
            return self.answer(200)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not allowed:
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        patterns = (
            r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|revision)/.*)?",
            r"/([^/]+/[^/]+)/(resolve)/.*",
            r"/([^/]+/[^/]+)\.git/info/(lfs)/objects/batch",
        )
        name, what = next((m[1], m[2]) for p in patterns if (m := re.fullmatch(p, path)))
        if name not in self.server.repos:
            return self.answer(404 if allowed else 401, {"error": "no"}, X_Error_Code="RepoNotFound")
        files = self.server.repos[name]
        if what == "preupload":
            given = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in given
            ]
            return self.answer(200, {"files": modes})
        if what == "lfs":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.server.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if what == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
            url = f"{self.server.url}/{name}/commit/{SHA}"
            return self.answer(200, {"success": True, "commitUrl": url, "commitOid": SHA})
        if what == "resolve":
            return self.file(files, path.split("/", 5)[5])
        siblings = [{"rfilename": file} for file in files]
        return self.answer(200, {"id": name, "modelId": name, "sha": SHA, "siblings": siblings})

    @staticmethod
    def mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".mp4", ".png")) else "regular"

    def create(self, given: dict[str, Any]) -> None:
        name = f"{given['organization']}/{given['name']}"
        if given["organization"] != USER:
            return self.answer(403, {"error": "You don't have the rights to create a model there"})
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created it", "url": f"{self.server.url}/{name}"})
        self.server.repos[name] = {}
        self.server.visibility[name] = given.get("visibility")
        return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")
        content = files[path]
        if self.command == "GET" and path in self.server.breaking:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(200, content, ETag=etag, X_Repo_Commit=SHA)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
