"""What may be written under `verify:`, every problem in one go, and the same in JSON Schema."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from gateway.verify.config_keys import GENERIC
from gateway.verify.config_reader import Path
from gateway.verify.presets import PRESETS, SchemeError
from gateway.verify.schemes import json_schema
from gateway.verify.signed_string import EXPECTED as SIGNED
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import WHSEC
from tests.verify.vectors import vectors

HEX = "00112233445566778899aabbccddeeff"


def problems(config: Mapping[str, object]) -> list[tuple[Path, str]]:
    try:
        build_verifier(config)
    except SchemeError as error:
        return list(error.problems)
    return []


def check(config: Mapping[str, object], *expected: tuple[Path, str]) -> None:
    assert problems(config) == list(expected)


def check_hmac(config: Mapping[str, object], *expected: tuple[Path, str]) -> None:
    check({"scheme": "hmac", "header": "X-S", "secrets": ["s"], **config}, *expected)


ALGORITHMS = {
    "hmac": ["sha256", "sha1", "sha512"],
    "hash": ["sha256", "sha1", "sha512"],
    "public-key": ["ed25519", "ecdsa-p256-sha256", "rsa-sha256", "rsa-sha1"],
    "http-message-signature": ["hmac-sha256", "ed25519", "ecdsa-p256-sha256", "rsa-pss-sha512", "rsa-v1_5-sha256"],
    "jwt": ["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "EdDSA"],
}
"""Written down here once more: another one is a decision, and not to come with a library."""


@pytest.mark.parametrize("scheme", ALGORITHMS)
def test_no_other_algorithm_can_be_named(scheme: str) -> None:
    name = "algorithms" if scheme == "jwt" else "algorithm"
    schema = GENERIC[scheme][name].schema
    assert (schema if scheme != "jwt" else schema["anyOf"][0])["enum"] == ALGORITHMS[scheme]
    known = {each for listed in ALGORITHMS.values() for each in listed}
    for other in (known - {*ALGORITHMS[scheme]}) | {"none", "None", "", "md5", "sha224", "SHA256", "PS256", "ES256K"}:
        found = [text for path, text in problems({"scheme": scheme, "header": "X", name: other}) if path == (name,)]
        assert [text.startswith("expected one ") for text in found] == [True], other
    assert {scheme for scheme, keys in GENERIC.items() if {"algorithm", "algorithms"} & keys.keys()} == {*ALGORITHMS}


def test_a_scheme_must_be_known() -> None:
    check({}, ((), "expected the key 'scheme' with a scheme's name, got nothing"))
    check({"scheme": None}, ((), "expected the key 'scheme' with a scheme's name, got nothing"))
    check({"scheme": 7}, ((), "expected the key 'scheme' with a scheme's name, got 7"))
    check({"scheme": "githb", "secrets": ["s"]}, (("scheme",), "unknown scheme 'githb', did you mean 'github'?"))
    ((path, message),) = problems({"scheme": "qqq"})
    assert path == ("scheme",)
    generic = "hmac, hash, public-key, token, jwt, http-message-signature, basic, bearer, none"
    expected = f"expected one of {generic}, or a provider's name"
    assert message == f"unknown scheme 'qqq', {expected} (`gateway providers` lists them)"


def test_a_preset_takes_secrets_and_a_tolerance_where_it_has_a_timestamp() -> None:
    check({"scheme": "github", "secrets": ["a", "b"]})
    check({"scheme": "stripe", "secrets": ["a"], "tolerance": "10m"})
    check({"scheme": "github"}, ((), "expected the key 'secrets', got none"))
    check(
        {"scheme": "github", "secrts": ["s"], "tolerance": "5m"},
        (("secrts",), "unknown key 'secrts', did you mean 'secrets'?"),
        (("tolerance",), "unknown key 'tolerance': `scheme: github` signs no timestamp"),
        ((), "expected the key 'secrets', got none"),
    )
    check(
        {"scheme": "stripe", "secrets": ["s"], "header": "X-S"},
        (("header",), "unknown key 'header': `scheme: stripe` defines it"),
    )


def test_secrets_are_texts_that_are_never_shown() -> None:
    secrets = ["", "  ", 12345, None, True, ["x"], {"y": 1}, "good"]
    check(
        {"scheme": "github", "secrets": secrets},
        (("secrets", 0), "expected a non-empty string, got a blank string"),
        (("secrets", 1), "expected a non-empty string, got a blank string"),
        (("secrets", 2), "expected a non-empty string, got a number"),
        (("secrets", 3), "expected a non-empty string, got nothing"),
        (("secrets", 4), "expected a non-empty string, got a boolean"),
        (("secrets", 5), "expected a non-empty string, got a list"),
        (("secrets", 6), "expected the keys secret and until alone, got others"),
    )
    check({"scheme": "github", "secrets": []}, (("secrets",), "expected a list of secrets, got an empty list"))
    check({"scheme": "github", "secrets": "s3cret"}, (("secrets",), "expected a list of secrets, got a string"))


def test_a_secret_must_be_of_its_encoding() -> None:
    whsec = "expected base64 after whsec_, got a string that isn't"
    check({"scheme": "standard-webhooks", "secrets": [WHSEC, "whsec_?", "whsec_"]},
          (("secrets", 1), whsec), (("secrets", 2), whsec))  # fmt: skip
    check({"scheme": "svix", "secrets": ["whsec_A"]}, (("secrets", 0), whsec))
    check({"scheme": "gitlab", "secrets": ["token", "whsec_é"]}, (("secrets", 1), whsec))
    check_hmac(
        {"secret_encoding": "hex", "secrets": ["0g", "ff", "f"]},
        (("secrets", 0), "expected hexadecimal digits, got a string that isn't"),
        (("secrets", 2), "expected hexadecimal digits, got a string that isn't"),
    )
    check_hmac(
        {"secret_encoding": "base64", "secrets": ["AP-8Q", "====", "AP8=Q"]},
        (("secrets", 0), "expected base64, got a string that isn't"),
        (("secrets", 1), "expected base64, got a string that isn't"),
        (("secrets", 2), "expected base64, got a string that isn't"),
    )


def test_each_key_of_hmac_says_what_it_expects() -> None:
    check_hmac({})
    check(
        {"scheme": "hmac"},
        ((), "expected the key 'secrets', got none"),
        ((), "expected where the signature is, one of header, query, field, form, got none"),
    )
    check_hmac({"header": "X S"}, (("header",), "expected a header's name, got 'X S'"))
    check_hmac({"header": ["X", "Y Z"]}, (("header",), "expected a header's name, got 'Y Z'"))
    check_hmac({"header": []}, (("header",), "expected a header's name, got an empty list"))
    check_hmac(
        {"field": "a.b"},
        ((), "expected where the signature is, one of header, query, field, form, got header and field"),
    )
    check_hmac({"header": "X-{n}-Y"})
    check_hmac({"algorithm": "md5"}, (("algorithm",), "expected one of sha256, sha1, sha512, got 'md5'"))
    check_hmac({"encoding": 64}, (("encoding",), "expected one of hex, hex-upper, base64, base64url, got 64"))
    check_hmac({"prefix": ""}, (("prefix",), "expected a string of printable ASCII characters, got ''"))
    check_hmac({"separator": "é"}, (("separator",), "expected a string of printable ASCII characters, got 'é'"))
    check_hmac({"id_header": False}, (("id_header",), "expected a header's name, got false"))
    check_hmac(
        {"secret_encoding": "b64"},
        (("secret_encoding",), "expected one of raw, hex, base64, whsec, nfkd, sha1, got 'b64'"),
    )
    check_hmac({"algoritm": "sha1"}, (("algoritm",), "unknown key 'algoritm', did you mean 'algorithm'?"))
    check_hmac({1: 2}, (("1",), "unknown key '1'"))  # type: ignore[dict-item]  # YAML could have such a key
    long = "x" * 100 + " "
    check_hmac({"header": long}, (("header",), f"expected a header's name, got '{'x' * 60}…'"))


@pytest.mark.parametrize(
    "signed",
    ["", "{timestamp}", "{body", "body}", "{body}{nope}", "{body}{}", "{body!r}", "{body:x}", "{header}{body}",
     "{header:}{body}", "{header:a b}{body}", "{header:{body}}{body}", "{body}{header:{x}}"],
)  # fmt: skip
def test_a_signed_string_covers_the_body_and_has_only_known_parts(signed: str) -> None:
    check_hmac({"signed": signed}, (("signed",), f"expected {SIGNED}, got {signed!r}"))


def test_a_digest_of_the_body_is_signed_in_the_query() -> None:
    digest = {"query": "sha"}
    signed = {"signed": "{header:X-A}.{query:sha}"}
    check_hmac({**signed, "body_digest": digest})
    check_hmac(signed, (("signed",), "expected {body} in it, or the key 'body_digest', got neither"))
    unsigned = "expected {url} or {query:sha} in 'signed', as a digest is anybody's unsigned, got neither"
    check_hmac({"body_digest": digest}, (("body_digest",), unsigned))
    check_hmac({"signed": "{query:other}", "body_digest": digest}, (("body_digest",), unsigned))
    check_hmac({**signed, "body_digest": "sha"}, (("body_digest",), "expected a mapping with query, got 'sha'"),
               (("signed",), "expected {body} in it, or the key 'body_digest', got neither"))  # fmt: skip
    check_hmac({**signed, "body_digest": {}}, (("body_digest",), "expected the key 'query', got none"))
    check_hmac(
        {**signed, "body_digest": {"query": "?"}},
        (("body_digest", "query"), "expected a query parameter's name of letters, digits and ._~-, got '?'"),
    )
    check_hmac({**signed, "body_digest": digest, "timestamp": {"field": "at"}})


def test_tolerances_are_durations() -> None:
    stamped = {"timestamp": {"header": "X-T"}, "signed": "{timestamp}{body}"}
    for good in ("5m", "1h30m", "3d", "500ms", "1m500ms", "none"):
        check_hmac({**stamped, "tolerance": good})
    for bad in ("", "5", "0s", "-5m", "5 m", "m", "30m1h", "\u0665m", "9999999999d"):
        check_hmac(
            {**stamped, "tolerance": bad}, (("tolerance",), f"expected a duration such as 5m, or none, got {bad!r}")
        )
    check_hmac({**stamped, "tolerance": 300}, (("tolerance",), "expected a duration such as 5m, or none, got 300"))


def test_keys_that_need_each_other() -> None:
    check_hmac(
        {"signed": "{timestamp}{id}.{body}", "tolerance": "5m"},
        (("signed",), "expected the key 'timestamp' with {timestamp}, got none"),
        (("signed",), "expected the key 'id_header' with {id}, got none"),
        (("tolerance",), "expected the key 'timestamp' beside 'tolerance', got none"),
    )
    unsigned = (("id_header",), "expected {id} in 'signed', as anyone could choose an unsigned identity, got none")
    check_hmac({"id_header": "X-I"}, unsigned)
    check_hmac({"id_header": "X-I", "signed": "{header:X-Other}.{body}"}, unsigned)
    check_hmac({"id_header": "X-I", "signed": "{header:x-i}.{body}"})
    check_hmac({"id_header": "X-I", "signed": "{id}.{body}"})
    check_hmac(
        {"timestamp": {"header": "X-T"}},
        (("timestamp",), "expected {timestamp} in 'signed', as it proves nothing unsigned, got none"),
    )
    check_hmac(
        {"timestamp": {"prefix": "t="}, "signed": "{timestamp}{body}"},
        (("timestamp",), "expected the key 'separator' with a timestamp's prefix, got none"),
    )
    check_hmac(
        {"signed": "{url}{body}"},
        (
            (),
            (
                "expected the source's public_url beside `verify`, since the address that the sender knows "
                "is signed, got none"
            ),
        ),
    )
    for timestamp, found in (({}, "none"), ({"header": "X-T", "prefix": "t="}, "header and prefix")):
        check_hmac(
            {"separator": ",", "timestamp": timestamp, "signed": "{timestamp}{body}"},
            (("timestamp",), f"expected one of header, prefix, position, field, got {found}"),
        )
    check_hmac(
        {"timestamp": {"headr": "X-T", "header": "X-T", "unit": "m"}, "signed": "{timestamp}{body}"},
        (("timestamp", "headr"), "unknown key 'headr', did you mean 'header'?"),
        (("timestamp", "unit"), "expected one of s, ms, iso, got 'm'"),
    )


def test_keys_of_the_credential_schemes() -> None:
    check({"scheme": "token", "header": "X-T", "secrets": ["s"]})
    check({"scheme": "token", "secrets": ["s"]}, ((), "expected one of header, query, field, got none"))
    check(
        {"scheme": "token", "header": "X-T", "query": "t", "secrets": ["s"]},
        ((), "expected one of header, query, field, got header and query"),
    )
    check(
        {"scheme": "token", "query": "a&b", "secrets": ["s"]},
        (("query",), "expected a query parameter's name of letters, digits and ._~-, got 'a&b'"),
    )
    check({"scheme": "basic", "secrets": ["s"]}, ((), "expected the key 'username', got none"))
    check(
        {"scheme": "basic", "username": "a:b", "secrets": ["s"]},
        (("username",), "expected a user name without a colon, got 'a:b'"),
    )
    check({"scheme": "bearer"}, ((), "expected the key 'secrets', got none"))
    check({"scheme": "none"})
    check({"scheme": "none", "secrets": ["s"]}, (("secrets",), "unknown key 'secrets'"))


def test_an_error_has_a_line_for_each_problem() -> None:
    with pytest.raises(SchemeError) as caught:
        build_verifier({"scheme": "github", "secrets": [""], "extra": 1})
    assert str(caught.value).splitlines() == [
        "verify.extra: unknown key 'extra'",
        "verify.secrets.0: expected a non-empty string, got a blank string",
    ]


def test_all_problems_come_in_one_go() -> None:
    check_hmac(
        {"header": "", "algorithm": "md5", "secrets": [1], "signed": "{timestamp}{body}", "extra": 1},
        (("extra",), "unknown key 'extra'"),
        (("header",), "expected a header's name, got ''"),
        (("algorithm",), "expected one of sha256, sha1, sha512, got 'md5'"),
        (("secrets", 0), "expected a non-empty string, got a number"),
        (("signed",), "expected the key 'timestamp' with {timestamp}, got none"),
    )


# ---- JSON Schema ----


KEYWORDS = {"type", "enum", "const", "pattern", "minLength", "minItems", "items", "properties", "required"}
KEYWORDS |= {"additionalProperties", "oneOf", "allOf", "if", "then", "description", "default"}


def is_valid(value: Any, schema: Any) -> bool:
    """Judge by the keywords that our schema uses, as draft 2020-12 defines them."""
    if isinstance(schema, bool):
        return schema
    assert schema.keys() <= KEYWORDS
    kinds = {"object": dict, "array": list, "string": str}
    return (
        isinstance(value, kinds.get(schema.get("type"), object))
        and value in schema.get("enum", [value])
        and value == schema.get("const", value)
        and all(is_valid(value, part) for part in schema.get("allOf", ()))
        and ("oneOf" not in schema or sum(is_valid(value, part) for part in schema["oneOf"]) == 1)
        and ("if" not in schema or not is_valid(value, schema["if"]) or is_valid(value, schema["then"]))
        and _has_valid_content(value, schema)
    )


def _has_valid_content(value: Any, schema: Any) -> bool:
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    if isinstance(value, list):
        return len(value) >= schema.get("minItems", 0) and all(is_valid(v, schema.get("items", True)) for v in value)
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        return value.keys() >= set(schema.get("required", ())) and all(
            is_valid(member, known.get(name, rest)) for name, member in value.items()
        )
    return True


ED25519 = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"  # RFC 8032, section 7.1, TEST 2


def a_preset(name: str) -> dict[str, Any]:
    return {"scheme": name, **next(each.config for each in vectors() if each.scheme == name)}


CONFIGS: list[dict[str, Any]] = [
    *[{"scheme": scheme} for scheme in (*GENERIC, *PRESETS)],
    *[{"scheme": scheme, "secrets": [WHSEC]} for scheme in GENERIC],
    *[a_preset(name) for name in PRESETS if not PRESETS[name].needs_url],
    {"scheme": "stripe", "secrets": ["s"], "tolerance": "5m"},
    {"scheme": "stripe", "secrets": ["s"], "tolerance": "none"},
    {"scheme": "stripe", "secrets": ["s"], "tolerance": "soon"},
    {"scheme": "stripe", "secrets": ["s"], "tolerance": ""},
    {"scheme": "github", "secrets": ["s"], "tolerance": "5m"},
    {"scheme": "github", "secrets": []},
    {"scheme": "github", "secrets": "s"},
    {"scheme": "github", "secrets": [7]},
    {"scheme": "github", "secrets": ["s", {"secret": "s", "until": "2027-01-31"}]},
    {"scheme": "github", "secrets": [{"secret": "s", "until": "2027-01-31T12:00:00.5+01:00"}]},
    {"scheme": "github", "secrets": [{"secret": "s", "until": "2027-01-31 12:00"}]},
    {"scheme": "github", "secrets": [{"secret": "s", "until": 2027}]},
    {"scheme": "github", "secrets": [{"secret": "s"}]},
    {"scheme": "github", "secrets": [{"secret": "", "until": "2027-01-31"}]},
    {"scheme": "github", "secrets": [{"secret": "s", "until": "2027-01-31", "scheme": "hmac"}]},
    {"scheme": "github", "secrets": {"secret": "s", "until": "2027-01-31"}},
    {"scheme": "githb", "secrets": ["s"]},
    {"secrets": ["s"]},
    {"scheme": "hmac", "header": "X-S", "secrets": ["s"], "algorithm": "sha1", "encoding": "base64", "prefix": "v1="},
    {"scheme": "hmac", "header": "X-S", "secrets": ["s"], "algorithm": "md5"},
    {"scheme": "hmac", "header": "X-S", "secrets": ["s"], "surprise": 1},
    {
        "scheme": "hmac", "header": "X-S", "secrets": ["s"], "separator": ",", "id_header": "X-I", "tolerance": "1m",
        "timestamp": {"prefix": "t=", "unit": "ms"}, "signed": "{timestamp}{id}.{body}",
    },
    {"scheme": "hmac", "header": "X-S", "secrets": ["s"], "timestamp": {"unit": "s"}, "signed": "{timestamp}{body}"},
    {"scheme": "public-key", "header": "X-S", "algorithm": "ed25519", "public_keys": [ED25519]},
    {
        "scheme": "public-key", "header": "X-S", "algorithm": "ed25519",
        "public_keys": [{"secret": ED25519, "until": "2027-01-31"}],
    },
    {"scheme": "public-key", "header": "X-S", "public_keys": [ED25519]},
    {"scheme": "public-key", "header": "X-S", "algorithm": "ed25519", "public_keys": []},
    {"scheme": "public-key", "header": "X-S", "field": "s", "algorithm": "ed25519", "public_keys": [ED25519]},
    {"scheme": "hmac", "header": "X-S", "secrets": ["s"], "signed": "{query:d}", "body_digest": {"query": "d"}},
    {"scheme": "hmac", "header": "X-S", "secrets": ["s"], "body_digest": {"header": "d"}},
    {"scheme": "token", "header": "X-T", "secrets": ["s"]},
    {"scheme": "token", "header": "X-T", "query": "t", "secrets": ["s"]},
    {"scheme": "basic", "username": "ann", "secrets": ["s"]},
    {"scheme": "none", "secrets": ["s"]},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_json_schema_accepts_exactly_the_valid_settings(config: dict[str, Any]) -> None:
    assert is_valid(config, json_schema()) == (not problems(config))
