"""A page of the console: what it shows, and how its parameters are read. Pure."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from multidict import MultiMapping

from gateway.console.asking import Asking
from gateway.console.forms import Form

NOT_TEXT = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a template shows. `section` is the entry of the navigation that it belongs to."""

    template: str
    title: str
    section: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A file to be saved: bytes that no browser shows as a page."""

    content: bytes
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """Another page of the console, which has what is asked for."""

    path: str


class Given:
    """The parameters of a page's address. What isn't one of the expected is as if it weren't there."""

    def __init__(self, path: Mapping[str, str], query: MultiMapping[str]) -> None:
        self.path = path
        self._query = query

    def text(self, name: str) -> str:
        return NOT_TEXT.sub(" ", self._query.get(name, "")).strip()

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of the choices, "" if it is another or isn't given."""
        value = self._query.get(name, "")
        return value if value in choices else ""

    def texts(self, name: str) -> tuple[str, ...]:
        """Return all values of a parameter that is given several times."""
        return tuple([each for each in self._query.getall(name, ()) if not NOT_TEXT.search(each)])

    def is_set(self, name: str) -> bool:
        return self._query.get(name) == "1"

    def cursor(self) -> str | None:
        return self._query.get("cursor") or None


class Show(Protocol):
    """Makes a page, or what there is instead. Raises ApiError."""

    __name__: str

    async def __call__(self, asking: Asking, given: Given, /) -> Page | Download | Redirect: ...


class Act(Protocol):
    """Does what a form asks for, and returns the page that follows. Raises ApiError."""

    __name__: str

    async def __call__(self, asking: Asking, given: Given, form: Form, /) -> Page | Redirect: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """Where forms are sent, and what they do.

    `function` is one of the API, whose role the sender needs: a form of somebody without it isn't read. `most` are the
    bytes of one, None if it is a small one.
    """

    path: str
    act: Act
    function: Callable[..., Any]
    most: int | None = None
