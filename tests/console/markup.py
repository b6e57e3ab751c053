"""A page as a strict reader sees it: what is wrong with its markup, its links, and its text."""

from html.parser import HTMLParser
from urllib.parse import urlsplit

from typing_extensions import override

VOID = {"meta", "link", "input", "br", "hr", "path", "circle", "rect", "img"}
ELEMENTS = {
    *(
        "html",
        "head",
        "title",
        "meta",
        "link",
        "script",
        "body",
        "header",
        "nav",
        "main",
        "div",
        "span",
        "p",
        "a",
        "strong",
    ),
    *("h1", "h2", "h3", "ul", "ol", "li", "dl", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("form", "label", "input", "select", "option", "button", "textarea", "fieldset", "legend", "progress", "meter"),
    *("datalist",),
    *("pre", "code", "bdi", "time", "details", "summary", "section", "svg", "path", "circle", "rect", "kbd"),
}
"""What our templates are made of: anything else has come from outside."""


class Document(HTMLParser):
    """A page. `links` are the addresses of `a`, `text` is what is read, without what is only in attributes."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.problems: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labels: set[str] = set()
        self.forms: dict[str, dict[str, str]] = {}
        """By the address that they are sent to: their hidden fields."""
        self._form: dict[str, str] = {}
        self.text = ""
        self.title = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        if self._open:
            self.problems.append(f"not closed: {self._open}")
        if len(set(self.ids)) != len(self.ids):
            self.problems.append(f"ids twice: {sorted(self.ids)}")
        self.text = " ".join(self.text.split())

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ELEMENTS:
            self.problems.append(f"an element of somebody else: {tag}")
        given = dict(attrs)
        for name, value in given.items():
            if name.startswith("on") or name == "style":
                self.problems.append(f"{tag}: {name} isn't allowed inline")
            if name in ("href", "src", "action") and not is_own(value or ""):
                self.problems.append(f"{tag}: {name} leaves the host: {value}")
        if tag == "a":
            self.links.append(given.get("href") or "")
        if tag == "form":
            self._form = self.forms.setdefault(given.get("action") or "", {})
        if tag == "input" and given.get("type") == "hidden":
            self._form[given["name"] or ""] = given.get("value") or ""
        if "id" in given:
            self.ids.append(given["id"] or "")
        if tag not in VOID:
            self._open.append(tag)

    @override
    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.problems.append(f"closed by itself: {tag}")
        self.handle_starttag(tag, attrs)

    @override
    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"unexpected end of {tag}")

    @override
    def handle_data(self, data: str) -> None:
        if self._open[-2:] == ["head", "title"]:
            self.title += data
        elif self._open and self._open[-1] == "script" and data.strip():
            self.problems.append("a script inline")
        self.text += data

    @override
    def handle_comment(self, data: str) -> None:
        self.problems.append(f"a comment: {data}")


def is_own(address: str) -> bool:
    """Return whether an address of a page is of the console itself, or of a place on the page."""
    parts = urlsplit(address)
    return not parts.scheme and not parts.netloc and (address.startswith(("/ui", "#")) or address == "")
