"""Why requests are refused, and what to do about each reason."""

from collections.abc import Mapping
from dataclasses import dataclass

SHARE = 0.1
"""Share of a source's events that are duplicates, unrouted or refused, above which they are reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What to do about requests that are refused for such a reason, and when they mean that something is wrong.

    That is if they are more than `share` of a source's requests, and more than `few`; never if `share` is None, since
    anyone on the internet can cause them. For the same reason `few` is above 0 if no signature was verified before.
    """

    steps: tuple[str, ...]
    share: float | None = None
    few: int = 0

    def needs_attention(self, count: float, of_all: float) -> bool:
        return self.share is not None and count > self.few and count > self.share * of_all


FEW_REFUSALS = 10
"""Number of refusals without a pause that a stranger may have caused; the alert on signatures also begins above it."""


HALF = 0.5


_EXPLAIN = "gateway explain {name}"


_AGAIN = "# the sender retries refused requests by itself, or redelivers them from its list"


_OTHER = Refusal(steps=("# details of each: the log lines request_finished of source {name}",))


_REFUSALS: Mapping[tuple[str, ...], Refusal] = {
    ("log_unavailable",): Refusal(
        share=SHARE,
        steps=("# the event log accepted no events: log_unavailable says why, log_available marks the end", _AGAIN),
    ),
    ("overloaded",): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# more events came than were stored: is the event log slow, or are more ingress processes needed?",
            _AGAIN,
        ),
    ),
    ("slow_bodies",): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# unverified senders that don't finish their bodies fill the memory: block them in front of the gateway",
            "# the log of what is in front of it says who (here they are body_slow, evicted or disconnected)",
            "# more ingress processes help only if these are your senders, with many large bodies at once",
            _AGAIN,
        ),
    ),
    ("draining",): Refusal(steps=("# by a stopping process, which another replaces", _AGAIN)),
    ("bad_signature", "bad_credentials"): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# how it is verified, and where its secrets are from:",
            _EXPLAIN,
            "# after a rotation: put the new secret next to the old one in `secrets` of source {name}",
            _AGAIN,
        ),
    ),
    ("key_unavailable", "unconfirmed_subscription"): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# something at the sender couldn't be fetched: key_not_fetched or subscription_not_confirmed says why",
            _EXPLAIN,
            "# can this process reach the sender's host over https? Strangers can name addresses that have no key, too",
            _AGAIN,
        ),
    ),
    ("bad_key", "wrong_recipient"): Refusal(
        share=HALF,
        few=FEW_REFUSALS,
        steps=(
            "# which keys and recipients are expected (the response to the sender says what was wrong):",
            _EXPLAIN,
            "# the sender is set up for somebody else or otherwise, its certificate is too old, or it is a stranger",
        ),
    ),
    ("stale_timestamp",): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# how old a request may be (the response to the sender says how old it was):",
            _EXPLAIN,
            "# our clock or the sender's is wrong, or something in between delays requests",
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
        "unreadable_body",
        "malformed_batch",
        "batch_too_large",
    ): Refusal(
        share=HALF,
        few=FEW_REFUSALS,
        steps=(
            "# which headers are expected, and in which form:",
            _EXPLAIN,
            "# the sender signs differently or not at all, something in between removes headers, or it is a stranger",
        ),
    ),
    ("body_not_json", "expression_error"): Refusal(
        share=SHARE,
        steps=(
            "# these events, verified as its own, lack what its `id`, `type` or `key` is read from:",
            _EXPLAIN,
            _AGAIN,
        ),
    ),
    ("content_coding", "content_too_large", "malformed_content"): Refusal(
        share=SHARE,
        steps=(
            "# these events, verified as its own, are to be split, or have an `id`, `type` or `key` in their bodies,",
            "# which can't be read (the response to the sender says why):",
            _EXPLAIN,
            _AGAIN,
        ),
    ),
    ("address_refused",): Refusal(
        share=HALF,
        few=FEW_REFUSALS,
        steps=(
            "# which addresses may send; the log lines request_finished of source {name} have those that were refused:",
            _EXPLAIN,
            "# its sender has new addresses, the proxy in front isn't in `trusted_proxies`, or it is a stranger",
            "# without an address: a trusted proxy sent an X-Forwarded-For that isn't a list of addresses",
        ),
    ),
    ("client_certificate_missing", "client_certificate_malformed", "client_certificate_refused"): Refusal(
        share=HALF,
        few=FEW_REFUSALS,
        steps=(
            "# which certificates may send; the lines request_finished of source {name} have those for other names:",
            _EXPLAIN,
            "# its sender has none, or one of a new authority or name, or it is a stranger",
            "# behind a proxy: it isn't in `trusted_proxies`, or doesn't set the header as `certificate_header` has it",
        ),
    ),
    ("rate_limited", "concurrency_limited"): Refusal(
        share=SHARE,
        few=FEW_REFUSALS,
        steps=(
            "# its verified requests reach `limits` of source {name}: `rate` of all processes, `concurrent` of each:",
            _EXPLAIN,
            "# too many in progress may also mean that the event log is slow: gateway_append_duration_seconds",
            _AGAIN,
        ),
    ),
    ("body_too_large",): Refusal(
        share=HALF,
        few=FEW_REFUSALS,
        steps=(
            "# larger than the event log accepts, or than `limits.body` of source {name}:",
            _EXPLAIN,
            "# can the sender send less, such as a link?",
        ),
    ),
    ("disconnected", "body_slow", "evicted"): Refusal(
        steps=("# the client disconnected, or was too slow; anyone can cause that, and a real sender retries",)
    ),
    (
        "bad_handshake",
        "transfer_coding",
        "method_not_allowed",
        "malformed_body",
        "malformed_request",
        "head_slow",
        "head_too_large",
        "unknown_source",
    ): Refusal(
        steps=("# no webhook looks like this: a stranger, or something in between that rewrites a sender's requests",)
    ),
}


def refusal_of(reason: str) -> Refusal:
    """Return what a reason means; a newer version may have others."""
    return next((kind for reasons, kind in _REFUSALS.items() if reason in reasons), _OTHER)
