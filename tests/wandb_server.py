"""A W&B server of the tests' own on this machine's loopback, which the real wandb-core talks to.

It keeps what arrives: runs by their id, with the rows of their history at the lines that they were sent to,
files, artifacts and workspaces. It answers as little as W&B needs.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "foveal", "entity": {"id": "e", "name": "me"}, "internalId": "p"}


class Server:
    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, dict[str, Any]] = {}
        """By id: "history" (line -> row), "overwritten" (rows), "summary", "config", "exit", and what
        UpsertBucket says."""
        self.files: dict[str, bytes] = {}
        """What was uploaded, by path."""
        self.artifacts: list[dict[str, Any]] = []
        self.projects = {"foveal"}
        self.views: dict[str, dict[str, Any]] = {}
        """Workspaces ("type" is project-view) and reports (runs) by their id, as upsertView gave them."""
        self.asked: list[str] = []
        """The names of all queries."""
        self.away = threading.Event()
        """While it is set, the server takes connections and answers nothing."""

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": 40 * "a"}

    def rows(self, run: str) -> list[dict[str, Any]]:
        """A run's rows without W&B's own keys, media aside."""
        history = self.runs[run]["history"]
        assert list(history) == list(range(len(history)))
        rows = [{k: v for k, v in history[line].items() if k[0] != "_"} for line in sorted(history)]
        return [row for row in rows if not any(isinstance(value, dict) for value in row.values())]

    def answer(self, query: str, given: dict[str, Any]) -> Any:
        name = re.findall(r"(?:query|mutation)\s+(\w+)", query)[0]
        self.asked.append(name)
        run = self.runs.get(given.get("name") or "", {})
        lines = {"historyLineCount": len(run.get("history", ())), "eventsLineCount": 0, "logLineCount": 0}
        bucket = {"id": "b", "name": given.get("name"), "displayName": run.get("displayName"), **lines}
        match name:
            case "RunResumeStatus":
                tail = [json.dumps(row) for row in list(run.get("history", {}).values())[-1:]]
                bucket |= {"historyTail": json.dumps(tail), "eventsTail": "[]", "tags": run.get("tags", [])}
                bucket |= {"summaryMetrics": json.dumps(run.get("summary", {}))}
                bucket |= {"config": json.dumps(run.get("config", {})), "wandbConfig": '{"t": 1}'}
                return {"model": {**PROJECT, "bucket": bucket if run else None}}
            case "UpsertBucket":
                new: dict[str, Any] = {
                    "history": {},
                    "overwritten": [],
                    "summary": {},
                    "config": {},
                    "exit": None,
                }
                run = self.runs.setdefault(given["name"], new)
                run |= {key: value for key, value in given.items() if value is not None and key != "config"}
                run["config"] |= json.loads(given.get("config") or "{}")
                return {"upsertBucket": {"bucket": {**bucket, "project": PROJECT}, "inserted": True}}
            case "CreateRunFiles":
                files = [
                    {"name": f, "uploadUrl": f"{self.url}/up/{given['run']}/{f}"} for f in given["files"]
                ]
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
            case "Viewer" | "GetDefaultEntity":
                return {
                    "viewer": {
                        "id": "u",
                        "entity": "me",
                        "username": "me",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                self.artifacts.append(given)
                artifact = {"id": f"a{len(self.artifacts)}", "state": "PENDING", "artifactSequence": None}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactFiles":
                files = given["input"]["artifactFiles"]
                edges = []
                for file in files:
                    url = f"{self.url}/up/{file['artifactID']}/{file['name']}"
                    node = {"id": "f", "name": file["name"], "displayName": file["name"], "storagePath": "x"}
                    node |= {"artifact": {"id": file["artifactID"]}, "uploadUrl": url, "uploadHeaders": []}
                    edges.append({"node": node})
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CreateArtifactManifest":
                file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": f"{self.url}/up/manifest"}
                manifest = {"id": "m", "file": {**file, "uploadHeaders": []}}
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d"}}}
            case "GetProjects":
                page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
                about = {"__typename": "Project", "id": "p", "entityName": given["entity"], "user": None}
                about |= {"createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False}
                edges = [{"node": {**about, "name": name}} for name in sorted(self.projects)]
                return {"models": {"pageInfo": page, "edges": edges}}
            case "CreateProject":
                self.projects.add(given["input"]["name"])
                return {"result": None}
            case "ProjectInternalId":
                known = given["projectName"] in self.projects
                return {"project": {"id": "p", "internalId": "7"} if known else None}
            case "View" | "ProjectViews":  # workspaces, reports
                wanted = {
                    "type": given.get("viewType", "runs"),
                    "projectName": given.get("project", given.get("name")),
                }
                if given.get("viewName"):
                    wanted["name"] = given["viewName"]
                views = [
                    {**view, "user": None} for view in self.views.values() if wanted.items() <= view.items()
                ]
                page = {"endCursor": None, "hasNextPage": False}
                edges = [{"node": view, "cursor": view["id"]} for view in views]
                return {"project": {"allViews": {"edges": edges, "pageInfo": page}}}
            case "UpsertView2" | "upsertView":
                assert given["projectName"] in self.projects
                view_id = given.get("id") or f"view{len(self.views) + 1}"
                inserted = view_id not in self.views
                now = {"createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z"}
                self.views[view_id] = view = {**given, "id": view_id, **now}
                project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
                return {"upsertView": {"view": {**view, "project": project}, "inserted": inserted}}
        return {}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, part in body.get("files", {}).items():
            contents = [json.loads(line) for line in part["content"]] if file.startswith("wandb-") else []
            if file == "wandb-summary.json":
                run["summary"] = contents[-1]
            if file == "wandb-history.jsonl":
                for line, row in enumerate(contents, start=part["offset"]):
                    if line in run["history"]:
                        run["overwritten"].append(row)
                    run["history"][line] = row
        if body.get("complete"):
            run["exit"] = body["exitcode"]


@contextmanager
def wandb_server() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if server.away.is_set():
                self.close_connection = True
                return
            content: Any = {}
            if self.command == "PUT":
                server.files[self.path] = body
            elif self.path == "/graphql":
                asked = json.loads(body)
                content = {"data": server.answer(asked["query"], asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = handle_one

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *_: None  # type: ignore[method-assign] # a client that was killed
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
