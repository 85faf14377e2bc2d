"""A chat endpoint on loopback that answers by what it is asked, and misbehaves as it is told."""

import base64
import contextlib
import hashlib
import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

KEY = "sk-loopback-7f3a9c"


def caption(question: dict) -> str:
    """What a model says: of the picture, the model and the seed alone."""
    text, picture = question["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        size = image.size
    told = f"{text['text']} {question['model']} {question['seed']}".encode()
    return f"{question['model']} {size} {hashlib.sha256(told + data).hexdigest()[:12]}\n é"


class Server:
    """`address` takes questions while the context lasts.

    Attributes:
      faults: of the first tries of every question, one each; see `_Handler.do_POST`.
      answered: how often each answer was sent whole.
      keys: what came as Authorization.
      most: questions that were worked on at once.
      on_answer: called with the number of answers that were sent so far.
    """

    def __init__(self, *faults, on_answer=lambda count: None):
        self.faults, self.on_answer = faults, on_answer
        self.answered, self.tries, self.keys = Counter(), Counter(), set()
        self.times, self.bodies = [], []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __enter__(self):
        self._http = _Quiet(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._http.ours = self
        self.address = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        pass  # of clients that were killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        ours = self.server.ours
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = json.loads(body)
        with ours.lock:
            ours.times.append(time.monotonic())
            ours.bodies.append(question)
            ours.keys.add(self.headers["Authorization"])
            number = ours.tries[body]
            ours.tries[body] += 1
            ours.now += 1
            ours.most = max(ours.most, ours.now)
        fault = ours.faults[number] if number < len(ours.faults) else None
        if isinstance(fault, dict):  # of models
            fault = fault.get(question["model"])
        with contextlib.suppress(OSError):  # of a client that was killed
            self._answer(question, fault, ours)
        with ours.lock:
            ours.now -= 1

    def _answer(self, question, fault, ours):
        said = {"error": {"message": f"you gave {self.headers['Authorization']}"}}
        text = caption(question)
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        whole = {"choices": [choice], "usage": {"prompt_tokens": 900, "completion_tokens": 11}}
        if callable(fault):
            whole = fault(whole)
        elif fault == "slow":
            time.sleep(0.3)
        elif fault == "hang up":
            self.close_connection = True
            return
        elif isinstance(fault, tuple):  # a status and headers
            return self._send(json.dumps(said).encode(), *fault)
        data = json.dumps(whole).encode()
        if fault == "broken":
            return self._send(data[:40])
        if fault == "web page":
            return self._send(b"<html>busy</html>")
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:30])
            self.close_connection = True
            return
        with ours.lock:
            ours.answered[text] += 1
            count = ours.answered.total()
        ours.on_answer(count)
        self._send(data)

    def _send(self, data, status=200, headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
