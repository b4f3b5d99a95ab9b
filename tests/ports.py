"""Free ports for servers of tests that take a port and no socket."""

import socket
import time


def free_ports(number: int) -> list[int]:
    """Free ports; those 10,000 higher, of a cluster bus, are free too. All are below those of outgoing connections."""
    found: list[int] = []
    for port in range(11_000 + time.monotonic_ns() // 1000 % 10_000, 22_000):
        try:
            for each in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")
