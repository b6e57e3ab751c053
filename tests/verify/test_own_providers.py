"""Providers of one's own: checked as a source is, with the keys of any algorithm, and no request is an error of ours.

That the two are checked alike is seen wherever a test of this folder builds a verifier: `both_ways.py`.
"""

import base64
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gateway.model import RefusedError, UsageError
from gateway.verify import schemes
from gateway.verify.config_keys import GENERIC
from gateway.verify.config_reader import ConfigPath, Path
from gateway.verify.handshakes import HANDSHAKES
from gateway.verify.presets import PRESETS, Preset, SchemeError, read_preset
from gateway.verify.remote_keys import KeyNeededError
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import with_provider
from tests.verify.signed_requests import BODY, NOW, SECRET, WHSEC, a_request, reason

KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = base64.b64encode(KEY.public_key().public_bytes_raw()).decode()
OTHER = base64.b64encode(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw())
KEY_SET = "https://keys.example.com/set"
URL = "https://hooks.example.com"


def a_provider(**entry: object) -> Preset:
    problems: dict[tuple[Path, str], None] = {}
    preset = read_preset(entry, ConfigPath((), problems))
    if preset is None or problems:
        raise SchemeError(list(problems))
    return preset


def problems_of(**entry: object) -> list[tuple[Path, str]]:
    with pytest.raises(SchemeError) as caught:
        a_provider(**entry)
    return list(caught.value.problems)


def a_source(preset: Preset, **config: object) -> Verifier:
    return schemes.build_verifier({"scheme": "own", **config}, public_url=URL, providers={"own": preset})


@pytest.mark.parametrize(
    "method",
    [
        {"scheme": "hash", "header": "X-S", "signed": "{body}"},
        {"header": "X-S", "timestamp": {"header": "X-T"}},
        {"header": "X-S", "id_header": "X-Id"},
        {"header": "X-S", "signed": "{given:x}.{body}"},
        {"header": "X-S", "signed": "{timestamp}.{body}"},
        {"header": "X-S", "prefix": "{given:x}|"},
        {"scheme": "token"},
        {"header": "X-S", "query": "s"},
        {"scheme": "jwt", "algorithms": ["RS256"], "claims": {"iss": "me"}},
        {"scheme": "jwt", "algorithms": ["HS256"], "claims": {"iss": "{given:x}"}},
        {"scheme": "jwt", "algorithms": ["HS256"], "claims": {"iss": "{id}"}},
        {"scheme": "jwt", "algorithms": ["HS256"], "key_set": KEY_SET},
        {"scheme": "public-key", "algorithm": "ed25519", "field": "s", "recipient": {"field": "a", "is": "{given:x}"}},
        {"scheme": "http-message-signature", "algorithm": "ed25519"},
    ],
    ids=str,
)  # fmt: skip
def test_what_proves_nothing_or_could_not_be_read_is_refused(method: Mapping[str, object]) -> None:
    with pytest.raises(SchemeError):
        with_provider({**method, "secrets": [SECRET]}, public_url=URL)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_checked_like_any_other_provider(name: str) -> None:
    """It is read by what reads those of the rules, and nothing of it has a problem."""
    assert a_provider(like=name, title="Mine").methods == PRESETS[name].methods


@pytest.mark.parametrize(
    "method",
    [
        {"scheme": "public-key", "algorithm": "ed25519", "header": "X-S"},
        {"scheme": "http-message-signature", "algorithm": "ed25519"},
        {"scheme": "jwt", "algorithms": ["EdDSA"], "claims": {"aud": "us"}},
    ],
    ids=lambda method: method["scheme"],
)
@pytest.mark.parametrize("own", [None, OTHER.decode()])
def test_a_source_has_the_public_keys_of_its_provider(method: dict[str, Any], own: str | None) -> None:
    preset = a_provider(verify=method | ({"public_keys": [own]} if own else {}))
    verifier = a_source(preset, public_keys=[PUBLIC])
    assert verifier.checks == schemes.build_verifier({**method, "public_keys": [PUBLIC]}, public_url=URL).checks
    with pytest.raises(SchemeError, match="unknown key 'secrets': `scheme: own` is verified without"):
        a_source(preset, secrets=[PUBLIC])
    if own is None:
        with pytest.raises(SchemeError, match="expected the key 'public_keys', got none"):
            a_source(preset)
    else:
        assert a_source(preset).checks != verifier.checks


def test_a_source_whose_provider_names_a_key_set_gives_none() -> None:
    for method in (
        {"scheme": "http-message-signature", "algorithm": "ed25519", "key_set": KEY_SET},
        {"scheme": "jwt", "algorithms": ["RS256"], "key_set": KEY_SET, "claims": {"aud": "us"}},
    ):
        assert a_source(a_provider(verify=method)).fetches_keys
        for name in ("secrets", "public_keys"):
            with pytest.raises(SchemeError, match=f"unknown key '{name}'"):
                a_source(a_provider(verify=method), **{name: [PUBLIC]})


def test_each_of_several_methods_has_the_keys_of_its_algorithm() -> None:
    methods = [
        {"scheme": "http-message-signature", "algorithm": "ed25519", "key_set": KEY_SET},
        {"header": "X-Signature"},
        {"scheme": "public-key", "algorithm": "ed25519", "header": "X-Ed25519"},
    ]
    verifier = a_source(a_provider(verify=methods), secrets=[SECRET], public_keys=[PUBLIC])
    assert verifier.checks[0] == schemes.build_verifier(methods[0], public_url=URL).checks[0], "its keys are fetched"
    assert reason(verifier, a_request([("X-Ed25519", KEY.sign(BODY).hex())])) == "accepted"
    pairs = schemes.build_verifier({"scheme": "hmac", "header": "X-Signature", "secrets": [SECRET]}).sign(
        BODY, now=NOW, id="1", type="t", headers={}
    )
    assert reason(verifier, a_request(pairs)) == "accepted"
    assert reason(verifier, a_request([("X-Signature", "0" * 64)])) == "bad_signature"
    for missing in ({"secrets": [SECRET]}, {"public_keys": [PUBLIC]}):
        with pytest.raises(SchemeError, match="expected the key "):
            a_source(a_provider(verify=methods), **missing)


def test_a_key_of_a_message_signature_may_have_its_id() -> None:
    preset = a_provider(verify={"scheme": "http-message-signature", "algorithm": "ed25519"})
    keys = [{"secret": PUBLIC, "keyid": "one"}]
    direct = {"scheme": "http-message-signature", "algorithm": "ed25519", "public_keys": keys}
    assert a_source(preset, public_keys=keys).checks == schemes.build_verifier(direct, public_url=URL).checks


def test_a_signed_header_identifies_events_unless_the_provider_says_otherwise() -> None:
    method = {"header": "X-S", "id_header": "X-Id", "signed": "{id}.{body}"}
    for entry, expected in (({}, 'headers["x-id"]'), ({"id": "body.id"}, "body.id")):
        verifier = a_source(a_provider(verify=method, **entry), secrets=[SECRET])
        assert (verifier.id, verifier.ids) == (expected, (expected,))
    assert a_source(a_provider(verify={**method, "id": "body.n"}), secrets=[SECRET]).id == "body.n"


def test_a_secret_that_no_method_uses_is_reported() -> None:
    preset = a_provider(verify=[{"header": "X-A", "secret_prefix": "a_"}, {"header": "X-B", "secret_prefix": "b_"}])
    assert len(a_source(preset, secrets=["a_1", "b_1"]).checks) == 2
    with pytest.raises(SchemeError) as caught:
        a_source(preset, secrets=["a_1", WHSEC])
    assert caught.value.problems == ((("secrets", 1), "expected a secret that starts with a_ or b_, got another"),)
    method = {"scheme": "public-key", "algorithm": "ed25519", "header": "X-S", "secret_prefix": "a_"}
    [(path, _)] = problems_of(verify=method)
    assert path == ("verify", "secret_prefix")


def test_any_time_is_warned_of_as_in_a_source() -> None:
    stamped = {"header": "X-S", "timestamp": {"header": "X-T"}, "signed": "{timestamp}.{body}", "tolerance": "none"}
    secrets = ["0123456789abcdef"]
    [(path, text)] = a_source(a_provider(verify=stamped), secrets=secrets).warnings
    assert path == ("scheme",)
    assert "a recorded request can be replayed at any time" in text
    assert a_source(a_provider(verify=stamped), secrets=secrets, tolerance="5m").warnings == ()


def test_a_timestamp_may_be_signed_as_a_header() -> None:
    stamp = {"header": "X-S", "timestamp": {"header": "X-T"}, "secrets": [SECRET]}
    for signed in ("{header:X-T:s}.{body}", "{listed:X-Names,x-t}\n{body}"):
        assert with_provider({**stamp, "signed": signed}).signing_specs[0].tolerance == 300
    with pytest.raises(SchemeError, match="it proves nothing unsigned"):
        with_provider({**stamp, "signed": "{header:X-Other}.{body}"})


@pytest.mark.parametrize(
    "name", ["scheme", "secrets", "public_keys", "tolerance", "verify_tokens", "pending", "X Y", 5]
)
def test_a_provider_asks_for_keys_that_a_source_does_not_have_anyway(name: object) -> None:
    [(path, text)] = problems_of(verify={"header": "X"}, asks={name: "what it is"})
    assert path == ("asks", str(name))
    assert text.startswith("expected a key")


def test_a_provider_asks_for_no_key_of_its_scheme() -> None:
    [(path, _)] = problems_of(verify={"scheme": "plaid-token"}, asks={"client_id": "what it is"})
    assert path == ("asks", "client_id")


@pytest.mark.parametrize(
    "verify",
    [
        {"field": "a.b"},
        {"scheme": "bearer"},
        {"scheme": "none"},
        {"scheme": "token", "header": "X"},
        {"scheme": "public-key", "algorithm": "ed25519", "header": "X"},
        [{"header": ["A", "B"]}],
        [{"header": "A"}, {"header": "B"}],
    ],
    ids=str,
)
def test_a_token_is_awaited_where_one_header_has_the_signature_by_it(verify: object) -> None:
    assert a_source(a_provider(verify={"header": "A"}, handshake="notion"), pending=True).is_pending
    [(path, text)] = problems_of(verify=verify, handshake="notion")
    assert path == ("handshake",)
    assert text.startswith("expected one signing method, by secrets and with its signatures in one header, ")


# ---- No request is an error of ours ----

PARTS = ["{timestamp}", "{id}", "{secret}", "{given:x}", "{method}", "{path}", "{url}", "{form}", "{body:sha256}"]
PARTS += ["{body:crc32}", "{header:X-A}", "{header:X-A:any}", "{query:q}", "{field:a.b?}", "{field:a}", "{form:f}"]
PARTS += ["{listed:X-L,X-T}", "{element:X-S:t=}", "{url:sha256}", "{path:encoded}"]
SIGNED = st.lists(st.sampled_from(PARTS), max_size=2, unique=True)
TEMPLATES = st.lists(st.sampled_from([*PARTS, "{body}"]), min_size=1, max_size=2, unique=True).map("|".join)
VALUES: Mapping[str, st.SearchStrategy[object]] = {
    "header": st.sampled_from(["X-S", "Authorization", ["X-S", "X-A"]]),
    "query": st.just("q"),
    "field": st.sampled_from(["a", "a.b"]),
    "form": st.just("f"),
    "encoding": st.sampled_from(["hex", "base64"]),
    "separator": st.just(","),
    "prefix": st.sampled_from(["v1=", "{given:x}="]),
    "timestamp": st.sampled_from(
        [{"header": "X-T"}, {"prefix": "t="}, {"position": 1}, {"field": "a.b"}, {"header": "X-T", "unit": "iso"}]
    ),
    "id_header": st.just("X-I"),
    "signed": st.none(),  # drawn with what is in it
    "tolerance": st.sampled_from(["5m", "none"]),
    "body_digest": st.just({"query": "q"}),
    "key_url": st.just({"header": "X-U", "hosts": ["keys.example.com"]}),
    "recipient": st.sampled_from([{"field": "a.b", "is": "us"}, {"field": "a", "is": "{given:x}"}]),
    "algorithms": st.sampled_from([["HS256"], ["HS256"], ["EdDSA"]]),
    "claims": st.dictionaries(st.sampled_from(["aud", "sub", "h"]), st.one_of(TEMPLATES, st.booleans()), max_size=2),
    "key_set": st.just(KEY_SET),
    "public_keys": st.just([PUBLIC]),
    "secrets": st.just([SECRET]),
    "username": st.just("ann"),
    "covered": st.sampled_from([["@method"], ["@target-uri", "x-a"], ["@query"]]),
    "tag": st.just("t"),
    "verify_tokens": st.just([SECRET]),
    "handshake": st.sampled_from([*HANDSHAKES]),
}
ALGORITHMS = {
    "public-key": ["ed25519"],
    "http-message-signature": ["hmac-sha256", "ed25519"],
    "hmac": ["sha256", "sha1"],
    "hash": ["sha256"],
}
NEEDED = ("secrets", "username", "algorithms", "claims", "signed")
PLACED = {"hmac", "hash", "public-key", "token"}
PLACES = ("header", "query", "field", "form")
HEADERS: Mapping[str, st.SearchStrategy[str]] = {
    "X-S": st.sampled_from(["", "0" * 64, "t=1700000000,v1=" + "0" * 64, "1700000000," + "0" * 64, "v1=" + "0" * 64]),
    "X-A": st.sampled_from(["", "a", "é", "1700000000"]),
    "X-T": st.sampled_from(["", "1700000000", "2023-11-14T22:13:20Z"]),
    "X-I": st.just("1"),
    "X-L": st.sampled_from(["x-l,x-t", "x-l,x-t,x-a", "x l", ""]),
    "X-U": st.sampled_from(["https://keys.example.com/k", "http://a"]),
    "Authorization": st.sampled_from(["Bearer hush", "Basic YW5uOmh1c2g=", "Bearer e30.e30.e30", ""]),
    "Content-Type": st.sampled_from(["application/json", "application/x-www-form-urlencoded", "application/xml"]),
    "Signature-Input": st.just('s=("@method" "@target-uri");created=1700000000;tag="t"'),
    "Signature": st.sampled_from(["s=:AAAA:", "s"]),
}
BODIES = [b"", b"{}", b'{"a":{"b":"us"}}', b'{"a":"' + b"0" * 64 + b'"}', b"f=" + b"0" * 64 + b"&q=1", b"\xff", b"<a/>"]


@st.composite
def methods(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the keys of a `verify`; most go together."""
    scheme = draw(st.sampled_from([*GENERIC]))
    keys = GENERIC[scheme].keys()
    named = [name for name in VALUES if name in keys and draw(st.integers(0, 9)) == 0]
    named += [name for name in NEEDED if name in keys]
    if scheme in PLACED:
        named.append(draw(st.sampled_from([place for place in PLACES if place in keys])))
    method: dict[str, Any] = {"scheme": scheme, **{name: draw(VALUES[name]) for name in dict.fromkeys(named)}}
    if scheme in ALGORITHMS:
        method["algorithm"] = draw(st.sampled_from(ALGORITHMS[scheme]))
    if "signed" in method:
        parts = [*draw(SIGNED), *(["{secret}"] if scheme == "hash" else []), "{body}"]
        method["signed"] = "|".join(draw(st.permutations(list(dict.fromkeys(parts)))))
        also = {"timestamp": "{timestamp}" in parts, "id_header": "{id}" in parts}
        method |= {name: draw(VALUES[name]) for name, is_signed in also.items() if is_signed}
    if "separator" in keys and {"prefix", "position"} & method.get("timestamp", {}).keys():
        method["separator"] = ","
    if scheme == "public-key":
        method = {name: each for name, each in method.items() if name not in {"public_keys", "key_url"}}
        kind = draw(st.sampled_from(["public_keys", "key_url"]))
        method[kind] = draw(VALUES[kind])
    if scheme == "http-message-signature" and method["algorithm"] == "ed25519":
        method["key_set"] = method.pop("secrets") and KEY_SET
    return method


def built(method: dict[str, Any], *, way: str) -> Verifier | None:
    """Return the verifier of a method in a source, a provider, or one that asks for `x`; None if it is refused."""
    config, preset = method, dict[str, Preset]()
    if way != "source":
        asked = {"x": "1"} if way == "asking" else {}
        if method.get("handshake") == "braintree":
            asked["public_key"] = "k"
        bare = {name: each for name, each in method.items() if name not in {"handshake", "secrets", "verify_tokens"}}
        also = {name: method[name] for name in ("handshake",) if name in method}
        given: dict[str, Any] = {name: method[name] for name in ("secrets", "verify_tokens") if name in method}
        config = {"scheme": "own", **given, **asked}
        try:
            preset = {"own": a_provider(verify=bare, asks=dict.fromkeys(asked, "a key"), **also)}
        except SchemeError:
            return None
    try:
        return schemes.build_verifier(config, public_url=URL, providers=preset)
    except SchemeError:
        return None


@given(method=methods(), way=st.sampled_from(["source", "provider", "asking"]), data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_no_request_is_an_error_of_ours(method: dict[str, Any], way: str, data: st.DataObject) -> None:
    """Whatever rules were accepted: a request verifies, is refused, or needs a key."""
    verifier = built(method, way=way)
    assume(verifier is not None)
    assert verifier is not None
    headers = {name: data.draw(each) for name, each in HEADERS.items() if data.draw(st.booleans())}
    body = data.draw(st.sampled_from(BODIES))
    query = data.draw(st.sampled_from(["", "q=" + "0" * 64, "q=1&q=2", "challenge=a", "hub.mode=subscribe"]))
    try:
        pairs = verifier.sign(body, now=NOW, id="1", type="t", headers=headers, query=query)
    except UsageError:
        pairs = list(headers.items())
    for sent in (pairs, headers.items()):
        request = a_request(sent, body=body, query=query)
        with suppress(RefusedError, KeyNeededError):
            verifier.verify(request, now=NOW)
            verifier.handshake(request, now=NOW)
        for how in verifier.handshake_methods:
            with suppress(RefusedError):
                verifier.unverified_handshake(request._replace(method=how, body=b""), now=NOW)
