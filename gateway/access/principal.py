"""Who makes a request, in which role, and what of the gateway that is limited to. Pure."""

from collections.abc import Mapping
from enum import StrEnum

from gateway.model import GatewayError, immutable


class AccessRole(StrEnum):
    """What a principal may do; each role may do what those before it may."""

    VIEWER = "viewer"
    """Sees what happens to events, but neither their bodies nor the values of their headers."""
    READER = "reader"
    """Sees bodies and headers, but for what a source's `redact` hides."""
    OPERATOR = "operator"
    """Acts: pauses, kicks, replays, drops."""

    def covers(self, needed: "AccessRole") -> bool:
        """Return whether who has this role may do what needs another."""
        return _RANKS[self] >= _RANKS[needed]


_RANKS = {role: rank for rank, role in enumerate(AccessRole)}


LOOPBACK = "loopback"
"""How somebody is known of whom only that is known: that they are on this machine."""
_KINDS = {"": "token", "token": "token", "token_session": "token", "identity_header": "person", "oidc": "person"}
"""Whose name it is, by how they are known: of a token or of a person; in any other way, a name of that way alone."""


@immutable
class Principal:
    """Who makes a request: a name for people, by which an act is recorded, and `via` how that is known.

    `owners` and `sources` limit what is seen and acted on to what has one of these owners, and concerns one of these
    sources; None is no limit. With both, both must hold.
    """

    name: str
    role: AccessRole
    owners: frozenset[str] | None = None
    sources: frozenset[str] | None = None
    via: str

    @property
    def is_limited(self) -> bool:
        return self.owners is not None or self.sources is not None

    @property
    def is_everybody(self) -> bool:
        """Whether it is any client on this machine, and no other may ask: as long as nobody is given access."""
        return self.via == LOOPBACK

    @property
    def identity(self) -> str:
        """Who it is, by whom something was commanded that is theirs alone."""
        return identity_of(self.name, self.via)

    def may_see(self, *, source: str | None, owner: str | None) -> bool:
        """Return whether the limits allow what concerns a source and has an owner; None is no source, or no owner.

        What isn't known to be within the limits isn't.
        """
        is_owned = self.owners is None or (owner is not None and owner in self.owners)
        return is_owned and (self.sources is None or (source is not None and source in self.sources))


def identity_of(name: str, via: str) -> str:
    """Return who has a name, told apart from those who have it in another way; of a token, it is the name alone.

    A record in which an older version has left out `via` ("") is a token's: people choose names, tokens are given them.
    """
    kind = _KINDS.get(via, via)
    return name if kind == "token" else f"{kind}:{name}"


class AccessError(GatewayError):
    """Who makes the request is at fault, or isn't known: `status` is 401, 403 or 429. `detail` is shown to them.

    `reason` is one of a closed set. `headers` belong to the response: RFC 9110 wants a challenge with a 401.
    """

    def __init__(self, status: int, detail: str, *, reason: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.reason = reason
        self.headers = headers or {}
