"""A server of the Hugging Face Hub's protocol for files, on loopback, with faults on demand.

As on the hub a request for a file is redirected to storage, and states size and SHA-256.
"""

import hashlib
import http.server
import threading

PREFIX = "/FoundationVision/var/resolve/"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, {name: bytes}; counts requests as "METHOD name range"."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = dict(files), []
        self.status = 200  # of all requests for files
        self.cuts = 0  # so many downloads end amid their bytes
        self.stated = {}  # {name: SHA-256} other than the true one
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}/storage/"  # of another name
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Clients may hang up."""


class Handler(http.server.BaseHTTPRequestHandler):
    """HEAD and GET."""

    def do_HEAD(self):
        hub, (revision, _, name) = self.server, self.path.removeprefix(PREFIX).partition("/")
        if self.path.startswith("/storage/"):
            return self.send_storage(self.path.removeprefix("/storage/"))
        if not self.path.startswith(PREFIX):
            return self.answer(404)
        hub.requests.append(f"{self.command} {name} {self.headers.get('Range', '')}".strip())
        data = hub.files.get(name)
        if hub.status != 200:
            return self.answer(hub.status)
        if revision not in ("main", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if data is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        digest = hub.stated.get(name, hashlib.sha256(data).hexdigest())
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(data)}
        self.answer(302, linked | {"X-Repo-Commit": COMMIT, "Location": f"{hub.storage}{name}"})

    do_GET = do_HEAD

    def send_storage(self, name):
        """The bytes from the start of the range on."""
        hub, data = self.server, self.server.files[name]
        begin = int(self.headers.get("Range", "bytes=0-").split("=")[1].rstrip("-"))
        self.answer(206 if begin else 200, {"Content-Length": len(data) - begin}, end=False)
        if self.command == "GET":
            cut, hub.cuts = hub.cuts > 0, max(0, hub.cuts - 1)
            end = begin + (len(data) - begin) // 2 if cut else len(data)
            self.wfile.write(data[begin:end])
            self.close_connection = True

    def answer(self, status, headers=None, end=True):
        """Status and headers."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        if end:
            self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Nothing on the terminal."""
