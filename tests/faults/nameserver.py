"""A nameserver that answers nobody, until it is told to: every name is then 127.0.0.1.

`through` is what runs a gateway that asks it, in a mount namespace with a resolv.conf of its own; that takes root.
"""

import asyncio
import socket
import subprocess
from pathlib import Path
from typing import Self, cast

import pytest
from typing_extensions import override

ADDRESS = "127.77.0.53"  # On the loopback interface; resolv.conf knows no other port than 53.
SCRIPT = 'mount --bind "$0" /etc/resolv.conf && mount --bind "$1" /etc/nsswitch.conf && shift && exec "$@"'
HEADER_BYTES = 12
FOUND, NOTHING_OF_THIS_TYPE = 1, 0
TYPE_A = 1


class Nameserver(asyncio.DatagramProtocol):
    """A context manager. Skips the test where this machine lets us have no such thing."""

    def __init__(self, folder: Path) -> None:
        self.is_silent = True
        self.asked = 0
        resolv, nsswitch = folder / "resolv.conf", folder / "nsswitch.conf"
        # Longer than the gateway waits for any name.
        resolv.write_text(f"nameserver {ADDRESS}\noptions timeout:10 attempts:2\n")
        nsswitch.write_text("hosts: files dns\n")
        self.through = ("unshare", "--mount", "sh", "-c", SCRIPT, str(resolv), str(nsswitch))
        self._transport: asyncio.DatagramTransport

    async def __aenter__(self) -> Self:
        tried = await asyncio.to_thread(subprocess.run, [*self.through, "true"], capture_output=True, check=False)
        if tried.returncode:
            pytest.skip(f"needs a mount namespace (root): {tried.stderr.decode().strip()}")
        try:
            loop = asyncio.get_running_loop()
            await loop.create_datagram_endpoint(lambda: self, (ADDRESS, 53), family=socket.AF_INET)
        except OSError as error:
            pytest.skip(f"needs to listen on {ADDRESS}:53 (root): {error}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._transport.close()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    @override
    def datagram_received(self, data: bytes, addr: tuple[str | int, int]) -> None:
        self.asked += 1
        if self.is_silent:
            return
        # RFC 1035 §4: the header, the question as it came, and where it asked for an IPv4 address, one answer.
        end = data.index(b"\0", HEADER_BYTES) + 5
        is_address = int.from_bytes(data[end - 4 : end - 2], "big") == TYPE_A
        count = FOUND if is_address else NOTHING_OF_THIS_TYPE
        head = data[:2] + b"\x81\x80\0\1" + count.to_bytes(2, "big") + bytes(4)
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton("127.0.0.1") if is_address else b""
        self._transport.sendto(head + data[HEADER_BYTES:end] + answer, addr)
