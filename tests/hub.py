"""A Hub on this machine: the requests of the Hub's API that listing, downloading and uploading repositories take."""

import base64
import json
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants

COMMIT = "0" * 40

Repos = MutableMapping[str, MutableMapping[str, bytes]]
"""Repository -> file -> content; a data set's begins with `datasets/`."""


@contextmanager
def serve_hub(repos: Repos, refused: int = 0, downloads: dict[str, int] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories; gives the endpoint, and the files that were asked for, as they are. The first `refused` requests are
    told to come later. `downloads`: of repositories, as lists of them tell."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repos, asked, refused, downloads or {}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def this_process_asks(repos: Repos) -> Iterator[None]:
    """Serve repositories to this process, of which huggingface_hub has read its settings."""
    with serve_hub(repos) as (endpoint, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        HfFileSystem.clear_instance_cache()
        yield
    HfFileSystem.clear_instance_cache()


def _tree(files: MutableMapping[str, bytes], folder: str, is_deep: bool) -> Iterator[dict[str, Any]]:
    """What is in a folder of a repository, as the Hub lists it."""
    start = f"{folder}/" if folder else ""
    inside = [name for name in files if name.startswith(start)]
    for below in sorted({name.removeprefix(start).partition("/")[0] for name in inside if "/" in name.removeprefix(start)}):
        yield {"type": "directory", "path": start + below, "oid": below}
    for name in inside:
        if is_deep or "/" not in name.removeprefix(start):
            yield {"type": "file", "path": name, "size": len(files[name]), "oid": sha1(files[name]).hexdigest()}


def _handler(repos: Repos, asked: list[str], refused: int, downloads: dict[str, int]) -> type[BaseHTTPRequestHandler]:
    left = iter(range(refused))

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if "/resolve/" in path:
                asked.append(path.rpartition("/")[2])
            self.wfile.write(self._answer())

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(self._take(urlsplit(self.path).path.strip("/").split("/"), content))

        def _answer(self) -> bytes:
            if next(left, None) is not None:
                return self._send(429, b"", "text/plain", {})
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts == ["api", "models"]:
                return self._json(self._listed())
            is_api = parts[0] == "api"
            if parts[is_api] in ("models", "datasets"):
                parts[is_api : is_api + 1] = [] if parts[is_api] == "models" else ["datasets/"]
            data = parts[is_api] == "datasets/"
            name = "/".join(parts[is_api + data : is_api + data + 2])
            repo, rest = ("datasets/" if data else "") + name, parts[is_api + data + 2 :]
            files = repos.get(repo)
            if files is None:
                return self._send(404, b"", "text/plain", {"X-Error-Code": "RepoNotFound"})
            if not is_api:
                return self._content(files, "/".join(rest[2:]))
            about = {"id": name, "sha": COMMIT, "downloads": downloads.get(repo, 0)}
            if "tree" not in rest:
                return self._json(about | {"siblings": [{"rfilename": file} for file in files]})
            is_deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            return self._json(list(_tree(files, "/".join(rest[2:]), is_deep)))

        def _listed(self) -> list[dict[str, Any]]:
            """Repositories whose card names the base that is asked for."""
            asked_for = parse_qs(urlsplit(self.path).query)
            base = asked_for["filter"][0].removeprefix("base_model:adapter:")
            named = [repo for repo, files in repos.items() if f"base_model: {base}\n".encode() in files.get("README.md", b"")]
            ranked = sorted(named, key=lambda repo: -downloads.get(repo, 0))[: int(asked_for.get("limit", ["1000"])[0])]
            return [{"id": repo, "sha": COMMIT, "downloads": downloads.get(repo, 0)} for repo in ranked]

        def _content(self, files: MutableMapping[str, bytes], name: str) -> bytes:
            if name not in files:
                return self._send(404, b"", "text/plain", {"X-Error-Code": "EntryNotFound"})
            content, headers = files[name], {"ETag": f'"{sha1(files[name]).hexdigest()}"', "Accept-Ranges": "bytes"}
            if not (given := self.headers.get("Range")):
                return self._send(200, content, "application/octet-stream", headers)
            first, _, last = given.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            return self._send(206, content[int(first) : stop], "application/octet-stream", headers)

        def _take(self, parts: list[str], content: bytes) -> bytes:
            """Of an upload: the repository is made, each file is to be sent as it is, and a commit brings them all."""
            if not self.headers.get("Authorization"):
                return self._send(401, b"", "text/plain", {})
            if parts[-1] == "validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if parts[-2:] == ["repos", "create"]:
                made = json.loads(content)
                repo = "/".join(filter(None, [made.get("organization"), made["name"]]))
                repos.setdefault(repo, {})
                return self._json({"url": f"http://{self.headers['Host']}/{repo}", "name": repo})
            repo = "/".join(parts[2:4])
            if parts[4] == "preupload":
                how = {"uploadMode": "regular", "shouldIgnore": False}
                return self._json({"files": [{"path": one["path"], **how} for one in json.loads(content)["files"]]})
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
            return self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})

        def _json(self, content: Any) -> bytes:
            return self._send(200, json.dumps(content).encode(), "application/json", {})

        def _send(self, code: int, content: bytes, kind: str, headers: dict[str, str]) -> bytes:
            self.send_response(code)
            common = {"Content-Type": kind, "Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
            for name, value in {**common, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return content

        def log_message(self, *args: object) -> None:
            pass

    return Handler
