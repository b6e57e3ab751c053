"""`gateway token`: the tokens by which programs ask at the admin address."""

import secrets
import time

from gateway.access.access_file import Grant
from gateway.access.principal import AccessRole
from gateway.access.tokens import RANDOM_BYTES, digest_of, token_of
from gateway.commands.base import Invocation, command
from gateway.commands.grants import access_file, grant_fields, grant_row
from gateway.commands.values import Parser, duration
from gateway.model import NAME_PATTERN, UsageError
from gateway.ops.access_tokens import add_token, read_tokens, revoke_token
from gateway.ops.output import rfc3339, when
from gateway.ops.presentation import Row, print_rows


def new_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="its name in lists, and in `gateway audit list`")
    parser.add_argument(
        "--role",
        dest="access_role",  # `role` is what of the gateway a process runs
        required=True,
        choices=list(map(str, AccessRole)),
        metavar="ROLE",
        help="viewer (no bodies), reader (bodies) or operator (acts)",
    )
    about = "restrict the token to this source; repeatable"
    parser.add_argument("--source", action="append", default=[], metavar="SOURCE", help=about)
    about = "restrict the token to what this owner answers for; repeatable"
    parser.add_argument("--owner", action="append", default=[], metavar="OWNER", help=about)
    about = "expires after DURATION, such as 90d (default: never)"
    parser.add_argument("--expires", type=duration, metavar="DURATION", help=about)


@command(
    "token new",
    about="create a token, print it once, and write its digest into the access file",
    example="gateway token new deploys --role operator --source github --expires 90d --access access.conf",
    add_arguments=new_arguments,
    settings=("access",),
)
def _token_new(call: Invocation) -> int:
    arguments, file = call.arguments, access_file(call)
    if not NAME_PATTERN.fullmatch(arguments.name):
        expected = "at most 63 lower-case letters, digits, '.', '_' and '-'"
        raise UsageError(f"NAME: expected {expected}, got {arguments.name!r}")
    for owner in arguments.owner:
        if not owner.strip() or not owner.isprintable():
            raise UsageError(f"--owner: expected a name of printable characters, got {owner!r}")
    for source in arguments.source:
        if not NAME_PATTERN.fullmatch(source):
            raise UsageError(f"--source: expected the name of a source, got {source!r}")
    token = token_of(secrets.token_bytes(RANDOM_BYTES))
    expires = None if arguments.expires is None else float(int(time.time() + arguments.expires))
    grant = Grant(
        name=arguments.name,
        role=AccessRole(arguments.access_role),
        sources=frozenset(arguments.source) or None,
        owners=frozenset(arguments.owner) or None,
        digest=digest_of(token),
        expires=expires,
    )
    add_token(file, grant)
    if call.output.json:
        call.output.line({"token": token, **_fields(grant)})
    else:
        call.output.print(token)
        until = "" if expires is None else f", good until {when(expires)}"
        call.output.note(f"{grant.name}, {grant.role}{until}: it isn't shown again; its digest is in {file}")
    return 0


@command(
    "token list",
    about="list the tokens in the access file, with what each may do",
    example="gateway token list --access access.conf",
    settings=("access",),
)
def _token_list(call: Invocation) -> int:
    tokens, now = read_tokens(access_file(call)), time.time()
    if call.output.json:
        for grant in tokens:
            call.output.line(_fields(grant))
    rows: list[Row] = [{**grant_row(grant), "good until": _until(grant.expires, now)} for grant in tokens]
    if rows:
        print_rows(call.output, rows)
    else:
        call.output.print("no tokens")
    return 0


def revoke_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="its name, as listed")


@command(
    "token revoke",
    about="remove a token from the access file: running processes refuse it within seconds",
    example="gateway token revoke deploys --access access.conf",
    add_arguments=revoke_arguments,
    settings=("access",),
)
def _token_revoke(call: Invocation) -> int:
    name = call.arguments.name
    revoke_token(access_file(call), name)
    call.output.print(f"{name} is revoked")
    if call.output.json:
        call.output.line({"name": name, "revoked": True})
    return 0


def _until(expires: float | None, now: float) -> str:
    if expires is None:
        return "for ever"
    return when(expires) if now < expires else f"{when(expires)}: expired"


def _fields(grant: Grant) -> dict[str, object]:
    return {**grant_fields(grant), "expires": None if grant.expires is None else rfc3339(grant.expires)}
