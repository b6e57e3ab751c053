"""The unit for one machine: systemd understands all of it, and it fits what the gateway does."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
from prometheus_client import ProcessCollector

from gateway.client.egress import NAMED_ONLY
from gateway.commands import COMMANDS
from gateway.run import STOP_TIMEOUT
from gateway.settings import EmbeddedTarget, Role, from_sources, refuse_useless_spool

pytestmark = pytest.mark.timeout(900)  # Where CI has to fetch systemd first.

UNIT = Path(__file__).parent.parent.parent / "deploy" / "systemd" / "gateway.service"
INSTALLED = "/opt/gateway/bin/gateway"
EXPOSURE = 15
"""Tenths of what `systemd-analyze security` finds exposed: 0 is nothing, 96 a service without any restriction."""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """Return the unit as it is here, where the gateway isn't installed."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(INSTALLED, sys.executable))
    return copy


def test_systemd_understands_all_of_it(tool: Callable[[str], Path], unit: Path) -> None:
    assert _verified(tool, unit) == (0, "")


def test_systemd_reports_an_unknown_setting(tool: Callable[[str], Path], unit: Path) -> None:
    """What the test above stands on."""
    unit.write_text(unit.read_text().replace("ProtectSystem=", "ProtectSystems="))
    assert "ProtectSystems" in _verified(tool, unit)[1]


def test_little_is_left_that_it_may_do(tool: Callable[[str], Path], unit: Path) -> None:
    command = (tool("systemd-analyze"), "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", unit)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_it_can_measure_itself(tmp_path: Path) -> None:
    """The client library tells nothing of a process where it can't read when the machine was started."""
    (tmp_path / "self").symlink_to("/proc/self")  # all that ProcSubset=pid leaves
    assert list(ProcessCollector(registry=None).collect())
    assert not list(ProcessCollector(proc=str(tmp_path), registry=None).collect())
    assert dict(_settings()).get("ProcSubset", "all") == "all"


def test_the_gateway_accepts_its_command_line() -> None:
    settings = dict(_settings())
    words = shlex.split(settings["ExecStart"])
    assert words[0] == INSTALLED
    COMMANDS[words[1]].parser().parse_args(words[2:])
    environ = dict(value.split("=", 1) for name, value in _settings() if name == "Environment")
    found = from_sources({}, environ)
    assert found.role is Role.ALL
    assert isinstance(found.log, EmbeddedTarget)
    # It may write there alone: ProtectSystem=strict.
    assert found.log.path.parent == Path("/var/lib", settings["StateDirectory"])
    assert found.admin.host == "127.0.0.1"


def test_the_spool_that_it_names_is_where_it_may_write_and_stays() -> None:
    settings = dict(_settings())
    [line] = re.findall(r"^#   Environment=(.*GATEWAY_SPOOL.*)$", UNIT.read_text(), re.MULTILINE)
    environ = dict(value.split("=", 1) for name, value in _settings() if name == "Environment")
    found = from_sources({}, environ | dict(word.split("=", 1) for word in line.split()))
    refuse_useless_spool(found)
    assert found.spool.file is not None
    assert found.spool.file.parent == Path("/var/lib", settings["StateDirectory"])


def test_it_has_time_to_drain_and_restarts_except_after_a_usage_error() -> None:
    settings = dict(_settings())
    assert int(settings["TimeoutStopSec"]) > STOP_TIMEOUT
    assert settings["KillSignal"] == "SIGTERM"
    assert settings["Restart"] == "always"
    assert settings["RestartPreventExitStatus"] == "2"


def test_the_system_refuses_the_addresses_that_the_gateway_refuses() -> None:
    denied = [ip_network(text) for name, value in _settings() if name == "IPAddressDeny" for text in value.split()]
    assert set(denied) == {network for _, networks in NAMED_ONLY for network in networks}
    assert len(denied) == len(set(denied))


def test_secrets_come_as_credentials() -> None:
    text = UNIT.read_text()
    [mentioned] = re.findall(r"\$\{file:/run/credentials/([^/]+)/([^}]+)\}", text)
    assert mentioned[0] == UNIT.name
    assert f"LoadCredential={mentioned[1]}:" in text


def _verified(tool: Callable[[str], Path], unit: Path) -> tuple[int, str]:
    command = (tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", unit)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def _settings() -> Iterator[tuple[str, str]]:
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield name, value
