"""`gateway providers`: the providers that are known, and how to connect one."""

from gateway.commands.base import Invocation, command
from gateway.commands.values import Parser
from gateway.model import UsageError
from gateway.ops.output import Output
from gateway.ops.provider_guide import ProviderGuide, provider_guide, provider_guides
from gateway.text import did_you_mean
from gateway.verify.presets import PRESETS


def _arguments(parser: Parser) -> None:
    parser.add_argument("provider", nargs="?", metavar="NAME", help="show this one in detail")


@command(
    "providers",
    about="list the providers that are known; of one: how it signs, what to set up there, and the rules for it",
    example="gateway providers stripe",
    add_arguments=_arguments,
)
def _providers(call: Invocation) -> int:
    name, output = call.arguments.provider, call.output
    if name is not None and name not in PRESETS:
        hint = did_you_mean(name, PRESETS) or "; `gateway providers` lists those that are known"
        raise UsageError(f"expected a provider's name, got {name!r}{hint}")
    guides = provider_guides() if name is None else [provider_guide(name, PRESETS[name])]
    if output.json:
        for each in guides:
            output.line(each.fields())
    elif name is None:
        rows = [(each.name, each.title, each.signing[0], "" if each.is_confirmed else "unconfirmed") for each in guides]
        output.table(["name", "provider", "signature", ""], rows)
    else:
        _print(output, guides[0])
    return 0


def _print(output: Output, guide: ProviderGuide) -> None:
    output.print((guide.title, "bold"), *[f"  {address}" for address in guide.docs])
    for label, text in guide.details():
        output.print((f"{label} ", "bold"), text)
    output.print()
    output.block(guide.snippet)
