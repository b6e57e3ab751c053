"""The site of these documents: `make docs` writes it to .site/, and fails at a link or an anchor that leads nowhere.

The source is the whole repository, so that links are the same for those who read the files.
"""
# ruff: noqa: INP001 - Sphinx reads it as it is

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

project = "Webhook gateway"
release = version_of("durable-webhook-gateway")
copyright = ""  # noqa: A001 - Sphinx's name for it
extensions = ["myst_parser"]
root_doc = "docs/README"
include_patterns = ["*.md", "docs/*.md", "docs/recipes/*.md", "deploy/ci/*.md"]
exclude_patterns = [".*", "tests"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
html_theme = "furo"
html_title = "Webhook gateway"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

SECTION = re.compile(r"^\*\*(?P<title>[^*]+)\*\*\n\n(?P<list>(?:- .*\n(?:  .*\n)*)+)", re.MULTILINE)
ROOT = Path(__file__).resolve().parent.parent
FOLDER = re.compile(r"\[([^]]+)\]\(([^)#:]+)\)")
LINK = re.compile(r"\]\(([^)#]+\.md)\)")


def setup(app: Any) -> None:  # noqa: ANN401 - untyped there
    app.connect("source-read", _add_contents)
    app.connect("source-read", _unlink_folders)
    app.connect("build-finished", _write_index)


def _unlink_folders(_: Any, name: str, source: list[str]) -> None:  # noqa: ANN401 - untyped there
    """Leave links to folders as words: a site has files alone."""
    beside = (ROOT / name).parent
    source[0] = FOLDER.sub(lambda found: found[1] if (beside / found[2]).is_dir() else found[0], source[0])


def _write_index(app: Any, failure: Exception | None) -> None:  # noqa: ANN401 - untyped there
    """Write the page of the site's root, which leads to that of these documents: that one's links are of its folder."""
    if failure is None and app.builder.format == "html":
        page = app.builder.get_target_uri(root_doc)
        head = f'<meta charset="utf-8"><title>{project}</title><meta http-equiv="refresh" content="0; url={page}">'
        Path(app.outdir, "index.html").write_text(f'<!doctype html>{head}<a href="{page}">{project}</a>\n')


def _add_contents(_: Any, name: str, source: list[str]) -> None:  # noqa: ANN401 - untyped there
    """Make the sections of the index the site's table of contents, too."""
    if name != root_doc:
        return
    trees = ["```{toctree}\n:hidden:\n\n../README\n```"]
    for found in SECTION.finditer(source[0]):
        pages = "\n".join([page.removesuffix(".md") for page in LINK.findall(found["list"])])
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {found['title']}\n\n{pages}\n```")
    source[0] += "\n" + "\n\n".join(trees) + "\n"
