"""The documents as a site: whole, and without a link or an anchor that leads nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("site"))


def built(source: Path, target: Path) -> Path:
    """Build it as `make docs` does. Raises CalledProcessError for a warning."""
    options = ("-q", "-E", "-W", "--keep-going", "-d", target / "doctrees", "-c", source / "docs")
    command = [sys.executable, "-m", "sphinx", *map(str, (*options, source, target / "html"))]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target / "html"


def test_each_document_is_a_page_that_the_index_leads_to(site: Path) -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    index = (site / "docs/README.html").read_text()
    for document in documents:
        page = document.relative_to(ROOT).with_suffix(".html")
        assert (site / page).exists(), page
        assert page.name in index, page


def test_its_root_leads_to_the_index(site: Path) -> None:
    [page] = re.findall(r'http-equiv="refresh" content="0; url=([^"]+)"', (site / "index.html").read_text())
    assert page == "docs/README.html"
    assert (site / page).is_file()


def test_linked_files_of_other_kinds_can_be_fetched(site: Path) -> None:
    files = {file.name for file in (site / "_downloads").rglob("*") if file.is_file()}
    assert {"routes.yaml", "prometheus.yml", "values.yaml"} <= files


def test_it_can_be_searched_and_has_its_pictures(site: Path) -> None:
    assert "gatewayalldown" in (site / "searchindex.js").read_text()
    of_console = {"console-overview", "console-event", "console-phone", "console-rules"}
    pictures = {"overview", "routes", "log", "process"} | of_console
    assert {file.stem for file in (site / "_images").iterdir()} == pictures
    assert "invert" in (site / "_static/site.css").read_text()  # in the dark


@pytest.mark.parametrize("link", ["[x](none.md)", "[x](rules.md#none)", "[x](../deploy/none.yaml)"])
def test_a_link_that_leads_nowhere_fails(tmp_path: Path, link: str) -> None:
    for path in ("docs/conf.py", "docs/_static/site.css", "docs/rules.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text() if path != "docs/rules.md" else "# Rules\n")
    (tmp_path / "README.md").write_text("# Start\n")
    (tmp_path / "docs/README.md").write_text("# Documents\n\n**Writing rules**\n\n- [rules.md](rules.md): rules\n")
    built(tmp_path, tmp_path / "whole")
    (tmp_path / "docs/rules.md").write_text(f"# Rules\n\n{link}\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        built(tmp_path, tmp_path / "broken")
    assert "rules.md" in failed.value.stderr
