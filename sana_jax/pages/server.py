"""The demo's server: its page, and pictures drawn for its form. Nothing is written to disk.

    GET  /      the page
    POST /draw  the form as JSON; the answer is a line of JSON for each event:
                {"turn": true}, {"step": 3, "steps": 20}, then {"pictures": [...], "command": "..."}
                or {"error": "..."}

A page of another site must not draw here: it can neither send JSON without being asked by the
browser for a permission that is never given, nor reach this server by a name of its own.
"""

import base64
import ipaddress
import json
import logging
import socket
import sys
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sana_jax.pages.page import for_script, render
from sana_jax.pages.studio import Studio
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import parse_json

MAX_BODY = 2**22  # bytes of a form
TIMEOUT = 60.0  # seconds for a request to arrive


class Server(ThreadingHTTPServer):
    """Serves a studio at `url` until the process ends."""

    daemon_threads = True

    def __init__(self, studio: Studio, host: str, port: int):
        """Raises UserError where the address cannot be used."""
        self.studio = studio
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__(address, Handler)
        except (OSError, UnicodeError) as error:  # of a name that no host can have
            reason = f"{getattr(error, 'strerror', None) or error}; give another"
            raise UserError(f"--host={host} --port={port}: {reason}") from None
        self.is_local = ipaddress.ip_address(self.server_address[0]).is_loopback

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps quiet about a browser that has gone away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = TIMEOUT

    def do_GET(self) -> None:
        if not self._is_meant():
            return
        if self.path != "/":
            self.send_error(404)
            return
        content = render("demo.html", self.server.studio.form)
        self._start("text/html; charset=utf-8", len(content))
        self.wfile.write(content)

    def do_POST(self) -> None:
        if not self._is_meant():
            return
        if self.path != "/draw" or self.headers.get_content_type() != "application/json":
            self.send_error(404)
            return
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > MAX_BODY:
            self.send_error(413)
            return
        body = self.rfile.read(int(size))
        self._start("application/x-ndjson")
        try:
            self._tell(self._draw(body))
        except UserError as error:
            self._tell({"error": str(error)})
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc()
            self._tell({"error": "a bug of the demo; its terminal has a traceback"})

    def log_message(self, format: str, *args: Any) -> None:
        logging.debug(format, *args)

    def _draw(self, body: bytes) -> dict[str, Any]:
        try:
            form = parse_json(body)
        except ValueError as error:
            raise UserError(f"the form is not JSON ({error})") from None
        if not isinstance(form, dict):
            raise UserError("the form is no object of JSON")
        studio = self.server.studio
        drawn = studio.draw(
            form,
            lambda: self._tell({"turn": True}),
            lambda step, steps: self._tell({"step": step, "steps": steps}),
        )
        pictures = [
            {
                "file": each.file,
                "uri": "data:image/png;base64," + base64.b64encode(each.content).decode(),
                "settings": for_script(each.settings),
            }
            for each in drawn
        ]
        return {"pictures": pictures, "command": studio.command(form)}

    def _tell(self, event: dict[str, Any]) -> None:
        """Sends an event. Where the browser has gone, ConnectionError ends the drawing."""
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def _start(self, kind: str, size: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def _is_meant(self) -> bool:
        """Refuses requests of other sites, by their names for this server or for themselves."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        name = host.rpartition(":")[0] or host
        known = not self.server.is_local or name in ("localhost", "[::1]") or _is_loopback(name)
        if known and origin in (None, f"http://{host}"):
            return True
        self.send_error(403)
        return False


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
