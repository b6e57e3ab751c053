"""`gateway fmt`: rule files in one form."""

import shutil
from pathlib import Path

from gateway.commands.base import Invocation, command
from gateway.commands.values import Parser
from gateway.model import UsageError
from gateway.ops.output import count
from gateway.ops.rule_format import formatted


def _arguments(parser: Parser) -> None:
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="rule files (default: routes.yaml)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file isn't formatted")


@command(
    "fmt",
    about="format rule files: indentation, blank lines and line ends; comments, quotes and order stay",
    example="gateway fmt routes.yaml routes.d/*.yaml --check",
    add_arguments=_arguments,
)
def _fmt(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    files: list[Path] = arguments.files or [Path("routes.yaml")]
    texts: dict[Path, str] = {}
    for file in files:
        try:
            texts[file] = formatted(file)
        except UsageError as error:
            output.fail(str(error))
    changed = [file for file, text in texts.items() if file.read_bytes() != text.encode()]
    for file in changed:
        if not arguments.check:
            beside = file.with_name(f".{file.name}.new")
            beside.write_bytes(texts[file].encode())
            shutil.copymode(file, beside)
            beside.replace(file.resolve())  # A running gateway never reads half of it.
        if output.json:
            output.line({"file": str(file)})
        output.print(f"{file}: {'not formatted' if arguments.check else 'formatted'}")
    if unread := len(files) - len(texts):
        output.print(f"{count(len(files), 'file')}: {len(changed)} changed, {unread} not readable")
        return 2
    output.print(f"{count(len(files), 'file')}: {'ok' if not changed else f'{len(changed)} changed'}")
    return 1 if changed and arguments.check else 0
