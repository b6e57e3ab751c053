"""The files that pages are made of: templates and static files, read once, in a process' first second.

Most templates are compiled when a page first needs them: all of them would be a quarter of the processor time of a
start, and nobody opens a page of most processes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import orjson
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from gateway.console import figures, text
from gateway.console.curl import quoted
from gateway.ops.waiting_deliveries import WAIT_REASONS
from gateway.turns import give_way

STATIC = f"{text.UI}/static"
AT_ONCE = ("base.html", "logo.html", "menu.html", "parts.html", "problem.html", "sign_in.html")
"""Templates of the pages that are made in the event loop, which compiling them later would hold up."""
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
NAVIGATION = (
    ("", "Overview"),
    ("events", "Events"),
    ("destinations", "Destinations"),
    ("routes", "Routes"),
    ("dead-letters", "Dead letters"),
    ("sources", "Sources"),
    ("rules", "Rules"),
)
"""The first segment of a section's pages, and what it is called."""
DECISIONS: Mapping[str, str] = {
    "delivered": "done",
    "retry": "a retry",
    "dead_letter": "a dead letter",
    "dropped": "dropped",
    "halted": "its key halted",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """A static file. Its address has its content's digest, so that it may be kept for ever."""

    address: str
    content: bytes
    content_type: str


class Assets:
    """Templates and static files. Reading them takes some tens of milliseconds, and blocks."""

    def __init__(self) -> None:
        root = files("gateway.console")
        self.static: Mapping[str, StaticFile] = {
            found.name: _static_file(found.name, found.read_bytes()) for found in root.joinpath("static").iterdir()
        }
        sources = {found.name: found.read_text("utf-8") for found in root.joinpath("templates").iterdir()}
        self._environment = _environment(sources)
        self._environment.globals["static"] = lambda name: self.static[name].address
        for name in AT_ONCE:
            self._environment.get_template(name)

    def rendered(self, template: str, values: Mapping[str, Any]) -> bytes:
        """Return a page. In a thread, it gives way to the event loop between its parts.

        The first page of a kind takes some tens of milliseconds more.
        """
        return "".join(self._parts(template, values)).encode()

    def _parts(self, template: str, values: Mapping[str, Any]) -> Iterator[str]:
        for part in self._environment.get_template(template).generate(values):
            give_way()
            yield part


def _static_file(name: str, content: bytes) -> StaticFile:
    path = PurePath(name)
    digest = sha256(content).hexdigest()[:16]
    return StaticFile(
        address=f"{STATIC}/{path.stem}.{digest}{path.suffix}", content=content, content_type=_TYPES[path.suffix]
    )


def _environment(sources: Mapping[str, str]) -> Environment:
    environment = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        finalize=_finalized,
    )
    environment.filters |= {
        "shown": text.shown,
        "exact": text.exact,
        "json": lambda value: text.marked(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode(), keep="\n"),
        "duration": text.duration,
        "area": text.area,
        "text": lambda value: text.marked(value, keep="\n\t"),
        "bytes": text.size,
        "count": text.plural,
    }
    environment.globals |= {
        "address": text.address,
        "chart": figures.chart,
        "between": lambda begin, end: text.duration(max(0.0, text.unix(end) - text.unix(begin))),
        "moment": text.moment,
        "navigation": NAVIGATION,
        "quoted": quoted,
        "rate": figures.rate,
        "reasons": WAIT_REASONS,
        "decisions": DECISIONS,
        "success": figures.success,
        "term": text.term,
    }
    return environment


def _finalized(value: object) -> object:
    """Escape what isn't seen in whatever text a template shows, an attribute's value included."""
    return text.plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value
