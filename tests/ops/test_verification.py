"""How a source is verified, shown without any secret."""

from pathlib import Path

import pytest

from gateway.ops.output import Output, when
from gateway.ops.source_presentation import print_source, source_fields
from gateway.ops.verification import masked_secret, verification_of
from gateway.rules.load import load_rules
from tests.certificates import Authority

RULES = """
version: 1
include: more/*.yaml
sources:
  shop:
    verify:
      scheme: hmac
      header: X-Signature
      algorithm: sha256
      encoding: hex
      timestamp: {header: X-Time}
      tolerance: 2m
      id_header: X-Id
      signed: "{id}.{timestamp}.{body}"
      secrets: ["${file:secrets/shop}", "${OLD:-a-default-secret-of-old}", written-out-secret, "whsec_${NEW}"]
  open: {verify: {scheme: none}}
  rotating:
    verify:
      scheme: github
      secrets: ["${NEW}", {secret: "${OLD:-a-default-secret-of-old}", until: 2027-01-31}]
  hidden:
    path: /in/hidden/${NEW}
    verify: {scheme: none}
    allow_from: [192.0.2.0/24, 198.51.100.7]
    limits: {body: 256KiB, rate: 30/m, concurrent: 20}
"""
MORE = """
sources:
  crm: {verify: {scheme: token, header: X-Token, secrets: ["${CRM}"]}}
  github: {verify: {scheme: github, secrets: ["${GITHUB}"]}}
  stripe: {verify: {scheme: stripe, secrets: ["${STRIPE}"], tolerance: 1h}}
"""


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("${file:secrets/shop}", "${file:secrets/shop}"),
        ("${OLD}", "${OLD}"),
        ("${OLD:-a secret}", "${OLD:-***}"),
        ("a secret", "***"),
        ("", "***"),
        ("$${OLD}", "***"),
        ("a$${b}${OLD}c", "***${OLD}***"),
        ("${OLD}${file:b}", "${OLD}${file:b}"),
        ("${OLD", "***"),
        (12345678, "***"),
    ],
)
def test_a_secret_is_shown_only_as_its_references(written: object, told: str) -> None:
    assert masked_secret(written) == told


def test_a_sources_verification_is_shown_with_its_secrets_references_not_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "shop").write_text("the secret in the file")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "team.yaml").write_text(MORE)
    file = tmp_path / "routes.yaml"
    file.write_text(RULES)
    rules = load_rules(file, environ={"NEW": "c2VjcmV0IG9mIG5ldw==", "CRM": "the secret of crm"}, resolve=False)
    told = {}
    for name in rules.sources:
        source = rules.sources[name]
        print_source(Output(json=False), source, verification_of(rules.files, source), [])
        told[name] = capsys.readouterr().out
        fields = source_fields(source, verification_of(rules.files, source), [])
        assert not any(
            secret in told[name] + str(fields) for secret in ("the secret", "written-out", "a-default", "c2V")
        )
    assert told["shop"].splitlines()[1:4] == [
        f"verify hmac  {file}:7",
        "  sha256 signature in the header X-Signature; its timestamp (in X-Time) at most 2m from now; id_header X-Id",
        "  4 secrets, any of which is accepted: ${file:secrets/shop}, ${OLD:-***}, ***, ***${NEW}",
    ]
    assert "  nothing: everyone may send\n" in told["open"]
    assert f"accepted: ${{NEW}}, ${{OLD:-***}} until {when(1801440000)}\n" in told["rotating"]
    rotating = rules.sources["rotating"]
    verify = source_fields(rotating, verification_of(rules.files, rotating), [])["verify"]
    assert isinstance(verify, dict)
    assert (verify["secrets"], verify["public_keys"]) == (["${NEW}", "${OLD:-***}"], [])
    assert verify["expiries"] == [{"key": "secrets", "position": 2, "until": "2027-02-01T00:00:00.000Z"}]
    assert "  credential in the header X-Token\n  1 secret: ${CRM}\n" in told["crm"]
    assert "sha256 signature in the header X-Hub-Signature-256\n  1 secret: ${GITHUB}\n" in told["github"]
    assert "(in Stripe-Signature) at most 1h from now\n" in told["stripe"]
    assert f"verify stripe  {tmp_path / 'more' / 'team.yaml'}:5" in told["stripe"]


@pytest.mark.parametrize("secret", ["the-path-s-secret", None])
def test_a_secret_path_is_shown_by_its_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, secret: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "routes.yaml"
    file.write_text(RULES)
    rules = load_rules(file, environ={} if secret is None else {"NEW": secret}, resolve=False)
    source = rules.sources["hidden"]
    verification = verification_of(rules.files, source)
    print_source(Output(json=False), source, verification, [])
    told = capsys.readouterr().out
    assert told.startswith("source hidden  path /in/hidden/${NEW}\n")
    assert "\nallow_from 192.0.2.0/24, 198.51.100.7/32\n" in told
    limits = "bodies of at most 262,144 bytes, 0.5 verified requests a second, over all processes"
    assert f"\nlimits {limits}, 20 of them in progress in each process\n" in told
    fields = source_fields(source, verification, [])
    assert fields["path"] == "/in/hidden/${NEW}"
    assert fields["allow_from"] == ["192.0.2.0/24", "198.51.100.7/32"]
    assert fields["limits"] == {"body_bytes": 262_144, "rate_per_second": 0.5, "concurrent": 20}
    assert "the-path" not in told + str(fields) + repr(source)
    others = source_fields(rules.sources["open"], verification, [])
    assert others.keys().isdisjoint({"allow_from", "client_certificate", "limits"})


def test_a_demanded_certificate_is_shown_by_its_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ca.pem").write_text(Authority().pem)
    file = tmp_path / "routes.yaml"
    file.write_text(
        "version: 1\nsources:\n"
        "  a: {verify: {scheme: none}, client_certificate: {ca: '${file:ca.pem}', dns: [b.example, a.example]}}\n"
        "  b: {verify: {scheme: none}, client_certificate: {ca: '${file:ca.pem}'}}\n"
    )
    rules = load_rules(file)
    for name, told in (("a", "dns a.example, b.example"), ("b", "any of its authorities")):
        source = rules.sources[name]
        print_source(Output(json=False), source, verification_of(rules.files, source), [])
        shown = capsys.readouterr().out
        assert f"\nclient_certificate {told}\n" in shown
        assert "\n  nothing but the client's certificate\n" in shown
    fields = source_fields(rules.sources["a"], verification_of(rules.files, rules.sources["a"]), [])
    names = {"subjects": [], "dns": ["a.example", "b.example"], "uris": [], "emails": []}
    assert fields["client_certificate"] == names
