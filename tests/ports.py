"""Ports for servers that are started a moment later, as processes of their own."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Above Ray's ports of workers, and below those that the system gives to whoever asks for any: among those an outgoing
# connection of another process may take a port before its server does.
FIRST, LAST = 20_000, 32_000


def free_ports(count: int) -> list[int]:
    """That many ports of 127.0.0.1 that nobody listens on now."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(FIRST, LAST), k=LAST - FIRST):
        if len(found) == count:
            break
        with suppress(OSError), socket.create_server(("", port)):
            found.append(port)
    return found
