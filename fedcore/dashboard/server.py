"""Serves the live page: plain HTTP on loopback, read only, new content by server-sent events.

Whoever can open the page sees clients' names and figures, never data or models. Requests under other host names are
refused: a foreign web page in the same browser could otherwise read this one through a name of its own (DNS rebinding).
"""
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from markupsafe import Markup

from fedcore.dashboard.feed import Feed
from fedcore.dashboard.view import page, pieces
from fedcore.errors import BadInput

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
REFRESH_S = 1.0
# A browser that takes nothing for so long has gone.
STALLED_S = 20.0
MOST_VIEWERS = 32
CLOSING_S = 3.0

Snapshot = Callable[[], Mapping[str, Any]]


def serve_dashboard(snapshot: Snapshot, folder: Path | None, port: int, host: str = "127.0.0.1") -> "Dashboard":
    """Return the live page of a run, served until it is closed.

    Args:
        snapshot: says who is connected and what each does; called once a second while somebody looks.
        folder: of the run.
        port: 0 takes a free one.
        host: to listen on; behind another than loopback everybody who reaches the port can look.

    Raises:
        BadInput: the port cannot be had.
    """
    return Dashboard(snapshot, folder, port, host)


class Dashboard:
    """A live page, for as long as its context is open; give it the run's rows.

    Attributes:
        url: where to find it.
    """

    def __init__(self, snapshot: Snapshot, folder: Path | None, port: int, host: str = "127.0.0.1"):
        self._snapshot, self.feed = snapshot, Feed(folder)
        try:
            self._http = _Server((host, port), self)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "there is no such port"
            raise BadInput(f"--dashboard {port}: {host}:{port} cannot be listened on ({reason}). "
                           "Choose another port.") from error
        self.url = f"http://{host}:{self._http.server_address[1]}/"
        self.over = threading.Event()
        self._viewers = threading.Semaphore(MOST_VIEWERS)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.2,), name="fedcore-dashboard",
                                        daemon=True)
        self._thread.start()

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Take note of a row of metrics."""
        self.feed.on_row(row)

    def on_task(self, row: Mapping[str, Any]) -> None:
        """Take note of a task that ended, a row of the timeline."""
        self.feed.on_task(row)

    def pieces(self) -> dict[str, Markup]:
        """Return what there is to see now."""
        seen, silent_s = self.feed.look()
        return pieces(seen, silent_s, self._snapshot())

    def close(self) -> None:
        """Send the last state to whoever looks, and stop."""
        if not self.over.is_set():
            self.over.set()
            self._http.shutdown()
            self._thread.join()
            self._http.wait_for_viewers(CLOSING_S)
            self._http.server_close()

    def admit(self) -> bool:
        """Let one more viewer in, if there is room; `leave` must follow."""
        return self._viewers.acquire(blocking=False)

    def leave(self) -> None:
        """Note that a viewer has gone."""
        self._viewers.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    """One thread for each request; those that watch do not keep the process alive."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], dashboard: Dashboard):
        self.dashboard = dashboard
        self._watching = 0
        self._changed = threading.Condition()
        super().__init__(address, _Handler)

    def watch(self, change: int) -> None:
        """Count who watches."""
        with self._changed:
            self._watching += change
            self._changed.notify_all()

    def wait_for_viewers(self, seconds: float) -> None:
        """Wait until everybody has the last state, or for so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._watching == 0, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a browser that goes away in the middle of an answer is no news."""


class _Handler(BaseHTTPRequestHandler):
    """Answers a browser."""

    server: _Server
    server_version, sys_version = "fedcore", ""
    timeout = STALLED_S

    def do_GET(self) -> None:
        """Answer with the page, or with its news."""
        dashboard = self.server.dashboard
        if not self._is_for_us():
            self._answer(403, "text/plain", "This page answers under its own address only.\n")
        elif self.path == "/":
            nonce = secrets.token_urlsafe(16)
            self._answer(200, "text/html; charset=utf-8", page(dashboard.pieces(), nonce), {
                "Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{nonce}'; "
                                           "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
                                           "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            })
        elif self.path != "/events":
            self._answer(404, "text/plain", "There is nothing here.\n")
        elif not dashboard.admit():
            self._answer(503, "text/plain", f"{MOST_VIEWERS} viewers are enough.\n")
        else:
            self.server.watch(1)
            try:
                self._tell_news(dashboard)
            finally:
                self.server.watch(-1)
                dashboard.leave()

    def _is_for_us(self) -> bool:
        """Say whether a request names this server as a person would who may look."""
        asked = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        bound = str(self.server.server_address[0])
        return bound not in LOOPBACK or asked in LOOPBACK

    def _tell_news(self, dashboard: Dashboard) -> None:
        self.send_response(200)
        self._send_headers({"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        shown: dict[str, Markup] = {}
        while True:
            over = dashboard.over.is_set()
            now = dashboard.pieces()
            news = {name: html for name, html in now.items() if shown.get(name) != html}
            self.wfile.write(f"data: {json.dumps(news)}\n\n".encode())
            if over:
                self.wfile.write(b"event: over\ndata: \n\n")
                return
            shown = now
            dashboard.over.wait(REFRESH_S)

    def _answer(self, status: int, kind: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        self._send_headers({"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store",
                            **(headers or {})})
        self.wfile.write(body)

    def _send_headers(self, headers: Mapping[str, str]) -> None:
        safe = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in {**headers, **safe}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on the terminal, which shows the run."""
