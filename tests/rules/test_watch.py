"""When changed files are read, and which changes new rules make."""

from pathlib import Path

import pytest

from gateway.rules.file_stamps import Stamps
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from gateway.rules.watch import MAX_UNSTABLE_LOOKS, Changes, Watch, changes
from gateway.verify.config_keys import GENERIC
from gateway.verify.presets import PRESETS
from gateway.verify.schemes import build_verifier

FILE, SECRET = Path("routes.yaml"), Path("secret")


def stamps(size: int, *, secret: int | None = 1) -> Stamps:
    return {FILE: (size, size, 1, 1), SECRET: None if secret is None else (secret, secret, 1, 1)}


def test_files_that_are_as_they_were_read_are_left_alone() -> None:
    watch = Watch(stamps(1))
    assert [watch.observe(stamps(1)) for _ in range(3)] == [False] * 3


def test_a_file_that_is_being_written_is_read_once_it_rests() -> None:
    watch = Watch(stamps(1))
    assert [watch.observe(stamps(size)) for size in (0, 40, 90, 90)] == [False, False, False, True]
    watch.mark_read(stamps(90))
    assert not watch.observe(stamps(90))


def test_a_secret_beside_a_rule_file_counts_as_much() -> None:
    watch = Watch(stamps(1))
    assert [watch.observe(stamps(2, secret=secret)) for secret in (None, 7, 7)] == [False, False, True]


def test_a_file_that_is_put_back_was_never_changed() -> None:
    watch = Watch(stamps(1))
    assert [watch.observe(stamps(size)) for size in (2, 1, 2, 2)] == [False, False, False, True]


def test_a_file_that_never_rests_is_read_all_the_same() -> None:
    watch = Watch(stamps(0))
    looks = [watch.observe(stamps(size)) for size in range(1, MAX_UNSTABLE_LOOKS + 2)]
    assert looks == [False] * MAX_UNSTABLE_LOOKS + [True]


RULES = """
version: 1
sources:
  crm: {verify: {scheme: hmac, header: X-S, secrets: ["${SECRET}"], encoding: base64}, id: body.id}
  shop: {verify: {scheme: slack, secrets: ["${SECRET}"]}}
destinations:
  ci: {url: "http://ci"}
routes:
  - {name: all, from: [crm, shop], match: {type: [a, b*], body.n: {gte: 1}}, when: "true", to: ci}
  - {name: some, from: crm, to: ci, request: {body: {a: "${{ body.a }}"}}}
"""


def read(folder: Path, text: str = RULES, secret: str = "s" * 16) -> Rules:
    path = folder / "routes.yaml"
    path.write_text(text)
    return load_rules(path, environ={"SECRET": secret})


def test_the_same_rules_read_again_change_nothing(tmp_path: Path) -> None:
    assert changes(read(tmp_path), read(tmp_path)) == Changes()


P256 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE83T4O/n84iotIvIW4mdBgQ/7dAfSmpqIM8kF9mN1flpVKS3GRqe62gw+2fNNRaINXvVpiglSI8eNEc6wEA3F+g=="  # noqa: E501 - SendGrid's example
ED25519 = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"  # RFC 8032, section 7.1, TEST 2


@pytest.mark.parametrize("scheme", [*GENERIC, *PRESETS])
def test_verifiers_of_equal_settings_are_equal(scheme: str) -> None:
    configs: dict[str, dict[str, object]] = {
        "none": {},
        "hmac": {"header": "X-S", "secrets": ["s"], "timestamp": {"header": "X-T"}, "signed": "{timestamp}{body}"},
        "hash": {"header": "X-S", "secrets": ["s"], "signed": "{secret}{body}"},
        "token": {"header": "X-T", "secrets": ["s"]},
        "basic": {"username": "u", "secrets": ["s"]},
        "jwt": {"algorithms": "HS256", "secrets": ["s"]},
        "public-key": {"header": "X-S", "algorithm": "ed25519", "public_keys": [ED25519]},
        "discord": {"public_keys": [ED25519]},
        "telnyx": {"public_keys": [ED25519]},
        "sendgrid": {"public_keys": [P256]},
        "wise": {},
        "http-message-signature": {"algorithm": "ed25519", "public_keys": [{"secret": ED25519, "keyid": "k"}]},
        "adobe-io-events": {"client_id": "c"},
        "braintree": {"public_key": "p", "secrets": ["s"]},
        "plaid": {"client_id": "c", "api_secret": "s"},
        "paypal": {"webhook_id": "9XL90610J3647323C"},
        "google-pubsub": {"audience": "https://x", "email": "a@b"},
        "sns": {"topics": ["arn:aws:sns:us-west-2:123456789012:MyTopic"]},
    }
    config = configs.get(scheme, {"secrets": ["00112233445566778899aabbccddeeff"]})  # of any encoding
    one, other = [build_verifier({"scheme": scheme, **config}, public_url="https://x") for _ in range(2)]
    assert one == other


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("id: body.id", "id: body.uid", Changes(changed=("source crm: id",))),
        ("http://ci", "http://cd", Changes(changed=("destination ci: url",))),
        ('"http://ci"', '"http://ci", headers: {x-a: b}', Changes(changed=("destination ci: headers",))),
        ('"http://ci"', '"http://ci", auth: {bearer: {token: abc}}', Changes(changed=("destination ci: auth",))),
        ('"http://ci"', '"http://cd", proxy: "http://p:1"', Changes(changed=("destination ci: url, proxy",))),
        ("gte: 1", "gte: 2", Changes(changed=("route all: match",))),
        ("body.a }}", "body.b }}", Changes(changed=("route some: request",))),
        (
            "from: crm, to: ci,",
            "from: shop, to: ci, retry: {max_attempts: 3},",
            Changes(changed=("route some: from, retry",)),
        ),
        ("name: some", "name: few", Changes(added=("route few",), removed=("route some",))),
        ("sources:", "egress: {private: refuse}\nsources:", Changes(changed=("egress: private",))),
        (
            "sources:",
            "ingress: {trusted_proxies: [10.0.0.0/8]}\nsources:",
            Changes(changed=("ingress: trusted_proxies",)),
        ),
        (
            "sources:",
            "ingress: {trusted_proxies: [10.0.0.0/8], certificate_header: {name: Client-Cert, format: pem}}\nsources:",
            Changes(changed=("ingress: trusted_proxies, certificate_header",)),
        ),
        (
            "shop: {",
            "shop: {path: '/${SECRET}', allow_from: [10.0.0.1], limits: {rate: 1/s}, ",
            Changes(changed=("source shop: path, allow_from, limits",)),
        ),
    ],
)
def test_changes_of_rules_are_reported_by_name(tmp_path: Path, written: str, instead: str, expected: Changes) -> None:
    assert changes(read(tmp_path), read(tmp_path, RULES.replace(written, instead))) == expected


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("id: body.id", "id: body.uid", {"crm"}),
        ("id: body.id", "id: body.id, dedupe: 2h", {"crm"}),
        ("id: body.id", "id: body.id, type: body.kind2", set()),
        ("gte: 1", "gte: 2", set()),
    ],
)
def test_of_which_sources_others_are_duplicates_than_before_is_shown_by_their_identity(
    tmp_path: Path, written: str, instead: str, expected: set[str]
) -> None:
    assert written in RULES
    old = read(tmp_path)
    assert changes(old, read(tmp_path, RULES.replace(written, instead))).identified == expected
    assert changes(old, read(tmp_path, secret="t" * 16)).identified == set()


def test_a_new_secret_changes_its_sources(tmp_path: Path) -> None:
    assert changes(read(tmp_path), read(tmp_path, secret="t" * 16)) == Changes(
        changed=("source crm: verify", "source shop: verify")
    )


def test_a_file_cut_where_it_is_valid_removes_the_rest(tmp_path: Path) -> None:
    cut = RULES[: RULES.index("  - {name: some")]
    assert changes(read(tmp_path), read(tmp_path, cut)) == Changes(removed=("route some",))


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("http://ci", "http://cd", {}),
        ("from: crm, to: ci,", "from: crm, to: ci, retry: {max_attempts: 3},", {}),
        ("from: crm, to: ci,", "from: shop, to: ci,", {"crm": {"some"}, "shop": {"some"}}),
        ("name: some", "name: few", {"crm": {"few"}}),
        ("id: body.id", "id: body.uid", {"crm": {"all", "some"}}),
    ],
)
def test_the_sources_that_a_change_affects_are_found_by_their_routes(
    tmp_path: Path, written: str, instead: str, expected: dict[str, set[str]]
) -> None:
    assert written in RULES
    old = read(tmp_path)
    assert changes(old, read(tmp_path, RULES.replace(written, instead))).touched == expected
