"""`gateway access check`: what an access file gives to whom, or what is wrong with it."""

import os

from gateway.access.read_file import read_file
from gateway.commands.base import Invocation, command
from gateway.commands.grants import access_file, grant_fields, grant_row
from gateway.ops.presentation import Row, print_rows


@command(
    "access check",
    about="check the access file and the secrets that it names, and show what it gives to whom",
    example="gateway access check --access access.conf",
    settings=("access",),
)
def _access_check(call: Invocation) -> int:
    found = read_file(access_file(call), os.environ)
    grants = [("token", each) for each in found.tokens]
    others = [*found.people, *found.groups]
    grants += [("group" if each.is_group else "person", each) for each in sorted(others, key=lambda each: each.line)]
    if call.output.json:
        sign_in, oidc = found.sign_in, found.oidc
        place = {
            "address": None if sign_in is None else sign_in.origin,
            "shared_key": sign_in is not None and bool(sign_in.key),
            "issuer": None if oidc is None else oidc.issuer,
            "client": None if oidc is None else oidc.client,
        }
        call.output.line({"sign_in": place})
        for kind, grant in grants:
            call.output.line({"kind": kind, **grant_fields(grant)})
        return 0
    if found.sign_in is None:
        call.output.print("people sign in on this machine alone: there is no line sign-in")
    else:
        key = "a key in a file" if found.sign_in.key else "a key that each process makes"
        call.output.print(f"people sign in at {found.sign_in.origin}, with sessions sealed by {key}")
    if found.oidc is not None:
        call.output.print(f"by {found.oidc.issuer}, as client {found.oidc.client}")
    rows: list[Row] = [{"kind": kind, **grant_row(grant)} for kind, grant in grants]
    if rows:
        print_rows(call.output, rows)
    else:
        call.output.print("nobody is given access")
    return 0
