"""What the kernel knows of a connection, and no event loop tells."""

import sys
import termios
from fcntl import ioctl

_NONE = bytes(4)  # an int of 0


def has_unread(descriptor: int) -> bool:
    """Return whether the kernel has bytes that this process hasn't read yet. Raises OSError if it is closed."""
    return ioctl(descriptor, termios.FIONREAD, _NONE) != _NONE


def has_unsent(descriptor: int) -> bool:
    """Return whether the kernel has bytes that the other end's hasn't taken yet. Raises OSError if it is closed.

    Only Linux tells (SIOCOUTQ, https://man7.org/linux/man-pages/man7/tcp.7.html).
    """
    return sys.platform == "linux" and ioctl(descriptor, termios.TIOCOUTQ, _NONE) != _NONE
