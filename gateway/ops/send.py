"""`gateway send`: events as their provider would send them, signed with the secrets in the rules; and `/status`."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson
from yarl import URL

from gateway.model import UsageError
from gateway.ops.verification import resolved_source, written_source
from gateway.rules.rules import Source
from gateway.rules.yaml_document import Node, Problem
from gateway.verify.algorithms import OfSenderAloneError
from gateway.verify.public_keys import PublicKeys, with_private_key
from gateway.verify.schemes import build_verifier
from gateway.verify.signatures import SignatureCheck
from gateway.verify.verifier import Verifier

TIMEOUT = 30.0
"""Seconds to wait for a response: longer than the gateway takes to refuse an event that it can't store."""
STATUS_TIMEOUT = 10.0
"""Seconds within which even a busy process returns its status."""
STATUS_KEYS = ("version", "rules")
"""What the status of every process has, whatever its version and role."""
MAX_ANSWER = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A signed request, ready to be sent."""

    url: URL
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The gateway's response. `event_id` is None if it accepted no event; `detail` then says why."""

    status: int
    event_id: str | None
    seconds: float
    detail: str


def source_of(rules: Path, name: str, *, secret: str | None) -> tuple[Source, Verifier]:
    """Return a source, and a verifier that signs its events: with the secrets in the rules, or the given one.

    Raises RulesError, and UsageError for an unknown source, or one whose secrets can't be resolved.
    """
    found, source, problems = resolved_source(rules, name)
    if secret is not None:
        return source, _with_secret(found.files, source, secret)
    missing = [problem for problem in problems if _is_needed(problem, name)]
    if missing:
        raise UsageError("\n".join(f"{problem}; --secret takes it, too" for problem in missing))
    return source, source.verifier


def sign(
    source: Source,
    verifier: Verifier,
    *,
    url: str,
    body: bytes,
    id: str,  # noqa: A002 - CloudEvents' attribute, as a keyword
    type: str,  # noqa: A002 - CloudEvents' attribute, as a keyword
    headers: Mapping[str, str],
    now: float,
    is_forged: bool = False,
) -> Signed:
    """Return the request that the provider would send; a URL without a path gets the source's.

    Of a provider that has time or signature in the body, these are written into it. A forged one has the signature of
    another body, and wrong credentials. Raises UsageError for an invalid URL, for a missing header that is signed, and
    if there is nothing to forge.
    """
    target = _target(source, url)
    if is_forged and verifier.is_open:
        raise UsageError(f"--forge: expected a source that verifies, got {source.name!r}, which takes everything")
    credential = verifier.signed_query(now=now)
    if is_forged and credential:
        credential = credential.partition("=")[0] + "=forged"
    query = "&".join(filter(None, [target.raw_query_string, credential]))
    given = {name.lower() for name in headers}
    if "content-type" not in given:
        headers = {"Content-Type": "application/json", **headers}
    path = target.raw_path
    body = verifier.complete(body, now=now, headers=headers, path=path, query=query, is_forged=is_forged)
    signed = verifier.sign(
        body + b" " if is_forged else body, now=now, id=id, type=type, headers=headers, path=path, query=query
    )
    if is_forged:
        signed = [
            (name, "forged" if _is_credential(verifier, name) and name.lower() not in given else value)
            for name, value in signed
        ]
    # Already encoded: a signature may cover path and query as they are written.
    address = URL(f"{target.origin()}{target.raw_path}{f'?{query}' if query else ''}", encoded=True)
    return Signed(url=address, headers=tuple(signed), body=body)


class Sender:
    """One connection to the gateway, kept open. A context manager."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
            timeout=aiohttp.ClientTimeout(total=TIMEOUT),
        )

    async def send(self, request: Signed) -> Response:
        """Send a request. Raises OSError or TimeoutError without a response."""
        began = time.perf_counter()
        try:
            async with self._session.post(
                request.url, data=request.body, headers=list(request.headers), allow_redirects=False
            ) as response:
                content = await response.content.read(MAX_ANSWER)
        except aiohttp.ClientConnectorError as error:
            raise ConnectionError(_reason(error.os_error)) from error
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error
        return Response(
            status=response.status,
            event_id=response.headers.get("gateway-event-id"),
            seconds=time.perf_counter() - began,
            detail=_detail(content),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()


async def ask_status(address: str, *, timeout: float = STATUS_TIMEOUT) -> Mapping[str, Any]:
    """Return a process's response at `/status` of its admin address (`http://HOST:PORT`, or without `http://`).

    Raises UsageError for an invalid address, and ConnectionError if no gateway responds.
    """
    url = admin_url(address)
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != HTTPStatus.OK:
                raise ConnectionError(f"expected the status of a gateway, got HTTP {response.status}")
            content = await response.read()
    except TimeoutError as error:
        raise ConnectionError(f"no response within {timeout:g} s") from error
    except aiohttp.ClientConnectorError as error:
        raise ConnectionError(_reason(error.os_error)) from error
    except (OSError, aiohttp.ClientError) as error:
        raise ConnectionError(str(error)) from error
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(key in found for key in STATUS_KEYS):
        raise ConnectionError("expected the status of a gateway, got something else")
    return found


def admin_url(address: str) -> URL:
    """Return the status URL of a process, by its admin address. Raises UsageError for an invalid one."""
    try:
        url = URL(address if "://" in address else f"http://{address}")
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"--admin: expected HOST:PORT of a process, got {address!r}")
    return url / "status"


def sample(id: str, type: str) -> bytes:  # noqa: A002 - CloudEvents' attributes
    """Return a body for an event that has none, with id and type where most schemes look for them."""
    return orjson.dumps({"id": id, "type": type, "test": True})


def _target(source: Source, url: str) -> URL:
    try:
        target = URL(url)
    except ValueError as error:
        raise UsageError(f"--url: expected http://host:port/path, got {url!r}") from error
    if target.scheme not in ("http", "https") or not target.host:
        raise UsageError(f"--url: expected http://host:port/path, got {url!r}")
    if target.raw_path == "/" and "${" in source.path:
        raise UsageError(f"--url: expected one with a path, as {source.shown_path} isn't known here, got {url!r}")
    return target if target.raw_path != "/" else URL(f"{target.origin()}{source.path}", encoded=True)


def _reason(error: OSError) -> str:
    """Return why nothing could be connected to; asyncio's own text names the call."""
    return "connection refused" if isinstance(error, ConnectionRefusedError) else error.strerror or str(error)


def _is_credential(verifier: Verifier, name: str) -> bool:
    return name.lower().encode() in verifier.credential_headers


def _is_needed(problem: Problem, source: str) -> bool:
    # Only the first secret signs.
    path = problem.path.removeprefix(f"sources.{source}.verify")
    return path != problem.path and not re.match(r"\.secrets\[[1-9]", path)


def _with_secret(files: tuple[Path, ...], source: Source, secret: str) -> Verifier:
    """Rebuild the source's verifier from the rule file, with another secret."""
    node = written_source(files, source.name)
    verify = node.child("verify") if node else None
    if node and verify:
        public_url = node.child("public_url")
        config = _plain(verify)
        if "secrets" not in config:
            return _with_private_key(source.verifier, secret)
        return build_verifier(
            {**config, "secrets": [secret]}, public_url=None if public_url is None else public_url.value
        )
    raise UsageError(f"--secret: expected the source {source.name!r} in a YAML file of the rules, got none")


def _with_private_key(verifier: Verifier, pem: str) -> Verifier:
    """Return a verifier that signs with a private key, if it verifies by public keys from the rules."""
    if verifier.is_open:
        return verifier
    check = verifier.checks[0]
    if not isinstance(check, SignatureCheck) or not isinstance(check.algorithm, PublicKeys) or check.algorithm.key_url:
        raise OfSenderAloneError
    try:
        signing = replace(check, algorithm=with_private_key(check.algorithm, pem))
    except ValueError as error:
        raise UsageError(f"--secret: {error}") from error
    return replace(verifier, checks=(signing, *verifier.checks[1:]))


def _plain(node: Node) -> Any:  # noqa: ANN401 - a value of YAML
    if isinstance(node.value, dict):
        return {key: _plain(value) for key, value in node.value.items()}
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def _detail(content: bytes) -> str:
    try:
        response = orjson.loads(content)
    except orjson.JSONDecodeError:
        return content.decode(errors="replace")
    return str(response.get("detail", "")) if isinstance(response, dict) else ""
