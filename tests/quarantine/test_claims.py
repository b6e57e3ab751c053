"""Who may work on a partition of refused requests, as its markers say it."""

from gateway.quarantine.claims import LEASE, Claims
from gateway.quarantine.records import Kind, Marker, RequestOutcome


def claims_of(*markers: tuple[Kind, str, float]) -> Claims:
    claims = Claims()
    for kind, name, at in markers:
        claims.apply(Marker(kind=kind, name=name, by=f"{name}@host"), at)
    return claims


def test_the_first_claim_of_a_free_partition_counts() -> None:
    claims = claims_of((Kind.CLAIM, "a", 0), (Kind.CLAIM, "b", 1))
    assert claims.holder(2) == ("a", "a@host", LEASE)


def test_a_claim_that_is_not_renewed_ends_by_itself() -> None:
    claims = claims_of((Kind.CLAIM, "a", 0))
    assert claims.holder(LEASE) is None
    assert claims_of((Kind.CLAIM, "a", 0), (Kind.CLAIM, "b", LEASE)).holder(LEASE + 1) == ("b", "b@host", 2 * LEASE)


def test_every_marker_of_the_owner_renews_its_claim() -> None:
    claims = claims_of((Kind.CLAIM, "a", 0), (Kind.RENEW, "a", 50), (Kind.DONE, "a", 100), (Kind.CLAIM, "b", 110))
    assert claims.holder(120) == ("a", "a@host", 100 + LEASE)


def test_only_the_owner_ends_a_claim() -> None:
    assert claims_of((Kind.CLAIM, "a", 0), (Kind.END, "b", 1)).holder(2) is not None
    assert claims_of((Kind.CLAIM, "a", 0), (Kind.END, "a", 1)).holder(2) is None


def test_a_claim_that_is_seen_without_the_one_it_lost_to_gives_nobody_else_the_partition() -> None:
    # `a` has the partition since before what is read here; `b` has lost to it.
    seen = claims_of((Kind.CLAIM, "b", 10))
    assert seen.holder(10 + LEASE - 1) is not None
    seen.apply(Marker(kind=Kind.RENEW, name="a"), 40)
    assert (seen.holder(10 + LEASE) or ("",))[0] == "a"


def test_outcomes_are_known_whoever_stored_them() -> None:
    claims = Claims()
    claims.apply(
        Marker(kind=Kind.DONE, name="a", outcomes=((3, RequestOutcome.ADMITTED), (5, RequestOutcome.PRESENT))), 1
    )
    claims.apply(Marker(kind=Kind.DONE, name="b", outcomes=((4, RequestOutcome.DROPPED),)), 2)
    assert claims.outcomes == {3: RequestOutcome.ADMITTED, 5: RequestOutcome.PRESENT, 4: RequestOutcome.DROPPED}
