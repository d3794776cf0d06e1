"""A Google Cloud Storage on loopback: the JSON API as gcsfs, tensorstore and array_record speak it.

In memory, strict about preconditions, with a log of requests and faults on demand.
"""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c

RESET, LOST = "reset", "lost"  # the connection ends before, or after, the request is obeyed
UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o")
BUCKET = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)")
OBJECT = re.compile(BUCKET.pattern + r"/o/([^/]+)")
MOVE = re.compile(OBJECT.pattern + r"/moveTo/o/([^/]+)")
COPY = re.compile(OBJECT.pattern + r"/rewriteTo/b/([^/]+)/o/([^/]+)")


class Refused(Exception):
    """An answer that is an error."""


@dataclasses.dataclass
class Object:
    data: bytes
    about: dict  # as the API describes it


class Server(ThreadingHTTPServer):
    """Buckets by name, each {key: Object}; `fault` maps (method, path) to a fault or None."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets, self.lock = {}, threading.RLock()
        self.generations, self.uploads, self.moves = itertools.count(1000), {}, {}
        self.clear()

    def clear(self):
        """No requests, no faults, one empty bucket called "bucket"."""
        self.log, self.fault = [], lambda method, path: None
        self.buckets.clear()
        self.buckets["bucket"] = {}

    @property
    def environment(self):
        """What makes the libraries' clients come here."""
        url = f"http://127.0.0.1:{self.server_port}"
        hosts = "STORAGE_EMULATOR_HOST TENSORSTORE_GCS_HTTP_URL CLOUD_STORAGE_EMULATOR_ENDPOINT"
        return dict.fromkeys(hosts.split(), url) | {
            "FSSPEC_GCS_TOKEN": "anon",
            "FSSPEC_GS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "test",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another server over gRPC
        }

    def store(self, bucket, key, data, about=None):
        """Writes an object and returns its description."""
        digest = lambda raw: base64.b64encode(raw).decode()
        crc = struct.pack(">I", google_crc32c.value(data))
        generation = str(next(self.generations))
        now = "2026-01-01T00:00:00.000Z"
        found = {
            "kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(data)),
            "generation": generation, "metageneration": "1", "updated": now, "timeCreated": now,
            "crc32c": digest(crc), "md5Hash": digest(hashlib.md5(data).digest()),
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
        }  # fmt: skip
        found |= {k: v for k, v in (about or {}).items() if k in ("contentType", "metadata")}
        self.buckets[bucket][key] = Object(data, found)
        return found

    def handle_error(self, request, client_address):
        """Connections that a killed client leaves are no news."""


@contextlib.contextmanager
def serve():
    """A server on a thread."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True

    def log_message(self, *args):
        """Tests read `Server.log`."""

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do_GET(self):
        """Any request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.server.log.append((self.command, urllib.parse.unquote(self.path)))
        fault = self.server.fault(self.command, urllib.parse.unquote(self.path))
        if fault == RESET:
            return self.reset()
        try:
            if isinstance(fault, int):
                raise Refused(fault)
            with self.server.lock:
                status, answer, headers = self.obey(url.path, query, body)
        except Refused as error:
            status, headers = error.args[0], {}
            answer = {"error": {"code": status, "message": f"refused with {status}"}}
        if fault == LOST:
            return self.reset()
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and status != 304:
            self.wfile.write(data)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def reset(self):
        """Ends the connection with RST, as a broken network does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def obey(self, path, query, body):
        """(status, JSON or bytes, headers) of the answer. Raises: Refused."""
        groups = lambda found: [urllib.parse.unquote(group) for group in found.groups()]
        if found := UPLOAD.fullmatch(path):
            return self.upload(*groups(found), query, body)
        if found := MOVE.fullmatch(path):
            return 200, self.move(*groups(found), query), {}
        if found := COPY.fullmatch(path):
            bucket, key, to_bucket, to_key = groups(found)
            source = self.found(bucket, key, query)
            self.check(to_bucket, to_key, query)
            about = self.server.store(to_bucket, to_key, source.data, source.about)
            return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": about}, {}
        if found := OBJECT.fullmatch(path):
            return self.of_object(*groups(found), query)
        if found := re.fullmatch(BUCKET.pattern + "/o", path):
            return 200, self.listing(*groups(found), query), {}
        if found := BUCKET.fullmatch(path):
            (name,) = groups(found)
            self.keys(name)
            return 200, {"kind": "storage#bucket", "name": name, "metageneration": "1"}, {}
        raise Refused(501)

    def keys(self, bucket):
        if bucket not in self.server.buckets:
            raise Refused(404)
        return self.server.buckets[bucket]

    def check(self, bucket, key, query):
        """Refuses what a precondition forbids."""
        item = self.keys(bucket).get(key)
        now = item.about["generation"] if item else "0"
        if query.get("ifGenerationMatch", now) != now:
            raise Refused(412)
        if query.get("ifGenerationNotMatch") == now:
            raise Refused(304)

    def found(self, bucket, key, query=None):
        if query:
            self.check(bucket, key, query)
        if key not in self.keys(bucket):
            raise Refused(404)
        return self.keys(bucket)[key]

    def of_object(self, bucket, key, query):
        item = self.found(bucket, key, query)
        if self.command == "DELETE":
            del self.keys(bucket)[key]
            return 204, b"", {}
        if query.get("alt") != "media":
            return 200, item.about, {}
        data, status = item.data, 200
        headers = {
            "x-goog-generation": item.about["generation"],
            "x-goog-hash": f"crc32c={item.about['crc32c']},md5={item.about['md5Hash']}",
            "x-goog-stored-content-length": str(len(data)),
            "Content-Type": item.about["contentType"],
        }
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            start = int(first) if first else max(len(data) - int(last), 0)
            end = int(last) + 1 if first and last else len(data)
            if start >= len(data):
                raise Refused(416)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}"
            data, status = data[start:end], 206
        return status, data, headers

    def move(self, bucket, key, to_key, query):
        token = self.headers.get("X-Goog-GCS-Idempotency-Token")
        if token not in self.server.moves:
            source = self.found(bucket, key)
            about = self.server.store(bucket, to_key, source.data, source.about)
            del self.keys(bucket)[key]
            self.server.moves[token] = about
        return self.server.moves[token]

    def listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        entries = {}
        for key, item in self.keys(bucket).items():
            if key.startswith(prefix) and key >= query.get("startOffset", ""):
                rest = key[len(prefix) :]
                cut = rest.find(delimiter) if delimiter else -1
                name = key if cut < 0 else prefix + rest[: cut + 1]
                entries[name] = item.about if cut < 0 else None
        names = sorted(name for name in entries if name > query.get("pageToken", ""))
        page = names[: int(query.get("maxResults", 1000))]
        answer = {"kind": "storage#objects"}
        answer["items"] = [entries[name] for name in page if entries[name]]
        answer["prefixes"] = [name for name in page if not entries[name]]
        if len(page) < len(names):
            answer["nextPageToken"] = page[-1]
        return answer

    def upload(self, bucket, query, body):
        self.keys(bucket)
        kind = query.get("uploadType")
        if kind == "media":
            about, data = {"name": query["name"]}, body
        elif kind == "multipart":
            mark = (
                b"--" + re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
            )
            _, first, second = body.removesuffix(mark + b"--").split(mark, 2)
            about = json.loads(re.split(rb"\r?\n\r?\n", first, maxsplit=1)[1])
            data = re.split(rb"\r?\n\r?\n", second, maxsplit=1)[1]
            data = data.removesuffix(b"\n").removesuffix(b"\r")
        elif "upload_id" in query:
            return self.go_on(bucket, query["upload_id"], body)
        else:
            number = str(next(self.server.generations))
            about = json.loads(body or b"{}") | ({"name": query["name"]} if "name" in query else {})
            self.server.uploads[number] = bytearray(), about, query
            host = f"http://127.0.0.1:{self.server.server_port}"
            location = f"{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
            return 200, {}, {"Location": f"{location}&upload_id={number}"}
        self.check(bucket, about["name"], query)
        return 200, self.server.store(bucket, about["name"], data, about), {}

    def go_on(self, bucket, number, body):
        """The next piece of a resumable upload."""
        data, about, query = self.server.uploads[number]
        first, total = re.fullmatch(
            r"bytes (\*|\d+)[-\d]*/(\*|\d+)", self.headers["Content-Range"]
        ).groups()
        if first != "*":
            data[int(first) :] = body
        if total == "*" or len(data) < int(total):
            return 308, {}, {"Range": f"bytes=0-{len(data) - 1}"}
        self.check(bucket, about["name"], query)
        return 200, self.server.store(bucket, about["name"], bytes(data), about), {}
