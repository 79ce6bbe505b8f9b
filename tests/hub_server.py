"""A small Hugging Face hub of the tests' own, over real HTTP on this machine.

It speaks what a download needs: `/{org}/{repo}/resolve/{revision}/{file}` with commit, ETag and
size headers, a redirect to a content server for large files (as the hub does), ranges, the list of
a repository's files (`/api/models/...`), and the hub's error codes. Faults are switched on by its
attributes.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

COMMIT = "1234567890abcdef1234567890abcdef12345678"
LARGE = (".gguf", ".onnx", ".safetensors")


@dataclass
class Refusal:
    """A status with the hub's error code for it."""

    status: int
    code: str = ""
    message: str = ""


@dataclass
class HubServer:
    """Serves `repos[name]` (a folder) at revisions `main` and `commit`.

    `cuts[file]` lists, request by request, after how many body bytes the connection breaks.
    After `stalls[file]` bytes nothing more comes and `stalled` is set.
    Files in `damaged` come with a wrong first byte, under their right ETag.
    `refusals[name]` answers every request for a repository's files. As on the hub, anyone may ask
    what a gated repository ("GatedRepo") holds.
    """

    repos: dict[str, Path]
    commit: str = COMMIT
    cuts: dict[str, list[int]] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header) of every request."""
    stalled: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening: connections are refused from now on."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self, name: str) -> list[str | None]:
        """Range headers of the GET requests for the content of `name`."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(name)]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub.requests.append((self.command, self.path, self.headers.get("Range")))
                path = self.path.partition("?")[0]
                if listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
                    return self.list_files(*listed.groups())
                found = re.fullmatch(r"/([^/]+/[^/]+)/(resolve|content)/([^/]+)/(.+)", path)
                if not found:
                    return self.refuse(Refusal(404))
                repo, kind, revision, name = found.groups()
                if repo in hub.refusals:
                    return self.refuse(hub.refusals[repo])
                if repo not in hub.repos:
                    return self.refuse(Refusal(404, "RepoNotFound", "Repository not found"))
                if revision not in ("main", hub.commit):
                    return self.refuse(Refusal(404, "RevisionNotFound", "Invalid rev id"))
                file = hub.repos[repo] / name
                if not file.is_file():
                    return self.refuse(Refusal(404, "EntryNotFound", "Entry not found"))
                data = file.read_bytes()
                if kind == "resolve" and name.endswith(LARGE):
                    return self.redirect(repo, name, data)
                return self.send(name, data, body)

            def list_files(self, repo: str, revision: str) -> None:
                refusal = hub.refusals.get(repo)
                if refusal is not None and refusal.code != "GatedRepo":
                    return self.refuse(refusal)
                if repo not in hub.repos:
                    return self.refuse(Refusal(404, "RepoNotFound", "Repository not found"))
                if revision not in ("main", hub.commit):
                    return self.refuse(Refusal(404, "RevisionNotFound", "Invalid rev id"))
                files = sorted(path for path in hub.repos[repo].iterdir() if path.is_file())
                siblings = [{"rfilename": p.name, "size": p.stat().st_size} for p in files]
                about = {"id": repo, "sha": hub.commit, "siblings": siblings, "tags": []}
                data = json.dumps(about).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return None

            def refuse(self, refusal: Refusal) -> None:
                self.send_response(refusal.status)
                if refusal.code:
                    self.send_header("X-Error-Code", refusal.code)
                    self.send_header("X-Error-Message", refusal.message)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def redirect(self, repo: str, name: str, data: bytes) -> None:
                self.send_response(302)
                self.send_header("Location", f"{hub.url}/{repo}/content/{hub.commit}/{name}")
                self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Linked-Size", str(len(data)))
                self.send_header("X-Repo-Commit", hub.commit)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def send(self, name: str, data: bytes, body: bool) -> None:
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
                first = int(wanted[1]) if wanted else 0
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", hub.commit)
                self.send_header("Content-Length", str(len(data) - first))
                self.end_headers()
                if not body:
                    return
                part = data[first:]
                if name in hub.damaged and first == 0:
                    part = bytes([part[0] ^ 255]) + part[1:]
                if hub.cuts.get(name):
                    part = part[: hub.cuts[name].pop(0)]
                    self.close_connection = True
                if name in hub.stalls:
                    self.wfile.write(part[: hub.stalls[name]])
                    self.wfile.flush()
                    hub.stalled.set()
                    hub.stopped.wait(60)
                    return
                self.wfile.write(part)

        return Handler
