"""What the kernel knows of a connection, and no event loop tells."""

import termios
from fcntl import ioctl

_NONE = bytes(4)  # an int of 0


def has_unread(descriptor: int) -> bool:
    """Return whether the kernel has bytes that this process hasn't read yet. Raises OSError if it is closed."""
    return ioctl(descriptor, termios.FIONREAD, _NONE) != _NONE
