"""Network addresses on a command line: HOST:PORT taken apart, and whether it can be listened on."""

from __future__ import annotations

import socket

from fedqlora.errors import ConfigError


def split_address(address: str, option: str) -> tuple[str, int]:
    """Splits HOST:PORT; `option` is the command-line option that it came from.

    Raises:
        ConfigError: it has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{option} {address} is not HOST:PORT: write for example localhost:9092.")
    return host.strip("[]"), int(port)


def check_port_is_free(host: str, port: int, option: str) -> None:
    """Refuses an address on which something listens already, or which is not of this machine.

    Raises:
        ConfigError: it cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Nothing can listen on {host}:{port} ({error.strerror}): stop what uses it, or "
                f"choose another address with {option}."
            ) from None


def find_free_port() -> int:
    """Returns a loopback port that is free now; another process may still take it first."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
