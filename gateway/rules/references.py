"""The references in texts of rule files, such as `${NAME}`: how they are written, and what is known without a value."""

import re

REFERENCE = re.compile(r"\$\$\{|\$\{\{|\$\{([^}]*)\}?")
"""A reference, with what is in its braces; also `$${`, which is a literal `${`, and `${{`, with which CEL begins."""
_DEFAULT = re.compile(r":-[^}]+")


def without_values(written: str) -> str:
    """Return a text with its references instead of their values; a default, which may be one, as `***`."""
    return REFERENCE.sub(lambda found: _DEFAULT.sub(":-***", found[0]) if found[1] else found[0], written)


def literal_beginning(written: str) -> str:
    """Return what a text begins with whatever the values of its references are."""
    begins, end = "", 0
    for found in REFERENCE.finditer(written):
        begins += written[end : found.start()]
        if found[0] != "$${":
            return begins
        begins, end = f"{begins}${{", found.end()
    return begins + written[end:]


def filled(written: str, value: str) -> str:
    """Return a text in which each reference has the same value."""
    return REFERENCE.sub(lambda found: "${" if found[0] == "$${" else value, written)
