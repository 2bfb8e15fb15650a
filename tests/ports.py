"""A port for processes that find each other, or a server that a test starts."""

import socket


def free_port() -> int:
    """One that nobody listens at on this machine now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
