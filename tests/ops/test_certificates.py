"""What `gateway status` says of the ingress's certificates."""

from typing import Any

from gateway.engine.control.state import Control
from gateway.ops.findings import REFUSED, Finding
from gateway.ops.process_status import process_findings

DAY = 86400.0


def findings(**certificates: Any) -> list[Finding]:
    return process_findings({"certificates": {"refused": None, "expiries": [], **certificates}}, "a:9090", Control())


def test_new_files_that_are_refused_are_reported() -> None:
    [found] = findings(refused={"since": 100.0, "problem": "--tls-key: a.pem: expected a file, got: none"})
    assert (found.rank, found.what, found.since, found.by) == (REFUSED, "certificate", 100.0, "a:9090")
    told = "the new files are refused: --tls-key: a.pem: expected a file, got: none; the previous certificate is still"
    assert found.why == f"{told} in use"
    assert found.needs_attention


def test_a_certificate_is_reported_two_weeks_before_it_ends() -> None:
    def expiring(left: float) -> list[Finding]:
        return findings(expiries=[{"name": "hooks.example", "until": 5000.0, "left": left}])

    assert expiring(14 * DAY) == []
    [soon] = expiring(14 * DAY - 1)
    assert (soon.what, soon.why) == ("certificate hooks.example", "the ingress's certificate expires in 13 days")
    [over] = expiring(-3600.0)
    assert (over.why, over.until) == ("the ingress's certificate expired 1 hour ago: senders refuse it", 5000.0)


def test_a_process_without_tls_or_of_an_older_version_has_nothing_to_report() -> None:
    assert process_findings({"certificates": None}, "a:9090", Control()) == []
    assert process_findings({}, "a:9090", Control()) == []
