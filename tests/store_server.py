"""An S3 server on this machine whose requests and answers a test sees, and which may refuse."""

import io
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request, before what a failed test has to show


class StoreServer:
    """A local S3 server: what it is asked, and what it refuses."""

    def __init__(self) -> None:
        self.requests = list[str]()
        self.sent = list[tuple[str, int]]()
        """Requests that were answered, and the bytes of what they were answered with."""
        self.refuse: Callable[[str], bool] = lambda request: False
        """Requests, such as 'PUT /bucket/key?partNumber=2', that are answered with 503."""
        self._turn = threading.Lock()
        """moto keeps its objects in plain dictionaries: a part that comes in while its upload is ended breaks it."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        assert self._server._server is not None
        self._app, self._server._server.app = self._server._server.app, self._answer
        self.endpoint = "http://{}:{}".format(*self._server.get_host_and_port())

    def stop(self) -> None:
        self._server.stop()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        query = environ["QUERY_STRING"]
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{'?' * bool(query)}{query}"
        self.requests.append(request)
        if "CONTENT_LENGTH" in environ:
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0)))
        if self.refuse(request):
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        with self._turn:
            content = b"".join(self._app(environ, start_response))
        self.sent.append((request, len(content)))
        return [content]
