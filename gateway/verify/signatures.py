"""Signatures: where they are in a request, and which string they cover, whatever the algorithm."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from gateway.model import RefusedError, UsageError
from gateway.verify.algorithms import Algorithm, Hmac
from gateway.verify.check import MAX_CANDIDATES, MAX_CHALLENGE, MAX_LINES, BodyCheck, Draft, SigningSpec
from gateway.verify.content import Content, FieldPath, shown_path, with_field
from gateway.verify.request import Reason, Request, preferred_refusal, refused, to_bytes
from gateway.verify.signed_string import SignedString, SigningInput, only_parameter
from gateway.verify.timestamps import Timestamp

MAX_ELEMENTS = 64  # in one header line
MAX_LINE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureCheck:
    """Checks a signature over a string made from the request.

    The signature is in one of several headers (`names` are theirs, as bytes), in the query (`parameter`), in a field of
    the JSON body (`path`), or in a parameter of a form (`form`). In `signed`, `{id}` is the header `id_header`.
    `body_digest` is the query parameter with the body's SHA-256, in hexadecimal digits, if that is signed instead of
    the body.
    """

    headers: tuple[str, ...] = ()
    names: tuple[bytes, ...] = ()
    parameter: str | None = None
    path: FieldPath = ()
    algorithm: Algorithm
    prefix: bytes
    separator: bytes | None
    timestamp: Timestamp | None
    id_header: str | None
    signed: SignedString
    public_url: str | None
    body_digest: str | None = None
    form: str | None = None
    recipient: tuple[FieldPath, str] | None = None
    """The field of the body that names whom it is for, and what it has to be."""
    challenge: re.Pattern[str] | None = None
    """Matches the challenges that the source's handshake signs for anybody: no event's signed string may match."""
    _is_in_body: bool = field(init=False)
    _has_other_checks: bool = field(init=False)
    """Whether a digest of the body, or its recipient, is checked, too."""
    _is_in_one_header: bool = field(init=False)
    """As most are: they take a fast path."""
    _hmac: Hmac | None = field(init=False)
    _hmac_length: int = field(init=False)
    """Bytes of an HMAC with its prefix; 0 of other algorithms."""
    _signed_fields: tuple[FieldPath, ...] = field(init=False)
    """The fields that are read of the body, if the signature covers only fields: each may occur once."""

    def __post_init__(self) -> None:
        is_in_body = bool(self.path or self.form or (self.timestamp is not None and self.timestamp.path))
        is_hmac = isinstance(self.algorithm, Hmac)
        for name, value in {
            "_is_in_body": is_in_body,
            "_has_other_checks": self.body_digest is not None or self.recipient is not None,
            "_is_in_one_header": len(self.names) == 1 and not is_in_body and self.body_digest is None,
            "_hmac": self.algorithm if is_hmac else None,
            "_signed_fields": () if self.signed.covers_body or self.body_digest else self._fields_of_signature(),
            "_hmac_length": len(self.prefix) + self.algorithm.length if isinstance(self.algorithm, Hmac) else 0,
        }.items():
            object.__setattr__(self, name, value)

    def check_head(self, head: Request, now: float) -> BodyCheck:
        if self._is_in_one_header:
            lines = head.values(self.names[0])
            if len(lines) == 1:
                return partial(self._check_body, (self._parsed(lines[0], head, now, None),))
        if self.body_digest is not None:
            only_parameter(head, self.body_digest)
        if self._is_in_body:
            # Fields of the body are checked with the body; what the head lacks is refused now.
            if not self.path and not self.form:
                self._lines(head)
            return partial(self._check_all, now)
        lines = self._lines(head)
        if len(lines) == 1:
            return partial(self._check_body, (self._parsed(lines[0], head, now, None),))
        return partial(self._check_body, self._parsed_lines(lines, head, now))

    def complete(self, request: Request, now: float, *, is_forged: bool) -> Request:
        """Return the request with the time and the signature in its JSON body, where its sender writes them there.

        With `is_forged`, another text is signed. Raises RefusedError if the body has no place for them, and
        UsageError if only the sender can sign.
        """
        if self.timestamp is not None and self.timestamp.path:
            request = with_field(request, self.timestamp.path, self.timestamp.write(now))
        if self.path:
            content = Content(request)
            stamp = content.field(self.timestamp.path) if self.timestamp is not None and self.timestamp.path else b""
            message = partial(self._message, request, content, stamp or b"")
            signature = self.algorithm.sign((lambda secret: message(secret) + b" ") if is_forged else message, now)
            request = with_field(request, self.path, (self.prefix + signature).decode())
        return request

    def sign(self, draft: Draft, request: Request, now: float, identity: str) -> None:
        if self.parameter or self.form or (self.path and Content(request).field(self.path) is None):
            raise UsageError(f"a test event for this source: expected its signature {self._where()}")
        if self.path:
            return
        if self.id_header is not None:
            draft.add(self.id_header, identity)
        stamp = b""
        if self.timestamp is not None and not self.timestamp.path:
            stamp = self.timestamp.write(now).encode()
            if self.timestamp.header is not None:
                draft.add(self.timestamp.header, stamp.decode())
                stamp = draft[self.timestamp.header].encode("utf-8", "surrogateescape")
        outgoing = Request(
            method=request.method, path=request.path, query=request.query, headers=draft.raw(), body=request.body
        )
        content = Content(outgoing)
        self._check_digest(outgoing, content)
        value = self.prefix + self.algorithm.sign(partial(self._message, outgoing, content, stamp), now)
        if self.timestamp is not None and self.timestamp.is_element:
            value = self.timestamp.prefix + stamp + (self.separator or b"") + value
        draft.add(self.headers[0], value.decode())

    def query(self, now: float) -> str:  # noqa: ARG002 - as the protocol has it
        return ""

    def signing_spec(self) -> SigningSpec:
        stamp = self.timestamp
        header = self.headers[0] if self.headers else None
        return SigningSpec(
            proof=f"{self.algorithm.name} signature {self._where()}",
            header=header,
            query=self.parameter,
            timestamp_header=None if stamp is None else stamp.header or header,
            tolerance=None if stamp is None else stamp.tolerance,
            id_header=self.id_header,
        )

    def _where(self) -> str:
        if self.form:
            return f"in the parameter {self.form} of the form"
        if self.path:
            return f"in the field {shown_path(self.path)} of the body"
        if self.parameter:
            return f"in the query parameter {self.parameter}"
        return f"in the header {self.headers[0]}"

    def _lines(self, head: Request) -> list[bytes]:
        """Return the header lines, or parameters, that hold signatures."""
        if len(self.names) == 1:
            lines = head.values(self.names[0])
        elif self.parameter is not None:
            lines = [to_bytes(value) for value in head.parameters(self.parameter)[self.parameter]]
        else:
            lines = [value for name in self.names for value in head.values(name)]
        if not lines:
            raise refused(Reason.MISSING_SIGNATURE, f"expected a signature {self._where()}, got none")
        if len(lines) > MAX_LINES and len(lines) > len(self.names):
            most = max(MAX_LINES, len(self.names))
            raise refused(
                Reason.MALFORMED_SIGNATURE, f"expected at most {most} signatures {self._where()}, got {len(lines)}"
            )
        return lines

    def _parsed_lines(
        self, lines: Sequence[bytes], request: Request, now: float, content: Content | None = None
    ) -> Sequence[tuple[list[bytes], bytes]]:
        """Return for each line the signatures in it, and the timestamp that they claim to cover."""
        parsed: list[tuple[list[bytes], bytes]] = []
        refusals: list[RefusedError] = []
        for line in lines:
            try:
                parsed.append(self._parsed(line, request, now, content))
            except RefusedError as error:
                refusals.append(error.with_traceback(None))
        if not parsed:
            raise preferred_refusal(refusals)
        return parsed

    def _parsed(self, line: bytes, request: Request, now: float, content: Content | None) -> tuple[list[bytes], bytes]:
        candidates, stamps = self._split(line)
        if not candidates or len(candidates) > MAX_CANDIDATES:
            raise refused(
                Reason.MALFORMED_SIGNATURE,
                f"expected 1 to {MAX_CANDIDATES} signatures {self._where()}, each "
                + (f"{self.prefix.decode()} and " if self.prefix else "")
                + f"{self.algorithm.form}, got {len(candidates) or 'none like that'}",
            )
        stamp = b""
        if self.timestamp is not None:
            if self.timestamp.header is not None:
                stamps = request.values(self.timestamp.name)
            elif self.timestamp.path and content is not None:
                value = content.field(self.timestamp.path)
                stamps = [] if value is None else [value]
            stamp = self._one_stamp(stamps)
            self.timestamp.check(stamp, now)
        if self.signed.needs_head:
            self.signed.check_head(request)
        return candidates, stamp

    def _check_all(self, now: float, request: Request, content: Content) -> int | None:
        if self.path or self.form:
            value = content.field(self.path) if self.form is None else content.parameter(self.form)
            if value is None:
                raise refused(Reason.MISSING_SIGNATURE, f"expected a signature {self._where()}, got none")
            lines = [value]
        else:
            lines = self._lines(request)
        return self._check_body(self._parsed_lines(lines, request, now, content), request, content)

    def _check_body(
        self, parsed: Sequence[tuple[list[bytes], bytes]], request: Request, content: Content
    ) -> int | None:
        if self._has_other_checks:
            self._check_digest(request, content)
            self._check_recipient(content)
        for candidates, stamp in parsed:
            if self._hmac is not None:
                if self.signed.is_body_alone:
                    text = request.body
                elif self.signed.is_simple:
                    text = self.signed.join(stamp, request.body)
                else:
                    text = self._message(request, content, stamp, b"")
                if self.challenge is not None:
                    _refuse_challenge(self.challenge, text)
                matched = self._hmac.match_string(candidates, text, content)
            else:
                matched = self.algorithm.match(candidates, partial(self._message, request, content, stamp), content)
            if matched is not None:
                if self._signed_fields:
                    content.require_single(self._signed_fields)
                return matched.secret_index
        raise refused(Reason.BAD_SIGNATURE, f"the signature {self._where()} doesn't match this request")

    def _fields_of_signature(self) -> tuple[FieldPath, ...]:
        stamp = self.timestamp.path if self.timestamp is not None else ()
        recipient = self.recipient[0] if self.recipient is not None else ()
        return tuple([path for path in (*self.signed.field_paths, self.path, stamp, recipient) if path])

    def _check_recipient(self, content: Content) -> None:
        if self.recipient is not None and content.field(self.recipient[0]) != to_bytes(self.recipient[1]):
            raise refused(Reason.WRONG_RECIPIENT, "expected a request for the source's recipient, got one for another")

    def _check_digest(self, request: Request, content: Content) -> None:
        if self.body_digest is not None:
            digest = only_parameter(request, self.body_digest)
            if digest != content.digest("sha256").hex().encode():
                raise refused(
                    Reason.BAD_SIGNATURE, f"the query parameter {self.body_digest} isn't the SHA-256 of this body"
                )

    def _split(self, line: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return what looks like signatures and timestamps, without their prefixes."""
        prefix, fits = self.prefix, self.algorithm.fits
        if self.separator is None:
            return ([bare] if line.startswith(prefix) and fits(bare := line[len(prefix) :]) else []), []
        if len(line) > MAX_LINE_BYTES:
            return [], []
        elements = [element.strip(b" ") for element in line.split(self.separator, MAX_ELEMENTS)]
        stamps: list[bytes] = []
        if self.timestamp is not None and self.timestamp.is_element:
            if mark := self.timestamp.prefix:
                stamps = [element[len(mark) :] for element in elements if element.startswith(mark)]
            else:
                stamps = [elements.pop(0)]
        if (length := self._hmac_length) > 0:
            begin = len(prefix)
            return [each[begin:] for each in elements if len(each) == length and each.startswith(prefix)], stamps
        bare_ones = [element[len(prefix) :] for element in elements if element.startswith(prefix)]
        return [bare for bare in bare_ones if fits(bare)], stamps

    def _one_stamp(self, stamps: Sequence[bytes]) -> bytes:
        if len(stamps) == 1:
            return stamps[0]
        stamp = self.timestamp
        if stamp is not None and stamp.path:
            where = f"in the field {shown_path(stamp.path)} of the body"
        else:
            where = f"in the header {(stamp and stamp.header) or self.headers[0]}"
        if not stamps:
            raise refused(Reason.MISSING_TIMESTAMP, f"expected a timestamp {where}, got none")
        raise refused(Reason.MALFORMED_TIMESTAMP, f"expected one timestamp {where}, got {len(stamps)}")

    def _message(self, request: Request, content: Content, stamp: bytes, secret: bytes) -> bytes:
        if self.signed.is_body_alone:
            return request.body
        return self.signed.render(SigningInput(request, content, stamp, self.public_url or "", secret))


def _refuse_challenge(challenge: re.Pattern[str], text: bytes) -> None:
    if len(text) <= MAX_CHALLENGE and challenge.fullmatch(text.decode("latin-1")):
        expected = "expected a signed string that can't be a challenge of the source's handshake"
        raise refused(Reason.BAD_SIGNATURE, f"{expected}, got one that matches it")
