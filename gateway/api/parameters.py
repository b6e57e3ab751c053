"""Parameters that several endpoints of the API have."""

from typing import Annotated

from gateway.api.endpoint import Parameter
from gateway.api.json_shapes import NAME, Limits

EVENT = Parameter(
    name="event",
    place="path",
    kind=Annotated[str, Limits(longest=400)],
    about="the event's id (if several have it, the newest), or its position TOPIC/PARTITION@OFFSET, percent-encoded",
    example="evt_1b2f0e8c5a7d8e3fb1c2d3e4f5061728",
)


def named(what: str, example: str) -> Parameter:
    """Return the parameter that names something of the rules."""
    return Parameter(name="name", place="path", kind=Annotated[str, NAME], about=f"the {what}'s name", example=example)
