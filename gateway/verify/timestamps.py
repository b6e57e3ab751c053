"""Signed timestamps: where one is, how it is written, and how far from now it may be."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from gateway.verify.content import FieldPath
from gateway.verify.request import Reason, refused

MAX_TIMESTAMP_BYTES = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Timestamp:
    """Where a timestamp is: in a header, an element of the signature's header, or a field of the JSON body.

    An element is known by its prefix; without one it is the first.
    """

    header: str | None = None
    name: bytes = b""
    prefix: bytes = b""
    path: FieldPath = ()
    unit: str
    tolerance: float
    is_element: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_element", self.header is None and not self.path)

    def check(self, text: bytes, now: float) -> None:
        at = self._read(text)
        if at is None:
            expected = {"s": "Unix seconds", "ms": "Unix milliseconds", "iso": "an RFC 3339 time"}[self.unit]
            raise refused(Reason.MALFORMED_TIMESTAMP, f"expected a timestamp in {expected}, got something else")
        if abs(now - at) > self.tolerance:
            raise refused(
                Reason.STALE_TIMESTAMP,
                f"expected a timestamp at most {self.tolerance:g} s from now, got one {abs(now - at):.0f} s "
                + ("ago" if at < now else "ahead"),
            )

    def write(self, now: float) -> str:
        if self.unit == "iso":
            return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return str(int(now * 1000) if self.unit == "ms" else int(now))

    def _read(self, text: bytes) -> float | None:
        if len(text) > MAX_TIMESTAMP_BYTES:
            return None
        if self.unit != "iso":
            # `isdigit` of bytes is ASCII only, so that neither signs, underscores nor other scripts' digits pass.
            return int(text) / (1000 if self.unit == "ms" else 1) if text.isdigit() else None
        try:
            at = datetime.fromisoformat(text.decode("ascii"))
        except ValueError:
            return None
        # A time without an offset could be anywhere within a day.
        return None if at.tzinfo is None else at.timestamp()
