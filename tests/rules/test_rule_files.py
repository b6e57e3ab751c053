"""Which files are read, and which a reload looks at."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.rules import rule_files, schema_reader
from gateway.rules.file_stamps import stamp_of, stamps_of
from gateway.rules.load import InvalidRulesError, check_rules, load_rules
from gateway.rules.references import content_of
from gateway.rules.rule_tests import read_tests
from gateway.rules.yaml_document import text_of

ROUTES = """
version: 1
sources: {shop: {verify: {scheme: hmac, header: X-S, secrets: ["${file:secret}"]}}}
destinations: {ci: {url: "https://ci.example/"}}
routes: [{name: build, from: shop, to: ci}]
"""


def written(folder: Path, files: dict[str, str]) -> Path:
    """Write files, of which routes.yaml is the first one to be read."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "routes.yaml"


def errors(file: Path) -> list[str]:
    _, problems = check_rules(file, environ={})
    return [f"{Path(each.file).name}:{each.line}: {each.message}" for each in problems if each.severity == "error"]


def watched(file: Path) -> set[str]:
    rules = load_rules(file, environ={})
    return {str(each.relative_to(file.parent)) for each in rules.stamps}


# --- Tests ---


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("[{name: a, event: {source: shop, body: {v: 12345678901234567890123}}, expect: {routes: []}}]", "64 bits"),
        ("[{name: a, event: {source: shop, body: [.nan]}, expect: {routes: []}}]", "expected a finite number"),
        ("[{name: a, event: {source: shop, body: 1e400}, expect: {routes: []}}]", "expected a finite number"),
        ("[{name: a, event: {source: shop, body: !foo x}, expect: {routes: []}}]", "expected no tag but YAML's own"),
        ("[{name: a, name: b, event: {source: shop}, expect: {routes: []}}]", "expected each key once, got 'name'"),
        ("[{name: a, event: {source: shop, body: {? [1] : 2}}, expect: {routes: []}}]", "expected a string as a key"),
        ("!foo x", "expected no tag but YAML's own"),
        ("[" * 70 + "]" * 70, "expected at most 64 levels"),
        ("&t [*t, *t, *t]", "expected at most 64 levels"),
    ],
)
def test_a_mistake_below_tests_is_told_with_the_tests_alone(tmp_path: Path, tests: str, message: str) -> None:
    file = written(tmp_path, {"routes.yaml": ROUTES.replace("${file:secret}", "s3cret") + f"tests: {tests}\n"})
    rules, problems = check_rules(file, environ={})
    assert rules is not None
    assert not any("tests" in each.path for each in problems)
    _, told = read_tests([file], [])
    assert any(message in each.message and each.line == 6 for each in told), told


def test_a_mistake_that_an_alias_brings_from_tests_into_rules_is_one_of_the_rules(tmp_path: Path) -> None:
    text = ROUTES.replace("${file:secret}", "s3cret").replace("name: build", "name: *n")
    file = written(tmp_path, {"routes.yaml": f"tests: [{{name: &n .nan}}]\n{text}"})
    assert errors(file) == ["routes.yaml:1: expected a finite number, got another (in quotes it is a string)"]


# --- Includes ---


def test_beside_a_pattern_that_nothing_fits_names_are_checked(tmp_path: Path) -> None:
    """It defines nothing. A file that is missing may have defined any name."""
    text = ROUTES.replace("to: ci", "to: typo")
    assert errors(written(tmp_path, {"routes.yaml": text + "include: teams/*.yaml\n"})) == [
        "routes.yaml:5: unknown destination 'typo'"
    ]
    assert errors(written(tmp_path, {"routes.yaml": text + "include: team.yaml\n"})) == [
        "routes.yaml:6: expected a file at 'team.yaml', got none"
    ]


@pytest.mark.parametrize("name", [r"a\0b", r"a\0b/*.yaml"])
def test_a_name_that_no_file_has_is_a_problem(tmp_path: Path, name: str) -> None:
    text = ROUTES.replace("${file:secret}", "abcdefghijklmnopqrst")
    file = written(tmp_path, {"routes.yaml": f'{text}include: "{name}"\n'})
    assert errors(file) == ["routes.yaml:6: expected a file's name, got one with a NUL"]


def test_a_secret_whose_file_no_file_is_can_be_watched(tmp_path: Path) -> None:
    file = written(tmp_path, {"routes.yaml": ROUTES.replace("file:secret", r"file:a\0b")})
    with pytest.raises(InvalidRulesError, match="expected a file's path, got one with a NUL") as refusal:
        load_rules(file, environ={})
    assert stamps_of(refusal.value.stamps) == refusal.value.stamps


def test_a_circle_of_links_is_a_problem(tmp_path: Path) -> None:
    file = written(tmp_path, {"routes.yaml": ROUTES + "include: [a.yaml, '*.yml']\n", "secret": "a" * 16})
    for name, other in (("a.yaml", "b.yaml"), ("b.yaml", "a.yaml"), ("c.yml", "c.yml")):
        (tmp_path / name).symlink_to(other)
    assert [each.partition(", got")[0] for each in errors(file)] == [
        "a.yaml:0: expected a file that can be read",
        "c.yml:0: expected a file that can be read",
    ]


def test_a_folder_out_of_reach_is_like_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs these tests may read everything, so that the system can't be the one to refuse."""

    def refuse(_: Path, **__: object) -> None:
        raise PermissionError

    file = written(tmp_path, {"routes.yaml": ROUTES + "include: routes.d/*.yaml\n", "secret": "a" * 16})
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert errors(file) == []


# --- What is watched ---


@pytest.mark.parametrize(
    ("pattern", "folders"),
    [
        ("*.yml", {"."}),
        ("routes.d/*.yaml", {"routes.d"}),
        ("nowhere/*.yaml", {"nowhere"}),
        ("teams/*/routes.yaml", {"teams", "teams/a", "teams/b"}),
        ("teams/*/more/*.yml", {"teams", "teams/a", "teams/b", "teams/a/more"}),
        ("teams/[b]/*.yml", {"teams", "teams/b"}),
        ("teams/**/*.yml", {"teams", "teams/a", "teams/b", "teams/a/more", "teams/a/more/still"}),
    ],
)
def test_where_a_file_may_be_added_is_watched(tmp_path: Path, pattern: str, folders: set[str]) -> None:
    for name in ("routes.d", "teams/a/more/still", "teams/b"):
        (tmp_path / name).mkdir(parents=True)
    file = written(tmp_path, {"routes.yaml": f"{ROUTES}include: '{pattern}'\n", "secret": "a" * 16, "teams/c": ""})
    assert watched(file) == {"routes.yaml", "secret"} | folders


@pytest.mark.parametrize("name", ["routes.yaml", "team.yaml", "secret"])
def test_what_is_written_while_it_is_read_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A stamp from after the reading would be that of a content that nobody has read."""
    files = {"routes.yaml": ROUTES + "include: team.yaml\n", "team.yaml": "sources: {}\n", "secret": "a" * 16}
    file = written(tmp_path, files)

    def then_written(read: Callable[..., object]) -> Callable[..., object]:
        def reading(path: Path, *more: object) -> object:
            found = read(path, *more)
            if path.name == name:
                path.write_text(files[name] + " ")
            return found

        return reading

    monkeypatch.setattr(rule_files, "text_of", then_written(text_of))
    monkeypatch.setattr(schema_reader, "content_of", then_written(content_of))
    before = stamp_of(tmp_path / name)
    rules = load_rules(file, environ={})
    assert rules.stamps[tmp_path / name] == before
    now = stamps_of(rules.files)
    assert [each.name for each in now if now[each] != rules.stamps[each]] == [name]


def test_of_what_is_read_twice_the_earlier_stamp_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(
        tmp_path,
        {"routes.yaml": ROUTES.replace('"${file:secret}"', '"${file:secret}", "${file:secret}"'), "secret": "a" * 16},
    )
    read = content_of
    times = []

    def reading(path: Path) -> str:
        times.append(path)
        path.write_text("a" * (16 + len(times)))
        return read(path)

    before = stamp_of(tmp_path / "secret")
    monkeypatch.setattr(schema_reader, "content_of", reading)
    assert load_rules(file, environ={}).stamps[tmp_path / "secret"] == before
    assert len(times) == 2
