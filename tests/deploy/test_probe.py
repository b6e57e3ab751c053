"""What health checks run: it tells a gateway that is well from one that isn't, and from none."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from typing_extensions import override

from gateway.ops import probe
from tests.gateway_process import free_ports


@contextmanager
def an_admin_address(*, status: int = 200, host: str = "127.0.0.1") -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(f"you asked {self.path}".encode())

        @override
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("arguments", "path"), [([], "/livez"), (["/livez"], "/livez"), (["/readyz"], "/readyz")])
def test_it_asks_the_admin_address(arguments: list[str], path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with an_admin_address() as admin:
        assert probe.main(arguments, {"GATEWAY_ADMIN": admin}) == 0
    assert capsys.readouterr().out == f"200 you asked {path}\n"


def test_an_address_of_every_interface_is_this_machine() -> None:
    with an_admin_address(host="0.0.0.0") as admin:
        assert probe.main([], {"GATEWAY_ADMIN": admin}) == 0


def test_an_unready_gateway_is_reported_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with an_admin_address(status=503) as admin:
        assert probe.main(["/readyz"], {"GATEWAY_ADMIN": admin}) == 1
    assert capsys.readouterr().out == "503 you asked /readyz\n"


def test_where_nobody_answers_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    [port] = free_ports(1)
    assert probe.main([], {"GATEWAY_ADMIN": f"127.0.0.1:{port}"}) == 1
    assert f"http://127.0.0.1:{port}/livez: expected a response, got " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "admin", "told"),
    [
        (["/metrics"], "", "expected /livez or /readyz or /handshakes, got '/metrics'"),
        (["/livez", "/readyz"], "", "expected /livez or /readyz or /handshakes, got '/livez /readyz'"),
        ([], "nowhere", "GATEWAY_ADMIN: expected host:port, got 'nowhere'"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], admin: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(arguments, {"GATEWAY_ADMIN": admin}) == 2
    assert capsys.readouterr().err == f"{told}\n"


def test_it_is_a_command_that_loads_little() -> None:
    """It runs every ten seconds: none of what the gateway itself needs is loaded."""
    script = "import sys; import gateway.ops.probe; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert not {"aiohttp", "aiokafka", "asyncio", "cryptography", "rich", "yaml"} & set(output.stdout.split())
