"""Server-sent events, as far as the API tells them (https://html.spec.whatwg.org/#parsing-an-event-stream). Pure."""

from typing import NamedTuple

from gateway.model import GatewayError

LARGEST = 8 << 20
"""Bytes of a message, at most: of an event that 10,000 routes deliver, the API tells a megabyte or two."""


class MalformedStreamError(GatewayError):
    """Who tells isn't the API of a gateway."""


class Message(NamedTuple):
    """A message: `id` is the last one that was told, by this message or before it."""

    id: str
    event: str
    data: str


class Messages:
    """Reads a stream piece by piece. A message is complete at its empty line: what is cut before it was never told."""

    def __init__(self) -> None:
        self._rest = b""
        self._size = 0
        self._id = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that are complete by now. Raises MalformedStreamError for one that is too large."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        found: list[Message] = []
        for line in lines:
            self._size += len(line)
            if line.rstrip(b"\r"):
                self._field(line.rstrip(b"\r").decode(errors="replace"))
                continue
            if self._data:
                found.append(Message(self._id, self._event or "message", "\n".join(self._data)))
            self._event, self._data, self._size = "", [], 0
        if self._size + len(self._rest) > LARGEST:
            raise MalformedStreamError(f"expected messages of at most {LARGEST} bytes, got a larger one")
        return found

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "id":
                self._id = value
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case _:  # a comment, or a field that nobody asked for
                pass
