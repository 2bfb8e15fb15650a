"""Servers of both protocols of buckets, and a proxy before them that plays what goes wrong between here and there."""

import contextlib
import functools
import http.client
import http.server
import os
import threading
import time
from http import HTTPStatus

BUCKET = "runs"
_HOP = ("transfer-encoding", "connection", "keep-alive", "content-length", "date", "server")


class Proxy:
    """Passes requests on to a server, but for what `fault(number, method, path)` says of them.

    It returns None, seconds to wait before, a status to answer instead (429, 503), or "drop": the connection is closed
    without an answer, and "cut": after half of it.
    """

    def __init__(self, port: int):
        self.fault = lambda number, method, path: None
        self.requests = 0
        self._server = _serve(functools.partial(_Pass, self, port))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def faulty(self, fault):
        """While it is open, requests are counted from 1 and go wrong."""
        self.requests, self.fault = 0, fault
        try:
            yield self
        finally:
            self.fault = lambda number, method, path: None


class _Pass(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy, port, *args):
        self._proxy, self._port = proxy, port
        super().__init__(*args)

    def _pass(self):
        self._proxy.requests += 1
        body = self._body()
        fault = self._proxy.fault(self._proxy.requests, self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, HTTPStatus):
            status, headers, data = fault, [], b""
        else:
            time.sleep(fault if isinstance(fault, float) else 0)
            status, headers, data = self._ask(body)
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)) if self.command != "HEAD" else dict(headers).get("n", "0"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection |= fault == "cut"

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _ask(self, body: bytes):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP]
        if self.command == "HEAD":
            kept.append(("n", answer.headers.get("Content-Length", "0")))
        connection.close()
        return answer.status, kept, data

    def log_message(self, format, *args):
        pass


def _serve(handler) -> http.server.ThreadingHTTPServer:
    server = type("Server", (http.server.ThreadingHTTPServer,), {"request_queue_size": 256})(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # clients hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _name_of_upload(request) -> str:
    if "name" in request.query:
        return request.query["name"][0]
    return request.data.get("meta", request.data)["name"]


def start_gcs() -> Proxy:
    """gcp-storage-emulator, with generations that requests depend on: TensorStore needs them, and it has none."""
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets, objects

    lock = threading.RLock()

    def generation(request, storage, name: str) -> str:
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            return "0"

    def guarded(original, name_of):
        def handle(request, response, storage, *args, **kwargs):
            with lock:
                name, query = name_of(request), request.query
                found = generation(request, storage, name)
                if found not in query.get("ifGenerationMatch", [found]):
                    response.status = HTTPStatus.PRECONDITION_FAILED
                elif found in query.get("ifGenerationNotMatch", []) and found != "0":
                    response.status = HTTPStatus.NOT_MODIFIED
                else:
                    response["x-goog-generation"] = found
                    original(request, response, storage, *args, **kwargs)

        return handle

    objects.download = guarded(objects.download, lambda request: request.params["object_id"])
    objects.insert = guarded(objects.insert, _name_of_upload)
    objects.delete = guarded(objects.delete, lambda request: request.params["object_id"])
    from gcp_storage_emulator import server
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True, data_dir=None, project_number=None)
    buckets.create_bucket(BUCKET, storage)
    proxy = Proxy(_serve(functools.partial(server.RequestHandler, storage)).server_port)
    os.environ |= {"TENSORSTORE_GCS_HTTP_URL": proxy.url, "STORAGE_EMULATOR_HOST": proxy.url}
    return proxy


def start_s3() -> Proxy:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port()[1])
    os.environ |= {
        "AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    import fsspec

    fsspec.filesystem("s3").mkdir(BUCKET)
    return proxy
