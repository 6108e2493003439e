"""A local, in-memory stand-in for the Hugging Face Hub that the real ``huggingface_hub`` client can talk to.

It serves model repositories over plain HTTP: creation, branches, commits (regular and LFS files, deletions),
listings and downloads. Left out: pull requests, gating, ``.gitignore``, paging, datasets and spaces. Xet is left out
too, since its storage protocol lives in a compiled client: ``client_environment`` sets ``HF_HUB_DISABLE_XET=1``, with
which the client uploads by Git LFS and downloads by plain HTTP.

The client reads its settings when it is imported, so a test runs it in another process::

    with hub_server() as hub:
        environment = client_environment(hub, tmp_path / "home")
        subprocess.run([sys.executable, "-c", "..."], env=environment, check=True)
        assert "config.json" in hub.repos["user/name"]
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hub_api import TOKEN, USER, HubServer

__all__ = ["TOKEN", "USER", "HubServer", "client_environment", "hub_server"]


class _Listener(ThreadingHTTPServer):
    request_queue_size = 64  # the client opens a connection per download thread

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, which would wait for each other
    server: _Listener

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def _answer(self) -> None:
        headers = {name.lower(): text for name, text in self.headers.items()}
        reply = self.server.hub.answer(self.command, self.path, headers, self._body())
        raw = isinstance(reply.content, bytes)
        content = reply.content if raw else json.dumps(reply.content, default=str).encode()  # YAML has dates
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in reply.headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Keep test output quiet; ``HubServer.requests`` holds the log."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a Hub without repositories on a free local port until the block ends."""
    hub = HubServer()
    with _Listener(hub) as listener:
        hub.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            listener.shutdown()
            thread.join()


def client_environment(server: HubServer, home: Path, token: str = TOKEN) -> dict[str, str]:
    """The environment of a process whose Hub is ``server``, signed in as ``USER``, with its caches under ``home``.

    An empty ``token`` gives a client that is not signed in.
    """
    # Settings of the surrounding process (offline mode, caches, a real token) must not reach the client.
    ours = ("HF_", "HUGGING", "TRANSFORMERS_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    return environment | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
