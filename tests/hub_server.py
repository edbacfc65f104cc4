"""A stand-in of Hugging Face's hub on 127.0.0.1: keeps what huggingface_hub uploads, and gives it out again."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

COMMIT = "0" * 39 + "1"
URL_TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
LARGE = 1024  # bytes, from which on a file goes by Git LFS


@dataclass
class Hub:
    """What was asked of it, and what it holds: files by repository, as `models/me/net`."""

    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path
    created: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of Git LFS, by SHA-256
    refuse: int | None = None  # status of the answer to every request


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The server, and the library told to ask it; nothing is sent anywhere else."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        with (
            # HF_ENDPOINT and HF_HUB_DISABLE_XET, which the library reads once, when it is imported. Xet is a protocol
            # of its own between a compiled client and another server.
            patch.object(constants, "ENDPOINT", hub.url),
            patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + URL_TEMPLATE),
            patch.object(constants, "HF_HUB_DISABLE_XET", True),
            patch.object(socket, "getaddrinfo", _find_here),
        ):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_getaddrinfo = socket.getaddrinfo


def _find_here(host: str, *given: Any, **named: Any) -> Any:
    assert host == "127.0.0.1", f"{host} was asked for, and nothing may leave this machine"
    return _getaddrinfo(host, *given, **named)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        path, body = self._begin()
        if self.hub.refuse:
            return self._json({"error": "no"}, self.hub.refuse)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/preupload/main", path):
            return self._preupload(match[1], json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self._json({"error": path}, 404)

    def do_PUT(self) -> None:
        path, body = self._begin()
        assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
        self.hub.objects[path.rpartition("/")[2]] = body
        self._json({})

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _begin(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.command == "POST":
            self.hub.tokens.add(self.headers.get("Authorization"))
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _create(self, asked: dict[str, Any]) -> None:
        self.hub.created.append(asked)
        name = f"{asked['organization']}/{asked['name']}"
        kind = asked.get("type", "model")
        known = f"{kind}s/{name}" in self.hub.repos
        self.hub.repos.setdefault(f"{kind}s/{name}", {})
        prefix = "datasets/" if kind == "dataset" else ""
        self._json({"url": f"{self.hub.url}/{prefix}{name}"}, 409 if known else 200)

    def _preupload(self, repo: str, asked: dict[str, Any]) -> None:
        assert repo in self.hub.repos
        modes = [(file["path"], "lfs" if file["size"] >= LARGE else "regular") for file in asked["files"]]
        self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            for wanted in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        assert lines[0]["key"] == "header"
        for line in lines[1:]:
            value = line["value"]
            data = base64.b64decode(value["content"]) if line["key"] == "file" else self.hub.objects[value["oid"]]
            self.hub.repos[repo][value["path"]] = data
        name = repo.removeprefix("models/")
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _get(self) -> None:
        path, _ = self._begin()
        if match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/(?:revision/\w+|tree/\w+)", path):
            files = self.hub.repos[match[1]]
            if "/tree/" in path:
                return self._json(
                    [{"type": "file", "path": n, "size": len(d), "oid": _tag(d)} for n, d in files.items()]
                )
            return self._json({"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            data = self.hub.repos[f"{match[1] or 'models/'}{match[2]}"].get(match[3])
            if data is not None:
                return self._send(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{_tag(data)}"'})
        return self._json({"error": path}, 404)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
