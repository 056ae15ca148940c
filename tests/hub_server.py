"""A server on this machine that speaks the protocol of the model hub, for folders as repositories.

It knows one commit of each. How many bytes it gave is counted by file, and told at ``/sent``. Files
of safetensors are told of by their SHA-256, as large files are there.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/models/(?P<id>[\w.-]+(/[\w.-]+)?)/(?P<what>revision|tree|paths-info)/(.+)")
_FILE = re.compile(r"/(?P<id>[\w.-]+(/[\w.-]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Hub:
    """Repositories by id, each a folder."""

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.withheld: set[str] = set()
        """Files that nobody may have, by repository and path."""
        self.stalled: set[str] = set()
        """Files of which the first half comes, and no more while they stand here."""
        self.half_sent = Event()
        """Set when half of a stalled file was sent."""
        self.sent: Counter[str] = Counter()
        """Bytes sent since ``/sent`` was asked for last, by repository and path."""
        self.sent_to: dict[str, Counter[str]] = defaultdict(Counter)
        """The same by the token of whoever asked, and never cleared."""
        self.without_ranges: set[str] = set()
        """Files that are sent whole whatever is asked for."""
        self.wrongly_listed: set[str] = set()
        """Files of which another digest is told than they have."""
        self.url = ""

    def environment(self, cache: Path) -> dict[str, str]:
        """Return the variables by which a new process asks this hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub, empty at first, for the length of a block."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := _FILE.fullmatch(path):
            self._file(found["id"], found["revision"], found["path"])
        elif found := _API.fullmatch(path):
            self._api(found["id"], found["what"], found[4])
        elif path == "/sent":
            self._json(dict(self.served.sent))
            self.served.sent.clear()
        else:
            self._refuse("EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body) if is_json else parse_qs(body)
        found = _API.fullmatch(unquote(urlsplit(self.path).path))
        root = self._root(found["id"] if found else "")
        if found is None or root is None:
            return
        names = [name for name in asked["paths"] if (root / name).is_file()]
        self._json([self._entry(found["id"], root, root / name) for name in names])

    def _api(self, repository: str, what: str, revision: str) -> None:
        root = self._root(repository)
        if root is None:
            return
        if revision.split("/")[0] not in ("main", COMMIT):
            self._refuse("RevisionNotFound")
            return
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if what == "tree":
            self._json([self._entry(repository, root, path) for path in files])
        else:
            names = [{"rfilename": path.relative_to(root).as_posix()} for path in files]
            self._json({"id": repository, "sha": COMMIT, "siblings": names})

    def _file(self, repository: str, revision: str, name: str) -> None:
        root = self._root(repository)
        if root is None:
            return
        if not (root / name).is_file():
            self._refuse("EntryNotFound")
            return
        if f"{repository}/{name}" in self.served.withheld:
            self._refuse("", 403)
            return
        data = (root / name).read_bytes()
        first, last = 0, len(data) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if f"{repository}/{name}" in self.served.without_ranges:
            asked = None
        if asked:
            first, last = int(asked[1]), min(last, int(asked[2] or last))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        if f"{repository}/{name}" not in self.served.without_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{self._digest(repository, root, root / name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            for count in (self.served.sent, self.served.sent_to[token]):
                count[f"{repository}/{name}"] += last + 1 - first
            self._stall(f"{repository}/{name}", data[first : (first + last) // 2])
            self.wfile.write(data[first : last + 1])

    def _stall(self, place: str, half: bytes) -> None:
        if place in self.served.stalled:
            self.wfile.write(half)
            self.wfile.flush()
            self.served.half_sent.set()
            while place in self.served.stalled:
                time.sleep(0.05)
            raise ConnectionError("the one who asked was killed")

    def _root(self, repository: str) -> Path | None:
        root = self.served.repositories.get(repository)
        if root is None:
            self._refuse("RepoNotFound")
        return root

    def _json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _digest(self, repository: str, root: Path, path: Path) -> str:
        name = path.relative_to(root).as_posix()
        if f"{repository}/{name}" in self.served.wrongly_listed:
            return hashlib.sha256(b"another file").hexdigest()
        return _digest(path)

    def _entry(self, repository: str, root: Path, path: Path) -> dict[str, Any]:
        name, size = path.relative_to(root).as_posix(), path.stat().st_size
        digest = self._digest(repository, root, path)
        entry = {"type": "file", "path": name, "size": size, "oid": digest[:40]}
        if _is_large(path):
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
        return entry


def _is_large(path: Path) -> bool:
    return path.suffix == ".safetensors"


def _digest(path: Path) -> str:
    method = "sha256" if _is_large(path) else "sha1"
    return hashlib.new(method, path.read_bytes()).hexdigest()
