"""Listening at an address that somebody has given, and why that isn't possible."""

import os
import socket

from aiohttp import web

from gateway.model import AddressUnavailableError
from gateway.settings import Address


async def listen_at(address: Address, runner: web.AppRunner, *, where: str) -> Address:
    """Serve at a flag's address; return it with its port. Raises AddressUnavailableError."""
    try:
        await web.TCPSite(runner, *address).start()
    except OSError as error:
        raise cannot_listen(where, address, error) from error
    return Address(*runner.addresses[0][:2])


def cannot_listen(where: str, address: Address, error: OSError) -> AddressUnavailableError:
    """Return the error for a flag's address at which we can't listen."""
    if isinstance(error, socket.gaierror):  # whose number isn't the system's
        expected, reason = "a host that has an address", error.strerror or "none"
    else:
        # asyncio's own message repeats the address.
        expected, reason = "an address that is free", os.strerror(error.errno or 0)
    return AddressUnavailableError(f"{where} {address}: expected {expected}, got {reason.lower()}")
