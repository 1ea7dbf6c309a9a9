"""A server that answers what wandb asks of W&B, with as little as it is content with, and keeps what it is sent."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = 40 * "a"


class Server(ThreadingHTTPServer):
    """Listens on this machine from the start on, until `close`.

    Args:
        refuses: whether it knows no key.

    Attributes:
        runs: what was sent of each, by its id: history, summary, whether it has finished.
        files: content of what was uploaded, by name; artifacts by the name of their collection.
    """

    daemon_threads = True

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuses = refuses
        self.runs: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """Variables by which wandb finds it."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def close(self) -> None:
        """Answer nobody any more."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self.content()
        self.reply({})

    def do_POST(self) -> None:
        asked = json.loads(self.content())
        if self.path.endswith("/file_stream"):
            self.stream(self.server.runs[self.path.split("/")[-2]], asked)
            self.reply({})
            return
        if self.server.refuses:
            self.reply({"errors": [{"message": "no such key"}]}, 401)
            return
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
        variables = asked.get("variables") or {}
        self.reply({"data": ANSWERS[name](self.server, variables) if name in ANSWERS else {}})

    def stream(self, run: dict[str, Any], asked: dict[str, Any]) -> None:
        """Lines of a run's files, from an offset on, as W&B keeps them."""
        for name, part in asked.get("files", {}).items():
            lines = run["files"].setdefault(name, [])
            del lines[part["offset"] :]
            lines += part["content"]
        run["has_finished"] = asked.get("complete", False)

    def content(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def reply(self, answer: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


def history(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that W&B would plot, without what wandb adds."""
    rows = [json.loads(line) for line in run["files"].get("wandb-history.jsonl", [])]
    return [{"step": row["_step"]} | {k: v for k, v in row.items() if k[0] != "_"} for row in rows]


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the run in W&B's table of runs."""
    return json.loads(run["files"]["wandb-summary.json"][-1])


def viewer(server: Server, _: dict[str, Any]) -> dict[str, Any]:
    return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}


def resume_status(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["name"] not in server.runs:
        return {"model": None}
    files = server.runs[asked["name"]]["files"]
    lines = files.get("wandb-history.jsonl", [])
    bucket = {
        "id": asked["name"],
        "name": asked["name"],
        "displayName": asked["name"],
        "summaryMetrics": files.get("wandb-summary.json", ["{}"])[-1],
        "logLineCount": len(files.get("output.log", [])),
        "historyLineCount": len(lines),
        "eventsLineCount": len(files.get("wandb-events.jsonl", [])),
        "historyTail": json.dumps(lines[-1:]),
        "eventsTail": "[]",
        "config": "{}",
        "tags": [],
        "notes": "",
        "wandbConfig": json.dumps({"t": 1}),  # it has begun
    }
    return {"model": {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "me"}, "bucket": bucket}}


def upsert_run(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    is_new = asked["name"] not in server.runs
    run = server.runs.setdefault(asked["name"], {"files": {}, "config": {}})
    told = {"project": asked["project"], "title": asked["displayName"], "kind": asked["jobType"]}
    run |= {name: value for name, value in told.items() if value}
    run["config"] |= json.loads(asked["config"] or "{}")
    bucket = {
        "id": asked["name"],
        "name": asked["name"],
        "displayName": asked["displayName"] or "",
        "description": "",
        "config": "{}",
        "sweepName": None,
        "project": {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "me"}},
        "historyLineCount": len(run["files"].get("wandb-history.jsonl", [])),
    }
    return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}


def run_files(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    files = [{"name": name, "uploadUrl": f"{server.url}/upload/{name}"} for name in asked["files"]]
    return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}


def artifact(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    name = asked["input"]["artifactCollectionName"]
    kind, metadata = asked["input"]["artifactTypeName"], json.loads(asked["input"]["metadata"] or "{}")
    server.artifacts[name] = {"kind": kind, "metadata": metadata}
    return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": {"id": name}}}}


def artifact_manifest(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    file = {"id": "f", "uploadUrl": f"{server.url}/upload/manifest.json", "uploadHeaders": []}
    return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}


def artifact_files(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    edges = []
    for file in asked["input"]["artifactFiles"]:
        url = f"{server.url}/upload/{file['artifactID']}/{file['name']}"
        node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
        edges.append({"node": node | {"artifact": {"id": file["artifactID"]}}})
    return {"createArtifactFiles": {"files": {"edges": edges}}}


ANSWERS = {
    "Viewer": viewer,
    "RunResumeStatus": resume_status,
    "UpsertBucket": upsert_run,
    "CreateRunFiles": run_files,
    "ServerFeaturesQuery": lambda server, asked: {"serverInfo": {"features": []}},
    "ArtifactType": lambda server, asked: {"project": {"artifact": None}},
    "CreateArtifact": artifact,
    "CreateArtifactManifest": artifact_manifest,
    "CreateArtifactFiles": artifact_files,
    "CommitArtifact": lambda server, asked: {"commitArtifact": {"artifact": {"id": asked["artifactID"]}}},
}
