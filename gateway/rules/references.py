"""References in rule files, such as `${NAME}`: their syntax, and what is known of a text without their values."""

import re
from pathlib import Path

from gateway.rules.yaml_document import reason_of

REFERENCE = re.compile(r"\$\$\{|\$\{\{|\$\{([^}]*)\}?")
"""A reference, with the text in its braces. Also matches `$${`, a literal `${`, and `${{`, where CEL begins."""
MAX_SECRET = 1 << 20
"""Maximum bytes of a `${file:…}`."""
_DEFAULT = re.compile(r":-[^}]+")


def without_values(written: str) -> str:
    """Return a text for display: references stay as they are; their defaults, which may be secrets, become `***`."""
    return REFERENCE.sub(lambda found: _DEFAULT.sub(":-***", found[0]) if found[1] else found[0], written)


def literal_beginning(written: str) -> str:
    """Return the literal beginning of a text, up to the first reference."""
    begins, end = "", 0
    for found in REFERENCE.finditer(written):
        begins += written[end : found.start()]
        if found[0] != "$${":
            return begins
        begins, end = f"{begins}${{", found.end()
    return begins + written[end:]


def filled(written: str, value: str) -> str:
    """Replace each reference in a text by the same value."""
    return REFERENCE.sub(lambda found: "${" if found[0] == "$${" else value, written)


def content_of(path: Path) -> str:
    """Read a secret, without the trailing newline that editors and `echo` add. Raises ValueError with the reason."""
    if "\0" in str(path):
        raise ValueError("expected a file's path, got one with a NUL")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SECRET + 1)
    except OSError as error:
        raise ValueError(f"expected a file at {path}, got {reason_of(error)}") from error
    if len(content) > MAX_SECRET:
        raise ValueError(f"expected at most {MAX_SECRET} bytes in {path}, got more")
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError(f"expected UTF-8 in {path}, got other bytes") from None
