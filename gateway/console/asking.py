"""What a page may ask: the functions of the API, for its reader, who needs the role that the API wants.

Pages know neither the log nor the index, and decide nothing about events.
"""

from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gateway.access.principal import AccessRole, Principal
from gateway.api.backend import Backend
from gateway.api.endpoints import ENDPOINTS
from gateway.api.problems import ApiError, Code
from gateway.api.shares import whose_turn

T = TypeVar("T")
_ROLES: Mapping[Callable[..., Any], AccessRole] = {each.run: each.role for each in ENDPOINTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Somebody who looks at a page; `now` (Unix seconds, by the log's clock) is when."""

    backend: Backend
    principal: Principal
    now: float

    def may(self, function: Callable[..., Any]) -> bool:
        """Return whether their role allows a function of the API."""
        return self.principal.role.covers(_ROLES[function])

    def must(self, function: Callable[..., Any]) -> None:
        """Raise ApiError if their role doesn't allow a function of the API."""
        if not self.may(function):
            needed = _ROLES[function]
            raise ApiError(Code.FORBIDDEN, f"expected the role {needed}, got {self.principal.role}")

    async def ask(self, function: Callable[..., Awaitable[T]], **given: Any) -> T:  # noqa: ANN401 - of any type
        """Return a function's answer. Raises ApiError, also if the role doesn't allow it."""
        self.must(function)
        return await function(self.backend, self.principal, **given)

    async def aside(self, work: Callable[[], T]) -> T:
        """Do what computes for a moment in a thread that gives way. Raises ApiError."""
        return await self.backend.aside(whose_turn(self.principal), work)

    async def share(self, what: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """Return what is read for all who see the same, once for those who look at the same time. Raises ApiError."""
        principal = self.principal
        key = (what, self.backend.rules().version, principal.role, principal.owners, principal.sources)
        found: T = await self.backend.shared.get(key, read)
        return found

    async def try_asking(self, function: Callable[..., Awaitable[T]], **given: Any) -> T | ApiError:  # noqa: ANN401 - as above
        """Return the answer, or why there is none: the rest of a page doesn't depend on it."""
        try:
            return await self.ask(function, **given)
        except ApiError as error:
            return error
