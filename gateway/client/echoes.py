"""Hides what an event's source hides (`redact:`) in texts that may repeat it. Pure."""

from dataclasses import replace

from gateway.bodies.redaction import HIDDEN, Redacted
from gateway.client.masking import MIN_SECRET, Mask
from gateway.model import ResponseExcerpt


class Echoes:
    """Hides an event's hidden values in other texts: what a destination responded, why an expression failed.

    A value of four bytes and more is hidden in any form in which a text may have it, a shorter one where it stands by
    itself. If not all values are known, because the body couldn't be read or has too many, the whole text is hidden.
    """

    def __init__(self, redacted: Redacted | None) -> None:
        values = () if redacted is None else redacted.values
        self._is_all = redacted is not None and redacted.has_more
        self._mask = Mask(
            [value for value in values if len(value) >= MIN_SECRET],
            words=[value for value in values if 0 < len(value) < MIN_SECRET],
        )

    def bytes(self, text: bytes, *, is_cut: bool = False) -> bytes:
        """Return a text without them; `is_cut`: it may end in the middle of one."""
        if self._is_all:
            return HIDDEN.encode() if text else text
        return self._mask.masked_beginning(text) if is_cut else self._mask.masked(text)

    def text(self, text: str) -> str:
        """Return a text without them."""
        if self._is_all:
            return HIDDEN if text else text
        return self._mask.masked_text(text)

    def excerpt(self, excerpt: ResponseExcerpt) -> ResponseExcerpt:
        """Return what was kept of a response without them."""
        return replace(
            excerpt,
            headers=tuple([(self.bytes(name), self.bytes(value)) for name, value in excerpt.headers]),
            body=self.bytes(excerpt.body, is_cut=excerpt.is_body_cut),
        )
