"""A Hugging Face Hub on the loopback interface: enough of its protocol for the real client; it keeps every commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class HubStub:
    """State of the server.

    Attributes:
        address: base URL.
        commits: files of every commit of a repository, in order, by their hash.
        private: whether a repository was asked to be private.
        requests: method and path of what was asked for.
    """

    def __init__(self) -> None:
        self.address = ""
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}

    def commit(self, repo: str, changes: dict[str, bytes]) -> str:
        """Add a commit with some files changed; returns its hash."""
        history = self.commits.setdefault(repo, {})
        files = {**(list(history.values())[-1] if history else {}), **changes}
        content = b"".join(name.encode() + value for name, value in sorted(files.items()))
        number = hashlib.sha1(str(len(history)).encode() + content).hexdigest()
        history[number] = files
        return number

    def find(self, repo: str, revision: str) -> str | None:
        """Hash of the commit that a revision is."""
        history = self.commits.get(repo, {})
        return list(history)[-1] if revision == "main" and history else revision if revision in history else None


def _handler(stub: HubStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def missing(self, what: str) -> None:
            self.answer({"error": what}, 404, X_Error_Code=what, X_Error_Message=what)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            stub.requests.append(f"{self.command} {path}")
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
            if found:
                self.file(*found.groups())
            elif asked and asked[1] in stub.private:
                number = stub.find(asked[1], asked[2] or "main")
                files = stub.commits[asked[1]][number] if number else {}
                siblings = [{"rfilename": name} for name in files]
                self.answer({"id": asked[1], "sha": number, "siblings": siblings, "private": stub.private[asked[1]]})
            else:
                self.missing("RepoNotFound")

        do_HEAD = do_GET

        def file(self, repo: str, revision: str, name: str) -> None:
            if repo not in stub.commits:
                return self.missing("RepoNotFound")
            number = stub.find(repo, revision)
            if number is None:
                return self.missing("RevisionNotFound")
            if name not in stub.commits[repo][number]:
                return self.missing("EntryNotFound")
            content = stub.commits[repo][number][name]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(content, ETag=etag, X_Repo_Commit=number)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            stub.requests.append(f"{self.command} {path}")
            sent = self.body()
            if path == "/api/repos/create":
                asked = json.loads(sent)
                repo = "/".join(name for name in (asked.get("organization"), asked["name"]) if name)
                private = asked.get("private") is True or asked.get("visibility") == "private"
                stub.private.setdefault(repo, private)
                stub.commits.setdefault(repo, {})
                return self.answer({"url": f"{stub.address}/{repo}"})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                files = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(sent)["files"]
                ]
                return self.answer({"files": files, "commitOid": stub.find(found[1], "main")})
            if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
                objects = [
                    {**one, "actions": {"upload": {"href": f"{stub.address}/blobs/{one['oid']}"}}}
                    for one in json.loads(sent)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                changes = {}
                for line in sent.decode().splitlines():
                    operation = json.loads(line)
                    value = operation["value"]
                    if operation["key"] == "file":
                        changes[value["path"]] = base64.b64decode(value["content"])
                    elif operation["key"] == "lfsFile":
                        changes[value["path"]] = stub.blobs[value["oid"]]
                number = stub.commit(found[1], changes)
                return self.answer({"commitUrl": f"{stub.address}/{found[1]}/commit/{number}", "commitOid": number})
            return self.missing("NotFound")

        def do_PUT(self) -> None:
            stub.blobs[self.path.rpartition("/")[2]] = self.body()
            self.answer()

    return Handler


@contextmanager
def hub() -> Iterator[HubStub]:
    """The server, while it is needed."""
    stub = HubStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub))
    stub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
