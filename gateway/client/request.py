"""Builds a delivery's request, without I/O, so that `gateway explain` prints exactly the request that would be made.

Without a template, a destination gets what it would have got from the provider: the body, and the header pairs in
order, with repeats, byte for byte. Omitted are headers of a single connection (RFC 9110 §7.6.1), those that the client
computes (Host, Content-Length), credentials (cookies, authorization), and headers that servers trust because their own
proxy sets them (X-Forwarded-For), unless the destination asks for them. If the route has its own body, or sends none,
none of the sender's headers are sent: no signature matches that body, and the others would be a stranger's text in our
request. The event's query string isn't sent: a destination's URL is up to the operators, and no provider's signature
covers a new one.
"""

import hmac
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable
from dataclasses import field
from functools import lru_cache, partial
from importlib.metadata import version
from typing import NamedTuple, Protocol, TypeVar

from yarl import URL

from gateway.client.observation import Observation
from gateway.model import (
    DISTRIBUTION,
    Delivery,
    DestinationResponse,
    ExpressionError,
    Headers,
    ItemMissingError,
    TraceContext,
    immutable,
)
from gateway.rules.absent_fields import AbsentFieldError
from gateway.rules.event_view import EventView
from gateway.rules.request_templates import MAX_TARGET, MessageTemplate, Method, RequestTemplate
from gateway.rules.rules import (
    OPT_IN_HEADERS,
    OPT_IN_PREFIXES,
    RESERVED_HEADERS,
    SIGNATURE_HEADER_PREFIX,
    Destination,
    DestinationAccess,
)
from gateway.rules.splits import Split
from gateway.rules.templates import MAX_RESULT

T = TypeVar("T")
USER_AGENT = (b"user-agent", f"webhook-gateway/{version(DISTRIBUTION)}".encode())
"""The default user agent: GitHub's API and some firewalls refuse a request without one."""


@immutable
class Outbound:
    """A request, to which the client adds Host and Content-Length. Its `repr` has nothing that may be a secret.

    `path` and `query`, percent-encoded, are added at the end of those that the URL has. `access` is how the URL is
    reached, if it needs more than its address; with OAuth2 the client adds Authorization. `delivery` is what it is sent
    for, `observation` takes down how that goes.
    """

    url: str = field(repr=False)
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)
    method: Method = Method.POST
    path: str = field(default="", repr=False)
    query: str = field(default="", repr=False)
    access: DestinationAccess | None = field(default=None, repr=False)
    delivery: Delivery | None = field(default=None, repr=False)
    observation: Observation | None = field(default=None, compare=False, repr=False)

    @property
    def host(self) -> str:
        """The host of the URL, in ASCII."""
        return _host_of(self.url)

    @property
    def address(self) -> str:
        """The URL with the added path and query, for people."""
        base, _, query = self.url.partition("?")
        queries = "&".join(filter(None, (query, self.query)))
        return (base.removesuffix("/") if self.path else base) + self.path + (f"?{queries}" if queries else "")


class Senders(Protocol):
    """Those of the events' senders that wait for what a destination responds."""

    def wait_for(self, outbound: Outbound) -> bool:
        """Return whether a sender may wait for the response to this request."""

    def take(self, outbound: Outbound, response: DestinationResponse | None) -> None:
        """Take the response; None if there is none, or no complete one."""


def compose(
    delivery: Delivery,
    destination: Destination,
    template: RequestTemplate | None,
    *,
    now: float,
    split: Split | None = None,
    trace: TraceContext | None = None,
    observation: Observation | None = None,
) -> Outbound:
    """Build the request of a delivery's next attempt, at `now`.

    Headers replace earlier ones of the same name, in this order: the provider's, the template's, the destination's,
    ours. Where the event's own bytes aren't sent, there are none of the provider's. Ours are `gateway-event-id`,
    `gateway-delivery-id`, `gateway-route`, `gateway-attempt`, and if the destination has signing secrets `webhook-id`
    (the delivery's), `webhook-timestamp` and `webhook-signature`; and `user-agent` if there is no other. A valid
    `traceparent` is forwarded; with a `trace`, it and `tracestate` are ours instead.

    With a `split`, the delivery is for one item of its event, which is the body unless the template has another. An
    `observation` is passed on.

    Raises ExpressionError if the template can't be rendered, or a header's value has control characters.
    """
    event = delivery.event
    body = event.body
    method, path, query = Method.POST, "", ""
    headers: list[tuple[bytes, bytes]] | None = None
    added: dict[bytes, tuple[bytes, bytes]] = {}
    if split is not None or delivery.part is not None:
        template = template or RequestTemplate()
    if template is not None:
        view = _view_of(delivery, split)
        own = _own_request(template, view, delivery, split)
        method, path, query = template.method, own.path, own.query
        if own.body is not None:
            headers, body, added = [], own.body, own.headers
        for name, value in template.headers:
            content, _ = _rendered(value.render_bytes, view, f"request.headers.{name}")
            _add(added, name, content, "request.headers")
    for name, text in destination.headers:
        _add(added, name, text.encode("utf-8", "surrogateescape"), f"destinations.{destination.name}.headers")
    if headers is None:
        headers = _forwarded_headers(event.headers, added, destination)
    headers += added.values()
    if trace is not None:
        headers = [pair for pair in headers if pair[0].lower() not in _TRACE]
        headers.append((b"traceparent", trace.traceparent.encode("ascii")))
        if trace.tracestate:
            headers.append((b"tracestate", trace.tracestate.encode("ascii")))
    headers += (
        (b"gateway-event-id", event.id.encode()),
        (b"gateway-delivery-id", delivery.id.encode()),
        (b"gateway-route", delivery.route.encode()),
        (b"gateway-attempt", b"%d" % delivery.next_number),
    )
    if destination.sign:
        headers += sign(delivery.id.encode(), body, destination.sign, now=now)
    return Outbound(
        url=destination.url,
        headers=tuple(headers),
        body=body,
        method=method,
        path=path,
        query=query,
        access=destination.access,
        delivery=delivery,
        observation=observation,
    )


def sign(identity: bytes, body: bytes, secrets: Iterable[bytes], *, now: float) -> list[tuple[bytes, bytes]]:
    """Return the headers of Standard Webhooks, with a signature for each secret while they rotate.

    https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    """
    timestamp = b"%d" % now
    signed = b"%b.%b.%b" % (identity, timestamp, body)
    signatures = [b"v1," + b64encode(hmac.digest(secret, signed, "sha256")) for secret in secrets]
    return [
        (b"webhook-id", identity),
        (b"webhook-timestamp", timestamp),
        (b"webhook-signature", b" ".join(signatures)),
    ]


@lru_cache(maxsize=16384)
def _host_of(url: str) -> str:
    return URL(url).raw_host or ""


def _forwarded_headers(
    headers: Headers, added: Collection[bytes], destination: Destination
) -> list[tuple[bytes, bytes]]:
    """Return the provider's header pairs to forward, except names that a receiver could take for one of ours.

    A user agent is added if neither they nor the added headers have one.
    """
    names = [name.translate(_CGI_NORMALIZED) for name, _ in headers]
    dropped = _NEVER_FORWARDED
    if added or destination.drop_headers:
        others = [*added, *[name.encode() for name in destination.drop_headers]]
        dropped = dropped.union([name.translate(_CGI_NORMALIZED) for name in others])
    if b"connection" in names:
        lines = [value for name, (_, value) in zip(names, headers, strict=True) if name == b"connection"]
        dropped = dropped.union([token for value in lines for token in _tokens(value)])
    if b"traceparent" in names:
        parents = [value for name, value in headers if name.lower() == b"traceparent"]
        if len(parents) > 1 or not _is_traceparent(parents[0]):
            dropped |= _TRACE  # Trace Context, section 3.3.1: both or none
    prefixes = _OPT_IN_PREFIXES_AND_SIGNED if destination.sign else _OPT_IN_PREFIXES
    excluded = _EXCLUDED if dropped is _NEVER_FORWARDED else dropped | _OPT_IN
    if destination.forward_headers:
        wanted = {name.lower().encode() for name in destination.forward_headers}
        names = [
            _OPTED_IN if name.lower() in wanted and normalized not in dropped else normalized
            for normalized, (name, _) in zip(names, headers, strict=True)
        ]
    kept = [
        pair
        for name, pair in zip(names, headers, strict=True)
        if name not in excluded and not name.startswith(prefixes)
    ]
    if b"user-agent" not in added and (b"user-agent" not in names or b"user-agent" in dropped):
        kept.append(USER_AGENT)
    return kept


class _OwnRequest(NamedTuple):
    """What a route sends instead of the event's request; a `body` of None is the event's own."""

    path: str
    query: str
    body: bytes | None
    headers: dict[bytes, tuple[bytes, bytes]]


def _message(template: MessageTemplate, view: EventView) -> _OwnRequest:
    message = _rendered(template.render, view, "request")
    headers = {b"user-agent": USER_AGENT, **_content_type(message.content_type)}
    for name, text in message.headers:
        _add(headers, name, text.encode(), "request")
    return _OwnRequest(message.path, message.query, message.content, headers)


def _view_of(delivery: Delivery, split: Split | None) -> EventView:
    """Return what a request's expressions see of an event: with a `split`, its item, too."""
    if split is not None:
        return split.view(delivery.event, delivery.part)
    if delivery.part is not None:
        raise ItemMissingError("split: expected a route that splits its events, got a delivery of one item")
    return EventView.of(delivery.event)


def _own_request(template: RequestTemplate, view: EventView, delivery: Delivery, split: Split | None) -> _OwnRequest:
    if template.message is not None:
        return _message(template.message, view)
    path, query = _resource(template, view)
    if template.sends_event and split is not None:
        item = split.as_json(view.item, delivery.event, delivery.part)
        return _OwnRequest(path, query, item, {b"user-agent": USER_AGENT} | _content_type("application/json"))
    if template.sends_event:
        return _OwnRequest(path, query, None, {})
    return _OwnRequest(path, query, *_own_body(template, view))


def _resource(template: RequestTemplate, view: EventView) -> tuple[str, str]:
    """Return the path and the query that a route adds to a destination's URL."""
    path = "" if template.path is None else _rendered(template.path.render, view, "request.path")
    query = ""
    if template.query is not None:
        query = _rendered(partial(template.query.render, limit=MAX_TARGET), view, "request.query")
    if len(path) + len(query) > MAX_TARGET:
        raise ExpressionError(f"request.path: expected at most {MAX_TARGET} bytes, with the query, got more")
    return path, query


def _own_body(template: RequestTemplate, view: EventView) -> tuple[bytes, dict[bytes, tuple[bytes, bytes]]]:
    """Return the body that a route sends instead of the event's, which may be none, and its headers."""
    added = {b"user-agent": USER_AGENT}
    if template.form is not None:
        form = _rendered(partial(template.form.render, limit=MAX_RESULT), view, "request.form").encode()
        if len(form) > MAX_RESULT:
            raise ExpressionError(f"request.form: expected at most {MAX_RESULT} bytes, got {len(form)}")
        return form, added | _content_type("application/x-www-form-urlencoded")
    if template.body is not None:
        body, content_type = _rendered(template.body.render_bytes, view, "request.body")
        return body, added | _content_type(content_type or "text/plain; charset=utf-8")
    return b"", added


def _content_type(value: str) -> dict[bytes, tuple[bytes, bytes]]:
    return {b"content-type": (b"content-type", value.encode())}


def _rendered(render: Callable[[EventView], T], view: EventView, where: str) -> T:
    try:
        return render(view)
    except ExpressionError as error:
        hint = f" ({error.hint})" if isinstance(error, AbsentFieldError) and error.hint else ""
        raise ExpressionError(f"{where}: {error}{hint}") from error
    except RecursionError:  # JSON may be nested more deeply than what walks over it
        raise ExpressionError(f"{where}: expected values that are nested less deeply, got deeper ones") from None


def _add(added: dict[bytes, tuple[bytes, bytes]], name: str, value: bytes, where: str) -> None:
    if not _CONTROL.isdisjoint(value):
        raise ExpressionError(f"{where}.{name}: expected a value without control characters, got one with them")
    raw = name.encode()
    lower = raw.lower()
    if lower not in _RESERVED:
        added[lower] = (raw, value)


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip().translate(_CGI_NORMALIZED) for token in value.split(b",")]


def _is_traceparent(value: bytes) -> bool:
    """Return whether a value is valid by W3C Trace Context, section 3.2: a later version may have more at its end."""
    found = _TRACEPARENT.fullmatch(value)
    return found is not None and (found[1] != b"00" or not found[2])


_CREDENTIALS = frozenset(b"authorization cookie proxy-authenticate proxy-authentication-info".split())
_RESERVED = frozenset([name.encode() for name in RESERVED_HEADERS])
_OPT_IN = frozenset([name.encode() for name in OPT_IN_HEADERS])
_OPT_IN_PREFIXES = tuple([name.encode() for name in OPT_IN_PREFIXES])
_OPT_IN_PREFIXES_AND_SIGNED = (*_OPT_IN_PREFIXES, SIGNATURE_HEADER_PREFIX.encode())
_OPTED_IN = b""  # Replaces a name that isn't forwarded by default.
_CGI_NORMALIZED = bytes(
    [ord("-") if byte == ord("_") else byte for byte in bytes(range(256)).lower()]
)  # as `cgi_normalized`
_NEVER_FORWARDED = _RESERVED | _CREDENTIALS
_EXCLUDED = _NEVER_FORWARDED | _OPT_IN
_CONTROL = frozenset(range(32)) - {9} | {127}  # RFC 9110 §5.5
_TRACE = frozenset((b"traceparent", b"tracestate"))
_TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.DOTALL
)
