"""How `gateway explain` shows a source: as JSON fields for scripts, as text for people."""

from collections.abc import Sequence
from math import inf, isinf

from gateway.ops.output import Output, count, rfc3339, when
from gateway.ops.verification import Verification
from gateway.rules.event_builder import FALLBACK_TYPE, IDEMPOTENCY_KEY, EventBuilder
from gateway.rules.rules import Source
from gateway.rules.value_kinds import shown_duration
from gateway.verify.check import SigningSpec


def source_fields(source: Source, verification: Verification, routes: Sequence[str]) -> dict[str, object]:
    origins = EventBuilder(source).expression_texts()
    return {
        "source": source.name,
        "path": source.shown_path,
        "verify": {
            "scheme": verification.scheme,
            "signing_methods": [_signing_method_fields(method) for method in verification.signing_methods],
            "secrets": list(verification.secrets),
            "public_keys": list(verification.public_keys),
            "expiries": [
                {"key": lifetime.key, "position": lifetime.position + 1, "until": rfc3339(lifetime.until)}
                for lifetime in verification.lifetimes
                if not isinf(lifetime.until)
            ],
            "defined_at": verification.location,
        },
        "identity": {"from": [*origins["id"], IDEMPOTENCY_KEY], "dedupe_seconds": source.dedupe},
        "type": origins["type"],
        "key": origins["key"],
        **({} if source.allow_from is None else {"allow_from": list(map(str, source.allow_from))}),
        **({"client_certificate": certificate} if (certificate := _certificate_fields(source)) else {}),
        **({"limits": limits} if (limits := _limit_fields(source)) else {}),
        "routes": list(routes),
    }


def print_source(output: Output, source: Source, verification: Verification, routes: Sequence[str]) -> None:
    """Print how a source's events are verified and identified, and which routes they may match."""
    origins = EventBuilder(source).expression_texts()
    output.print(("source ", "bold"), f"{source.name}  path {source.shown_path}")
    output.print(("verify ", "bold"), f"{verification.scheme}  {verification.location}")
    for method in verification.signing_methods:
        is_certificate = source.verifier.is_open and source.client_certificate is not None
        output.print("  nothing but the client's certificate" if is_certificate else f"  {_signing_text(method)}")
    for what, listed in (("secret", verification.secrets), ("public key", verification.public_keys)):
        if listed:
            expiries = {
                lifetime.position: lifetime.until
                for lifetime in verification.lifetimes
                if lifetime.shown.startswith(what)
            }
            told = ", ".join([f"{each}{_until(expiries.get(index, inf))}" for index, each in enumerate(listed)])
            which = ", any of which is accepted" if len(listed) > 1 else ""
            output.print(f"  {count(len(listed), what)}{which}: {told}")
    identified_by = ", else ".join([*origins["id"], IDEMPOTENCY_KEY])
    output.print(("identity ", "bold"), dedupe_text(identified_by, source.dedupe))
    output.print(("type ", "bold"), ", else ".join([*origins["type"], f"the word {FALLBACK_TYPE}"]))
    output.print(("key ", "bold"), *(origins["key"] or ["none"]))
    if source.allow_from is not None:
        output.print(("allow_from ", "bold"), ", ".join(map(str, source.allow_from)))
    if source.client_certificate is not None:
        names = [f"{key} {', '.join(values)}" for key, values in _certificate_fields(source).items() if values]
        output.print(("client_certificate ", "bold"), ", or ".join(names) or "any of its authorities")
    if limits := _limits_text(source):
        output.print(("limits ", "bold"), limits)
    output.print(("routes ", "bold"), ", ".join(routes) or "none: its events are acknowledged and delivered nowhere")


def _until(end: float) -> str:
    return "" if isinf(end) else f" until {when(end)}"


def _certificate_fields(source: Source) -> dict[str, list[str]]:
    demanded = source.client_certificate
    if demanded is None:
        return {}
    named = {"subjects": demanded.subjects, "dns": demanded.dns, "uris": demanded.uris, "emails": demanded.emails}
    return {key: sorted(values) for key, values in named.items()}


def _limit_fields(source: Source) -> dict[str, object]:
    limits = source.limits
    named = {"body_bytes": limits.body, "rate_per_second": limits.rate, "concurrent": limits.concurrent}
    return {name: value for name, value in named.items() if value is not None}


def _limits_text(source: Source) -> str:
    limits = source.limits
    parts = [
        *([] if limits.body is None else [f"bodies of at most {limits.body:,} bytes"]),
        *([] if limits.rate is None else [f"{limits.rate:.4g} verified requests a second, over all processes"]),
        *([] if limits.concurrent is None else [f"{limits.concurrent} of them in progress in each process"]),
    ]
    return ", ".join(parts)


def _signing_method_fields(method: SigningSpec) -> dict[str, object]:
    fields = method._asdict()
    return {"signature": fields.pop("proof"), **fields}


def _signing_text(method: SigningSpec) -> str:
    parts = [method.proof]
    if method.tolerance is not None:
        limit = "at any time" if isinf(method.tolerance) else f"at most {shown_duration(method.tolerance)} from now"
        parts.append(f"its timestamp (in {method.timestamp_header}) {limit}")
    if method.id_header is not None:
        parts.append(f"id_header {method.id_header}")
    return "; ".join(parts)


def dedupe_text(identified_by: str, dedupe: float | None) -> str:
    if dedupe is None:
        return f"{identified_by}; dedupe is off: duplicates are delivered"
    window = shown_duration(dedupe)
    return f"{identified_by}; dedupe {window}: the same identity with the same content isn't delivered again within it"
