"""The kinds of values, and the JSON Schema for editors, which agrees with the reader."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from gateway.rules.load import check_rules
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.rules import Destination
from gateway.rules.schema import DESTINATION, RETRY, json_schema
from gateway.rules.schema_reader import SchemaReader
from gateway.rules.value_kinds import MappingKind, parse_rate
from gateway.rules.yaml_document import Node, read_document
from gateway.text import parse_duration

EXAMPLE = """
version: 1
include: routes.d/*.yaml
egress: {private: refuse, allow: [10.0.0.0/8]}
ingress:
  trusted_proxies: [10.0.0.0/8, "fd00::1"]
  certificate_header: {name: X-Forwarded-Client-Cert, format: xfcc}
sources:
  github:
    verify: {scheme: github, secrets: ["${GITHUB_WEBHOOK_SECRET}"]}
    key: body.repository.full_name
    dedupe: 1d
  billing:
    path: /in/stripe
    verify: {scheme: stripe, secrets: ["${STRIPE_SECRET}", "${file:/run/secrets/stripe_old}"], tolerance: 5m}
  crm:
    verify: {scheme: hmac, header: X-Signature, algorithm: sha256, encoding: hex, prefix: "sha256=", secrets: [a]}
    id: body.event_id
    type: body.kind
    dedupe: off
    allow_from: [192.0.2.0/24, "${OFFICE}", "2001:db8::/32"]
    limits: {body: 256KiB, rate: 100/s, concurrent: 20}
    client_certificate:
      ca: ${file:ca.pem}
      subjects: ["CN=hooks,O=Bank,C=DE"]
      dns: [hooks.bank.example, "*.bank.example"]
      uris: [spiffe://bank.example/hooks]
      emails: [hooks@bank.example]
  open: {verify: {scheme: none}}
destinations:
  slack:
    url: ${SLACK_WEBHOOK_URL}
  ci:
    url: https://ci.internal/hooks/github
    headers: {X-Team: "${TEAM}"}
    forward_headers: [X-Forwarded-For]
    drop_headers: [X-Hub-Signature-256]
    sign: {secrets: ["${CI_SIGNING_SECRET}", whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw]}
    auth: {oauth2: {token_url: "${IDP}", client_id: us, client_secret: "${SECRET}", scope: read, style: body}}
    tls: {ca: "${file:ca.pem}", certificate: "${CERTIFICATE}", key: "${KEY}"}
    proxy: http://proxy.internal:3128
    proxy_auth: {username: us, password: "${PROXY_PASSWORD}"}
    on_gone: pause
    timeout: ${TIMEOUT:-10s}
    concurrency: ${CONCURRENCY}
    rate: 100/s
routes:
  - name: build-on-push
    from: github
    match: {type: push, body.ref: [refs/heads/main, refs/heads/release]}
    when: '!body.deleted && size(body.commits) > 0'
    to: [ci, {name: mirror, url: "https://mirror.internal/hook"}]
    retry:
      schedule: [5s, 30s, 2m, 10m, 1h30m]
      max_attempts: 8
      max_age: 1d
      jitter: 0.1
      results: {404: drop, 5xx: dead_letter, timeout: retry_short}
  - name: announce-failed-payments
    from: [billing, crm, open]
    match: {type: [invoice.payment_failed, charge.*]}
    to: slack
    request:
      headers: {X-Customer: "${{ body.data.object.customer }}"}
      body: {text: "Payment failed for ${{ body.data.object.customer_email }}"}
"""

# What to change in the example → what is wrong with it then.
WRONG = {
    "version: 1": ["version: 2", "versoin: 1"],
    "private: refuse": ["private: deny", "privat: refuse"],
    "scheme: github": ["scheme: 7", "scheme: hmac"],
    "verify: {scheme: none}": ["verify: none", "path: /x"],
    "path: /in/stripe": ["path: in/stripe"],
    "trusted_proxies: [": ["proxies: [", "trusted_proxies: 5 # [", "trusted_proxies: [5, "],
    "allow_from: [": ["allow_form: [", "allow_from: 10.0.0.1 #", "allow_from: [5, "],
    "certificate_header: {": ["certificate_header: {fmt: x, ", "certificate_headers: {"],
    "format: xfcc": ["format: envoy", ""],
    "client_certificate:": ["client_certificates:"],
    "ca: ${file:ca.pem}": ["chain: x"],
    "subjects: [": ["subject: [", "subjects: [5, "],
    "dns: [hooks": ["dns: [https://hooks", "dns: hooks", "dns: []\n      xx: [hooks"],
    "uris: [spiffe": ["uris: [/spiffe", "uris: ['spiffe:// ', spiffe"],
    "emails: [hooks": ["emails: ['', hooks", "emails: [bank.example, hooks"],
    "body: 256KiB": ["body: 256", "body: 256kB", "body: 1GiB"],
    "rate: 100/s, conc": ["rate: 100, conc", "rate: 100/d, conc"],
    "concurrent: 20": ["concurrent: 0", "concurrency: 20"],
    "forward_headers: [X-Forwarded-For]": ["forward_headers: X-Forwarded-For", "forward_headers: [a b]"],
    "drop_headers: [X-Hub-Signature-256]": ["drop_headers: {X-A: no}", "drop_header: [X-A]"],
    "  crm:": ["  CRM:"],
    "dedupe: 1d": ["dedupe: on", "dedupe: 1w"],
    "url: https://ci": ["url: ftp://ci", "ur: https://ci", "url: 5"],
    "X-Team": ["'a b'"],
    "auth: {oauth2: {": ["auth: {oauth2: {realm: x, ", "auth: {bearer: {token: x}, oauth2: {"],
    "client_id: us, ": [""],
    "scope: read": ["scope: []", "scope: ['a b']"],
    "style: body": ["style: header"],
    "tls: {": ["tls: {verify: false, "],
    "proxy: http": ["proxy: https", "proxy: socks5"],
    "proxy_auth: {username: us": ["proxy_auth: {user: us"],
    "on_gone: pause": ["on_gone: drop"],
    "concurrency: ${CONCURRENCY}": ["concurrency: 0", "concurrency: lots"],
    "rate: 100/s": ["rate: 100", "rate: 100/d"],
    "${TIMEOUT:-10s}": ["10", "10 s"],
    "from: github": ["from: []", "form: github"],
    "to: slack": ["to: {url: http://x}", "to: []"],
    "max_attempts: 8": ["max_attempts: 0", "order: key"],
    "max_age: 1d": ["max_age: 1w"],
    "jitter: 0.1": ["jitter: 2"],
    "404: drop": ["200: drop", "404: dropp"],
    "schedule: [5s": ["schedule: [5"],
}


def accepts(schema: Mapping[str, Any], value: object) -> bool:
    return not any(_errors(schema, value, schema["$defs"]))


def _errors(schema: Any, value: object, definitions: Mapping[str, Any]) -> Iterator[str]:  # noqa: C901, PLR0912, PLR0915 - a branch a keyword
    """Hold a value to a schema, by the keywords that are used here (an unknown one fails the test)."""
    if schema is True:
        return
    types: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    for keyword, rule in schema.items():
        match keyword:
            case "$schema" | "$defs" | "title" | "description" | "default" | "then" | "else" | "required" | "format":
                pass
            case "$ref":
                yield from _errors(definitions[rule.removeprefix("#/$defs/")], value, definitions)
            case "type":
                names = [rule] if isinstance(rule, str) else rule
                if not any(
                    isinstance(value, types[name]) and (name == "boolean" or value is not True) for name in names
                ):
                    yield f"{value!r} is not of type {rule}"
            case "const" | "enum":
                if value not in (rule if keyword == "enum" else [rule]):
                    yield f"{value!r} is not {rule}"
            case "pattern" if isinstance(value, str) and not re.search(rule, value):
                yield f"{value!r} does not match {rule}"
            case "minLength" if isinstance(value, str) and len(value) < rule:
                yield f"{value!r} is too short"
            case "minimum" if isinstance(value, int | float) and value < rule:
                yield f"{value} is too small"
            case "maximum" if isinstance(value, int | float) and value > rule:
                yield f"{value} is too large"
            case "minProperties" if isinstance(value, dict) and len(value) < rule:
                yield "too few keys"
            case "maxProperties" if isinstance(value, dict) and len(value) > rule:
                yield "too many keys"
            case "minItems" if isinstance(value, list) and len(value) < rule:
                yield "too few items"
            case "items" if isinstance(value, list):
                for item in value:
                    yield from _errors(rule, item, definitions)
            case "anyOf":
                if all(any(_errors(option, value, definitions)) for option in rule):
                    yield f"{value!r} is none of {rule}"
            case "oneOf":
                if sum(not any(_errors(option, value, definitions)) for option in rule) != 1:
                    yield f"{value!r} is not exactly one of {rule}"
            case "not":
                if not any(_errors(rule, value, definitions)):
                    yield f"{value!r} is {rule}"
            case "allOf":
                for option in rule:
                    yield from _errors(option, value, definitions)
            case "if":
                branch = "else" if any(_errors(rule, value, definitions)) else "then"
                yield from _errors(schema.get(branch, True), value, definitions)
            case "propertyNames" if isinstance(value, dict):
                for name in value:
                    yield from _errors(rule, name, definitions)
            case "properties" if isinstance(value, dict):
                for name in value.keys() & rule.keys():
                    yield from _errors(rule[name], value[name], definitions)
            case "additionalProperties" if isinstance(value, dict):
                for name in value.keys() - schema.get("properties", {}).keys():
                    yield from [f"{name} is unknown"] if rule is False else _errors(rule, value[name], definitions)
            case _:
                known = (
                    "pattern minLength minimum maximum minItems items "
                    "propertyNames properties additionalProperties minProperties maxProperties"
                )
                assert keyword in known.split(), f"teach this test the keyword {keyword}"
    if isinstance(value, dict):
        yield from [f"{name} is missing" for name in schema.get("required", []) if name not in value]


def plain(folder: Path, text: str) -> object:
    path = folder / "routes.yaml"
    path.write_text(text)
    root = read_document(path, [])
    assert root is not None
    return _plain(root)


def _plain(node: Node) -> object:
    if isinstance(node.value, dict):
        return {name: _plain(child) for name, child in node.value.items()}
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def test_the_json_schema_accepts_the_example(tmp_path: Path) -> None:
    schema = json_schema()
    assert list(_errors(schema, plain(tmp_path, EXAMPLE), schema["$defs"])) == []
    assert check_rules(tmp_path / "routes.yaml", environ={})[0] is not None


@pytest.mark.parametrize(("right", "wrong"), [(right, each) for right, wrongs in WRONG.items() for each in wrongs])
def test_the_json_schema_refuses_as_the_reader_does(tmp_path: Path, right: str, wrong: str) -> None:
    assert EXAMPLE.count(right) >= 1
    text = EXAMPLE.replace(right, wrong, 1)
    assert not accepts(json_schema(), plain(tmp_path, text))
    assert any(problem.severity == "error" for problem in check_rules(tmp_path / "routes.yaml", environ={})[1])


def test_the_json_schema_is_json_and_describes_every_key() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    records = [schema, *[found for found in schema["$defs"].values() if found.get("additionalProperties") is False]]
    assert len(records) == 40
    for record in records:
        for name, found in record["properties"].items():
            assert found["description"].endswith((".", "…")), name


@pytest.mark.parametrize(("record", "meaning"), [(DESTINATION, Destination), (RETRY, RetryPolicy)])
def test_a_documented_default_is_the_one_that_applies(record: MappingKind, meaning: type) -> None:
    real = {field.name: field.default for field in fields(meaning) if field.default is not MISSING}
    told = {key.name: key for key in record.keys if key.default is not None}
    assert told
    for name, key in told.items():
        reader = SchemaReader({}, is_strict=True)
        assert reader.read(_written(key.default), key.kind) == real[name], name
        assert reader.problems == []


def _written(value: object) -> Node:
    node = Node(file="", path="", line=1, column=1)
    node.value = [_written(item) for item in value] if isinstance(value, list) else value
    return node


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("5s", 5), ("2m", 120), ("1h30m", 5400), ("3d", 259200), ("1d1h1m1s1ms", 90061.001), ("0s", 0)],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "5", "s", "5 s", "-5s", "1.5s", "30m1h", "5s\n", "\N{ARABIC-INDIC DIGIT FIVE}s", "5S", "1" * 5000 + "s"],
)
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "rate"), [("100/s", 100), ("90/m", 1.5), ("36/h", 0.01), ("0.5/s", 0.5)])
def test_a_rate_is_read_in_events_a_second(text: str, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "5", "/s", "0/s", "0.0/s", "-1/s", "5/d", "5 /s", "1e3/s"])
def test_an_invalid_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        parse_rate(text)
