"""Write docs/openapi.json, the OpenAPI document of the API, from the table of endpoints: `python -m dev.openapi`."""

from pathlib import Path

import orjson

from gateway.api.openapi import document

DOCUMENT = Path(__file__).parent.parent / "docs" / "openapi.json"


def text() -> str:
    """Return the document as it is in the file."""
    return orjson.dumps(document(), option=orjson.OPT_INDENT_2).decode() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
