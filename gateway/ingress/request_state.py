"""What is known of a request until it has its response."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.ingress.admission import Admission
from gateway.ingress.destination_responses import Waiting

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Span


@dataclass(slots=True)
class RequestState:
    """The fields of a request's log line, and beside them what ends with the request, or is given back then."""

    fields: dict[str, Any]
    is_verified: bool = False
    admission: Admission | None = None
    """That of its source, if it has one of the places."""
    span: "Span | None" = None
    is_spooled: bool = False
    """Whether an event of it is in the spool, and not in the log yet."""
    waits: bool = False
    """Whether its sender gets a destination's response."""
    waiting: Waiting | None = None
    """The wait for that response; None also if too many wait already."""
