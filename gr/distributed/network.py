"""Where processes meet: checked with plain sockets first, because torch tells of a bad address in C++ stack traces."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import time

from gr.errors import UserError

_SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface (netdevice(7))."""


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """``host:port`` as its two parts.

    Raises:
        UserError: It is not of that form.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"meeting place {endpoint!r} must be HOST:PORT, for instance node0:29500")
    return host, int(port)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def check_port_free(port: int) -> None:
    """Whether this machine can listen there.

    Raises:
        UserError: Somebody does already.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what an ended run left is no listener
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of this machine cannot be listened on ({error.strerror}); "
                "end the run that holds it, or choose another port"
            ) from None


def check_reachable(host: str, port: int, patience_s: float) -> None:
    """Waits until somebody listens at ``host:port``.

    Raises:
        UserError: The name is unknown, or nobody does within ``patience_s`` seconds.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, end - time.monotonic()))):
                return
        except socket.gaierror as error:
            raise UserError(f"the name of the meeting place {host}:{port} is unknown ({error.strerror})") from None
        except OSError as error:
            if time.monotonic() + 0.2 >= end:
                raise UserError(
                    f"the meeting place {host}:{port} cannot be reached ({error.strerror or error}) for "
                    f"{patience_s:g} s; start node 0 first, name its address, and see that no firewall stands between"
                ) from None
        time.sleep(0.2)


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to ``host``; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))
        except socket.gaierror as error:
            raise UserError(f"the name of the meeting place {host}:{port} is unknown ({error.strerror})") from None
        except OSError as error:
            raise UserError(f"no way leads to the meeting place {host}:{port} ({error.strerror})") from None
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None where the system does not say (not Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None
