"""Builds events from verified requests: id, type and key by the source's expressions or the scheme's defaults."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple
from urllib.parse import unquote_plus

from gateway.bodies.codings import CONTENT_ENCODING
from gateway.model import Event, ExpressionError, Headers, RefusedError, event_id
from gateway.rules.batches import MAX_EVENTS
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.rules import Source
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier

# Maximum characters of an identity, type or key: they are stored in addition to the body, some of them twice.
MAX_FIELD = 1024
MAX_CACHED = 200
"""Maximum characters of a default expression that is cached: 0.4 MB each for the longest of strangers' rules."""
FALLBACK_TYPE = "webhook"
_OF_WHOLE = frozenset(
    {CONTENT_ENCODING, b"content-length", b"content-md5", b"content-digest", b"digest", b"repr-digest"}
)
_BATCH, _ONE = b"application/cloudevents-batch+json", b"application/cloudevents+json"
IDEMPOTENCY_KEY = "the header Idempotency-Key"
"""The last place to look for an identity."""


def read_of_body(type_: Expression | None, key: Expression | None, verifier: Verifier) -> frozenset[str]:
    """Return which of an event's type and key may be read from its body, those included that no rule reads."""
    fields = {"type": _Field("type", type_, verifier.type), "key": _Field("key", key, None)}
    return frozenset([name for name, field in fields.items() if field.reads_body or field.text is None])


class EventBuilder:
    """Builds the events of one source. Precomputes what doesn't depend on the request."""

    __slots__ = ("_ids", "_key", "_of_whole", "_source", "_type", "_withheld")

    def __init__(self, source: Source) -> None:
        self._source = source
        verifier = source.verifier
        self._ids: dict[str | None, _Field] = {
            expression: _Field("id", source.id, expression) for expression in verifier.ids
        }
        self._ids[None] = _Field("id", source.id, verifier.id)
        self._type = _Field("type", source.type, verifier.type)
        self._key = _Field("key", source.key, None)
        self._withheld = verifier.credential_headers | source.proxy_headers
        specs = [(spec.header, spec.timestamp_header) for spec in verifier.signing_specs]
        self._of_whole = _OF_WHOLE | {name.lower().encode() for names in specs for name in names if name}
        """Headers that describe a request's whole body, rather than one of the events in it."""

    def events(
        self, request: Request, bodies: Sequence[bytes], *, received_at: float, identity_expression: str | None = None
    ) -> list[Event]:
        """Build the events of a verified request that has several, given their uncompressed bodies.

        An identity from the request, rather than from an event's own body, gets the event's number appended; also if
        its expression may read either. Raises RefusedError (400) as `event` does, for any of the events.
        """
        kept = [_of_one(*pair) for pair in request.headers if pair[0].lower() not in self._of_whole]
        bare = request._replace(headers=tuple(kept), names=None)
        whole = _Whole(request, None)
        build = partial(self._event, received_at=received_at, identity_expression=identity_expression)
        events = [build(bare._replace(body=body), whole=whole, number=at) for at, body in enumerate(bodies)]
        if len({event.id for event in events}) < len(events):
            whole = _Whole(request, self._identity_of(request, identity_expression))
            events = [build(bare._replace(body=body), whole=whole, number=at) for at, body in enumerate(bodies)]
        return events

    def _identity_of(self, request: Request, identity_expression: str | None) -> str | None:
        """Return the identity of a request with several events; None if the request itself has none."""
        given = _Input(self._source.name, request, request.headers, request.lower_names(), request.query)
        try:
            identity = self._ids[identity_expression].read(given)
        except RefusedError:
            identity = None
        return identity or _idempotency_key(request.headers)

    def event(self, request: Request, *, received_at: float, identity_expression: str | None = None) -> Event:
        """Build the event of a verified request, without the headers and parameters that carry a credential.

        `identity_expression` is what `Verifier.verify` returned; without it, all possible expressions are tried. Raises
        RefusedError (400) if its identity, type or key can't be determined.
        """
        return self._event(request, received_at, identity_expression)

    def _event(
        self,
        request: Request,
        received_at: float,
        identity_expression: str | None,
        whole: "_Whole | None" = None,
        number: int = 0,
    ) -> Event:
        name, verifier = self._source.name, self._source.verifier
        headers, names = request.headers, request.lower_names()
        secret = self._withheld
        if not secret.isdisjoint(names):
            kept = [index for index, each in enumerate(names) if each not in secret]
            headers, names = tuple([headers[index] for index in kept]), [names[index] for index in kept]
        query = _without(request.query, verifier.credential_query) if verifier.credential_query else request.query
        given = _Input(name, request, headers, names, query)
        field = self._ids[identity_expression]
        if whole is None or field.reads_body:
            identity = field.read(given)
        else:  # of the request, signature's headers included
            received = whole.request
            identity = field.read(_Input(name, received, received.headers, received.lower_names(), received.query))
        identity = identity or _idempotency_key(headers)
        if whole is not None and identity and (not field.reads_body or identity == whole.identity):
            identity = f"{identity}#{number}"
        return Event(
            id=event_id(name, identity),
            source=name,
            type=self._type.read(given) or FALLBACK_TYPE,
            key=self._key.read(given),
            received_at=received_at,
            headers=headers,
            query=query,
            body=request.body,
        )

    def expression_texts(self) -> Mapping[str, Sequence[str]]:
        """Return the expressions for an event's id, type and key. The first one that has a value applies."""
        ids = [field.text for field in self._ids.values() if field.text is not None]
        texts = {"type": self._type.text, "key": self._key.text}
        return {"id": list(dict.fromkeys(ids)), **{name: [text] if text else [] for name, text in texts.items()}}

    def reproduces_id_of(self, event: Event) -> bool:
        """Return whether these rules reproduce a stored event's id. They don't if it came from a removed credential."""
        request = Request(
            method="POST", path=self._source.path, query=event.query, headers=event.headers, body=event.body
        )
        try:
            if self.event(request, received_at=event.received_at).id == event.id:
                return True
        except RefusedError:
            return False
        if self._source.split is None:
            return False
        # As an item of a request that has its identity: the item's number isn't stored.
        identity = self._identity_of(request, None)
        return identity is not None and any(
            event_id(self._source.name, f"{identity}#{number}") == event.id for number in range(MAX_EVENTS)
        )

    def identified_by(self, request: Request) -> str:
        """Return the expression that finds a request's identity; "" if none does.

        Raises RefusedError (400) as `event` does.
        """
        given = _Input(self._source.name, request, request.headers, request.lower_names(), request.query)
        for field in self._ids.values():
            if field.text is not None and field.read(given):
                return field.text
        return IDEMPOTENCY_KEY if _idempotency_key(request.headers) else ""


def _compiled(default: str) -> Expression:
    """Return a scheme's default expression. Our presets' are cached for all sources: compiling takes a millisecond."""
    return _cached(default) if len(default) <= MAX_CACHED else Expression(default)


@lru_cache(maxsize=512)
def _cached(default: str) -> Expression:
    return Expression(default)


class _Whole(NamedTuple):
    """A request that has several events, and the identity that it has itself, if that is to be told from theirs."""

    request: Request
    identity: str | None


class _Input:
    """The input of the fields. Most providers send id and type in headers, for which no view has to be created."""

    __slots__ = ("_request", "_source", "_view", "headers", "names", "query")

    def __init__(self, source: str, request: Request, headers: Headers, names: Sequence[bytes], query: str) -> None:
        self.headers = headers
        self.names = names
        self.query = query
        self._source = source
        self._request = request
        self._view: EventView | None = None

    def view(self) -> EventView:
        if self._view is None:
            self._view = EventView(
                source=self._source,
                headers=self.headers,
                query=self.query,
                body=self._request.body,
                names=self.names,
            )
        return self._view


class _Field:
    """An event's id, type or key, by the expression in routes.yaml or the scheme's default."""

    __slots__ = ("_expression", "_header", "_is_configured", "_name", "_reads_body")

    def __init__(self, name: str, configured: Expression | None, default: str | None) -> None:
        self._is_configured = configured is not None
        self._name = name
        self._expression = configured or (None if default is None else _compiled(default))
        self._reads_body = self._expression is not None and self._expression.reads_body
        header = self._expression.header if self._expression else None
        self._header = None if header is None else header.encode()

    @property
    def reads_body(self) -> bool:
        """Return whether it is read from the body."""
        return self._reads_body

    @property
    def text(self) -> str | None:
        """The text of the expression."""
        return None if self._expression is None else self._expression.text

    def read(self, given: _Input) -> str | None:
        if self._expression is None:
            return None
        try:
            if self._header is None:
                return self._checked(self._evaluate(self._expression, given.view()))
            if self._header not in given.names:
                return None
            value = given.headers[given.names.index(self._header)][1]
            return self._checked(value.decode("utf-8", "replace") or None)
        except RefusedError:
            # A scheme's default is a guess; an event of another shape is still valid.
            if self._is_configured:
                raise
            return None

    def _evaluate(self, expression: Expression, view: EventView) -> str | None:
        # If a provider sends it in a header, the body isn't searched.
        if self._is_configured and self._reads_body and (unreadable := view.unreadable) is not None:
            raise RefusedError(unreadable.status, unreadable.reason, f"{self._name}: {unreadable.detail}")
        try:
            return expression.as_text(view)
        except ExpressionError as error:
            raise RefusedError(400, "expression_error", f"{self._name}: {error}") from error

    def _checked(self, text: str | None) -> str | None:
        if text is not None and len(text) > MAX_FIELD:
            expected = f"expected at most {MAX_FIELD} characters, got {len(text)}"
            raise RefusedError(400, "expression_error", f"{self._name}: {expected}")
        return text


def _idempotency_key(headers: Headers) -> str | None:
    """https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/."""
    for name, value in headers:
        if len(name) == len(b"idempotency-key") and name.lower() == b"idempotency-key":
            return value.decode("utf-8", "surrogateescape") or None
    return None


def _of_one(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """Convert a batch's header for one of its events: a CloudEvents batch has a content type of its own.

    https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md#33-batched-content-mode
    """
    if name.lower() != b"content-type":
        return name, value
    media_type, semicolon, parameters = value.partition(b";")
    return name, _ONE + semicolon + parameters if media_type.strip().lower() == _BATCH else value


def _without(query: str, names: frozenset[str]) -> str:
    """Remove parameters from a query string, leaving every other byte unchanged."""
    return "&".join([part for part in query.split("&") if unquote_plus(part.partition("=")[0]) not in names])
