"""A small Hugging Face Hub on 127.0.0.1: the routes that huggingface_hub requests to download a model.

The routes, headers and error codes are those of https://huggingface.co/docs/hub/api; files are served directly,
without the redirect to a content network and without Xet.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<repo>.+?)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
FILE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves `hub.repos` at `hub.url` until the block ends or `hub.close()`."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> revision -> path -> content
        self.tokens: dict[str, str] = {}  # gated repository -> the token that may read its files
        self.cuts: dict[str, list[int]] = {}  # path -> where each of its next answers breaks off
        self.status: int | None = None  # answer everything with this error
        self.silent = False  # accept requests, never answer
        self.requests = 0
        self.sent: Counter[str] = Counter()  # path -> bytes of it that left the server
        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        if not self.closed.is_set():
            self.closed.set()
            self.server.shutdown()
            self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def commit_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default: one connection for each request, so that a closed hub is gone for every client.
    hub: LoopbackHub

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, route = self.hub, urlsplit(self.path).path
        hub.requests += 1
        if hub.silent:
            hub.closed.wait()
            return
        if hub.status:
            self.fail(hub.status, "", "the hub is out of order")
            return
        match = API.fullmatch(route) or FILE.fullmatch(route)
        if not match or match["repo"] not in hub.repos:
            self.fail(404, "RepoNotFound", "Repository not found")
            return
        repo, revision = match["repo"], unquote(match["revision"] or "main")
        commits = {commit_of(repo, name): files for name, files in hub.repos[repo].items()}
        commit = revision if revision in commits else commit_of(repo, revision)
        if commit not in commits:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = commits[commit]
        if match.re is API:
            body = tree(files) if match["what"] == "tree" else described(repo, commit, files)
            self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif repo in hub.tokens and not self.headers["Authorization"]:
            self.fail(401, "GatedRepo", f"Access to model {repo} is restricted. You must have access to it.")
        elif repo in hub.tokens and self.headers["Authorization"] != f"Bearer {hub.tokens[repo]}":
            self.fail(403, "", "Please enable access to public gated repositories in your token settings")
        elif (path := unquote(match["path"])) not in files:
            self.fail(404, "EntryNotFound", "Entry not found")
        else:
            self.send_file(path, files[path], commit)

    def send_file(self, path: str, content: bytes, commit: str):
        start = 0
        headers = {"ETag": f'"{git_id(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.endswith(".safetensors"):
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            start = int(span[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cuts = self.hub.cuts.get(path) if self.command == "GET" else None
        stop = cuts.pop(0) if cuts else len(content)
        self.reply(206 if span else 200, content[start:], headers, content[start:stop])
        if self.command == "GET":
            self.hub.sent[path] += max(stop - start, 0)

    def fail(self, status: int, code: str, message: str):
        body = json.dumps({"error": message}).encode()
        self.reply(status, body, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))

    def reply(self, status: int, body: bytes, headers: dict[str, str], part: bytes | None = None):
        """Announce `body`; send it, or only `part` of it, and close the connection."""
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # the client was killed
                self.wfile.write(body if part is None else part)


def described(repo: str, commit: str, files: dict[str, bytes]):
    return {"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]}


def tree(files: dict[str, bytes]):
    entries = []
    for path, content in files.items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
