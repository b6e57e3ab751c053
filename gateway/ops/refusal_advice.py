"""Why requests are refused, and what to do about each reason."""

from collections.abc import Mapping
from dataclasses import dataclass

SHARE = 0.1
"""Of a source's events, that are duplicates, unrouted or refused: what is more is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What requests that are refused for such a reason say, and what to do about them.

    They say that something is wrong where they are more than `share` of a source's requests, and more than `few`; with
    None never, as anybody on the internet can cause them. So `few` is above 0 where no signature has been verified yet.
    """

    steps: tuple[str, ...]
    share: float | None = None
    few: int = 0

    def is_wrong(self, count: float, of_all: float) -> bool:
        return self.share is not None and count > self.few and count > self.share * of_all


FEW_REFUSALS = 10
"""Refusals in a row, without a pause, that a stranger may have caused: the alert on signatures begins above it, too."""


HALF = 0.5


_EXPLAIN = "gateway explain {name}"


_AGAIN = "# what was refused the sender sends again by itself, or from its list of deliveries"


_OTHER = Refusal(steps=("# what is told of each: the lines request_finished of source {name}",))


_REFUSALS: Mapping[tuple[str, ...], Refusal] = {
    ("log_unavailable",): Refusal(
        share=SHARE,
        steps=("# the log took no events: why is in the lines log_unavailable, that it does in log_available", _AGAIN),
    ),
    ("overloaded",): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=("# more came than the log stored: is it slow, or does it take more ingress processes?", _AGAIN),
    ),
    ("draining",): Refusal(steps=("# by a process that was ending, whose place another takes", _AGAIN)),
    ("bad_signature", "bad_credentials"): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# how it is verified, and where its secrets are from:",
            _EXPLAIN,
            "# after a rotation: put the new secret beside the old one in `secrets` of source {name}",
            _AGAIN,
        ),
    ),
    ("stale_timestamp",): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# how old a request may be (the answer to the sender says how old it was):",
            _EXPLAIN,
            "# our clock or the sender's is wrong, or something on the way holds requests back",
        ),
    ),
    (
        "missing_signature",
        "missing_credentials",
        "missing_timestamp",
        "missing_header",
        "malformed_signature",
        "malformed_timestamp",
        "repeated_header",
    ): Refusal(
        share=HALF,
        few=FEW_REFUSALS,
        steps=(
            "# which headers are expected, and in which form:",
            _EXPLAIN,
            "# its sender signs otherwise or not at all, something on the way takes headers off, or it is a stranger",
        ),
    ),
    ("body_not_json", "expression_error"): Refusal(
        share=SHARE,
        steps=(
            "# what its `id`, `type` or `key` is read from isn't in these events, which are its own:",
            _EXPLAIN,
            _AGAIN,
        ),
    ),
    ("body_too_large",): Refusal(
        share=HALF,
        few=FEW_REFUSALS,
        steps=("# larger than the log takes: can its sender be told to send less, such as a link?",),
    ),
    ("disconnected", "body_slow", "crowded_out"): Refusal(
        steps=("# who sent them broke off, or was too slow; anybody can do that, and a sender of ours sends again",)
    ),
    (
        "transfer_coding",
        "method_not_allowed",
        "malformed_body",
        "malformed_request",
        "head_slow",
        "head_too_large",
        "unknown_source",
    ): Refusal(
        steps=("# no webhook looks so: a stranger, or something on the way that rewrites requests of a sender of ours",)
    ),
}


def refusal_of(reason: str) -> Refusal:
    """Return what a reason says; a newer version may have others."""
    return next((kind for reasons, kind in _REFUSALS.items() if reason in reasons), _OTHER)
