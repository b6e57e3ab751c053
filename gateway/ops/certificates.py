"""The ingress's own certificates, and those of clients: what `gateway check` and `gateway status` say of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.engine.control.state import Control
from gateway.model import UsageError
from gateway.ops.findings import REFUSED, Finding
from gateway.ops.output import rfc3339
from gateway.ops.secret_expiry import shown_time
from gateway.rules.rules import Rules
from gateway.rules.server_certificates import read_certificates
from gateway.verify.key_ring import EXPIRY_WARNING


def undemanded_certificates(rules: Rules, *, has_tls: bool) -> Iterator[str]:
    """Yield which sources demand a certificate that no client can present."""
    if has_tls or (rules.trusted_proxies and rules.certificate_header is not None):
        return
    for name, source in rules.sources.items():
        if source.client_certificate is not None:
            yield (
                f"sources.{name}.client_certificate: expected TLS to be terminated here (--tls-certificate) or at a "
                "proxy (`ingress` with trusted_proxies and certificate_header), got neither: every request is refused"
            )


def certificate_problems(files: Sequence[tuple[Path, Path]], now: float) -> tuple[Sequence[str], Sequence[str]]:
    """Return what is wrong with the ingress's certificate files, and what will be soon. Blocks for a while."""
    try:
        certificates = read_certificates(files)
    except UsageError as error:
        return str(error).splitlines(), ()
    return (), [
        f"--tls-certificate: {each.file}: expected a certificate that is valid for {shown_time(EXPIRY_WARNING)}, got "
        + (f"one until {rfc3339(each.until)}" if each.until > now else f"one that expired {rfc3339(each.until)}")
        for each in certificates
        if each.until - now < EXPIRY_WARNING
    ]


def certificate_findings(certificates: Mapping[str, Any], where: str, _: Control) -> Iterable[Finding]:
    """Yield that a process refuses new certificate files, and which of its certificates expire soon."""
    refusal = certificates["refused"]
    if refusal is not None:
        yield Finding(
            rank=REFUSED,
            what="certificate",
            why=f"the new files are refused: {refusal['problem']}; the previous certificate is still in use",
            since=refusal["since"],
            by=where,
            next=("# correct the files; they are read again as soon as they change",),
        )
    for each in certificates.get("expiries", ()):  # absent from a version that named it otherwise
        left = each["left"]
        if left >= EXPIRY_WARNING:
            continue
        when = f"expires in {shown_time(left)}" if left > 0 else f"expired {shown_time(-left)} ago: senders refuse it"
        yield Finding(
            rank=REFUSED,
            what=f"certificate {each['name']}",
            why=f"the ingress's certificate {when}",
            until=each["until"],
            by=where,
            next=("# renew it, and replace its files: they are read as soon as they change",),
        )
