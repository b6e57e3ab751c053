"""A body as rules read it: decompressed, and parsed by its Content-Type.

What is made here is kept by whoever asked (an `EventView`), for no longer than a step of the event loop: at any time
there is one body of at most 2 MiB, with what was parsed from it (70 MiB at worst; 120 where an id, type or key is an
integer beyond 64 bits). So it isn't part of the memory for bodies. The items of a request that is split are: they wait
for the log. Five times as much is kept of the events that routes have split last (`rules/splits.py`).
"""

from gateway.bodies.codings import decompressed
from gateway.bodies.forms import read_form, read_multipart
from gateway.bodies.json_text import read_json
from gateway.bodies.media_types import Kind, kind_of
from gateway.bodies.xml import read_xml
from gateway.model import UnreadableBodyError

NOT_JSON = "body_not_json"


def read(body: bytes, content_encoding: str, content_type: str) -> object:
    """Return the value of a body, of JSON's types, by these two fields (each "" if there is none).

    Raises UnreadableBodyError, with the status and reason by which a request is refused that can't do without it.
    """
    content = decompressed(body, content_encoding) if content_encoding else body
    kind = kind_of(content_type)
    if kind is Kind.JSON or not content:
        try:
            return read_json(content)
        except ValueError:
            raise UnreadableBodyError(400, NOT_JSON, "expected a JSON body, got something else") from None
    if kind is Kind.FORM:
        return read_form(content)
    return read_multipart(content, content_type) if kind is Kind.MULTIPART else read_xml(content, content_type)
