"""Parameters that several endpoints of the API have."""

from typing import Annotated

from gateway.api.cursors import LONGEST as LONGEST_CURSOR
from gateway.api.endpoint import Parameter
from gateway.api.json_shapes import NAME as A_NAME
from gateway.api.json_shapes import Limits

MOST_ITEMS = 200
"""Items of a page, at most: what is written in one step of the event loop takes some milliseconds."""
NAME = Annotated[str, A_NAME]
TIME = Annotated[str, Limits(form="date-time", longest=40)]
CURSOR = Parameter(
    name="cursor",
    place="query",
    kind=Annotated[str, Limits(pattern="^[A-Za-z0-9_-]+$", longest=LONGEST_CURSOR)],
    about="`next_cursor` of a page",
)
LIMIT = Parameter(
    name="limit",
    place="query",
    kind=Annotated[int, Limits(minimum=1, maximum=MOST_ITEMS)],
    about="items of a page, at most",
    example=20,
)
EVENT = Parameter(
    name="event",
    place="path",
    kind=Annotated[str, Limits(longest=400)],
    about="the event's id (if several have it, the newest), or its position TOPIC/PARTITION@OFFSET, percent-encoded",
    example="evt_1b2f0e8c5a7d8e3fb1c2d3e4f5061728",
)


def named(what: str, example: str) -> Parameter:
    """Return the parameter of a path that names something of the rules."""
    return Parameter(name="name", place="path", kind=NAME, about=f"the {what}'s name", example=example)


def only(name: str, about: str) -> Parameter:
    """Return the parameter of a list for what concerns a name alone."""
    return Parameter(name=name, place="query", kind=NAME, about=about)
