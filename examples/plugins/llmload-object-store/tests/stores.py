"""Stores to load from: one on this disk that counts what is asked of it, and a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

import llmload
from llmload.plugin import partitions

SMALL = 128
"""Bytes up to which a piece is one end of a tensor, for the audit, and not a part to be placed."""

Span = tuple[str, int, int]
"""File, first byte, and the one after the last."""


class Counted(LocalFileSystem):
    """A store of this machine's files, at ``counted://``: it writes down every piece it gives."""

    protocol = "counted"
    given: ClassVar[list[Span]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("counted://")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **kwargs)
        return {**found, "ETag": f"{found['size']}-{found['mtime']}"}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **kwargs)
        self.given.append((Path(path).name, start or 0, (start or 0) + len(data)))
        return data


def register() -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.given.clear()


def placed(given: list[Span]) -> list[Span]:
    """Of what a store gave, the parts of tensors that were placed, in order."""
    return sorted(span for span in given if span[2] - span[1] > SMALL and span[1] > 0)


def headers(spans: list[Span]) -> list[Span]:
    return [span for span in spans if span[1] == 8]


def on_a_rank(folder: str, url: str) -> dict[str, Any]:
    """Load under ZeRO-3; return what this rank asked the store for and what it says it read."""
    register()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    spec = {"model": folder, "object_store": {"url": url}, "zero3": {"config": config}}
    result = llmload.load(spec)
    given = list(Counted.given)
    values = {}
    for name, parameter in result.model.named_parameters():
        with partitions.whole([parameter]):
            values[name] = parameter.detach().clone()
    files = result.report.facts["streaming"]["files"].values()
    return {
        "given": given,
        "read": sum(file["bytes_read"] for file in files),
        "loader": result.report.loader,
        "values": values,
    }


class Handler(SimpleHTTPRequestHandler):
    """Sends parts of files, as object stores do."""

    given: list[Span]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{size}-{path.stat().st_mtime_ns}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if body:
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))
            self.server.given.append((path.name, start, stop))  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[Span]]]:
    """Serve a folder on this machine; yields its address, and what has been given so far."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        server.given = []  # type: ignore[attr-defined]
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.given  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()
