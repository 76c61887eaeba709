"""Real servers on this machine, for tests of their clients."""

import contextlib
import http.server
import itertools
import json
import socket
import threading

import pytest


def completion(texts, before="", after=""):
    message = {"role": "assistant", "content": before + json.dumps(texts) + after}
    return json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()


def answers(body, status=200, **headers):
    def act(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return act


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what these tests are about


@contextlib.contextmanager
def chat_server(*acts):
    """Serves with `acts` in turn, the last for ever; yields the base URL and the requests that came."""
    requests = []
    turns = itertools.chain(acts, itertools.repeat(acts[-1]))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append({"path": self.path, "key": self.headers["Authorization"], **json.loads(body)})
            next(turns)(self)

        def log_message(self, *arguments):
            pass

    httpd = _Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@contextlib.contextmanager
def bucket_server():
    """A real S3 server on this machine; yields the URL of a bucket."""
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    thread = server.ThreadedMotoServer("127.0.0.1", port)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        bucket = f"bucket-{port}"  # what one server holds, the next of this process holds, too
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}/some where"
    s3fs.S3FileSystem.clear_instance_cache()
    thread.stop()
