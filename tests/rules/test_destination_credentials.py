"""How a destination is reached and who we are to it: what is read, and what is refused with its place."""

import ssl
from collections.abc import Mapping
from pathlib import Path
from weakref import ref

import pytest

from gateway.rules.destination_credentials import tls_of
from gateway.rules.load import check_rules, load_rules
from gateway.rules.rules import Destination, DestinationAccess, OAuth2, OnGone, Proxy, TokenEndpointAuthMethod
from tests.certificates import Authority

HEAD = "version: 1\nsources: {in: {verify: {scheme: none}}}\nroutes: [{name: r, from: in, to: d}]\n"


PLACE = "destinations.d."


def written(text: str) -> str:
    return f"{HEAD}destinations:\n  d:\n    {text}\n"


def destination(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> Destination:
    path = folder / "routes.yaml"
    path.write_text(written(text))
    return load_rules(path, environ=environ or {}).destinations["d"]


def problems(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """Return each problem, as `what stands at its place … | path: message`."""
    path = folder / "routes.yaml"
    path.write_text(written(text))
    lines = path.read_text().splitlines()
    found = check_rules(path, environ=environ or {}, resolve=True)[1]
    return [
        f"{lines[problem.line - 1][problem.column - 1 :][:5]} | {problem.path.removeprefix(PLACE)}: {problem.message}"
        for problem in found
        if problem.severity == "error"
    ]


# Authentication.


def test_basic_authentication_is_a_header(tmp_path: Path) -> None:
    """The example is that of RFC 7617, section 2.1."""
    read = destination(
        tmp_path, "{url: http://d, headers: {X-A: b}, auth: {basic: {username: test, password: '${P}'}}}", {"P": "123£"}
    )
    assert read.headers == (("X-A", "b"), ("authorization", "Basic dGVzdDoxMjPCow=="))
    assert read.access is None


def test_a_bearer_token_is_a_header(tmp_path: Path) -> None:
    read = destination(tmp_path, "{url: http://d, auth: {bearer: {token: '${T}'}}}", {"T": "1|aB-._~+/="})
    assert read.headers == (("authorization", "Bearer 1|aB-._~+/="),)


def test_oauth2_settings_are_read(tmp_path: Path) -> None:
    text = "{url: http://d, auth: {oauth2: {token_url: https://idp/t, client_id: me, client_secret: s%s}}}"
    least = OAuth2(token_url="https://idp/t", client_id="me", client_secret="s")
    assert destination(tmp_path, text % "").access == DestinationAccess(oauth2=least)
    assert destination(tmp_path, text % ", scope: [a, 'b:c'], audience: x, style: body").access == DestinationAccess(
        oauth2=OAuth2(
            token_url="https://idp/t",
            client_id="me",
            client_secret="s",
            scope=("a", "b:c"),
            audience="x",
            style=TokenEndpointAuthMethod.BODY,
        )
    )
    assert destination(tmp_path, text % ", scope: a").access == DestinationAccess(
        oauth2=OAuth2(token_url="https://idp/t", client_id="me", client_secret="s", scope=("a",))
    )


def test_a_410_dead_letters_unless_set_to_pause(tmp_path: Path) -> None:
    assert destination(tmp_path, "{url: http://d}").on_gone is OnGone.DEAD_LETTER
    assert destination(tmp_path, "{url: http://d, on_gone: pause}").on_gone is OnGone.PAUSE


ONE = "expected exactly one of basic, bearer, oauth2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auth: {}", [f"{{}}}} | auth: {ONE}, got none"]),
        (
            "auth: {bearer: {token: s3cret}, basic: {username: a, password: s3cret}}",
            [f"{{bear | auth: {ONE}, got bearer, basic"],
        ),
        ("auth: {baerer: {}}", ["baere | auth.baerer: unknown key 'baerer', did you mean 'bearer'?"]),
        ("auth: {bearer: {}}", ["{}}} | auth.bearer: expected the key 'token', got none"]),
        (
            "auth: {bearer: {token: s3cr\u00e9t}}",
            ["s3cré | auth.bearer.token: expected a token of visible ASCII characters, got another string"],
        ),
        (
            "auth: {basic: {username: s3:cret, password: pass}}",
            [
                (
                    "s3:cr | auth.basic.username: expected a string without colons and control characters, "
                    "got another string"
                ),
            ],
        ),
        (
            'auth: {basic: {username: "", password: "s3\\ncret"}}',
            ['"s3\\n | auth.basic.password: expected a string without control characters, got another string'],
        ),
        (
            "auth: {oauth2: {token_url: s3cret, client_id: 5.00, client_secret: s, scope: a bcd, style: header}}",
            [
                "s3cre | auth.oauth2.token_url: expected an http or https URL, got one without a scheme",
                "5.00, | auth.oauth2.client_id: expected a string without control characters, got something else",
                "a bcd | auth.oauth2.scope: expected a scope without spaces, got 'a bcd'",
                "heade | auth.oauth2.style: expected one of basic, body, got 'header'",
            ],
        ),
        (
            "auth: {oauth2: {token_url: http://idp, client_id: a, client_secret: b}}, headers: {AUTHORIZATION: x}",
            [
                (
                    "AUTHO | headers.AUTHORIZATION: expected no Authorization where a destination has `auth`, "
                    "got 'AUTHORIZATION'"
                ),
            ],
        ),
        (
            "headers: {Proxy-Authorization: x}",
            [
                (
                    "Proxy | headers.Proxy-Authorization: expected a header that the gateway doesn't write itself, "
                    "got 'Proxy-Authorization'"
                ),
            ],
        ),
        ("on_gone: drop", ["drop} | on_gone: expected one of dead_letter, pause, got 'drop'"]),
    ],
)
def test_errors_in_credentials_are_reported_without_them(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = problems(tmp_path, f"{{url: http://d, {text}}}")
    assert found == expected
    assert "s3" not in "".join([problem.partition("|")[2] for problem in found])


def test_a_routes_header_that_authentication_would_replace_is_refused(tmp_path: Path) -> None:
    text = written("{url: http://d, auth: {bearer: {token: t}}}").replace(
        "to: d}", "to: d, request: {headers: {Authorization: x}}}"
    )
    path = tmp_path / "routes.yaml"
    path.write_text(text)
    (found,) = [problem for problem in check_rules(path, environ={})[1] if problem.severity == "error"]
    assert found.path == "routes[0].request.headers.Authorization"
    assert "expected no Authorization where a destination has `auth`" in found.message


def test_secrets_are_in_no_representation(tmp_path: Path) -> None:
    text = (
        "{url: http://d, proxy: 'http://p:1', proxy_auth: {username: s3cret, password: s3cret},"
        " auth: {oauth2: {token_url: 'http://i/s3cret', client_id: s3cret, client_secret: s3cret}}}"
    )
    read = destination(tmp_path, text)
    assert "s3cret" not in repr(read)
    assert "s3cret" not in repr(read.access)


# Proxies.


def test_a_proxy_is_a_host_and_a_port(tmp_path: Path) -> None:
    read = destination(tmp_path, "{url: http://d, proxy: 'http://Proxy.internal:3128/'}")
    assert read.access == DestinationAccess(proxy=Proxy(host="proxy.internal", port=3128))
    text = "{url: http://d, proxy: '${P}', proxy_auth: {username: us, password: '${S}'}}"
    read = destination(tmp_path, text, {"P": "http://[::1]:80", "S": "s3cret"})
    assert read.access == DestinationAccess(proxy=Proxy(host="::1", port=80, authorization="Basic dXM6czNjcmV0"))


@pytest.mark.parametrize("url", ["https://p:3128", "http://p", "http://p:3128/path", "http://p:3128/?q"])
def test_a_proxy_of_another_kind_is_refused(tmp_path: Path, url: str) -> None:
    assert problems(tmp_path, f"{{url: http://d, proxy: '{url}'}}") == [
        "'http | proxy: expected a proxy such as http://proxy.internal:3128, got another URL"
    ]


def test_a_proxys_credentials_are_not_for_its_url_and_not_without_it(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "{url: http://d, proxy: 'http://us:s3cret@p:1'}")
    assert "s3cret" not in found
    assert "without user and password" in found
    assert problems(tmp_path, "{url: http://d, proxy_auth: {username: a, password: b}}") == [
        "proxy | proxy_auth: `proxy_auth` needs a `proxy`, got none"
    ]


# TLS.


@pytest.fixture(scope="module")
def ours() -> Authority:
    return Authority("Ours")


def test_certificates_come_from_files_beside_the_rules_and_are_watched(tmp_path: Path, ours: Authority) -> None:
    certificate, key = ours.issue("gateway")
    (tmp_path / "ca.pem").write_text(f"Die Wurzel für alle\n{ours.pem}")
    (tmp_path / "both.pem").write_text(key + certificate)
    path = tmp_path / "routes.yaml"
    path.write_text(
        written(
            "{url: https://d, tls: {ca: '${file:ca.pem}', certificate: '${file:both.pem}', key: '${file:both.pem}'}}"
        )
    )
    rules = load_rules(path, environ={})
    access = rules.destinations["d"].access
    assert access is not None
    assert access.tls is not None
    assert access.tls == tls_of(ca=ours.pem, certificate=certificate, key=key)
    assert {tmp_path / "ca.pem", tmp_path / "both.pem"} <= set(rules.files)
    context = access.tls.context
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert [dict(found["subject"][0])["commonName"] for found in context.get_ca_certs()] == ["Ours"]  # type: ignore[arg-type] # typeshed is vague about names
    assert "PRIVATE" not in repr(access)


def test_without_an_authority_the_system_is_trusted(ours: Authority) -> None:
    certificate, key = ours.issue("gateway")
    counts = tls_of(ca=None, certificate=certificate, key=key).context.cert_store_stats()
    assert counts == ssl.create_default_context().cert_store_stats()


def test_identical_identities_are_read_once(ours: Authority) -> None:
    """5,000 destinations with one identity must not take minutes to load."""
    assert tls_of(ca=ours.pem, certificate=None, key=None) is tls_of(
        ca=f"# ours\n{ours.pem}", certificate=None, key=None
    )


def test_what_no_destination_has_any_more_is_freed(ours: Authority) -> None:
    """A rotated private key doesn't stay in memory, nor half a megabyte of authorities for each rotation."""
    tls = tls_of(ca=ours.pem, certificate=None, key=None)
    freed = ref(tls.context)
    assert freed() is not None
    del tls
    assert freed() is None


BOTH = "certificate: '${C}', key: '${K}'"


def test_an_unusable_credential_is_reported_with_its_place(tmp_path: Path, ours: Authority) -> None:
    certificate, key = ours.issue("gateway")
    _, other = ours.issue("other")
    _, locked = ours.issue("gateway", passphrase=b"s3cret")
    broken = certificate.replace("MII", "AAA", 1)
    none = "got a string without one"
    for tls, environ, expected in (
        ("ca: /etc/ca.pem", {}, f"/etc/ | tls.ca: expected a certificate in PEM, such as ${{file:ca.pem}}, {none}"),
        (
            "ca: '${K}'",
            {"K": key},
            f"'${{K}} | tls.ca: expected a certificate in PEM, such as ${{file:ca.pem}}, {none}",
        ),
        ("ca: '${C}'", {"C": broken}, "'${C} | tls.ca: expected valid certificates, got others"),
        (
            BOTH,
            {"C": broken, "K": key},
            "'${C} | tls.certificate: expected a certificate and a private key that can be used, got others",
        ),
        (
            BOTH,
            {"C": certificate, "K": certificate},
            f"'${{K}} | tls.key: expected a private key in PEM, such as ${{file:key.pem}}, {none}",
        ),
        (
            BOTH,
            {"C": certificate, "K": other},
            "'${K} | tls.key: expected the private key of the certificate, got something else",
        ),
        (
            BOTH,
            {"C": certificate, "K": locked},
            "'${K} | tls.key: expected a private key without a passphrase, got an encrypted one",
        ),
        (
            "certificate: '${C}'",
            {"C": certificate},
            "{cert | tls: expected the key 'key' with 'certificate', got none",
        ),
        ("key: '${K}'", {"K": key}, "{key: | tls: expected the key 'certificate' with 'key', got none"),
        ("", {}, "{}} | tls: expected `ca`, or `certificate` and `key`, got neither"),
        ("verify: false", {}, "verif | tls.verify: unknown key 'verify'"),
        ("ca: 5", {}, "5}} | tls.ca: expected a string in PEM, got something else"),
    ):
        (found,) = problems(tmp_path, f"{{url: https://d, tls: {{{tls}}}}}", environ)
        assert found.startswith(expected), found
        assert "BEGIN" not in found


def test_tls_for_a_url_without_it_is_refused(tmp_path: Path, ours: Authority) -> None:
    assert problems(tmp_path, "{url: http://d, tls: {ca: '${C}'}}", {"C": ours.pem}) == [
        "tls:  | tls: `tls` needs an https URL, got http"
    ]


def test_an_unresolved_reference_is_a_warning_in_a_check(tmp_path: Path) -> None:
    text = (
        "{url: '${U}', proxy: '${P}', proxy_auth: {username: '${A}', password: '${B}'},"
        " tls: {ca: '${file:ca.pem}', certificate: '${C}', key: '${K}'},"
        " auth: {oauth2: {token_url: '${T}', client_id: '${I}', client_secret: '${S}', scope: '${X}'}}}"
    )
    path = tmp_path / "routes.yaml"
    path.write_text(written(text))
    rules, found = check_rules(path, environ={})
    assert rules is not None
    assert {problem.severity for problem in found} == {"warning"}
    assert len([problem for problem in found if problem.code == "unresolved"]) == 11
