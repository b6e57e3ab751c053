"""Write docs/providers.md from the presets: `python -m dev.providers`."""

from pathlib import Path

from gateway.ops.provider_guide import ProviderGuide, provider_guides

DOCUMENT = Path(__file__).parent.parent / "docs" / "providers.md"
HEAD = """# Providers

<!-- Written by `python -m dev.providers` from gateway/verify/presets/: change those. -->

The providers whose events the gateway verifies by name: `verify: {scheme: stripe, secrets: [...]}`. `gateway providers
NAME` prints the same, with the rules to copy. A provider that isn't here can be defined under
[`providers:`](rules.md#a-provider-of-your-own) with the keys that these are defined with
([the files](../gateway/verify/presets/)).

*Identity* is where an event has the id that the provider gave it, by which `dedupe` knows it when it comes again; with
several events in a request, in each of them. Where the provider's documents or source code say that it sends nothing
that would do, it is `none`, with the reason; where neither was found, `not confirmed`. A source may say `id:` in both
cases.

*Checked with* says what our verification was compared with: the vendor's own library, or a request that the vendor has
published. `unconfirmed` means that there is neither: the preset follows the vendor's documentation, and `gateway check`
warns.

*Fixtures* are samples of its events: `gateway trigger stripe invoice.payment_failed` sends one to your gateway, with
new ids and current times, signed with the secrets in your rules ([more](commands.md#test-events)). What of them is not
known from the documents that they were made from is *unconfirmed in them*.
"""


def document() -> str:
    """Return the whole document."""
    guides = provider_guides()
    index = ", ".join(f"[{guide.title}](#{anchor(guide.title)})" for guide in guides)
    return "\n".join([HEAD, f"{len(guides)} providers: {index}.", *map(_section, guides)]) + "\n"


def anchor(title: str) -> str:
    """Return a heading's anchor, as GitHub and MyST make it."""
    kept = "".join(each for each in title.lower() if each.isalnum() or each in " -_")
    return kept.replace(" ", "-")


def _section(guide: ProviderGuide) -> str:
    rows = [
        ("scheme", f"`{guide.name}`"),
        *guide.details(),
        ("documentation", ", ".join(f"<{address}>" for address in guide.docs)),
    ]
    table = [f"| {label} | {text.replace('|', chr(92) + '|')} |" for label, text in rows]
    return "\n".join([f"\n## {guide.title}\n", "| | |", "|---|---|", *table])


if __name__ == "__main__":
    DOCUMENT.write_text(document())
