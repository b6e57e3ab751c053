"""What an endpoint of the API is: its place, its role, its parameters, and the function that does it. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter as Argument
from inspect import signature
from typing import Any, Literal

from gateway.access.principal import AccessRole
from gateway.api.problems import Code

BYTES = "application/octet-stream"
BODY_BYTES = 64 << 10
"""Bytes of a request's body, at most, unless its endpoint says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of the path or the query: its type, what it is, and a value for readers to try."""

    name: str
    place: Literal["path", "query"]
    kind: Any
    about: str
    example: str | int | bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One operation: its method and path below the API's, who may, and the function that does it.

    The function takes the backend, the principal, and the parameters by name; those with a default may be missing.
    `body` is the shape of the request's body, its argument `given`. `answer` is the shape of the response, or BYTES, or
    EVENT_STREAM: that function yields what is told. `codes` are the problems that there may be besides those that any
    request may meet. A body has `body_bytes` at most: as many as a valid one may need.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    role: AccessRole
    run: Callable[..., Any]
    answer: Any
    tag: str
    parameters: tuple[Parameter, ...] = ()
    body: Any = None
    body_bytes: int = BODY_BYTES
    status: int = 200
    codes: tuple[Code, ...] = ()

    @property
    def about(self) -> str:
        """What it does, in a line: the first of the function's docstring."""
        return (self.run.__doc__ or "").split("\n", maxsplit=1)[0].rstrip(".")

    def is_required(self, parameter: Parameter) -> bool:
        return self._argument(parameter).default is Argument.empty

    def default(self, parameter: Parameter) -> Any:  # noqa: ANN401 - of any type
        """Return the value of a parameter that isn't given; None if there is none."""
        found = self._argument(parameter).default
        return None if found is Argument.empty else found

    @property
    def is_keyed(self) -> bool:
        """Whether it takes an idempotency key, as whatever acts does."""
        return "sent" in signature(self.run).parameters

    def _argument(self, parameter: Parameter) -> Argument:
        return signature(self.run).parameters[parameter.name]
