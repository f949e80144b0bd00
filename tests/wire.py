"""A wire between a client and a server that can be cut or made slow; the server behind it is real."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlparse


class Wire:
    """Forwards a local port to a server's.

    Attributes:
        cut_after: bytes towards the server after which all connections break; None for never.
        on_cut, on_refusal: called when that happens, and after each refused connection.
        refusals: so many connections after the cut are closed at once, then the server has returned.
        bytes_per_s: of all connections towards the server together; None for as fast as it goes.
        cuts: how often the wire was cut.
        refused: connections that were closed at once, because of `refusals` or because there is no server.
    """

    def __init__(self, endpoint: str) -> None:
        parsed = urlparse(endpoint)
        self._target = (parsed.hostname, parsed.port)
        self.cut_after: int | None = None
        self.on_cut: Callable[[], object] = lambda: None
        self.on_refusal: Callable[[], object] = lambda: None
        self.bytes_per_s: float | None = None
        self.refusals = self.cuts = self.refused = self._sent = 0
        self._lock, self._open = threading.Lock(), set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End all connections and listen no more."""
        self._listener.close()
        self._break()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = self._reach()
            if server is None:
                self.refused += 1
                client.close()
                self.on_refusal()
                continue
            with self._lock:
                self._open |= {client, server}
            for source, sink, upwards in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, upwards), daemon=True).start()

    def _reach(self) -> socket.socket | None:
        """A connection to the server, if it is to be had."""
        if self.cuts and self.refused < self.refusals:
            return None
        with contextlib.suppress(ConnectionError):
            return socket.create_connection(self._target)
        return None

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if upwards and self._is_cut(len(data)):
                    self.on_cut()
                    self._break()
                    return
                if upwards and self.bytes_per_s:
                    time.sleep(len(data) / self.bytes_per_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _is_cut(self, number: int) -> bool:
        with self._lock:
            self._sent += number
            if self.cuts or self.cut_after is None or self._sent < self.cut_after:
                return False
            self.cuts += 1
            return True

    def _break(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
