"""Structured fields of HTTP (RFC 8941, and the dates of RFC 9651): parsed exactly, and serialised in their only form.

What isn't one as a whole is refused: no part of a field counts if another can't be read. Display strings (RFC 9651,
section 3.3.8) are refused as well: no signature needs one. The time is linear in the text's length, which is the
caller's to bound.
"""

import binascii
import re
from collections.abc import Mapping
from decimal import Decimal
from types import MappingProxyType
from typing import NamedTuple

_NONE: Mapping[str, "BareItem"] = MappingProxyType({})
_KEY = re.compile(r"[a-z*][a-z0-9_.*-]*")
_NUMBER = re.compile(r"-?(?:[0-9]{1,12}\.[0-9]{1,3}|[0-9]{1,15})(?![0-9.])")
_DATE = re.compile(r"@(-?[0-9]{1,15})(?![0-9.])")
_STRING = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*")
_BYTES = re.compile(r":([A-Za-z0-9+/]*={0,2}):")
_BOOLEAN = re.compile(r"\?([01])")
_SPACES = re.compile(r" *")
_OPTIONAL_SPACES = re.compile(r"[ \t]*")


class Token(str):
    """A token (RFC 8941, section 3.3.4), which isn't the string of the same characters."""

    __slots__ = ()


class Date(int):
    """A date (RFC 9651, section 3.3.7), in Unix seconds."""

    __slots__ = ()


BareItem = bool | int | Decimal | str | bytes


class Item(NamedTuple):
    """A value and its parameters, in their order."""

    value: BareItem
    parameters: Mapping[str, BareItem] = _NONE


class InnerList(NamedTuple):
    """A list within a dictionary, with parameters of its own."""

    items: tuple[Item, ...]
    parameters: Mapping[str, BareItem] = _NONE


def parse_dictionary(text: bytes) -> dict[str, Item | InnerList]:
    """Return the members of a dictionary (section 4.2.2); of several with one key the last. Raises ValueError."""
    parser = _Parser(text)
    parser.skip(_SPACES)
    members: dict[str, Item | InnerList] = {}
    while not parser.is_at_end():
        key = parser.take(_KEY)[0]
        members[key] = parser.member() if parser.has("=") else Item(True, parser.parameters())  # noqa: FBT003
        parser.skip(_OPTIONAL_SPACES)
        if parser.is_at_end():
            break
        parser.expect(",")
        parser.skip(_OPTIONAL_SPACES)
        if parser.is_at_end():  # a comma at the end
            raise ValueError(parser.text)
    return members


def parse_item(text: bytes) -> Item:
    """Return an item (section 4.2.3). Raises ValueError."""
    parser = _Parser(text)
    parser.skip(_SPACES)
    item = parser.item()
    parser.skip(_SPACES)
    if not parser.is_at_end():
        raise ValueError(parser.text)
    return item


def serialise(value: Item | InnerList) -> str:
    """Return an item or an inner list as it is written (sections 4.1.1.1 and 4.1.3)."""
    if isinstance(value, InnerList):
        return f"({' '.join(map(serialise, value.items))})" + _serialise_parameters(value.parameters)
    return _serialise_bare(value.value) + _serialise_parameters(value.parameters)


def _serialise_parameters(parameters: Mapping[str, BareItem]) -> str:
    return "".join(
        [f";{name}" if value is True else f";{name}={_serialise_bare(value)}" for name, value in parameters.items()]
    )


def _serialise_bare(value: BareItem) -> str:  # noqa: PLR0911 - one for each type
    match value:
        case bool():
            return "?1" if value else "?0"
        case Date():
            return f"@{int(value)}"
        case int():
            return str(value)
        case Decimal():
            whole, _, rest = f"{value:f}".partition(".")
            return f"{whole}.{rest.rstrip('0') or '0'}"
        case Token():
            return str(value)
        case str():
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return f'"{escaped}"'
        case bytes():
            return f":{binascii.b2a_base64(value, newline=False).decode()}:"


class _Parser:
    """A text, and how far it is parsed. All methods raise ValueError."""

    def __init__(self, text: bytes) -> None:
        self.text = text.decode("ascii")
        self._at = 0

    def is_at_end(self) -> bool:
        return self._at == len(self.text)

    def has(self, character: str) -> bool:
        """Return whether that is what comes next, and take it if so."""
        if self.text[self._at : self._at + 1] == character:
            self._at += 1
            return True
        return False

    def expect(self, character: str) -> None:
        if not self.has(character):
            raise ValueError(self.text)

    def skip(self, pattern: re.Pattern[str]) -> None:
        self.take(pattern)

    def take(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self.text, self._at)
        if found is None:
            raise ValueError(self.text)
        self._at = found.end()
        return found

    def member(self) -> Item | InnerList:
        return self._inner_list() if self.has("(") else self.item()

    def item(self) -> Item:
        return Item(self._bare_item(), self.parameters())

    def parameters(self) -> Mapping[str, BareItem]:
        parameters: dict[str, BareItem] = {}
        while self.has(";"):
            self.skip(_SPACES)
            name = self.take(_KEY)[0]
            parameters[name] = self._bare_item() if self.has("=") else True
        return parameters

    def _inner_list(self) -> InnerList:
        items: list[Item] = []
        while True:
            self.skip(_SPACES)
            if self.has(")"):
                return InnerList(tuple(items), self.parameters())
            items.append(self.item())
            if self.text[self._at : self._at + 1] not in (" ", ")"):
                raise ValueError(self.text)

    def _bare_item(self) -> BareItem:
        match self.text[self._at : self._at + 1]:
            case '"':
                return re.sub(r"\\(.)", r"\1", self.take(_STRING)[1])
            case ":":
                return self._bytes(self.take(_BYTES)[1])
            case "?":
                return self.take(_BOOLEAN)[1] == "1"
            case "@":
                return Date(self.take(_DATE)[1])
            case first if first == "-" or first.isdigit():
                number = self.take(_NUMBER)[0]
                return Decimal(number) if "." in number else int(number)
            case _:
                return Token(self.take(_TOKEN)[0])

    def _bytes(self, text: str) -> bytes:
        # Neither missing padding nor bits that don't count, which section 4.2.7 would let pass: a signature has one
        # spelling.
        value = binascii.a2b_base64(text, strict_mode=True)
        if binascii.b2a_base64(value, newline=False).decode() != text:
            raise ValueError(self.text)
        return value
