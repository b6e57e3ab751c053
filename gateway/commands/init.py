"""`gateway init`: rules, a test and a CI job to begin with."""

import shlex
import sys
from pathlib import Path

from gateway.commands.base import Invocation, command
from gateway.commands.values import Parser
from gateway.model import UsageError
from gateway.ops.starter import PLACEHOLDER, RULES, repository_of, starter


def _arguments(parser: Parser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where to write (default: here); the CI job is written to the root of its Git repository",
    )
    parser.add_argument(
        "--provider", metavar="NAME", help="the provider that sends the events; `gateway providers` lists them"
    )
    parser.add_argument("--to", metavar="URL", help="the URL that its events go to")


@command(
    "init",
    about="write starter rules, a test of them, and a CI job; asks for what isn't given",
    example="gateway init --provider github --to https://ci.example/hooks",
    add_arguments=_arguments,
)
def _init(call: Invocation) -> int:
    arguments, output = call.arguments, call.output
    provider = arguments.provider or _ask("--provider", "Who sends? A provider's name, such as github: ")
    to = arguments.to or _ask("--to", "Where to? A URL, such as https://ci.example/hooks: ")
    root, own = repository_of(arguments.folder)
    files = {
        (arguments.folder / path.relative_to(own) if path.is_relative_to(own) else root / path): text
        for path, text in starter(provider, to, own, root=root).items()
    }
    if existing := [str(path) for path in files if path.exists()]:
        raise UsageError(f"expected a folder without these files, got {', '.join(existing)}")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if output.json:
            output.line({"file": str(path)})
        output.print(("written ", "bold"), str(path))
    if PLACEHOLDER in files[arguments.folder / RULES]:
        output.print(f"to replace: `public_url` in {arguments.folder / RULES}, by the address that the provider calls")
    rules = shlex.quote(str(arguments.folder / RULES))
    output.print(f"next: `gateway test {rules}`; `gateway run --rules {rules}`; `gateway providers {provider}`")
    return 0


def _ask(flag: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise UsageError(f"{flag}: expected one, got none, and nobody to ask")
    print(question, end="", file=sys.stderr, flush=True)  # noqa: T201 - a question
    return sys.stdin.readline().strip()
