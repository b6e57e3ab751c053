"""XML as JSON has it, read by expat within bounds: no DTD, so neither entities that expand nor any from elsewhere.

Python's own expat with handlers of ours: a tree that is made first (`xml.etree`, defusedxml) has its depth and its
number of elements checked when they are there already.
"""

import re
from typing import Any
from xml.parsers.expat import ExpatError, ParserCreate

from gateway.bodies.codings import excessive, malformed
from gateway.bodies.forms import charset_of, gathered
from gateway.bodies.media_types import parameters
from gateway.model import UnreadableBodyError

MAX_ELEMENTS = 10_000  # and attributes
MAX_DEPTH = 100
_DECLARED = re.compile(rb"""<\?xml[ \t\r\n][^>]{0,200}?encoding[ \t\r\n]*=[ \t\r\n]*["']([A-Za-z0-9._-]{1,40})["']""")
MAX_PROLOG = 100  # pieces before the root element
_PROLOG = re.compile(r"[ \t\r\n]+|<\?.*?\?>|<!--.*?-->", re.DOTALL)
"""A piece of what may stand before the root element, but for a document type."""
_BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_SPACE = " \t\r\n"


def read_xml(content: bytes, content_type: str) -> dict[str, Any]:
    """Return a document as a mapping with its root element.

    An element with neither attributes nor elements in it is its text. Any other is a mapping: of attributes as `@name`,
    of the elements in it as `gathered`, and of text beside them as `#text`. Names are without their prefixes; namespace
    declarations, comments and processing instructions are left out.

    Raises UnreadableBodyError: 413 for more than MAX_ELEMENTS, or MAX_DEPTH of them inside each other; 400 for a
    document with a DTD, one that isn't well-formed, or is in another encoding than UTF-8, UTF-16, US-ASCII, ISO-8859-1
    and windows-1252.
    """
    text = _decoded(content, content_type)
    _check_prolog(text)
    document = _Document()
    # Text instead of bytes: it replaces an encoding that is declared, which expat would look for among Python's.
    # Without namespaces, since their names would be copied into that of each element.
    parser = ParserCreate()
    parser.buffer_text = True
    parser.ordered_attributes = True
    parser.StartElementHandler = document.start
    parser.EndElementHandler = document.end
    parser.CharacterDataHandler = document.text
    parser.StartDoctypeDeclHandler = document.refuse_type
    try:
        parser.Parse(text, True)  # noqa: FBT003 - positional in C
    except UnreadableBodyError:
        raise
    except (ExpatError, ValueError) as error:
        raise malformed("expected well-formed XML, got something else") from error
    return gathered(document.root)


class _Document:
    """The elements that are open, each with its name, and the pairs and texts in it."""

    def __init__(self) -> None:
        self.root: list[tuple[str, Any]] = []
        self._open: list[tuple[str, list[tuple[str, Any]], list[str]]] = []
        self._count = 0

    def start(self, name: str, attributes: list[str]) -> None:
        """Open an element, whose attributes are a name, its value, the next name and so on."""
        self._count += 1 + len(attributes) // 2
        if self._count > MAX_ELEMENTS:
            raise excessive(f"expected XML of at most {MAX_ELEMENTS} elements and attributes, got more")
        if len(self._open) >= MAX_DEPTH:
            raise excessive(f"expected XML of at most {MAX_DEPTH} elements inside each other, got more")
        named = zip(attributes[::2], attributes[1::2], strict=True)
        pairs = [(f"@{_local(each)}", value) for each, value in named if each.partition(":")[0] != "xmlns"]
        self._open.append((_local(name), pairs, []))

    def text(self, text: str) -> None:
        self._open[-1][2].append(text)

    def end(self, _: str) -> None:
        name, pairs, texts = self._open.pop()
        text = "".join(texts)
        value: Any = text
        if pairs:
            if text.strip(_SPACE):
                pairs.append(("#text", text.strip(_SPACE)))
            value = gathered(pairs)
        (self._open[-1][1] if self._open else self.root).append((name, value))

    def refuse_type(self, *_: object) -> None:
        """Called for no document whose prolog has been checked."""
        raise malformed("expected XML without a document type, got one with it")


def _check_prolog(text: str) -> None:
    """Refuse a document type before expat sees it, which would read it to its end, whatever a handler raises."""
    at = 0
    for _ in range(MAX_PROLOG):
        piece = _PROLOG.match(text, at)
        if piece is None:
            break
        at = piece.end()
    if not text.startswith("<", at) or text.startswith(("<!", "<?"), at):
        raise malformed("expected XML that begins with an element, not a document type, got another start")


def _local(name: str) -> str:
    return name.rpartition(":")[2]


def _decoded(content: bytes, content_type: str) -> str:
    """Decode by the mark at its beginning, the charset in Content-Type, or what it declares (RFC 7303 §3)."""
    encoding: str | None = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), None)
    if encoding is None:
        try:
            charset = parameters(content_type).get("charset")
        except ValueError:
            charset = None
        declared = _DECLARED.match(content)
        encoding = charset_of(charset or (declared[1].decode("ascii") if declared else "utf-8"))
    if encoding is None:
        raise malformed("expected XML in UTF-8, UTF-16, ASCII, ISO-8859-1 or windows-1252, got another")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise malformed("expected XML in the encoding that it declares, got another") from error
