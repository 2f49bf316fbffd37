"""A milter that takes everything but at the end of a message, where the sender says what it answers.

As much of the protocol as Postfix speaks to it: options, then a reply to each command (Sendmail's mfdef.h).
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from collections.abc import Mapping
from typing import Self

_OPTIONS = b"O" + struct.pack(">III", 6, 0, 0)
_CONTINUE = b"c"
_ASKS_NOTHING = b"DAKQ"  # macros, abort, the next connection, the end
HANGS_UP = b""


class Milter:
    """``ends`` maps a sender to what is answered at the end of its message: a packet, or HANGS_UP."""

    def __init__(self, ends: Mapping[str, bytes]) -> None:
        ends = {sender: bytes(packet) for sender, packet in ends.items()}

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                end = _CONTINUE
                while (packet := _read(self.request)) is not None:
                    command = packet[:1]
                    if command == b"M":
                        sender = packet[1:].partition(b"\0")[0].decode().strip("<>")
                        end = ends.get(sender, _CONTINUE)
                    if command == b"E" and end == HANGS_UP:
                        return
                    if command not in _ASKS_NOTHING:
                        answer = _OPTIONS if command == b"O" else end if command == b"E" else _CONTINUE
                        self.request.sendall(struct.pack(">I", len(answer)) + answer)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        """As Postfix names it."""
        return f"inet:127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _read(connection: socket.socket) -> bytes | None:
    """Return the next packet, None at the end."""
    try:
        head = connection.recv(4, socket.MSG_WAITALL)
        if len(head) < 4:
            return None
        return connection.recv(struct.unpack(">I", head)[0], socket.MSG_WAITALL)
    except OSError:
        return None
