"""The rule files on the disk as people may see them, read anew only when one has changed."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.ops.shown_rules import Entry, ShownFile, shown_file
from gateway.rules.file_stamps import Stamps, stamps_of
from gateway.rules.load import gc_paused
from gateway.rules.schema import ROOT
from gateway.rules.yaml_document import text_of

_KEYS = frozenset([key.name for key in ROOT.keys])
_TEMPLATE = re.compile(r"\$\{\{.*?\}\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileView:
    """A rule file, as it is on the disk."""

    path: Path
    shown: ShownFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something of the rules is: the number of the file, from 0 on, and the entry there."""

    file: int
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class FileViews:
    """The rule file and those that it includes. `version` is a digest of them, as `Rules.version` is."""

    files: Sequence[FileView]
    version: str
    stamps: Stamps

    def place_of(self, kind: str, name: str) -> Place | None:
        """Return where a source, destination or route is; of a route that is one of several of a `foreach`, that."""
        found: Place | None = None
        for number, file in enumerate(self.files):
            for entry in file.shown.entries:
                if entry.kind != kind:
                    continue
                if entry.name == name:
                    return Place(file=number, entry=entry)
                if found is None and is_template_of(entry.name, name):
                    found = Place(file=number, entry=entry)
        return found


def is_template_of(written: str, name: str) -> bool:
    """Return whether a name is one that a name with templates, as written, may become."""
    if "${{" not in written:
        return False
    pattern = ".+".join([re.escape(part) for part in _TEMPLATE.split(written)])
    return re.fullmatch(pattern, name) is not None


def file_views(root: Path, files: Iterable[Path]) -> FileViews:
    """Read the rule files among those that rules were read from; the first is the root.

    The others may be secrets, or certificates: what hasn't the keys of a rule file, and no others, isn't shown. Takes
    seconds for 10,000 routes.
    """
    paths = [root, *[each for each in files if each.absolute() != root.absolute()]]
    stamps = stamps_of(paths)
    version = hashlib.blake2b(digest_size=4)
    views: list[FileView] = []
    with gc_paused():
        for path in paths:
            if path.is_dir():
                continue
            text = text_of(path, [])
            shown = ShownFile(problem="it can't be read, or isn't text") if text is None else shown_file(text)
            if path != root and not (shown.keys and shown.keys <= _KEYS):
                continue
            version.update(f"{path.name}\0{text}\0".encode("utf-8", "surrogatepass"))
            views.append(FileView(path=path, shown=shown))
    return FileViews(files=views, version=version.hexdigest(), stamps=stamps)
