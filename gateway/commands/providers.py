"""`gateway providers`: the providers that are known, and how to connect one."""

from collections.abc import Mapping
from pathlib import Path

from gateway.commands.base import Invocation, command
from gateway.commands.values import Parser
from gateway.model import UsageError
from gateway.ops.output import Output
from gateway.ops.provider_guide import ProviderGuide, provider_guide, provider_guides
from gateway.rules.load import check_providers
from gateway.settings import Settings
from gateway.text import did_you_mean
from gateway.verify.presets import PRESETS, Preset


def _arguments(parser: Parser) -> None:
    parser.add_argument("provider", nargs="?", metavar="NAME", help="show this one in detail")


@command(
    "providers",
    about="list the known providers, including those of the rules; with a NAME: how it signs, what to set up there, "
    "and the rules for it",
    example="gateway providers stripe",
    add_arguments=_arguments,
    settings=("rules",),
)
def _providers(call: Invocation) -> int:
    name, output, file = call.arguments.provider, call.output, call.settings.rules
    own = {} if name in PRESETS else _own(file, output)
    known = {**PRESETS, **own}
    if name is not None and name not in known:
        hint = did_you_mean(name, known) or "; `gateway providers` lists those that are known"
        raise UsageError(f"expected a provider's name, got {name!r}{hint}")
    guides = [*provider_guides(own), *provider_guides()] if name is None else [provider_guide(name, known[name])]
    if output.json:
        for each in guides:
            output.line({**each.fields(), "is_own": each.name in own})
    elif name is None:
        rows = [(each.name, each.title, each.signing[0], _origin(each, own, file)) for each in guides]
        output.table(["name", "provider", "signature", ""], rows)
    else:
        _print(output, guides[0])
    return 0


def _own(file: Path, output: Output) -> Mapping[str, Preset]:
    """Return the providers of the rules, by name; none if there is no file where it is by default."""
    if not file.exists():
        if file == Settings().rules:
            return {}
        raise UsageError(f"{file}: expected a rule file, got none")
    own, problems = check_providers(file)
    if problems:
        output.note(f"{problems[0]}; so a provider of yours may be missing")
    return {name: own[name] for name in sorted(own)}


def _origin(guide: ProviderGuide, own: Mapping[str, Preset], file: Path) -> str:
    return f"of {file}" if guide.name in own else "" if guide.is_confirmed else "unconfirmed"


def _print(output: Output, guide: ProviderGuide) -> None:
    output.print((guide.title, "bold"), *[f"  {address}" for address in guide.docs])
    for label, text in guide.details():
        output.print((f"{label} ", "bold"), text)
    output.print()
    output.block(guide.snippet)
