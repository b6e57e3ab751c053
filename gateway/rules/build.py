"""Builds sources, destinations and routes from rule files that were parsed and checked."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from gateway.model import ExpressionError
from gateway.rules.debounce import Debounce
from gateway.rules.destination_choice import DestinationChoice, fitting
from gateway.rules.destination_credentials import basic_authorization
from gateway.rules.eligibility import Eligibility
from gateway.rules.event_builder import read_of_body
from gateway.rules.event_view import EventView
from gateway.rules.redact_paths import redaction_of
from gateway.rules.references import without_values
from gateway.rules.request_presets import REQUEST_PRESETS
from gateway.rules.request_presets.preset import PresetRequest
from gateway.rules.request_templates import RequestTemplate, parameters
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.rules import (
    AfterDelivery,
    CertificateHeader,
    Destination,
    DestinationAccess,
    OAuth2,
    Proxy,
    Route,
    Source,
    SourceLimits,
    StoredResponse,
    Tls,
)
from gateway.rules.schema_reader import NameRef, ParsedMapping, SchemaReader, TemplateRef
from gateway.rules.templates import Template
from gateway.turns import give_way
from gateway.verify.client_certificates import ClientCertificates
from gateway.verify.preset_keys import PresetResponse
from gateway.verify.verifier import Verifier

# Shorter than for other routes, since a delivery that keeps failing blocks its key and holds back the partition's
# commit.
ORDERED_MAX_AGE = 3600.0
_AS_WRITTEN = ("order", "on_exhausted", "choice", "fixed", "split", "stop", "catch_all", "delay")


def source_of(
    name: str,
    read: ParsedMapping,
    verifier: Verifier,
    client_certificate: ClientCertificates | None,
    certificate_header: CertificateHeader | None,
) -> Source:
    expressions = {key: read.values.get(key) for key in ("id", "type", "key")}
    paths, of_body = read.values.get("redact"), read_of_body(expressions["type"], expressions["key"], verifier)
    return Source(
        name=name,
        path=path_of(name, read),
        masked_path=_masked_path(read),
        verifier=verifier,
        topic=read.values.get("topic"),
        dedupe=read.values.get("dedupe", verifier.dedupe),
        split=split_of(read.values.get("split"), verifier.split),
        batch_type=verifier.batch_type if "split" not in read.values else None,
        response=_response(read.values.get("respond"), verifier.response),
        allow_from=read.values.get("allow_from"),
        quarantine=read.values.get("quarantine", False),
        redaction=redaction_of(paths, of_body) if paths else None,
        client_certificate=client_certificate,
        proxy_headers=frozenset() if certificate_header is None else certificate_header.headers,
        limits=SourceLimits(**(limits.values if (limits := read.values.get("limits")) else {})),
        **expressions,
    )


def client_certificates_of(read: ParsedMapping, authorities: tuple[bytes, ...]) -> ClientCertificates:
    names = {key: frozenset(read.values.get(key, ())) for key in ("subjects", "dns", "uris", "emails")}
    return ClientCertificates(authorities=authorities, **names)


def split_of(own: str | None, default: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the path of the list of events in a body, from the source or its provider; None if there is no list."""
    if own is None:
        return default
    return None if own == "off" else tuple(own.split(".")[1:])


def _response(read: ParsedMapping | None, default: PresetResponse | None) -> StoredResponse | None:
    """Return the source's response, with the provider's defaults."""
    if read is None and default is None:
        return None
    status, body = default or PresetResponse()
    values = {} if read is None else read.values
    after = values.get("after_delivery")
    return StoredResponse(
        status=values.get("status", status),
        headers=tuple(values.get("headers", {}).items()),
        body=values["body"] if "body" in values else None if body is None else Template(body),
        after_delivery=None
        if after is None or "destination" not in after.values  # an unresolved reference
        else AfterDelivery(**{**after.values, "destination": after.values["destination"].name}),
    )


def destination_of(name: str, read: ParsedMapping, tls: Tls | None) -> Destination:
    give_way()
    own = {"url", "forward_headers", "drop_headers", "timeout", "concurrency", "rate", "on_gone"}
    values = {key: value for key, value in read.values.items() if key in own}
    sign = read.values.get("sign")
    headers, oauth2 = _authorization(read)
    proxy = _proxy(read)
    return Destination(
        name=name,
        headers=(*read.values.get("headers", {}).items(), *headers),
        sign=sign.values["secrets"] if sign else (),
        access=DestinationAccess(oauth2=oauth2, tls=tls, proxy=proxy) if oauth2 or tls or proxy else None,
        **values,
    )


def _authorization(read: ParsedMapping) -> tuple[Sequence[tuple[str, str]], OAuth2 | None]:
    """Convert `auth` to headers, or to OAuth2 client credentials."""
    auth = read.values.get("auth")
    for kind, found in auth.values.items() if auth else ():
        match kind:
            case "basic":
                return [("authorization", _basic(found))], None
            case "bearer":
                return [("authorization", f"Bearer {found.values.get('token', '')}")], None
            case _:
                return [], OAuth2(**{"client_id": "", "client_secret": ""} | found.values)
    return [], None


def _basic(read: ParsedMapping) -> str:
    return basic_authorization(read.values.get("username", ""), read.values.get("password", ""))


def _proxy(read: ParsedMapping) -> Proxy | None:
    proxy: Proxy | None = read.values.get("proxy")
    auth = read.values.get("proxy_auth")
    return replace(proxy, authorization=_basic(auth)) if proxy and auth else proxy


def route_of(name: str, read: ParsedMapping) -> Route:
    give_way()
    request = read.values.get("request")
    return Route(
        name=name,
        sources=names_of(read, "from"),
        match=read.values.get("match"),
        when=read.values.get("when"),
        destinations=names_of(read, "to"),
        request=_request(request) if request else None,
        retry=retry_policy_of(read),
        eligibility=_eligibility(read),
        **_debounce(read),
        **{key: read.values[key] for key in _AS_WRITTEN if key in read.values},
    )


def _debounce(read: ParsedMapping) -> dict[str, Any]:
    """Convert `debounce` to the fields of a route: it implies an order, by its own key."""
    values = read.values["debounce"].values if "debounce" in read.values else {}
    # If its values were refused, that is reported.
    return {"order": "key", "debounce": Debounce(**values)} if values.keys() == {"key", "quiet"} else {}


def _eligibility(read: ParsedMapping) -> Eligibility | None:
    values = {key: read.values[key] for key in ("enabled", "sample", "expires") if key in read.values}
    found = Eligibility(**values)
    return None if found == Eligibility() else found


def _request(read: ParsedMapping) -> RequestTemplate:
    values = read.values
    if "preset" in values:
        headers = tuple(values.get("headers", {}).items())
        preset = REQUEST_PRESETS[values["preset"]]
        fields = {each.name: values[each.name] for each in preset.fields if each.name in values}
        return RequestTemplate(headers=headers, message=PresetRequest(preset, fields))
    known: dict[str, Any] = {key: values[key] for key in ("method", "path", "body") if key in values}
    known |= {key: parameters(values[key]) for key in ("query", "form") if key in values}
    return RequestTemplate(headers=tuple(values.get("headers", {}).items()), **known)


def message_problem(read: ParsedMapping) -> str:
    """Return why this message can't be built; "" if it can, or if that depends on the event."""
    message = _request(read).message
    needed = [each.name for each in REQUEST_PRESETS[read.values["preset"]].fields if each.is_required]
    is_whole = read.node.value.keys() == read.values.keys() >= set(needed)  # otherwise a problem was reported
    if message is None or not is_whole or any(message.expressions):
        return ""
    try:
        message.render(EventView(source="", headers=(), query="", body=b""))
    except ExpressionError as error:
        return str(error)
    return ""


def retry_policy_of(route: ParsedMapping) -> RetryPolicy:
    """Return a route's retry policy, with the defaults of its file."""
    read = route.values.get("retry")
    is_ordered = bool({"order", "debounce"} & route.values.keys())
    values: dict[str, Any] = ({"max_age": ORDERED_MAX_AGE} if is_ordered else {}) | dict(read.values if read else {})
    # `max_age`, `max_attempts`, `schedule` and `jitter` are named as in the policy.
    results = sorted(values.pop("results", {}).items(), key=lambda item: not item[0].isdigit())
    return RetryPolicy(results=tuple(results), **values)


def names_of(route: ParsedMapping, key: str) -> tuple[str, ...]:
    give_way()
    return _names(route.values.get(key, ()))


def _names(uses: Iterable[NameRef | ParsedMapping]) -> tuple[str, ...]:
    return tuple([use.name if isinstance(use, NameRef) else use.values.get("name", "") for use in uses])


def choose_destinations(route: ParsedMapping, declared: Iterable[str], reader: SchemaReader) -> None:
    """Replace a template in a route's `to` by all names that it may evaluate to; keep the template as `choice`."""
    uses = route.values.get("to", ())
    templates = [use for use in uses if isinstance(use, TemplateRef)]
    otherwise: NameRef | None = route.values.get("otherwise")
    if not templates:
        if otherwise is not None:
            message = "`otherwise` needs a template in `to`, got none"
            reader.report(route.node.value["otherwise"], "value", message, at_key=True)
        return
    written, *others = templates
    for other in others:
        reader.report(other.node, "value", "expected one template in `to`, got another: a route of its own may have it")
    candidates = fitting(written.template, declared)
    if not candidates and not reader.has_gaps and written.node not in reader.unresolved:
        message = "expected a template of declared destinations' names, got one that none of them fits"
        reader.report(written.node, "unknown_name", message)
    if keys := [shown for key, shown in (("order", "order: key"), ("debounce", "debounce")) if key in route.values]:
        message = f"expected names of destinations with `{keys[0]}`, got a template"
        reader.report(written.node, "value", message)
    fixed = tuple([use for use in uses if not isinstance(use, TemplateRef)])
    names = _names(fixed)
    added = [NameRef(name, written.node) for name in candidates if name not in names]
    if otherwise is not None and otherwise.name not in {*names, *candidates}:
        added.append(otherwise)
    route.values |= {
        "to": (*fixed, *added),
        "fixed": names,
        "choice": DestinationChoice(
            name=written.template,
            candidates=frozenset(candidates),
            otherwise=None if otherwise is None else otherwise.name,
        ),
    }


def path_of(name: str, source: ParsedMapping) -> str:
    return str(source.values.get("path", f"/in/{name}"))


def shown_path_of(name: str, source: ParsedMapping) -> str:
    """Return a source's path for display, without the values of references, which may be secrets."""
    return _masked_path(source) or path_of(name, source)


def _masked_path(source: ParsedMapping) -> str | None:
    node = source.node.child("path")
    is_secret = node is not None and isinstance(node.value, str) and "${" in node.value
    return without_values(node.value) if node is not None and is_secret else None
