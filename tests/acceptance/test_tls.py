"""A process whose TLS is terminated at its ingress, under load: certificates and rules change, and it stops."""

import asyncio
import json
import os
import ssl
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.ingress.proxy_protocol import MAGIC
from gateway.ingress.server import Limits
from gateway.telemetry.log_quota import PER_KIND
from tests.certificates import Authority
from tests.gateway_process import ROOT, GatewayProcess

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = """
version: 1
sources:
  shop: {verify: {scheme: none}, allow_from: [192.0.2.0/24]}
  bank: {verify: {scheme: none}, client_certificate: {ca: "${file:CA}", dns: [hooks.bank.example]}}
"""
CLIENT = MAGIC + b"\x21\x11\x00\x0c" + bytes([192, 0, 2, 7]) + bytes(4) + b"\xc0\x00\x01\xbb"


@dataclass
class Sender:
    """Sends one event after the other over TLS, on as few connections as it can."""

    port: int
    client: ssl.SSLContext
    path: str
    statuses: list[int] = field(default_factory=list)
    connections: int = 0
    unanswered: int = 0
    """Requests on connections that were open, without a response."""

    async def run(self) -> None:
        """Send until nobody listens any more."""
        while True:
            try:
                reader, writer = await self._connect()
            except OSError:
                return
            self.connections += 1
            try:
                while await self._exchange(reader, writer):
                    pass
            except (OSError, asyncio.IncompleteReadError):
                self.unanswered += 1
            writer.close()

    async def once(self) -> int:
        reader, writer = await self._connect()
        await self._exchange(reader, writer)
        writer.close()
        return self.statuses[-1]

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(CLIENT)
        await writer.drain()
        await writer.start_tls(self.client, server_hostname="hooks.example")
        return reader, writer

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = f"POST /in/{self.path} HTTP/1.1\r\nHost: hooks.example\r\nContent-Length: 2\r\n\r\n"
        writer.write(head.encode() + b"{}")
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        self.statuses.append(int(answer.split()[1]))
        return b"connection: close" not in answer


async def test_nothing_is_lost_while_certificates_and_rules_change_and_the_process_stops(tmp_path: Path) -> None:
    servers, clients = Authority("servers"), Authority("clients")
    certificate, ca, own = tmp_path / "tls.pem", tmp_path / "ca.pem", tmp_path / "own.pem"
    certificate.write_text("".join(servers.issue("hooks.example", life=timedelta(days=90))))
    ca.write_text(clients.pem)
    own.write_text("".join(clients.issue("hooks.bank.example")))
    environ = {"GATEWAY_TLS_CERTIFICATE": str(certificate), "GATEWAY_PROXY_PROTOCOL": "127.0.0.0/8"}
    anybody, known = ssl.create_default_context(cadata=servers.pem), ssl.create_default_context(cadata=servers.pem)
    known.load_cert_chain(own)
    rules = RULES.replace("CA", str(ca))
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    async with GatewayProcess(tmp_path, rules=rules, log=log, environ=environ) as gateway:
        assert (await gateway.line("listening"))["ingress"] == f"https://127.0.0.1:{gateway.port}"
        senders = [Sender(gateway.port, each, path) for each, path in ((anybody, "shop"), (known, "bank")) * 3]
        stranger = Sender(gateway.port, anybody, "bank")
        assert await stranger.once() == 403
        async with asyncio.TaskGroup() as tasks:
            for sender in senders:
                tasks.create_task(sender.run())
            await asyncio.sleep(0.5)
            assert await _findings(gateway, log) == []
            certificate.write_text("broken")
            await gateway.line("certificate_refused")
            [found] = await _findings(gateway, log)
            assert found["why"].startswith(f"the new files are refused: --tls-certificate: {certificate}: expected a")
            assert (await gateway.metrics()).sum("gateway_certificate_refused") == 1
            certificate.write_text("".join(servers.issue("new.example", "hooks.example", life=timedelta(days=13))))
            await gateway.line("certificate_reloaded")
            [found] = await _findings(gateway, log)
            assert found["what"] == "certificate new.example"
            assert await Sender(gateway.port, anybody, "shop").once() == 202
            gateway.rules.write_text(rules.split("  bank:")[0] + "  bank: {verify: {scheme: none}}\n")
            await gateway.line("rules_reloaded")
            assert await stranger.once() == 202
            await asyncio.sleep(0.5)
            assert await gateway.stop() == 0, gateway.story()
        for sender in senders:
            assert (sender.unanswered, set(sender.statuses)) == (0, {202})
            assert sender.connections <= 2, "one, and one after the `Connection: close` of the drain"
        assert gateway.lines("connection_failed") == []


async def test_handshakes_that_are_held_open_refuse_nobody(tmp_path: Path) -> None:
    servers, certificate = Authority("servers"), tmp_path / "tls.pem"
    certificate.write_text("".join(servers.issue("hooks.example", life=timedelta(days=90))))
    environ = {"GATEWAY_TLS_CERTIFICATE": str(certificate), "GATEWAY_PROXY_PROTOCOL": "127.0.0.0/8"}
    log = f"sqlite:///{tmp_path / 'gateway.db'}"
    rules = RULES.split("  bank:", maxsplit=1)[0]
    async with GatewayProcess(tmp_path, rules=rules, log=log, environ=environ) as gateway:
        sender = Sender(gateway.port, ssl.create_default_context(cadata=servers.pem), "shop")
        held = []
        for number in range(Limits().opening + 100):
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(CLIENT + b"\x16\x03\x01\x02\x00\x01")
            held.append(writer)
            if number % 20 == 0:
                assert await sender.once() == 202
        for _ in range(20):
            assert await sender.once() == 202
        for writer in held:
            writer.close()
        refused = (await gateway.metrics()).sum
        assert refused("gateway_connections_refused_total", reason="evicted") >= 100
        assert refused("gateway_connections_refused_total", reason="bug") == 0
        assert len(gateway.lines("connection_refused")) <= 3 * PER_KIND


async def _findings(gateway: GatewayProcess, log: str) -> list[dict[str, Any]]:
    """Return what `gateway status` says of certificates."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "status", "--json", f"--log={log}"),
        *(f"--rules={gateway.rules}", f"--admin=127.0.0.1:{gateway.admin_port}"),
        stdout=asyncio.subprocess.PIPE,
        env=dict(os.environ),
        cwd=ROOT,
    )
    out, _ = await process.communicate()
    return [line for line in map(json.loads, out.splitlines()) if str(line.get("what", "")).startswith("certificate")]
