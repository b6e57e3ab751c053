"""Certificates of clients in the headers of proxies: each format, whose header counts, and that none goes further."""

import asyncio
import base64
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from gateway.ingress.certificate_headers import certificate_in
from gateway.model import RefusedError
from gateway.rules.rules import CertificateFormat, CertificateHeader
from gateway.verify.client_certificates import ClientCertificates, ForwardedCertificate, read_authorities
from tests.certificates import Authority
from tests.ingress.test_ingress import CRM, World, a_request, running
from tests.ingress.test_proxy_protocol import until_listening
from tests.ingress.test_tls import Pki, connected, pki, serving
from tests.tools import needed

__all__ = ["pki"]

XFCC, PEM, RFC9440 = CertificateFormat.XFCC, CertificateFormat.PEM, CertificateFormat.RFC9440
ROOT = Authority("bank")
MIDDLE = Authority("bank, departments", issuer=ROOT)
NAMES = ("hooks.bank.example", "spiffe://bank/hooks", "hooks@bank.example")
AUTHORITIES = read_authorities(ROOT.pem)
LEAF = ROOT.issue(*NAMES)[0]
DEEP = MIDDLE.issue(*NAMES)[0]


def der(pem: str) -> bytes:
    return x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)


def envoy(pem: str, chain: str = "", subject: str = "CN=x") -> str:
    """As Envoy writes it: https://github.com/envoyproxy/envoy, source/common/http/conn_manager_utility.cc."""
    more = f'Chain="{quote(chain, safe="")}";' if chain else ""
    return f'By=spiffe://us;Hash={"0" * 64};Cert="{quote(pem, safe="")}";{more}Subject="{subject}";URI=spiffe://x;DNS=a'


def sequence(pem: str) -> str:
    return f":{base64.b64encode(der(pem)).decode()}:"


def bare(pem: str) -> str:
    return "".join(pem.splitlines()[1:-1])


@pytest.mark.parametrize(
    ("format_", "value", "chain"),
    [
        (XFCC, envoy(DEEP, DEEP + MIDDLE.pem), []),  # `Chain` has the leaf, too
        (XFCC, f"{envoy(LEAF)},{envoy(DEEP, MIDDLE.pem)}", []),  # the nearest proxy's is the last
        (XFCC, f'Subject="a \\"quoted\\", Cert=b",{envoy(DEEP, MIDDLE.pem)}', []),
        (XFCC, f'Hash=1, cert="{quote(DEEP + MIDDLE.pem)}"', []),
        (PEM, quote(DEEP + MIDDLE.pem), []),
        (PEM, quote(DEEP + MIDDLE.pem, safe="+=/"), []),  # AWS
        (PEM, quote(f"{bare(DEEP)},{bare(MIDDLE.pem)}"), []),  # Traefik
        (PEM, f"{bare(DEEP)},{bare(MIDDLE.pem)}", []),
        (RFC9440, sequence(DEEP), [sequence(MIDDLE.pem)]),
        (RFC9440, f" {sequence(DEEP)} ", [f" {sequence(MIDDLE.pem)}"]),
    ],
)
def test_each_format_has_the_certificate_and_its_chain(
    format_: CertificateFormat, value: str, chain: list[str]
) -> None:
    found = certificate_in(format_, [value.encode()], [each.encode() for each in chain])
    assert found == ForwardedCertificate(der(DEEP), (der(MIDDLE.pem),))


@pytest.mark.parametrize("format_", [*CertificateFormat])
@pytest.mark.parametrize("values", [[], [b""], [b"  "]])
def test_without_a_value_there_is_none(format_: CertificateFormat, values: list[bytes]) -> None:
    assert certificate_in(format_, values, [b":AAAA:"]) is None


@pytest.mark.parametrize(
    ("format_", "value"),
    [
        (XFCC, "Hash=0;Subject=x"),  # an Envoy that wasn't told to add `cert`
        (XFCC, f"{envoy(LEAF)},Hash=0"),  # that of another proxy's client isn't ours
        (XFCC, f'Cert="{quote(LEAF)}";Cert="{quote(LEAF)}"'),
        (XFCC, f'Foo="{quote(LEAF)}'),
        (XFCC, f'Foo=",{envoy(LEAF)}'),  # an open quote, for the proxy's element to be taken for text
        (XFCC, 'Cert=""'),
        (XFCC, quote(LEAF)),
        (PEM, LEAF.replace("\n", " ").replace("CERTIFICATE", "CERT")),
        (PEM, quote(LEAF + "more")),
        (PEM, quote("more" + LEAF)),
        (PEM, "(null)"),
        (PEM, envoy(LEAF)),
        (PEM, quote(LEAF * 20)),
        (RFC9440, quote(LEAF)),
        (RFC9440, sequence(LEAF).strip(":")),
        (RFC9440, "::"),
        (RFC9440, f"{sequence(LEAF)}, {sequence(LEAF)}"),
        (RFC9440, f"{sequence(LEAF)};a=b"),
        (RFC9440, ":AAA:"),
    ],
)
def test_what_is_malformed_is_refused(format_: CertificateFormat, value: str) -> None:
    with pytest.raises(RefusedError) as caught:
        certificate_in(format_, [value.encode()])
    assert (caught.value.status, caught.value.reason) == (403, "client_certificate_malformed")


def test_two_lines_are_refused_as_one_may_be_the_clients() -> None:
    with pytest.raises(RefusedError):
        certificate_in(RFC9440, [sequence(LEAF).encode()] * 2)


@given(
    st.sampled_from(CertificateFormat), st.lists(st.binary(max_size=200), max_size=3), st.lists(st.binary(), max_size=2)
)
def test_nothing_else_than_a_refusal_comes_of_any_bytes(
    format_: CertificateFormat, values: Sequence[bytes], chain: Sequence[bytes]
) -> None:
    with suppress(RefusedError):
        found = certificate_in(format_, values, chain)
        assert found is None or ClientCertificates(authorities=AUTHORITIES).check(found, now=time.time())


# --- Verification ---


def check(pem: str, *chain: str, now: float | None = None, ca: str = ROOT.pem, **names: frozenset[str]) -> str | None:
    demanded = ClientCertificates(authorities=read_authorities(ca), **names)
    presented = ForwardedCertificate(der(pem), tuple(map(der, chain)))
    return demanded.check(presented, now=time.time() if now is None else now)


def test_a_chain_up_to_an_authority_is_accepted() -> None:
    assert check(LEAF) is None
    assert check(DEEP, MIDDLE.pem) is None
    assert check(DEEP, ca=MIDDLE.pem) is None, "which needn't be self-signed"
    assert check(DEEP, LEAF, MIDDLE.pem, ROOT.pem) is None, "whatever else is there"
    assert check(LEAF, ca=Authority("other").pem + ROOT.pem) is None
    assert check(ROOT.issue(subject="CN=no alternative names")[0]) is None
    assert check(ROOT.issue("a", purpose=ExtendedKeyUsageOID.CLIENT_AUTH)[0]) is None


@pytest.mark.parametrize(
    "pem",
    [
        Authority("bank").issue(*NAMES)[0],  # of the same name, with another key
        DEEP,  # without what is between
        ROOT.issue("a", life=timedelta(seconds=-1))[0],
        ROOT.issue("a", purpose=ExtendedKeyUsageOID.SERVER_AUTH)[0],
    ],
)
def test_any_other_certificate_is_refused(pem: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check(pem)
    assert caught.value.reason == "client_certificate_refused"


@pytest.mark.parametrize(
    "alternatives",
    [
        bytes.fromhex("3004a3023000"),  # an X.400 address
        bytes.fromhex("30058703010203"),  # an IP address of three bytes
    ],
)
@pytest.mark.parametrize("dns", [[], ["shop.example"]])
def test_a_certificate_with_names_that_cannot_be_read_is_malformed(alternatives: bytes, dns: Sequence[str]) -> None:
    """Its authority may sign anything; what can't be read is no bug of ours."""
    leaf, _ = ROOT.issue("shop", alternatives=alternatives)
    with pytest.raises(RefusedError) as caught:
        check(leaf, dns=frozenset(dns))
    assert (caught.value.status, caught.value.reason) == (403, "client_certificate_malformed")


def test_a_certificate_that_signs_none_is_no_authority() -> None:
    """A client can't issue certificates with its own."""
    own, key = ROOT.issue("hooks.bank.example", subject="CN=hooks.bank.example")
    impostor = Authority("hooks.bank.example", key=key)
    leaf = impostor.issue(*NAMES)[0]
    assert check(leaf, ca=impostor.pem) is None, "its signature is right"
    with pytest.raises(RefusedError):
        check(leaf, own)


def test_a_chain_that_was_verified_counts_until_its_first_certificate_ends() -> None:
    middle = Authority("brief", issuer=ROOT, life=timedelta(hours=1))
    leaf, now = middle.issue(*NAMES)[0], time.time()
    for ahead, is_accepted in ((0, True), (3590, True), (3601, False), (10, True), (-3 * 86400, False)):
        if is_accepted:
            assert check(leaf, middle.pem, now=now + ahead) is None
        else:
            with pytest.raises(RefusedError):
                check(leaf, middle.pem, now=now + ahead)


def test_another_sources_chain_is_not_taken_for_ones_own() -> None:
    other = Authority("other")
    assert check(LEAF) is None
    with pytest.raises(RefusedError):
        check(LEAF, ca=other.pem)


def test_a_name_is_needed_if_there_are_some() -> None:
    assert check(LEAF, dns=frozenset({"hooks.bank.example"})) is None
    assert check(LEAF, uris=frozenset({"spiffe://bank/hooks"})) is None
    assert check(LEAF, dns=frozenset({"other"})) == "CN=hooks.bank.example"


# --- Over real connections ---


@asynccontextmanager
async def behind(
    format_: CertificateFormat, name: str = "Client-Cert", proxies: Sequence[str] = ("127.0.0.1",), ca: str = ROOT.pem
) -> AsyncIterator[World]:
    """Run an ingress whose source `open` demands a certificate, which trusted proxies have in a header."""
    async with running(clock=time.time) as world:
        demand(world, format_, name, proxies, ca)
        yield world


def demand(world: World, format_: CertificateFormat, name: str, proxies: Sequence[str], ca: str) -> None:
    rules, header = world.rules[0], CertificateHeader(name=name, format=format_)
    demanded = ClientCertificates(authorities=read_authorities(ca), dns=frozenset({"hooks.bank.example"}))
    sources = {
        each: replace(
            source,
            proxy_headers=header.headers,
            client_certificate=demanded if each == "open" else None,
        )
        for each, source in rules.sources.items()
    }
    trusted = tuple(map(ip_network, proxies))
    world.rules[0] = replace(rules, sources=sources, trusted_proxies=trusted, certificate_header=header)
    if world.tls is not None:
        world.tls.trust(world.rules[0].client_authorities)


@pytest.mark.parametrize(
    ("format_", "name", "headers"),
    [
        (XFCC, "X-Forwarded-Client-Cert", [f"X-Forwarded-Client-Cert: {envoy(DEEP, DEEP + MIDDLE.pem)}"]),
        (PEM, "SSL-Client-Cert", [f"ssl-client-cert: {quote(DEEP + MIDDLE.pem)}"]),
        (RFC9440, "Client-Cert", [f"Client-Cert: {sequence(DEEP)}", f"Client-Cert-Chain: {sequence(MIDDLE.pem)}"]),
    ],
)
async def test_the_header_of_a_trusted_proxy_counts_and_goes_no_further(
    format_: CertificateFormat, name: str, headers: list[str]
) -> None:
    async with behind(format_, name) as world:
        assert (await world.exchange(a_request("/in/open", *headers, "X-Other: kept"))).status == 202
        assert (await world.exchange(a_request("/in/crm", CRM, *headers))).status == 202, "nor where nobody reads it"
        for stored in world.log.stored:
            names = {name.lower() for name, _ in stored.event.headers}
            assert names.isdisjoint(
                {b"x-forwarded-client-cert", b"ssl-client-cert", b"client-cert", b"client-cert-chain"}
            )
        assert b"x-other" in {name.lower() for name, _ in world.log.stored[0].event.headers}
        assert (await world.exchange(a_request("/in/open"))).status == 403
        assert world.lines[-1]["reason"] == "client_certificate_missing"
        assert (await world.exchange(a_request("/in/open", *headers, headers[0]))).status == 403
        assert world.lines[-1]["reason"] == "client_certificate_malformed"


async def test_a_header_of_anybody_else_is_ignored() -> None:
    async with behind(RFC9440, proxies=["192.0.2.0/24"]) as world:
        assert (await world.exchange(a_request("/in/open", f"Client-Cert: {sequence(LEAF)}"))).status == 403
        assert world.lines[-1]["reason"] == "client_certificate_missing"


async def test_a_certificate_for_another_name_is_in_the_line() -> None:
    async with behind(RFC9440) as world:
        other = ROOT.issue("other.example", subject="CN=other\\0d\\0a,O=Bank")[0]
        assert (await world.exchange(a_request("/in/open", f"Client-Cert: {sequence(other)}"))).status == 403
        line = world.lines[-1]
        assert (line["reason"], line["certificate"]) == ("client_certificate_refused", der_subject(other))
        stranger = Authority("x").issue("a", subject="CN=nothing is known of it")[0]
        assert (await world.exchange(a_request("/in/open", f"Client-Cert: {sequence(stranger)}"))).status == 403
        assert "certificate" not in world.lines[-1]


def der_subject(pem: str) -> str:
    return x509.load_pem_x509_certificate(pem.encode()).subject.rfc4514_string()


async def test_with_tls_here_a_header_counts_from_trusted_proxies_alone(pki: Pki) -> None:
    """And there it is the header that counts, not the proxy's own certificate."""
    own = pki.folder / "own.pem"
    own.write_text("".join(pki.bank.issue("hooks.bank.example")))
    forwarded = f"Client-Cert: {sequence(pki.bank.issue('hooks.bank.example')[0])}"
    other = f"Client-Cert: {sequence(pki.bank.issue('other.example')[0])}"
    async with serving(pki) as world:

        async def status(client: Path | None, *headers: str) -> int:
            async with connected(world, pki.client(own=client)) as wire:
                wire.send(a_request("/in/open", *headers))
                return (await wire.reply()).status

        demand(world, RFC9440, "Client-Cert", ["192.0.2.0/24"], pki.bank.pem)
        assert await status(None, forwarded) == 403
        assert await status(own) == 202
        assert await status(own, other) == 202
        demand(world, RFC9440, "Client-Cert", ["127.0.0.1"], pki.bank.pem)
        assert await status(None, forwarded) == 202
        assert await status(own) == 403
        assert await status(own, other) == 403


# --- Proxies as oracles ---


NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{
    listen 127.0.0.1:{front} ssl; ssl_certificate {folder}/tls.pem; ssl_certificate_key {folder}/tls.pem;
    ssl_verify_client optional_no_ca;
    location / {{ proxy_pass http://127.0.0.1:{back}; proxy_set_header Client-Cert $ssl_client_escaped_cert; }}
  }}
}}
"""
HAPROXY = """
defaults
  mode http
  timeout client 5s
  timeout server 5s
  timeout connect 5s
listen front
  bind 127.0.0.1:{front} ssl crt {folder}/tls.pem ca-file {folder}/ca.pem verify optional
  http-request del-header Client-Cert
  http-request set-header Client-Cert ":%[ssl_c_der,base64]:" if {{ ssl_c_used }}
  server gateway 127.0.0.1:{back}
"""


@pytest.mark.full
@pytest.mark.parametrize(("name", "format_", "config"), [("nginx", PEM, NGINX), ("haproxy", RFC9440, HAPROXY)])
async def test_a_proxy_in_front_is_understood(
    pki: Pki, tmp_path: Path, *, name: str, format_: CertificateFormat, config: str
) -> None:
    """What a client sends in the header itself, they remove; nginx passes on certificates that it hasn't verified."""
    program = needed(name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        front = free.getsockname()[1]
    (tmp_path / "tls.pem").write_text("".join(pki.servers.issue("hooks.example")))
    (tmp_path / "ca.pem").write_text(pki.bank.pem)
    good, other = pki.own(pki.bank, "hooks.bank.example"), pki.own(pki.shop, "hooks.bank.example")
    claimed = {PEM: quote(good.read_text().partition("-----BEGIN PRIVATE")[0]), RFC9440: sequence(good.read_text())}
    async with behind(format_, ca=pki.bank.pem) as world:
        (tmp_path / "config").write_text(config.format(folder=tmp_path, front=front, back=world.port))
        options = (
            ["-p", str(tmp_path), "-c", str(tmp_path / "config")]
            if name == "nginx"
            else ["-f", str(tmp_path / "config"), "-db"]
        )
        process = await asyncio.create_subprocess_exec(program, *options)
        try:
            await until_listening(front)

            async def status(own: Path | None, *headers: str) -> int:
                async with connected(replace(world, port=front), pki.client(own=own)) as wire:
                    wire.send(a_request("/in/open", *headers))
                    return (await wire.reply()).status

            assert await status(good) == 202
            assert await status(None) == 403
            assert await status(None, f"Client-Cert: {claimed[format_]}") == 403
            if name == "nginx":
                assert await status(other) == 403
                assert world.lines[-1]["reason"] == "client_certificate_refused"
        finally:
            process.terminate()
            await process.wait()
