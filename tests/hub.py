"""A Hub on this machine: the few requests of the Hub's API that a download of a model's files takes."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0" * 40

Repos = Mapping[str, Mapping[str, bytes]]
"""Repository -> file -> content."""


@contextmanager
def serve_hub(repos: Repos, refused: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories; gives the endpoint, and the files that were asked for, as they are. The first `refused` requests are
    told to come later."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repos, asked, refused))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(repos: Repos, asked: list[str], refused: int) -> type[BaseHTTPRequestHandler]:
    left = iter(range(refused))

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if "/resolve/" in path:
                asked.append(path.rpartition("/")[2])
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            if next(left, None) is not None:
                return self._send(429, b"", "text/plain", {})
            parts = urlsplit(self.path).path.strip("/").split("/")
            is_api = parts[0] == "api"
            repo = "/".join(parts[2:4] if is_api else parts[:2])
            files = repos.get(repo)
            if files is None:
                return self._send(404, b"", "text/plain", {"X-Error-Code": "RepoNotFound"})
            if not is_api:
                content = files[parts[-1]]
                return self._send(200, content, "application/octet-stream", {"ETag": f'"{sha1(content).hexdigest()}"'})
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self._send(200, json.dumps(tree if "tree" in parts else about).encode(), "application/json", {})

        def _send(self, code: int, content: bytes, kind: str, headers: Mapping[str, str]) -> bytes:
            self.send_response(code)
            common = {"Content-Type": kind, "Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
            for name, value in {**common, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return content

        def log_message(self, *args: object) -> None:
            pass

    return Handler
