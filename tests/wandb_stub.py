"""Serve the part of W&B's protocol that the real client needs, on the loopback interface, and store all it sends."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import wandb
from wandb.sdk.lib import wbauth

KEY = "1" * 40
ENTITY = "someone"
VIEWER = {
    "viewer": {
        "id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "admin": False,
        "teams": {"edges": []},
    }
}  # fmt: skip
#: Operations that always get the same answer.
FIXED: dict[str, dict[str, Any]] = {
    "Viewer": VIEWER,
    "GetDefaultEntity": VIEWER,
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": None}},
    "MarkRunFilesUploaded": {"markRunFilesUploaded": {"success": True}},
    "FetchArtifactDigestAlgorithm": {"project": {"artifactType": None}},
    "XXHashDigestsEnabled": {"entity": {"xxhashDigestsEnabled": False}},
    "GetProjects": {"models": {"edges": [], "pageInfo": {"endCursor": "", "hasNextPage": False}}},
    "CreateProject": {"result": None},
}


@dataclass
class StoredRun:
    """The data that the client sent about one run.

    Attributes:
        fields: from the last upsert that had them: displayName, groupName, jobType, tags, notes, project.
        config: the configuration, without W&B's {"value": ...} around each value.
        files: file name, such as `wandb-history.jsonl` -> line number -> line of a streamed file.
        exit_code: None until the run ended.
        used: names of the artifacts that the run used.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[int, str]] = field(default_factory=dict)
    exit_code: int | None = None
    used: list[str] = field(default_factory=list)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a streamed file, in order."""
        return [json.loads(line) for _, line in sorted(self.files.get(name, {}).items())]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the logged rows."""
        return self.lines("wandb-history.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        """Return the last summary."""
        rows = self.lines("wandb-summary.json")
        return rows[-1] if rows else {}


@dataclass
class StoredArtifact:
    """An artifact: its manifest, and the names of its uploaded files."""

    name: str
    kind: str
    digest: str
    metadata: dict[str, Any]
    state: str = "PENDING"
    uploaded: list[str] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)


class WandbStub:
    """The state of the server. `address` is its base URL.

    `refusing` is the HTTP status that the server gives to all data from now on: 401 as after a key was revoked, 500 as
    after a fault, or 200 to accept the data.
    """

    def __init__(self) -> None:
        self.address = ""
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[StoredArtifact] = []
        self.unknown: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.refusing = 200
        self.lock = threading.RLock()

    def run(self, run_id: str) -> StoredRun:
        """Return the run with an id, and create it if it is new."""
        return self.runs.setdefault(run_id, StoredRun())

    def artifact(self, name: str) -> StoredArtifact:
        """Return the last artifact with a name."""
        return next(a for a in reversed(self.artifacts) if a.name == name)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data that answer a GraphQL operation."""
        found = re.search(r"\b(query|mutation)\s+(\w+)", query)
        name = found.group(2) if found else "anonymous"
        if name in FIXED:
            return FIXED[name]
        handler = getattr(self, f"on_{name}", None)
        if handler is None:
            self.unknown.append(f"{name} {query[:2000]} {variables}")
            return {}
        data: dict[str, Any] = handler(variables)
        return data

    def _bucket(self, run_id: str, project: str) -> dict[str, Any]:
        run = self.run(run_id)
        owner = {"id": "1", "name": ENTITY}
        return {
            "id": f"id-{run_id}",
            "name": run_id,
            "displayName": run.fields.get("displayName") or run_id,
            "description": "",
            "sweepName": None,
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "summaryMetrics": json.dumps(run.summary),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": "[]",
            "tags": run.fields.get("tags") or [],
            "notes": run.fields.get("notes") or "",
            # Without this field, the client thinks that the run never began.
            "wandbConfig": json.dumps({"t": 1} if "_wandb" in run.config else {}),
            "project": {"id": "p1", "name": project, "entity": owner},
            "logLineCount": len(run.files.get("output.log", {})),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.files.get("wandb-events.jsonl", {})),
        }

    def on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        model = {"id": "p1", "name": variables["project"], "entity": {"id": "1", "name": ENTITY}}
        return {
            "model": {**model, "bucket": self._bucket(run_id, variables["project"]) if run_id in self.runs else None}
        }

    def on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables.get("name") or str(variables.get("id", "")).removeprefix("id-")
        inserted = run_id not in self.runs
        run = self.run(run_id)
        run.fields.update({key: value for key, value in variables.items() if value is not None})
        if variables.get("config"):
            run.config.update({key: value.get("value") for key, value in json.loads(variables["config"]).items()})
        return {"upsertBucket": {"bucket": self._bucket(run_id, run.fields.get("project", "")), "inserted": inserted}}

    def on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.address}/put/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": files}}

    def on_ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = [a for a in self.artifacts if a.name == variables["name"].split(":")[0]]
        artifact = {"artifactType": {"name": known[-1].kind}} if known else None
        return {"project": {"artifact": artifact}}

    def on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        sent = variables["input"]
        name = sent["artifactCollectionName"]
        # If the name and the content are the same, the artifact is the same version, whichever run sent it.
        number = next((n for n, a in enumerate(self.artifacts) if (a.name, a.digest) == (name, sent["digest"])), None)
        if number is None:
            number = len(self.artifacts)
            metadata = json.loads(sent.get("metadata") or "{}")
            self.artifacts.append(StoredArtifact(name, sent["artifactTypeName"], sent["digest"], metadata))
        artifact = self.artifacts[number]
        sequence = {"id": f"s-{name}", "latestArtifact": None}
        return {
            "createArtifact": {"artifact": {"id": str(number), "state": artifact.state, "artifactSequence": sequence}}
        }

    def on_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        number = variables["artifactID"]
        place = {"id": "f", "uploadUrl": f"{self.address}/manifest/{number}/manifest.json", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"m-{number}", "file": place}}}

    def on_UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        number = variables["artifactManifestID"].removeprefix("m-")
        place = {"id": "f", "uploadUrl": f"{self.address}/manifest/{number}/manifest.json", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": f"m-{number}", "file": place}}}

    def on_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in variables["input"]["artifactFiles"]:
            number, name = file["artifactID"], file["name"]
            self.artifacts[int(number)].uploaded.append(name)
            node = {"storagePath": name, "uploadUrl": f"{self.address}/file/{number}/{name}", "uploadHeaders": []}
            nodes.append({"node": {**node, "uploadMultipartUrls": None, "artifact": {"id": number}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def on_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(variables["artifactID"])]
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact.digest}}}

    def on_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        sent = variables["input"]
        self.run(sent["runName"]).used.append(self.artifacts[int(sent["artifactID"])].name)
        return {"useArtifact": {"artifact": {"id": sent["artifactID"], "digest": "", "state": "COMMITTED"}}}

    def on_upsertView(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Store reports and saved views. A deleted report or view cannot be written again."""
        known = variables.get("id")
        if known and known not in self.views:
            return {"upsertView": None}
        identity = known or f"view{len(self.views)}"
        self.views[identity] = {**self.views.get(identity, {}), **variables}
        project = {"id": "p1", "name": variables["projectName"], "entityName": variables["entityName"]}
        named = {key: variables.get(key) or "" for key in ("name", "displayName", "description")}
        view = {"id": identity, "project": project, "spec": variables["spec"], "updatedAt": None, **named}
        return {"upsertView": {"view": view, "inserted": not known}}

    on_UpsertView2 = on_upsertView

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        """Store what a run streams: lines of files from an offset on, and the exit code."""
        run = self.run(run_id)
        for name, part in (sent.get("files") or {}).items():
            kept = run.files.setdefault(name, {})
            for number, line in enumerate(part["content"]):
                kept[part["offset"] + number] = line
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    stub: WandbStub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _reply(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            content = b"".join(parts)
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            content = gzip.decompress(content)
        return content

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        content = self._body()
        _, kind, owner, _ = self.path.split("/", 3)
        if kind == "manifest":
            with self.stub.lock:
                self.stub.artifacts[int(owner)].manifest = json.loads(content)
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        if given != f"api:{KEY}":
            self._reply({"errors": [{"message": "user is not logged in"}]}, 401)
            return
        if self.stub.refusing != 200:
            self._reply({"errors": [{"message": "refused"}]}, self.stub.refusing)
            return
        with self.stub.lock:
            sent = json.loads(body)
            if self.path.endswith("/file_stream"):
                self.stub.stream(self.path.split("/")[-2], sent)
                self._reply({})
            else:
                self._reply({"data": self.stub.answer(sent["query"], sent.get("variables") or {})})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: a client may disconnect at any time, and retries what it missed."""


@contextmanager
def serving() -> Iterator[WandbStub]:
    """Run a server on a free port of the loopback interface until the block ends."""
    stub = WandbStub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    stub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


def forget() -> None:
    """Drop the client's cached settings and login."""
    wandb.teardown()
    wbauth.unauthenticate_session(update_settings=False)
