"""The PROXY protocol, version 2: the client's address, in front of what it sends. Pure.

    client ──TCP──▶ load balancer ──TCP──▶ gateway       header, then the client's bytes: a TLS handshake, or HTTP

A load balancer that forwards connections, and not requests, can't add `X-Forwarded-For`. With this header it tells the
address of its client all the same (https://www.haproxy.org/download/3.2/doc/proxy-protocol.txt, section 2.2):

    bytes   0-11  12               13                     14-15    16-
            magic version, command family and transport   length   addresses, then other fields

The header isn't authenticated, so that it only counts from known proxies; and whether there is one is never guessed, as
the specification demands: where it is expected, a connection without it is refused. Version 1, a line of text, is
refused too: its length isn't known in advance, and all that send it also send version 2.
"""

import struct
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

START = 16
"""Bytes that every header begins with, from which its length is known."""
MAX_REST = 1024 - START
"""Bytes after them. Addresses take 12, 36 or 216 bytes; other fields, such as a VPC endpoint's name, some dozens."""
MAGIC = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = 0x20, 0x21
_UNSPECIFIED, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31
_ADDRESS_BYTES = {_UNSPECIFIED: 0, _TCP4: 12, _TCP6: 36, _UNIX: 216}


class HeaderProblem(StrEnum):
    """Why a connection is refused that should begin with a header: a metric's label."""

    MISSING = "proxy_header_missing"
    VERSION_1 = "proxy_header_version_1"
    MALFORMED = "proxy_header_malformed"


class ProxyHeaderError(Exception):
    """The first bytes of a connection are no header that we accept."""

    def __init__(self, problem: HeaderProblem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


def rest_length(start: bytes) -> int:
    """Return how many bytes of the header follow its first 16. Raises ProxyHeaderError."""
    if start.startswith(b"PROXY "):
        raise ProxyHeaderError(HeaderProblem.VERSION_1, "expected version 2 of the PROXY protocol, got version 1")
    if not start.startswith(MAGIC):
        raise ProxyHeaderError(HeaderProblem.MISSING, "expected a header of the PROXY protocol")
    command, transport, length = struct.unpack("!BBH", start[12:START])
    if command not in (_LOCAL, _PROXY):
        message = f"expected version 2 and the command LOCAL or PROXY (20 or 21), got {command:02x}"
        raise ProxyHeaderError(HeaderProblem.MALFORMED, message)
    if length > MAX_REST:
        message = f"expected a header of at most {START + MAX_REST} bytes, got {START + length}"
        raise ProxyHeaderError(HeaderProblem.MALFORMED, message)
    if command == _PROXY:
        if transport not in _ADDRESS_BYTES:
            message = f"expected a TCP connection (11 or 21), got {transport:02x}"
            raise ProxyHeaderError(HeaderProblem.MALFORMED, message)
        if length < _ADDRESS_BYTES[transport]:
            message = f"expected at least {_ADDRESS_BYTES[transport]} bytes of addresses, got {length}"
            raise ProxyHeaderError(HeaderProblem.MALFORMED, message)
    return int(length)


def source_address(start: bytes, rest: bytes) -> str | None:
    """Return the client's IP address: "" if the proxy doesn't tell it, None if the proxy itself is the client (LOCAL).

    `start` is what `rest_length` accepted, `rest` the bytes that follow it.
    """
    if start[12] == _LOCAL:
        return None
    if start[13] == _TCP4:
        return str(IPv4Address(rest[:4]))
    if start[13] == _TCP6:
        return str(IPv6Address(rest[:16]))
    return ""
