r"""JSON's escapes in a text of any kind: `\u002B`, `\/`, half of it escaped, and JSON in a string of JSON. Pure.

A text need not be JSON, and may be cut off: what is no escape stays as it is, and so is half a surrogate pair.
Everything here takes time and memory in proportion to the text, whatever is in it.
"""

import re

from gateway.turns import give_way

_NUMBER = (
    rb"\\u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a surrogate pair
    rb"|[0-9a-fA-F]{4})"
)
_NUMBERS = re.compile(_NUMBER)
_ESCAPE = re.compile(rb'\\["\\/bfnrt]|' + _NUMBER)
_BEGUN = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
_BACKSLASH = b"\\\\"
_SHORT = {b'\\"': b'"', b"\\/": b"/"}
_SHORT |= {b"\\b": b"\b", b"\\f": b"\f", b"\\n": b"\n", b"\\r": b"\r", b"\\t": b"\t"}
ESCAPES_A_TURN = 256
_RARE = [bytes([each]) for each in range(255, 127, -1)]


def unescaped(text: bytes) -> bytes:
    """Return a text with what its escapes stand for."""
    if b"\\" not in text:
        return text
    stands_in = next((each for each in _RARE if each not in text), None)
    if stands_in is None:
        return _ESCAPE.sub(_replaced, text)
    # In four steps, each of which takes a tenth of the time of a call for each escape.
    text = text.replace(_BACKSLASH, stands_in)  # so that each that is left begins an escape
    for escape, meant in _SHORT.items():
        text = text.replace(escape, meant)
    if b"\\u" in text:
        text = _without_numbers(text)
    return text.replace(stands_in, b"\\")


def _without_numbers(text: bytes) -> bytes:
    parts, known, at = list[bytes](), dict[bytes, bytes](), 0
    for number, found in enumerate(_NUMBERS.finditer(text)):
        if number % ESCAPES_A_TURN == 0:
            give_way()
        escape, begins = found[0], found.start()
        if (meant := known.get(escape)) is None:
            meant = known[escape] = _meant(escape)
        parts += [text[at:begins], meant]
        at = found.end()
    return b"".join([*parts, text[at:]])


def without_cut_escape(text: bytes) -> bytes:
    """Return a text that was cut off without the escape, or the half of a surrogate pair, in which it may end."""
    for end in (_BEGUN, _HALF):
        if found := end.search(text[-6:]):
            before = text[: len(text) - len(found[0])]
            if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:  # its backslash isn't escaped itself
                text = before
    return text


def outside(text: bytes, marks: bytes) -> bytes:
    """Return the marks of a text's bytes by those of `unescaped(text)`: of an escape, each if any of it is marked."""
    found, at, inside = bytearray(), 0, 0
    for number, escape in enumerate(_ESCAPE.finditer(text)):
        if number % ESCAPES_A_TURN == 0:
            give_way()
        begins = inside + escape.start() - at
        found += marks[inside:begins]
        inside, at = begins + len(_meant(escape[0])), escape.end()
        found += bytes([max(marks[begins:inside])]) * len(escape[0])
    return bytes(found + marks[inside:])


def _replaced(found: re.Match[bytes]) -> bytes:
    give_way()
    return _meant(found[0])


def _meant(escape: bytes) -> bytes:
    if escape == _BACKSLASH:
        return b"\\"
    if (short := _SHORT.get(escape)) is not None:
        return short
    try:
        return bytes.fromhex(escape.replace(b"\\u", b"").decode()).decode("utf-16-be").encode()
    except UnicodeDecodeError:  # half a pair
        return escape
