"""Why a process can't listen at an address, for whoever has given that."""

import os
import socket

from gateway.model import AddressUnavailableError
from gateway.settings import Address


def cannot_listen(where: str, address: Address, error: OSError) -> AddressUnavailableError:
    """Return the error for a flag's address at which we can't listen."""
    if isinstance(error, socket.gaierror):  # whose number isn't the system's
        expected, reason = "a host that has an address", error.strerror or "none"
    else:
        # asyncio's own message repeats the address.
        expected, reason = "an address that is free", os.strerror(error.errno or 0)
    return AddressUnavailableError(f"{where} {address}: expected {expected}, got {reason.lower()}")
