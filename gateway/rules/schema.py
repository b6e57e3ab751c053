"""The schema of routes.yaml, as data: every key, with its kind of value.

`load.py` reads files by it, and `json_schema()` exports it for editors. The kinds are in `value_kinds.py`.
"""

import re
from dataclasses import replace
from typing import Any, assert_never

from gateway.model import STORED_STATUSES, Disposition
from gateway.rules.addresses import (
    PATH,
    http_url,
    path,
    proxy,
    public_url,
    unresolved_path,
    unresolved_public_url,
)
from gateway.rules.conditions import parse_condition
from gateway.rules.debounce import MAX_QUIET, MIN_QUIET
from gateway.rules.defaults import OF_DESTINATIONS
from gateway.rules.event_view import ITEM
from gateway.rules.expression_kinds import CEL, CEL_CONDITION, CEL_SCALAR, EXPRESSION_NAME, SPLIT, provider
from gateway.rules.policy import FORBIDDEN, REQUIRED
from gateway.rules.redact_paths import EXPECTED, parse_redact_path
from gateway.rules.request_presets import REQUEST_PRESETS
from gateway.rules.request_presets.field_kinds import field_kind
from gateway.rules.request_templates import Method, PathTemplate, parameter
from gateway.rules.rule_tests import TESTS
from gateway.rules.rules import CertificateFormat, OnGone, TokenEndpointAuthMethod
from gateway.rules.templates import Template
from gateway.rules.value_kinds import (
    _CREDENTIAL,
    _DNS_NAME,
    _EMAIL,
    _PASSWORD,
    _RESULTS,
    _SCOPE,
    _STATUS,
    _TOPIC,
    _URI,
    _USER,
    DURATION_STEP,
    FILE_REF,
    HEADER,
    NAME,
    NAME_REF,
    PEER_NETWORK,
    PEM,
    RATE,
    SECRET,
    SIZE,
    TEXT,
    URL,
    ByKey,
    Key,
    Kind,
    MappingKind,
    NameOr,
    Scalar,
    Several,
    Table,
    Tree,
    _dns_name,
    _email,
    _header_template,
    _header_value,
    _network,
    _opt_in_header,
    _result,
    _signing_secret,
    _stored_status,
    _subject,
    choice,
    duration,
    integer,
    matching,
    number,
    pattern,
    secret,
)
from gateway.verify import presets, schemes
from gateway.verify.config_keys import GENERIC
from gateway.verify.config_values import EXPECTED_WINDOW, WINDOW, parse_window
from gateway.verify.config_values import SPLIT as BODY_LIST
from gateway.verify.key_ring import EXPECTED_UNTIL, parse_until
from gateway.verify.tokens import TOKEN

VERSION = 1


def _version(value: object) -> object:
    if value is True or value != VERSION:
        raise ValueError
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError  # noqa: TRY004 - as for any other value
    return value


def _share(value: object) -> float:
    found = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if found is None or not 0 < float(found[1]) <= 100:  # noqa: PLR2004 - per cent
        raise ValueError
    return float(found[1]) / 100


def _expires(value: object) -> float:
    try:
        return parse_until(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError from None  # its own message is the text


def _owner(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 100 or not value.isprintable():  # noqa: PLR2004 - a label
        raise ValueError("expected a name of at most 100 printable characters, got another string")
    return _public(value)


def _runbook(value: object) -> str:
    return http_url(_public(value))


def _public(value: object) -> str:
    """Refuse a reference, which may be a secret: this is a label of a metric."""
    if "${" in str(value):
        raise ValueError("expected a string without references, got one with ${…}, which everybody would see")
    return str(value)


BOOLEAN = Scalar("true or false", _boolean, {"type": "boolean"})
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,4})?)%", re.ASCII)
_WINDOW = Scalar(EXPECTED_WINDOW, parse_window, WINDOW)
SIGN = MappingKind(
    name="sign",
    about="Sign each request as Standard Webhooks does (https://www.standardwebhooks.com).",
    keys=(
        Key(
            name="secrets",
            kind=Several(
                "a list of secrets",
                Scalar(
                    "a secret of the form whsec_ and base64",
                    _signing_secret,
                    {"type": "string", "pattern": "^(whsec_)?[A-Za-z0-9+/]+={0,2}$"},
                    is_secret=True,
                    unresolved=lambda _: b"a secret that isn't known here",
                ),
            ),
            about="The secrets, `whsec_` and base64, the current one first; several while rotating.",
            is_required=True,
        ),
    ),
)
CONTACT_KEYS = (
    Key(
        name="owner",
        kind=Tree("a string", str, _owner, {"type": "string"}, is_raw=True),
        about="Who answers for it, in `explain`, a metric and alerts: a team, a channel.",
    ),
    Key(
        name="runbook",
        kind=Tree("a URL", str, _runbook, {"type": "string", "pattern": "^https?://"}, is_raw=True),
        about="What to do when it fails: a URL.",
    ),
)
_BASIC_KEYS = (
    Key(
        name="username",
        kind=secret("a string without colons and control characters", _USER),
        about="The user's name, without a colon.",
        is_required=True,
    ),
    Key(
        name="password",
        kind=secret("a string without control characters", _PASSWORD),
        about="The password.",
        is_required=True,
    ),
)
OAUTH2 = MappingKind(
    name="oauth2",
    about="Fetch a token by client credentials (RFC 6749, section 4.4), and send it as a bearer token.",
    keys=(
        Key(name="token_url", kind=URL, about="The token endpoint.", is_required=True),
        Key(
            name="client_id",
            kind=secret("a string without control characters", _PASSWORD),
            about="Our client id at the token endpoint.",
            is_required=True,
        ),
        Key(
            name="client_secret",
            kind=secret("a string without control characters", _PASSWORD),
            about="The client's secret.",
            is_required=True,
        ),
        Key(
            name="scope",
            kind=Several(
                "a scope or a list of them",
                Scalar("a scope without spaces", matching(_SCOPE), pattern(_SCOPE)),
                may_be_one=True,
            ),
            about="The token's scope, or a list of scopes.",
        ),
        Key(name="audience", kind=TEXT, about="The token's audience, if the endpoint requires one."),
        Key(
            name="style",
            kind=choice(*TokenEndpointAuthMethod, parse=TokenEndpointAuthMethod),
            about="Where the token request has id and secret: in a header (basic), or in its body.",
            default="basic",
        ),
    ),
)
AUTH = MappingKind(
    name="auth",
    about="How we authenticate to the destination: one of basic, bearer and oauth2.",
    keys=(
        Key(
            name="basic",
            kind=MappingKind(name="basic", about="A user's name and password (RFC 7617).", keys=_BASIC_KEYS),
            about="A user's name and password (RFC 7617).",
        ),
        Key(
            name="bearer",
            kind=MappingKind(
                name="bearer",
                about="A token that doesn't change (RFC 6750).",
                keys=(
                    Key(
                        name="token",
                        kind=secret("a token of visible ASCII characters", _CREDENTIAL),
                        about="The token.",
                        is_required=True,
                    ),
                ),
            ),
            about="A token that doesn't change (RFC 6750).",
        ),
        Key(name="oauth2", kind=OAUTH2, about=OAUTH2.about),
    ),
    is_choice=True,
)
TLS = MappingKind(
    name="tls",
    about="Trusted authorities and our certificate, in PEM, such as ${file:ca.pem}. Verification can't be disabled.",
    keys=(
        Key(name="ca", kind=PEM, about="Certificates that we trust instead of the system's."),
        Key(name="certificate", kind=PEM, about="Our certificate, and the others of its chain."),
        Key(name="key", kind=PEM, about="The certificate's private key, without a passphrase."),
    ),
)
PROXY_AUTH = MappingKind(
    name="proxy_auth", about="A user's name and password at the proxy (RFC 7617).", keys=_BASIC_KEYS
)
DESTINATION_KEYS = (
    *CONTACT_KEYS,
    Key(name="url", kind=URL, about="Where to POST. The host is never templated.", is_required=True),
    Key(
        name="headers",
        kind=Table(
            "a mapping of headers",
            HEADER,
            Scalar("a string", _header_value, {"type": "string"}, is_secret=True, unresolved=str),
        ),
        about="Headers that each request gets, such as Authorization.",
    ),
    Key(
        name="forward_headers",
        kind=Several(
            "a list of headers",
            Scalar("a header's name, such as X-Forwarded-For", _opt_in_header, pattern(TOKEN)),
        ),
        about="The sender's headers to forward although servers trust them: X-Forwarded-For, X-Original-URL, "
        "X-HTTP-Method-Override and the like, which aren't forwarded by default.",
    ),
    Key(
        name="drop_headers",
        kind=Several("a list of headers", HEADER),
        about="The sender's headers not to forward, such as a provider's signature.",
    ),
    Key(name="sign", kind=SIGN, about=SIGN.about),
    Key(name="auth", kind=AUTH, about=AUTH.about),
    Key(name="tls", kind=TLS, about=TLS.about),
    Key(
        name="proxy",
        kind=Scalar("a proxy such as http://proxy.internal:3128", proxy, {"type": "string", "pattern": "^http://"}),
        about="Reach the destination, and its token endpoint, through this HTTP proxy; none is ever read from the "
        "environment.",
    ),
    Key(name="proxy_auth", kind=PROXY_AUTH, about=PROXY_AUTH.about),
    Key(
        name="on_gone",
        kind=choice(*OnGone, parse=OnGone),
        about="What happens after a 410: a dead letter, or a dead letter and a pause of the destination.",
        default="dead_letter",
    ),
    Key(
        name="timeout",
        kind=duration(0.1, 300),
        about="The timeout of one attempt in all, from resolving the host to the response.",
        default="10s",
    ),
    Key(
        name="concurrency",
        kind=integer(1, 1000),
        about="Maximum concurrent requests, over the whole fleet.",
        default=50,
    ),
    Key(
        name="rate",
        kind=RATE,
        about="Maximum rate of requests, over the whole fleet: 100/s, 10/m, 5/h. Without it there is no limit.",
    ),
)
DESTINATION = MappingKind(
    name="destination",
    about="A downstream URL with its own limits.",
    keys=DESTINATION_KEYS,
)
INLINE_DESTINATION = MappingKind(
    name="inline_destination",
    about="A destination defined where it is used.",
    keys=(
        Key(name="name", kind=NAME, about="Its name: a label of metrics, and part of keys.", is_required=True),
        *DESTINATION_KEYS,
    ),
)
AFTER_DELIVERY = MappingKind(
    name="after_delivery",
    about="Wait for a destination's response, and send it on to the sender.",
    keys=(
        Key(name="destination", kind=NAME_REF, about="The destination whose response it is.", is_required=True),
        Key(
            name="timeout",
            kind=duration(0.1, 30),
            about="How long after the request has come. Without a response by then, the sender gets the one above.",
            default="2s",
        ),
    ),
)
RESPOND = MappingKind(
    name="respond",
    about="The response to a sender whose event is stored. Strings may contain ${{ CEL }}.",
    keys=(
        Key(
            name="status",
            kind=Scalar("200, 201, 202 or 204", _stored_status, {"enum": list(STORED_STATUSES)}),
            about="Its status. Default: 202, or as the provider wants.",
        ),
        Key(
            name="headers",
            kind=Table(
                "a mapping of headers",
                HEADER,
                Tree("a string", str, _header_template, {"type": "string"}, is_template=True),
            ),
            about="Headers to add; Content-Type replaces the one of the body.",
        ),
        Key(
            name="body",
            kind=Tree("any value", object, Template, {}, is_template=True),
            about="Text if it is a string, else JSON. Default: the event's id, or as the provider wants.",
        ),
        Key(name="after_delivery", kind=AFTER_DELIVERY, about=AFTER_DELIVERY.about),
    ),
)
LIMITS = MappingKind(
    name="limits",
    about="What a source may send.",
    keys=(
        Key(name="body", kind=SIZE, about="Maximum size of a body, as it comes: 256KiB. Beyond it: 413."),
        Key(
            name="rate",
            kind=RATE,
            about="Maximum rate of verified requests, to all ingresses together: 100/s, 10/m, 5/h. Beyond it: 429.",
        ),
        Key(
            name="concurrent",
            kind=integer(1, 100_000),
            about="Maximum verified requests in progress at a time, in each process. Beyond it: 503.",
        ),
    ),
)
CLIENT_CERTIFICATE = MappingKind(
    name="client_certificate",
    about="The certificate that a client must have (mutual TLS): of these authorities, for one of the names, if any.",
    keys=(
        Key(
            name="ca",
            kind=PEM,
            about="The authorities' certificates, in PEM, such as ${file:ca.pem}. A chain may end at any of them.",
            is_required=True,
        ),
        Key(
            name="subjects",
            kind=Several(
                "a list of subjects",
                Scalar("a subject as RFC 4514 writes it, such as CN=hooks,O=Bank,C=DE", _subject, {"type": "string"}),
            ),
            about="Subjects, as `openssl x509 -subject -nameopt RFC2253` prints them.",
        ),
        Key(
            name="dns",
            kind=Several("a list of names", Scalar("a host's name", _dns_name, pattern(_DNS_NAME))),
            about="Names of hosts, among the alternative names.",
        ),
        Key(
            name="uris",
            kind=Several("a list of URIs", Scalar("a URI with a scheme", matching(_URI), pattern(_URI))),
            about="URIs among the alternative names, such as spiffe://bank.example/hooks.",
        ),
        Key(
            name="emails",
            kind=Several("a list of addresses", Scalar("an email address", _email, pattern(_EMAIL))),
            about="Email addresses among the alternative names.",
        ),
    ),
)
SOURCE = MappingKind(
    name="source",
    about="A sender: where it posts, how it is verified, what identifies an event.",
    keys=(
        Key(
            name="path",
            kind=Scalar(
                "an absolute path without a query, such as /in/github", path, pattern(PATH), unresolved=unresolved_path
            ),
            about="Where the sender posts. Without it, /in/ and the source's name. The value of a reference in it is "
            "a secret, and not shown.",
        ),
        Key(
            name="verify",
            kind=Tree(
                "a mapping such as {scheme: github, secrets: [...]}, or {scheme: none}",
                dict,
                lambda config: config,  # built with the source's `public_url`, by the reader
                {"$ref": "#/$defs/verify"},
                is_secret=True,
                unresolved="whsec_cGxhY2Vob2xkZXItcGxhY2Vob2xkZXI=",  # a secret of any scheme
            ),
            about="How the sender is verified.",
            is_required=True,
        ),
        *CONTACT_KEYS,
        Key(
            name="id",
            kind=CEL_SCALAR,
            about="CEL: what identifies an event. Default: what the scheme's vendor documents.",
        ),
        Key(name="type", kind=CEL_SCALAR, about="CEL: the event's type. Default: what the scheme's vendor documents."),
        Key(name="key", kind=CEL_SCALAR, about="CEL: the order key, such as body.repository.full_name."),
        Key(
            name="topic",
            kind=Scalar("a topic's name of letters, digits, '.', '_' and '-'", matching(_TOPIC), pattern(_TOPIC)),
            about="The topic that the events go to. Default: <prefix>events.<source>.",
        ),
        Key(
            name="dedupe",
            kind=_WINDOW,
            about="For how long events with the same identity and content aren't delivered again; "
            "or off. Default: 1h for providers that redeliver automatically, else off.",
        ),
        Key(
            name="allow_from",
            kind=Several("a list of addresses or networks", PEER_NETWORK),
            about="The only addresses and networks that may send; others get 403. Behind proxies see `ingress`.",
        ),
        Key(name="client_certificate", kind=CLIENT_CERTIFICATE, about=CLIENT_CERTIFICATE.about),
        Key(name="limits", kind=LIMITS, about=LIMITS.about),
        Key(
            name="split",
            kind=Scalar("body, body.PATH or off", matching(BODY_LIST), pattern(BODY_LIST)),
            about="The list in a JSON body of which each item is an event. Default: what the provider sends.",
        ),
        Key(name="respond", kind=RESPOND, about=RESPOND.about),
        Key(
            name="quarantine",
            kind=BOOLEAN,
            about="Whether requests whose signature or credential was refused are kept for 7 days, "
            "to be verified again by `gateway rejected retry`.",
            default=False,
        ),
        Key(
            name="redact",
            kind=Several("a list of paths", Tree(EXPECTED, str, parse_redact_path, {"type": "string"}, is_raw=True)),
            about="What commands, the API and the console hide of its events: body.card.number, headers.x-api-key. "
            "Deliveries and the log have all of it.",
        ),
        Key(
            name="public_url",
            kind=Scalar(URL.expected, public_url, URL.json, is_secret=True, unresolved=unresolved_public_url),
            about="The address the sender knows, for schemes that sign it; without a path, the request's is added.",
        ),
    ),
)
RETRY = MappingKind(
    name="retry",
    about="How deliveries of this route are retried.",
    keys=(
        Key(
            name="schedule",
            kind=Several("a list of durations", DURATION_STEP),
            about="From the end of one attempt to the next; the last step repeats.",
            default=["5s", "30s", "2m", "10m", "1h", "3h", "6h", "12h", "1d"],
        ),
        Key(name="max_attempts", kind=integer(1), about="Attempts in all, the first one included.", default=20),
        Key(
            name="max_age",
            kind=duration(1, 30 * 86400),
            about="How long after its receipt an event is still tried.",
            default="3d",
        ),
        Key(
            name="jitter",
            kind=number(0, 1),
            about="The share by which a delay varies: 0.2 is plus or minus 20 %.",
            default=0.2,
        ),
        Key(
            name="results",
            kind=Table(
                "a mapping such as {404: drop, 5xx: retry}",
                Scalar(
                    f"a status such as 404, or one of {', '.join(_RESULTS)}",
                    _result,
                    {"anyOf": [pattern(_STATUS), {"enum": list(_RESULTS)}]},
                    choices=_RESULTS,
                ),
                choice(*Disposition, parse=Disposition),
                has_number_keys=True,
            ),
            about="What to do after a status, a class of statuses or a kind of failure, instead of the default.",
        ),
    ),
)
PARAMETERS = Table(
    "a mapping of parameters",
    TEXT,
    Tree(
        "a string, a number, a boolean, a list of these or null",
        (str, int, float, list, type(None)),
        parameter,
        {"type": ["string", "number", "boolean", "array", "null"]},
        is_template=True,
    ),
)
REQUEST = MappingKind(
    name="request",
    about="What is sent instead of the raw bytes. Strings may contain ${{ CEL }}.",
    keys=(
        Key(
            name="method",
            kind=choice(*Method, parse=Method),
            about="The method. Without a body or form of its own, GET and DELETE have none.",
            default="POST",
        ),
        Key(
            name="path",
            kind=Tree(
                "a path such as /customers/${{ body.id }}", str, PathTemplate, {"type": "string"}, is_template=True
            ),
            about="A path to add to the destination's. What expressions give is percent-encoded.",
        ),
        Key(
            name="query",
            kind=PARAMETERS,
            about="Parameters to add to the destination's query: strings, numbers, booleans, a list for several of one "
            "name, null for none.",
        ),
        Key(
            name="headers",
            kind=Table(
                "a mapping of headers",
                HEADER,
                Tree("a string", str, _header_template, {"type": "string"}, is_template=True),
            ),
            about="Headers to add to the request.",
        ),
        Key(
            name="body",
            kind=Tree("any value", object, Template, {}, is_template=True),
            about="A string is sent as text/plain, anything else as JSON.",
        ),
        Key(
            name="form",
            kind=PARAMETERS,
            about="Instead of a body, a form (application/x-www-form-urlencoded), with values as in `query`.",
        ),
    ),
)
_REQUEST_HEADERS = next(key for key in REQUEST.keys if key.name == "headers")
REQUEST_OR_MESSAGE = ByKey(
    key="preset",
    kinds={
        name: MappingKind(
            name=f"request_{name}",
            about=f"{preset.about} The destination's URL: {preset.url}.",
            keys=(
                Key(name="preset", kind=choice(name), about="The service that it is for.", is_required=True),
                *[
                    Key(name=each.name, kind=field_kind(each), about=each.about, is_required=each.is_required)
                    for each in preset.fields
                ],
                _REQUEST_HEADERS,
            ),
        )
        for name, preset in REQUEST_PRESETS.items()
    },
    otherwise=REQUEST,
)
DEBOUNCE = MappingKind(
    name="debounce",
    about="Which events of a route supersede one another.",
    keys=(
        Key(
            name="key",
            kind=CEL_SCALAR,
            about="CEL: what they have in common, such as body.site. An event without it is superseded by none.",
            is_required=True,
        ),
        Key(
            name="quiet",
            kind=duration(MIN_QUIET, MAX_QUIET),
            about="For how long no other event of the source and key has to come until the last one is delivered: 30s. "
            "It is delivered after ten times that at the latest, however many come.",
            is_required=True,
        ),
    ),
)
ROUTE = MappingKind(
    name="route",
    about="Which events of which sources go to which destinations.",
    keys=(
        Key(name="name", kind=NAME, about="Its name: a label of metrics, and part of keys.", is_required=True),
        Key(
            name="foreach",
            kind=Several(
                "a list of values, or of mappings with values",
                Tree("a value", (str, int, float, dict), lambda item: item, {}, is_raw=True),
            ),
            about="The route is written once for each item: `${{ each }}`, or `${{ each.name }}` of a mapping, is "
            "replaced everywhere in it.",
        ),
        Key(
            name="from",
            kind=Several("a source's name or a list of them", NAME_REF, may_be_one=True),
            about="The source, or a list of sources.",
            is_required=True,
        ),
        Key(
            name="match",
            kind=Tree(
                "a mapping such as {type: push} (CEL is written under `when`)",
                dict,
                parse_condition,
                {"type": "object"},
            ),
            about="Paths (type, source, headers.…, query.…, body.…) with their conditions, all of which must hold: "
            "a value, a list of values, a glob, or tests {is, gt, gte, lt, lte, exists, not}; "
            "any_of and all_of have lists of such mappings, not has one.",
        ),
        Key(
            name="let",
            kind=Table("a mapping of CEL expressions", EXPRESSION_NAME, CEL),
            about="CEL expressions by name: the others of the route, and those after them, may use the names.",
            names_expressions=True,
        ),
        Key(name="when", kind=CEL_CONDITION, about="CEL, for conditions that match can't express."),
        Key(
            name="enabled",
            kind=BOOLEAN,
            about="With false, it matches no event; what it has matched before is still delivered.",
            default=True,
        ),
        Key(
            name="sample",
            kind=Scalar("a share such as 10% or 0.5%", _share, pattern(_SHARE)),
            about="The share of the events that it takes, by their ids: each route with the same share takes the same.",
            default="100%",
        ),
        Key(
            name="expires",
            kind=Scalar(EXPECTED_UNTIL, _expires, {"type": "string"}),
            about="It matches no event that is received from then on; what it has matched before is still delivered.",
        ),
        Key(
            name="to",
            kind=Several(
                "a destination or a list of them",
                NameOr(
                    NAME_REF,
                    INLINE_DESTINATION,
                    Tree(
                        "a name with ${{ … }} in it",
                        str,
                        Template,
                        {"type": "string", "pattern": r"\$\{\{"},
                        is_template=True,
                    ),
                ),
                may_be_one=True,
            ),
            about="Names of destinations, or destinations defined in place. One name may be a template, such as "
            "tenant-${{ body.tenant }}, that gives the name of a declared destination.",
            is_required=True,
        ),
        Key(
            name="otherwise",
            kind=NAME_REF,
            about="The destination of an event for which the template in `to` gives no declared name; without it, that "
            "delivery is a dead letter (`unknown_destination`).",
        ),
        Key(
            name="stop",
            kind=BOOLEAN,
            about="With true, an event that it takes goes to none of the routes below it, in the order of the files.",
            default=False,
        ),
        Key(
            name="catch_all",
            kind=BOOLEAN,
            about="With true, it takes only events that no route without `catch_all` takes.",
            default=False,
        ),
        Key(
            name="split",
            kind=SPLIT,
            about="A list of the event: each of its items is a delivery of its own, retried alone. It is the body, "
            "unless `request` has another, whose expressions may name it: `item`.",
            gives=ITEM,
        ),
        Key(
            name="delay",
            kind=duration(1, 86400),
            about="How long after its receipt an event is delivered: 5m. Its age, for `max_age`, begins then.",
        ),
        Key(
            name="debounce",
            kind=DEBOUNCE,
            about="Events of the same key that follow one another closely: the last one is delivered, and the others "
            "end as `superseded`.",
        ),
        Key(
            name="request",
            kind=REQUEST_OR_MESSAGE,
            about="Without it the raw bytes go through untouched.",
            takes_secrets=True,
            takes_given=True,
        ),
        Key(name="retry", kind=RETRY, about=RETRY.about),
        Key(
            name="order",
            kind=replace(choice("key"), expected="the word key (the expression is the `key` of the source)"),
            about="`key`: the events of a source's key are delivered to each destination one after another, in order. "
            "Every source needs a `key`; `max_age` is 1h by default.",
        ),
        *CONTACT_KEYS,
        Key(
            name="on_exhausted",
            kind=choice("dead_letter", "halt"),
            about="With `order`, what happens after a delivery has finally failed: a dead letter and the key's next "
            "one, or a halt of the key until the route or the destination is kicked.",
            default="dead_letter",
        ),
    ),
)
EGRESS = MappingKind(
    name="egress",
    about="Where deliveries may connect to. Link-local and cloud-metadata addresses are always refused, unless `allow` "
    "has the exact address.",
    keys=(
        Key(
            name="private",
            kind=choice("allow", "refuse"),
            about="Whether private and loopback addresses are allowed.",
            default="allow",
        ),
        Key(
            name="allow",
            kind=Several(
                "a list of addresses or networks",
                Scalar("an address or a network such as 10.0.0.0/8", _network, {"type": "string"}),
                may_be_empty=True,
            ),
            about="Addresses and networks that are always allowed; link-local and "
            "cloud-metadata ones only if they are written here as single addresses.",
        ),
    ),
)
CERTIFICATE_HEADER = MappingKind(
    name="certificate_header",
    about="The header in which trusted proxies that terminate TLS pass on the certificate of a client.",
    keys=(
        Key(
            name="name",
            kind=HEADER,
            about="The header, which they replace or remove in each request.",
            is_required=True,
        ),
        Key(
            name="format",
            kind=choice(*CertificateFormat, parse=CertificateFormat),
            about="xfcc: Envoy's X-Forwarded-Client-Cert, with `cert`. pem: a text in PEM, percent-encoded, as nginx's "
            "$ssl_client_escaped_cert. rfc9440: Client-Cert, and Client-Cert-Chain.",
            is_required=True,
        ),
    ),
)
INGRESS = MappingKind(
    name="ingress",
    about="What is in front of the gateway.",
    keys=(
        Key(
            name="trusted_proxies",
            kind=Several("a list of addresses or networks", PEER_NETWORK, may_be_empty=True),
            about="Addresses and networks of the proxies whose X-Forwarded-For says where a request is from.",
        ),
        Key(name="certificate_header", kind=CERTIFICATE_HEADER, about=CERTIFICATE_HEADER.about),
    ),
)
PROVIDER = Tree(
    "a mapping with `verify`, as in a source, but for the secrets",
    dict,
    provider,
    {"$ref": "#/$defs/provider"},
)
DEFAULTS = MappingKind(
    name="defaults",
    about="What routes and destinations have if they don't say it, in this file and in those that it includes.",
    keys=(
        Key(name="retry", kind=RETRY, about="Of routes; a key that a route has under `retry` replaces it there."),
        *[key for key in DESTINATION_KEYS if key.name in {"headers", *OF_DESTINATIONS}],
    ),
)
INCLUDED_KEYS = (
    Key(
        name="include",
        kind=Several("a file, a glob or a list of them", FILE_REF, may_be_one=True),
        about="Other files to read, relative to this one; `*` matches any characters.",
    ),
    Key(
        name="providers",
        kind=Table("a mapping of providers", NAME, PROVIDER),
        about="Providers that aren't known yet: a source's `scheme` may be one.",
    ),
    Key(name="defaults", kind=DEFAULTS, about=DEFAULTS.about),
    *[
        replace(key, about=f"{key.about} For all that this file and those that it includes have.")
        for key in CONTACT_KEYS
    ],
    Key(
        name="secrets",
        kind=Table("a mapping of names to secrets", NAME, SECRET),
        about="Secrets by which `hmac` makes digests, in the requests of this file and of those that it includes.",
        gives_secrets=True,
    ),
    Key(name="sources", kind=Table("a mapping of names to sources", NAME, SOURCE), about="Who sends."),
    Key(name="destinations", kind=Table("a mapping of destinations", NAME, DESTINATION), about="Who receives."),
    Key(
        name="routes", kind=Several("a list of routes (- name: …)", ROUTE, may_be_empty=True), about="What goes where."
    ),
    Key(
        name="tests",
        kind=TESTS,
        about="What the rules should do with events: `gateway test` tries it.",
        is_of_tests=True,
    ),
)
_GLOB = Scalar("a string, in which * matches any characters", str, {"type": "string"})
POLICY = MappingKind(
    name="policy",
    about="What the files that this one includes may do.",
    keys=(
        Key(
            name="hosts",
            kind=Several("a list of hosts", _GLOB),
            about="The hosts of their destinations, token endpoints and proxies: `*.acme.example`.",
        ),
        Key(name="paths", kind=Several("a list of paths", _GLOB), about="The paths of their sources: `/in/team-*`."),
        Key(name="max_rate", kind=RATE, about="The most that `rate` of a destination may be; each then needs one."),
        Key(
            name="require",
            kind=Several("a list of keys", choice(*REQUIRED)),
            about="`owner`, `runbook`: what each source, destination and route has, itself or from its file.",
        ),
        Key(
            name="forbid",
            kind=Several("a list", choice(*FORBIDDEN)),
            about="`unverified`: sources with `scheme: none`. `headers`: of destinations and requests. `secrets`: "
            "those of this file in requests of theirs.",
        ),
    ),
)
_VERSION_KIND = Scalar(f"the version {VERSION}", _version, {"const": VERSION})
ROOT = MappingKind(
    name="rules",
    about="The rules of the webhook gateway.",
    keys=(
        Key(name="version", kind=_VERSION_KIND, about="The version of this format.", is_required=True),
        *INCLUDED_KEYS,
        Key(name="egress", kind=EGRESS, about=EGRESS.about),
        Key(name="ingress", kind=INGRESS, about=INGRESS.about),
        Key(name="policy", kind=POLICY, about=POLICY.about),
    ),
)
INCLUDED = MappingKind(
    name="included",
    about="A file that another one includes.",
    keys=(Key(name="version", kind=_VERSION_KIND, about="The version of this format."), *INCLUDED_KEYS),
)


_OF_OWN_PROVIDER = {
    "type": "object",
    "description": "Of a provider under `providers`.",
    "properties": {"scheme": {"type": "string", "not": {"enum": [*GENERIC, *presets.PRESETS]}}},
    "required": ["scheme"],
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a rule file, for editors (https://json-schema.org/draft/2020-12)."""
    definitions: dict[str, object] = {
        "reference": {"type": "string", "pattern": r"\$\{"},
        "verify": {"anyOf": [schemes.json_schema(), _OF_OWN_PROVIDER]},
        "provider": presets.json_schema(),
    }
    root = _object_schema(ROOT, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "routes.yaml",
        **root,
        "$defs": definitions,
    }


def _object_schema(record: MappingKind, definitions: dict[str, object]) -> dict[str, object]:
    properties: dict[str, object] = {}
    for key in record.keys:
        about = {"description": key.about} | ({} if key.default is None else {"default": key.default})
        properties[key.name] = _kind_schema(key.kind, definitions) | about
    required = [key.name for key in record.keys if key.is_required]
    return {
        "type": "object",
        "description": record.about,
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
        **({"minProperties": 1, "maxProperties": 1} if record.is_choice else {}),
    }


def _kind_schema(kind: Kind, definitions: dict[str, object]) -> dict[str, object]:  # noqa: PLR0911 - one for each kind
    match kind:
        case Scalar():
            # A string without further conditions already allows a reference.
            return dict(kind.json) if kind.json == TEXT.json else {"anyOf": [kind.json, {"$ref": "#/$defs/reference"}]}
        case Tree():
            return dict(kind.json)
        case Several():
            item = _kind_schema(kind.item, definitions)
            several: dict[str, object] = {"type": "array", "items": item, "minItems": 0 if kind.may_be_empty else 1}
            return {"anyOf": [item, several]} if kind.may_be_one else several
        case Table():
            value = _kind_schema(kind.value, definitions)
            return {"type": "object", "propertyNames": dict(kind.key.json), "additionalProperties": value}
        case NameOr():
            kinds = (kind.name, kind.record, kind.template)
            return {"anyOf": [_kind_schema(each, definitions) for each in kinds]}
        case ByKey():
            return {"anyOf": [_kind_schema(each, definitions) for each in (kind.otherwise, *kind.kinds.values())]}
        case MappingKind():
            if kind.name not in definitions:
                definitions[kind.name] = {}  # a placeholder, in case a mapping contains itself
                definitions[kind.name] = _object_schema(kind, definitions)
            return {"$ref": f"#/$defs/{kind.name}"}
    assert_never(kind)
