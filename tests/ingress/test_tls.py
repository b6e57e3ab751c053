"""TLS at the ingress, over real connections: Python's client, openssl and curl, on the loops of asyncio and uvloop."""

import asyncio
import errno
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import structlog
import uvloop
from typing_extensions import override

from gateway.ingress.ingress import KEEPALIVE_GRACE
from gateway.ingress.listener import ConnectionSetup, Listener
from gateway.ingress.server import Limits
from gateway.ingress.tls import ServerTls, without_clients_names
from gateway.model import UsageError
from gateway.rules.rules import Rules
from gateway.rules.server_certificates import ServerNames, read_certificates
from gateway.verify.client_certificates import ClientCertificates, read_authorities
from tests.certificates import Authority
from tests.ingress.test_ingress import CRM, PING, Wire, World, a_request, running, until

GET = a_request("/healthz", method="GET", body=b"")


class Pki(NamedTuple):
    """An authority of servers, and two of clients."""

    folder: Path
    servers: Authority
    bank: Authority
    shop: Authority

    def client(self, *, least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2, own: Path | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.servers.pem)
        context.minimum_version = least
        if own is not None:
            context.load_cert_chain(own)
        return context

    def own(self, authority: Authority, *names: str, life: float = 86400.0, subject: str | None = None) -> Path:
        """Write the certificate of a client, and its key."""
        path = self.folder / f"client-{len([*self.folder.iterdir()])}.pem"
        path.write_text("".join(authority.issue(*names, life=timedelta(seconds=life), subject=subject)))
        return path


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"), Authority("servers"), Authority("bank"), Authority("shop"))


@asynccontextmanager
async def serving(
    pki: Pki, *names: Sequence[str], clock: Callable[[], float] = time.time, limits: Limits | None = None
) -> AsyncIterator[World]:
    """Run an ingress with a certificate for each of these groups of names."""
    files = [pki.servers.file(pki.folder, *group) for group in names or (["hooks.example"],)]
    async with running(certificates=files, clock=clock, limits=limits) as world:
        yield world


@asynccontextmanager
async def connected(world: World, client: ssl.SSLContext, name: str = "hooks.example") -> AsyncIterator[Wire]:
    wire = Wire(*await asyncio.open_connection("127.0.0.1", world.port, ssl=client, server_hostname=name))
    try:
        yield wire
    finally:
        wire.close()


async def status_of(world: World, client: ssl.SSLContext, data: bytes = GET, name: str = "hooks.example") -> int:
    async with connected(world, client, name) as wire:
        wire.send(data)
        return (await wire.reply()).status


def refusals(world: World, reason: str) -> float:
    return world.count("connections_refused_total", reason=reason)


def expiry_of(world: World, name: str) -> float | None:
    labels = {"name": f"ingress/{name}"}
    return world.registry.get_sample_value("gateway_certificate_expiry_timestamp_seconds", labels)


def demand(world: World, name: str = "open", *authorities: Authority, **names: frozenset[str]) -> None:
    """Activate rules by which a source demands a certificate; of no authority, that it doesn't."""
    rules = world.rules[0]
    ders = read_authorities("".join([each.pem for each in authorities])) if authorities else ()
    demanded = ClientCertificates(authorities=ders, **names) if authorities else None
    source = replace(rules.sources[name], client_certificate=demanded)
    activate(world, replace(rules, sources={**rules.sources, name: source}))


def activate(world: World, rules: Rules) -> None:
    world.rules[0] = rules
    assert world.tls is not None
    world.tls.trust(rules.client_authorities)


# --- Handshakes ---


async def test_events_and_health_come_over_tls(pki: Pki) -> None:
    async with serving(pki) as world, connected(world, pki.client()) as wire:
        for _ in range(2):
            wire.send(a_request("/in/crm", CRM) + GET)  # pipelined
            assert [(await wire.reply()).status for _ in range(2)] == [202, 200]
    assert [stored.value for stored in world.log.stored] == [PING, PING]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_is_1_2_or_1_3_with_authenticated_encryption(pki: Pki, version: ssl.TLSVersion) -> None:
    client = pki.client()
    client.minimum_version = client.maximum_version = version
    client.set_alpn_protocols(["h2", "http/1.1"])
    async with serving(pki) as world:
        _, writer = await asyncio.open_connection("127.0.0.1", world.port, ssl=client, server_hostname="hooks.example")
        connection = writer.get_extra_info("ssl_object")
        assert connection.selected_alpn_protocol() == "http/1.1"
        assert any(aead in connection.cipher()[0] for aead in ("GCM", "CHACHA20"))
        writer.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_client_gets_a_ticket_and_nothing_is_compressed(pki: Pki, version: ssl.TLSVersion) -> None:
    def exchange() -> tuple[bytes, bool]:
        with (
            socket.create_connection(("127.0.0.1", world.port)) as plain,
            client.wrap_socket(plain, server_hostname="hooks.example") as secured,
        ):
            secured.sendall(GET)
            status = secured.recv(1000)[9:12]  # tickets of TLS 1.3 come after the handshake
            return status, secured.session is not None and secured.session.has_ticket

    client = pki.client()
    client.minimum_version = client.maximum_version = version
    async with serving(pki) as world:
        assert await asyncio.to_thread(exchange) == (b"200", False)
        assert world.tls is not None
        # What OpenSSL may compress depends on how it was built: Python's client never asks for it.
        assert world.tls.context.options & ssl.OP_NO_COMPRESSION


async def test_a_client_that_renegotiates_is_refused(pki: Pki) -> None:
    """Python's client can't: openssl does, at a line with an R. Each costs as much as a handshake, within one."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    async with serving(pki) as world:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{world.port}", "-servername", "hooks.example"]
        process = await asyncio.create_subprocess_exec(
            *command, "-tls1_2", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdin is not None
        assert process.stdout is not None
        async with asyncio.timeout(20):
            told = await process.stdout.readuntil(b"Verify return code")
            assert b"Cipher    : ECDHE" in told
            process.stdin.write(b"R\n")
            told = await process.stdout.read()  # it ends by itself
            await process.wait()
        assert b"RENEGOTIATING" in told
        assert b"no renegotiation" in told
        assert await status_of(world, pki.client()) == 200


@pytest.mark.parametrize(
    ("ciphers", "version"),
    [
        ("ECDHE-RSA-AES128-SHA256", ssl.TLSVersion.TLSv1_2),  # CBC
        ("AES128-GCM-SHA256", ssl.TLSVersion.TLSv1_2),  # without forward secrecy
        ("ECDHE-RSA-AES128-SHA:@SECLEVEL=0", ssl.TLSVersion.TLSv1_1),
    ],
)
async def test_older_tls_and_weaker_suites_are_refused(pki: Pki, ciphers: str, version: ssl.TLSVersion) -> None:
    client = pki.client()
    file = pki.folder / "rsa.pem"
    file.write_text("".join(pki.servers.issue("hooks.example", is_rsa=True)))
    async with running(certificates=[file], clock=time.time) as world:
        client.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await status_of(world, client) == 200
        # No suite that is left is one of an older version, which would be refused for that alone.
        assert world.tls is not None
        assert world.tls.context.minimum_version == ssl.TLSVersion.TLSv1_2
        client.set_ciphers(ciphers)
        with pytest.warns() if version is ssl.TLSVersion.TLSv1_1 else nullcontext():
            client.minimum_version = client.maximum_version = version
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await status_of(world, client)
        await until(lambda: refusals(world, "tls_failed") == 1)


async def test_a_client_gets_the_certificate_of_the_name_that_it_asks_for(pki: Pki) -> None:
    names = (["hooks.example", "other.example"], ["*.shop.example"], ["pay.shop.example", "HOOKS.example"])
    async with serving(pki, *names) as world:
        for name in ("hooks.example", "Other.Example", "a.shop.example", "pay.shop.example"):
            assert await status_of(world, pki.client(), name=name) == 200
        for name in ("a.b.shop.example", "shop.example", "else.example"):  # the first one, which isn't for them
            with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
                await status_of(world, pki.client(), name=name)
        nameless = pki.client()
        nameless.check_hostname = False
        assert await status_of(world, nameless, name="") == 200, "without a name the first one"


async def test_a_name_that_is_no_name_harms_nobody(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake whose SNI isn't ASCII, made of a good one byte by byte, with two certificates to choose from."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = pki.client().wrap_bio(incoming, outgoing, server_hostname="hooks.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", without_clients_names(told.append))
    async with serving(pki, ["hooks.example"], ["b.example"]) as world:
        for bad in (b"hooks\xff\xfexample", b"hooks\x00example", b"." * 13, b"*.hooks.examp"):
            async with world.wire() as wire:
                wire.send(hello.replace(b"hooks.example", bad))
                await asyncio.wait_for(wire._reader.read(5), 5)
        assert await status_of(world, pki.client()) == 200
    assert told == [], "anybody can send such names: no line of each"


async def test_plain_http_on_the_port_of_tls_is_closed(pki: Pki) -> None:
    async with serving(pki) as world, world.wire() as wire:
        wire.send(a_request("/in/crm", CRM))
        assert await wire.is_closed()
        await until(lambda: refusals(world, "tls_failed") == 1)
        line = world.lines[-1]
        assert (line["event"], line["reason"], line["detail"]) == ("connection_refused", "tls_failed", "http request")
    assert world.log.stored == []


async def test_a_connection_that_is_closed_at_once_is_counted_and_not_logged(pki: Pki) -> None:
    """As a load balancer's checks are."""
    async with serving(pki) as world:
        async with world.wire():
            pass
        await until(lambda: refusals(world, "disconnected") == 1)
        assert world.lines == []


# --- Handshakes that don't end ---


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x02\x00\x01"])
async def test_a_handshake_that_does_not_end_closes_its_connection(pki: Pki, sent: bytes) -> None:
    async with serving(pki, limits=Limits(opening_seconds=0.2)) as world, world.wire() as wire:
        wire.send(sent)
        assert await wire.is_closed()
        await until(lambda: refusals(world, "tls_slow") == 1)


async def test_a_handshake_that_drips_ends_at_the_same_time(pki: Pki) -> None:
    async with serving(pki, limits=Limits(opening_seconds=0.3)) as world, world.wire() as wire:
        began = time.perf_counter()
        for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 5:
            wire.send(bytes([byte]))
            if refusals(world, "tls_slow"):
                break
            await asyncio.sleep(0.02)
        assert 0.25 < time.perf_counter() - began < 2


async def test_half_handshakes_take_a_bounded_share_and_keep_nobody_out(pki: Pki) -> None:
    async with serving(pki, limits=Limits(opening=8, opening_seconds=60)) as world:
        halves = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(50)]
        await until(lambda: refusals(world, "evicted") == 42)
        assert world.ingress._listener.opening == 8  # type: ignore[union-attr]
        for _ in range(3):
            assert await status_of(world, pki.client()) == 200
        evicted = 0
        for reader, writer in halves:
            try:
                evicted += await asyncio.wait_for(reader.read(1), 0.01) == b""
            except TimeoutError:
                pass
            except ConnectionResetError:
                evicted += 1
            writer.close()
        assert evicted >= 42
        assert world.count("connections_refused_total", reason="bug") == 0


async def test_many_refusals_have_few_lines(pki: Pki) -> None:
    async with serving(pki) as world:
        for _ in range(30):
            async with world.wire() as wire:
                wire.send(GET)
                assert await wire.is_closed()
        await until(lambda: refusals(world, "tls_failed") == 30)
        assert len([line for line in world.lines if line["event"] == "connection_refused"]) == 10


async def test_a_head_and_a_body_that_do_not_end_are_refused_in_tls_as_without(pki: Pki) -> None:
    limits = Limits(head_seconds=0.2, body_seconds=0.2)
    async with serving(pki, limits=limits) as world:
        for sent, reason in ((b"POST /in/open HT", "head_slow"), (a_request(length=9, body=b"x"), "body_slow")):
            async with connected(world, pki.client()) as wire:
                wire.send(sent)
                assert (await wire.reply()).status == 408
                assert reason == "body_slow" or await wire.is_closed()
            assert world.count("rejected_total", source="open" if reason == "body_slow" else "", reason=reason) == 1


async def test_a_lack_of_descriptors_is_waited_out(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [errno.EMFILE, errno.ECONNABORTED, errno.ENFILE]

    class Listening(socket.socket):
        @override
        def accept(self) -> tuple[socket.socket, Any]:
            found = super().accept()
            if failures:
                found[0].close()
                raise OSError(failures.pop(0), "too many")
            return found

    monkeypatch.setattr("gateway.ingress.listener.socket", SimpleNamespace(**{**vars(socket), "socket": Listening}))
    monkeypatch.setattr("gateway.ingress.listener.ACCEPT_PAUSE", 0.01)
    async with serving(pki) as world:
        for _ in range(3):
            with suppress(ConnectionError, ssl.SSLError):
                await status_of(world, pki.client())
        assert await status_of(world, pki.client()) == 200
        assert len([line for line in world.lines if line["event"] == "accept_failed"]) == 2


async def test_a_bug_ends_one_connection(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(pki) as world:
        assert world.tls is not None
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # asyncio tells of it as well
        with monkeypatch.context() as patch:
            patch.setattr(ServerTls, "presented", lambda *_: 1 / 0)
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await status_of(world, pki.client())
        await until(lambda: refusals(world, "bug") == 1)
        [line] = [line for line in world.lines if line["event"] == "connection_failed"]
        assert line["exception"].endswith("ZeroDivisionError")
        assert await status_of(world, pki.client()) == 200


async def test_a_bug_of_many_connections_has_few_traces(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerTls, "presented", lambda *_: 1 / 0)
    async with serving(pki) as world:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # asyncio tells of it as well
        for _ in range(15):
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await status_of(world, pki.client())
        await until(lambda: refusals(world, "bug") == 15)
        assert len([line for line in world.lines if line["event"] == "connection_failed"]) == 10


# --- Replacing certificates ---


async def test_a_new_certificate_counts_for_new_connections_and_drops_none(pki: Pki, tmp_path: Path) -> None:
    file = tmp_path / "tls.pem"
    file.write_text("".join(pki.servers.issue("old.example")))
    async with running(certificates=[file], clock=time.time) as world:
        assert world.tls is not None
        async with connected(world, pki.client(), "old.example") as wire:
            wire.send(GET)
            assert (await wire.reply()).status == 200
            file.write_text("".join(pki.servers.issue("new.example", life=timedelta(days=3))))
            await world.tls.poll()
            with pytest.raises(ssl.SSLCertVerificationError):  # not read before it is stable
                await status_of(world, pki.client(), name="new.example")
            await world.tls.poll()
            assert await status_of(world, pki.client(), name="new.example") == 200
            wire.send(a_request("/in/crm", CRM))
            assert (await wire.reply()).status == 202, "the connection is the same"
        assert [line["names"] for line in world.lines if line["event"] == "certificate_reloaded"] == [["new.example"]]
        assert expiry_of(world, "new.example") == pytest.approx(time.time() + 3 * 86400, abs=60)
        assert expiry_of(world, "old.example") is None


@pytest.mark.parametrize("broken", ["", "not a certificate", "cut", "another key", "no key"])
async def test_a_broken_certificate_leaves_the_one_of_before(pki: Pki, tmp_path: Path, broken: str) -> None:
    file = tmp_path / "tls.pem"
    certificate, key = pki.servers.issue("hooks.example")
    file.write_text(certificate + key)
    async with running(certificates=[file], clock=time.time) as world:
        assert world.tls is not None
        texts = {"cut": certificate[:300] + key, "another key": certificate + pki.servers.issue("x")[1]}
        file.write_text(texts.get(broken, certificate if broken == "no key" else broken))
        for _ in range(4):
            await world.tls.poll()
        assert await status_of(world, pki.client()) == 200
        [line] = [line for line in world.lines if line["event"] == "certificate_refused"]
        assert str(file) in line["problems"][0]
        assert world.count("certificate_refused") == 1
        refused = world.tls.status(time.time())["refused"]
        assert refused["problem"] == line["problems"][0]
        assert time.time() - refused["since"] < 60
        file.unlink()  # gone is as bad
        for _ in range(2):
            await world.tls.poll()
        assert world.tls.status(time.time())["refused"]["since"] == refused["since"]
        assert await status_of(world, pki.client()) == 200
        file.write_text("".join(pki.servers.issue("hooks.example", "again.example")))
        for _ in range(2):
            await world.tls.poll()
        assert world.count("certificate_refused") == 0
        assert world.tls.status(time.time())["refused"] is None
        assert await status_of(world, pki.client(), name="again.example") == 200


async def test_a_key_that_may_be_read_at_last_is_read(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content was there before, and only who may read it changes."""
    file = tmp_path / "tls.pem"
    async with renewed_in_vain(pki, tmp_path, monkeypatch) as (world, tls):
        assert world.count("certificate_refused") == 1
        file.chmod(0o640)
        for _ in range(2):
            await tls.poll()
        assert await status_of(world, pki.client(), name="new.example") == 200
        assert [line["event"] for line in world.lines if line["event"].startswith("certificate_")] == [
            "certificate_refused",
            "certificate_reloaded",
        ]


async def test_a_certificate_that_could_not_be_read_for_a_moment_is_read_again(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.tls.REREAD_INTERVAL", 0.0)
    async with renewed_in_vain(pki, tmp_path, monkeypatch) as (world, tls):
        await tls.poll()
        assert await status_of(world, pki.client(), name="new.example") == 200
        assert [line["event"] for line in world.lines].count("certificate_refused") == 1, "one problem, one line"


@asynccontextmanager
async def renewed_in_vain(
    pki: Pki, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[World, ServerTls]]:
    """Run an ingress that couldn't read its new certificate, and can from now on."""

    def refused(_: object) -> Any:
        raise UsageError("tls.pem: Too many open files")

    file = folder / "tls.pem"
    file.write_text("".join(pki.servers.issue("old.example")))
    async with running(certificates=[file], clock=time.time) as world:
        assert world.tls is not None
        with monkeypatch.context() as patched:
            patched.setattr("gateway.ingress.tls.read_certificates", refused)
            file.write_text("".join(pki.servers.issue("new.example")))
            for _ in range(5):
                await world.tls.poll()
        yield world, world.tls


def test_unusable_files_are_reported_without_their_content(pki: Pki, tmp_path: Path) -> None:
    certificate, key = pki.servers.issue("hooks.example")
    (tmp_path / "a.pem").write_text(certificate)
    (tmp_path / "key.pem").write_text(key)
    (tmp_path / "other.pem").write_text(pki.servers.issue("b")[1])
    (tmp_path / "locked.pem").write_text(pki.servers.issue("b", passphrase=b"secret")[1])
    [good] = read_certificates([(tmp_path / "a.pem", tmp_path / "key.pem")])
    assert (good.names, key in repr(good)) == (("hooks.example",), False)
    with pytest.raises(UsageError) as caught:
        read_certificates([(tmp_path / "a.pem", tmp_path / each) for each in ("other.pem", "locked.pem", "none.pem")])
    lines = str(caught.value).splitlines()
    assert [line.split(": ", 2)[:2] for line in lines] == [
        ["--tls-key", str(tmp_path / each)] for each in ("other.pem", "locked.pem", "none.pem")
    ]
    assert "PRIVATE" not in str(caught.value)
    with pytest.raises(UsageError, match=r"--tls-certificate: .*key\.pem: expected a certificate in PEM"):
        read_certificates([(tmp_path / "key.pem", tmp_path / "key.pem")])


def test_of_two_certificates_for_a_name_the_first_counts(pki: Pki) -> None:
    files = [pki.servers.file(pki.folder, *names) for names in (["a.example", "both.example"], ["b.example"])]
    files.append(pki.servers.file(pki.folder, "c.example", "both.example"))
    names = ServerNames(read_certificates([(file, file) for file in files]))
    assert names.context_for("both.example") is names.default
    assert names.context_for("b.example.") is not names.default


# --- Certificates of clients ---


async def test_a_source_that_demands_a_certificate_takes_requests_with_one_alone(pki: Pki) -> None:
    good, other = pki.own(pki.bank, "hooks.bank.example"), pki.own(pki.shop, "hooks.bank.example")
    async with serving(pki) as world:
        demand(world, "open", pki.bank)
        demand(world, "crm", pki.shop)
        event = a_request("/in/open")
        assert await status_of(world, pki.client(own=good), event) == 202
        assert await status_of(world, pki.client(), event) == 403
        assert await status_of(world, pki.client(own=other), event) == 403, "another source's authority isn't ours"
        assert await status_of(world, pki.client(), a_request("/in/erp?token=" + CRM.split()[1])) == 202
        assert await status_of(world, pki.client(own=good), GET) == 200
        assert await status_of(world, pki.client()) == 200
        # Beside a signature, both count.
        assert await status_of(world, pki.client(own=other), a_request("/in/crm", CRM)) == 202
        assert await status_of(world, pki.client(own=other), a_request("/in/crm")) == 401
        assert await status_of(world, pki.client(own=good), a_request("/in/crm", CRM)) == 403
        assert world.count("rejected_total", source="open", reason="client_certificate_missing") == 1
        assert world.count("rejected_total", source="open", reason="client_certificate_refused") == 1


async def test_a_certificate_of_no_authority_is_refused_in_the_handshake(pki: Pki) -> None:
    stranger, expired = pki.own(Authority("bank"), "a.example"), pki.own(pki.bank, "a.example", life=-60)
    async with serving(pki) as world:
        demand(world, "open", pki.bank)
        for own in (stranger, expired):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await status_of(world, pki.client(own=own))
        await until(lambda: refusals(world, "client_certificate_refused") == 2)
        assert world.lines[-1]["detail"] == "certificate has expired"


@pytest.mark.parametrize(
    ("names", "is_accepted"),
    [
        ({}, True),
        ({"subjects": {"CN=hooks,O=Bank,C=DE"}}, True),
        ({"subjects": {"CN=hooks,O=Bank", "C=DE,O=Bank,CN=hooks"}}, False),
        ({"dns": {"hooks.bank.example"}}, True),
        ({"dns": {"bank.example", "x.hooks.bank.example", "hooks"}}, False),
        ({"uris": {"spiffe://bank/hooks"}}, True),
        ({"uris": {"spiffe://bank/hook", "SPIFFE://bank/hooks"}}, False),
        ({"emails": {"Hooks@bank.example"}}, True),
        ({"emails": {"hooks@bank.example"}}, False),
        (
            {"dns": {"spiffe://bank/hooks"}, "uris": {"hooks.bank.example"}, "subjects": {"CN=hooks.bank.example"}},
            False,
        ),
        ({"subjects": {"CN=other"}, "dns": {"hooks.bank.example"}}, True),
    ],
)
async def test_one_of_the_names_is_enough_and_each_is_of_its_kind(
    pki: Pki, names: dict[str, set[str]], *, is_accepted: bool
) -> None:
    subject = "CN=hooks,O=Bank,C=DE"
    alternatives = ("Hooks.Bank.example", "spiffe://bank/hooks", "Hooks@BANK.example")
    own = pki.own(pki.bank, *alternatives, subject=subject)
    async with serving(pki) as world:
        demand(world, "open", pki.bank, **{key: frozenset(values) for key, values in names.items()})
        assert await status_of(world, pki.client(own=own), a_request("/in/open")) == (202 if is_accepted else 403)
        line = world.lines[-1]
        assert line.get("certificate") == (None if is_accepted else subject)


async def test_nothing_of_a_request_without_its_certificate_is_looked_at(pki: Pki) -> None:
    async with serving(pki) as world:
        for name in ("open", "graph", "cloud"):
            demand(world, name, pki.bank)
        async with connected(world, pki.client()) as wire:
            wire.send(a_request("/in/open", "Expect: 100-continue", length=5_000, body=b""))
            assert (await wire.reply()).status == 403, "not 100: nobody has asked for the body"
        async with connected(world, pki.client()) as wire:
            wire.send(a_request("/in/open"))
            assert (await wire.reply()).headers["connection"] == "close"
            assert await wire.is_closed(), "so that the next connection is asked for a certificate"
        client = pki.client()
        assert await status_of(world, client, a_request("/in/graph?validationToken=a", body=b"")) == 403
        asked = a_request("/in/cloud", "WebHook-Request-Origin: b.example", method="OPTIONS", body=b"")
        assert await status_of(world, client, asked) == 403


async def test_a_reload_of_the_rules_counts_at_once_on_open_connections(pki: Pki) -> None:
    own = pki.own(pki.bank, "hooks.bank.example")
    event = a_request("/in/open")
    async with serving(pki) as world:
        async with connected(world, pki.client(own=own)) as wire:
            wire.send(event)
            assert (await wire.reply()).status == 202
            demand(world, "open", pki.bank)  # this connection wasn't asked for a certificate
            wire.send(event)
            assert (await wire.reply()).status == 403
            assert await wire.is_closed()
        async with connected(world, pki.client(own=own)) as wire:
            wire.send(event)
            assert (await wire.reply()).status == 202
            demand(world, "open", pki.bank, dns=frozenset({"other.example"}))
            wire.send(event)
            assert (await wire.reply()).status == 403
        async with connected(world, pki.client(own=own)) as wire:
            demand(world, "open", pki.shop)  # whose the certificate isn't
            wire.send(event)
            assert (await wire.reply()).status == 403
        demand(world, "open")
        assert await status_of(world, pki.client(own=own), event) == 202


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_an_authority_under_another_ones_takes_no_sender_from_it(pki: Pki, version: ssl.TLSVersion) -> None:
    """OpenSSL ends a chain at the first authority of any source: then the one above it isn't in it."""
    root = Authority("group")
    below, other = Authority("subsidiary", issuer=root), Authority("other")
    certificate, key = below.issue("hooks.sub.example")
    path = pki.folder / f"below-{version.name}.pem"
    path.write_text(certificate + below.pem + key)
    client = pki.client(own=path, least=version)
    async with serving(pki) as world:
        demand(world, "open", root)
        assert await status_of(world, client, a_request("/in/open")) == 202
        demand(world, "crm", below)
        assert await status_of(world, client, a_request("/in/open")) == 202
        assert await status_of(world, client, a_request("/in/crm", CRM)) == 202
        demand(world, "open", other)
        assert await status_of(world, client, a_request("/in/open")) == 403


@pytest.mark.parametrize("has_both", [False, True])
async def test_an_authority_that_ends_while_a_connection_is_open_counts_no_longer(pki: Pki, *, has_both: bool) -> None:
    root = Authority("group")
    below = Authority("subsidiary", issuer=root, life=timedelta(hours=1))
    certificate, key = below.issue("hooks.sub.example", life=timedelta(days=30))
    path = pki.folder / f"ending-{has_both}.pem"
    path.write_text(certificate + below.pem + key)
    ahead = 0.0
    async with serving(pki, clock=lambda: time.time() + ahead) as world:
        demand(world, "open", root)
        if has_both:
            demand(world, "crm", below)
        async with connected(world, pki.client(own=path)) as wire:
            wire.send(a_request("/in/open"))
            assert (await wire.reply()).status == 202
            ahead = 7200.0
            wire.send(a_request("/in/open"))
            assert (await wire.reply()).status == 403


async def test_a_certificate_that_ends_while_its_connection_is_open_counts_no_longer(pki: Pki) -> None:
    own = pki.own(pki.bank, "hooks.bank.example", life=3600)
    ahead = [0.0]
    async with serving(pki, clock=lambda: time.time() + ahead[0]) as world:
        demand(world, "open", pki.bank)
        async with connected(world, pki.client(own=own)) as wire:
            for ahead[0], status in ((3000.0, 202), (3601.0, 403)):
                wire.send(a_request("/in/open"))
                assert (await wire.reply()).status == status


async def test_a_session_that_is_resumed_is_its_clients(pki: Pki) -> None:
    """OpenSSL resumes those of TLS 1.2 from its memory, without the chain; of TLS 1.3 it resumes none here."""
    good, other = pki.own(pki.bank, "a.example"), pki.own(pki.shop, "a.example")
    below = Authority("below", issuer=pki.bank)
    certificate, key = below.issue("a.example")
    indirect = pki.folder / "indirect.pem"
    indirect.write_text(certificate + below.pem + key)

    def exchange(
        client: ssl.SSLContext, session: ssl.SSLSession | None
    ) -> tuple[bytes, bool | None, ssl.SSLSession | None]:
        with (
            socket.create_connection(("127.0.0.1", world.port)) as plain,
            client.wrap_socket(plain, server_hostname="hooks.example", session=session) as secured,
        ):
            secured.sendall(a_request("/in/open"))
            status, is_resumed, new = secured.recv(1000)[9:12], secured.session_reused, secured.session
            secured.unwrap()  # a connection that breaks off ends its session
            return status, is_resumed, new

    async with serving(pki) as world:
        demand(world, "open", pki.bank)
        demand(world, "crm", pki.shop)
        for own, status in ((good, b"202"), (indirect, b"202"), (other, b"403"), (None, b"403")):
            client = pki.client(own=own)
            client.maximum_version = ssl.TLSVersion.TLSv1_2
            found, is_resumed, session = await asyncio.to_thread(exchange, client, None)
            assert (found, is_resumed) == (status, False)
            found, is_resumed, _ = await asyncio.to_thread(exchange, client, session)
            assert (found, is_resumed) == (status, True)
        client = pki.client(own=good)
        _, _, session = await asyncio.to_thread(exchange, client, None)
        assert (await asyncio.to_thread(exchange, client, session))[:2] == (b"202", False)


# --- The end ---


async def test_a_drain_resets_no_connection(pki: Pki) -> None:
    async with serving(pki) as world, connected(world, pki.client()) as idle, connected(world, pki.client()) as busy:
        world.log.may_append.clear()
        busy.send(a_request("/in/crm", CRM))
        await until(lambda: world.log.waiting == 1)
        _, late = await asyncio.open_connection("127.0.0.1", world.port)  # its handshake begins during the drain
        await until(lambda: world.ingress._listener.opening == 1)  # type: ignore[union-attr]
        stopping = asyncio.create_task(world.ingress.stop(timeout=2))
        await asyncio.sleep(KEEPALIVE_GRACE / 10)
        idle.send(a_request("/in/erp?token=" + CRM.split()[1]))
        await until(lambda: world.log.waiting == 2)
        world.log.may_append.set()
        for wire in (busy, idle):
            reply = await wire.reply()
            assert (reply.status, reply.headers["connection"]) == (202, "close")
            assert await wire.is_closed()
        late.close()
        await stopping
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", world.port)


async def test_processes_share_a_port(pki: Pki) -> None:
    async with serving(pki) as world, asyncio.TaskGroup() as tasks:
        web, wire = world.ingress._web, ConnectionSetup(tls=world.tls, tasks=tasks)
        assert web is not None
        other = Listener(web, wire, logger=structlog.get_logger())
        assert await other.start("127.0.0.1", world.port, is_shared=True, backlog=10) == ("127.0.0.1", world.port)
        for _ in range(20):  # the kernel chooses one for each
            assert await status_of(world, pki.client()) == 200
        other.close()
        with pytest.raises(OSError, match="in use"):
            await other.start("127.0.0.1", world.port, is_shared=False, backlog=10)


# --- Other clients, and the other event loop ---


def _run(*arguments: str, stdin: str = "") -> tuple[int, str]:
    found = subprocess.run(arguments, input=stdin, capture_output=True, text=True, timeout=20, check=False)
    return found.returncode, found.stdout + found.stderr


@pytest.mark.parametrize("loop", [asyncio, uvloop])
def test_curl_and_openssl_are_served_on_both_event_loops(pki: Pki, loop: object) -> None:
    if shutil.which("curl") is None or shutil.which("openssl") is None:
        pytest.skip("needs curl and openssl")
    own = pki.own(pki.bank, "hooks.bank.example")
    ca = pki.folder / "ca.pem"
    ca.write_text(pki.servers.pem)

    async def main() -> None:
        async with serving(pki, ["hooks.example"], ["b.example"], limits=Limits(opening=4)) as world:
            demand(world, "open", pki.bank)
            curl = ["curl", "-sS", "--cacert", str(ca), "-o", "/dev/null", "-w", "%{http_code}", "--noproxy", "*"]
            to = ["--connect-to", f"::127.0.0.1:{world.port}"]

            async def curled(host: str, path: str, *more: str) -> tuple[int, str]:
                return await asyncio.to_thread(_run, *curl, *to, *more, f"https://{host}{path}")

            assert await curled("hooks.example", "/healthz") == (0, "200")
            assert await curled("b.example", "/healthz", "--http2") == (0, "200")
            assert await curled("b.example", "/in/open", "-d", "{}", "--cert", str(own)) == (0, "202")
            assert await curled("b.example", "/in/open", "-d", "{}") == (0, "403")
            assert await curled("b.example", "/in/crm", "-H", CRM, "-d", "{}") == (0, "202")
            large = ("-d", '{"text":"%s"}' % ("x" * 10_000), "-H", "Expect: 100-continue", "--expect100-timeout", "60")
            assert await curled("hooks.example", "/in/crm", "-H", CRM, *large) == (0, "202")
            assert (await curled("c.example", "/healthz"))[0] == 60, "a certificate for another name"
            halves = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(20)]
            await until(lambda: refusals(world, "evicted") == 16)
            assert await curled("hooks.example", "/healthz") == (0, "200")
            for _, writer in halves:
                writer.close()
            address = ["-connect", f"127.0.0.1:{world.port}", "-servername", "b.example", "-CAfile", str(ca), "-brief"]
            _, told = await asyncio.to_thread(_run, "openssl", "s_client", *address, stdin=GET.decode())
            assert "CN = b.example" in told or "CN=b.example" in told
            assert "Verification: OK" in told
            _, told = await asyncio.to_thread(_run, "openssl", "s_client", *address, "-tls1_1")
            assert "Verification" not in told
            assert world.count("connections_refused_total", reason="bug") == 0

    runner = loop.run  # type: ignore[attr-defined]
    runner(main())
