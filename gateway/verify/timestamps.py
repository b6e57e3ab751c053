"""Signed timestamps: where one is, how it is written, and how far from now it may be."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from gateway.verify.content import FieldPath
from gateway.verify.request import Reason, refused

# RFC 3339, section 5.6, with its T and its Z in capitals, as all of them are sent.
_ISO = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)"
# IMF-fixdate: RFC 9110, section 5.6.7.
_OF_HTTP = (
    rb"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4} "
    rb"\d\d:\d\d:\d\d GMT"
)
FORMATS: Mapping[str, re.Pattern[bytes]] = {
    # Digits of ASCII, as many as from 2001 to 2286: no sign, and no bytes of what is signed beside it.
    "s": re.compile(rb"[0-9]{10}"),
    "ms": re.compile(rb"[0-9]{13}"),
    "iso": re.compile(_ISO),
    "date": re.compile(_ISO + rb"|" + _OF_HTTP),
}
"""How a time is written. Each has one length, or an end that is known from its beginning and the other way round."""


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

    def check(self, value: bytes, now: float) -> None:
        at = self._read(value)
        if at is None:
            expected = {
                "s": "Unix seconds (10 digits)",
                "ms": "Unix milliseconds (13 digits)",
                "iso": "an RFC 3339 time",
            }[self.unit]
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

    def _read(self, value: bytes) -> float | None:
        if self.unit != "iso":
            length, per_second = (13, 1000) if self.unit == "ms" else (10, 1)
            # `isdigit` of bytes is ASCII only, so that neither signs, underscores nor other scripts' digits pass.
            return int(value) / per_second if len(value) == length and value.isdigit() else None
        if not FORMATS["iso"].fullmatch(value):
            return None
        try:
            return datetime.fromisoformat(value.decode("ascii")).timestamp()
        except ValueError:
            return None
