"""What roles and limits allow."""

import pytest

from gateway.access.principal import AccessRole, Principal, identity_of
from gateway.model import NAME_PATTERN

VIEWER, READER, OPERATOR = AccessRole
WAYS = ("token", "token_session", "identity_header", "oidc", "loopback", "command")


def test_a_role_may_do_what_those_before_it_may() -> None:
    assert [role for role in AccessRole if role.covers(READER)] == [READER, OPERATOR]
    assert [role for role in AccessRole if role.covers(VIEWER)] == [VIEWER, READER, OPERATOR]
    assert [role for role in AccessRole if role.covers(OPERATOR)] == [OPERATOR]


def test_a_name_is_somebody_elses_where_it_is_known_in_another_way() -> None:
    """A person may call themselves what a token is called, and so may whoever runs a command."""
    ways = {way: Principal(name="deploys", role=VIEWER, via=way).identity for way in WAYS}
    assert ways["token"] == ways["token_session"] == identity_of("deploys", "") == "deploys"
    assert ways["identity_header"] == ways["oidc"]
    assert len(set(ways.values())) == len(WAYS) - 2
    assert not NAME_PATTERN.fullmatch(ways["oidc"]), "no token is called so"


@pytest.mark.parametrize(
    ("owners", "sources", "source", "owner", "allowed"),
    [
        (None, None, None, None, True),
        (None, ["github"], "github", None, True),
        (None, ["github"], "stripe", None, False),
        (None, ["github"], None, "billing", False),  # what concerns no source is not within a limit to some
        (["billing"], None, "stripe", "billing", True),
        (["billing"], None, "stripe", None, False),
        (["billing"], ["github"], "github", "billing", True),
        (["billing"], ["github"], "github", "ci", False),
        (["billing"], ["github"], "stripe", "billing", False),
        (None, [], "github", None, False),
    ],
)
def test_limits_hold_together(
    owners: list[str] | None, sources: list[str] | None, source: str | None, owner: str | None, *, allowed: bool
) -> None:
    principal = Principal(
        name="ci",
        role=VIEWER,
        owners=None if owners is None else frozenset(owners),
        sources=None if sources is None else frozenset(sources),
        via="token",
    )
    assert principal.may_see(source=source, owner=owner) is allowed
    assert principal.is_limited is (owners is not None or sources is not None)
