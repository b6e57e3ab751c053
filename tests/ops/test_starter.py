"""What `gateway init` writes is right for each provider: checked strictly, formatted, tested."""

from pathlib import Path

import pytest

from gateway.cli import main
from gateway.model import UsageError
from gateway.ops.check_reports import without_allowed
from gateway.ops.rule_format import formatted
from gateway.ops.rule_tests import run_test
from gateway.ops.starter import RULES, TESTS, job_of, repository_of, starter
from gateway.rules.load import check_rules
from gateway.rules.rule_tests import read_tests
from gateway.verify.presets import PRESETS


def write(folder: Path, provider: str, to: str) -> None:
    for path, text in starter(provider, to).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


@pytest.mark.parametrize("provider", PRESETS)
def test_what_is_written_passes_its_own_job(provider: str, tmp_path: Path) -> None:
    passes(tmp_path, provider, f"https://{provider}.acme.example/hooks?a=1&b=%22")


def passes(tmp_path: Path, provider: str, to: str) -> None:
    write(tmp_path, provider, to)
    rules, problems = check_rules(tmp_path / RULES, environ={}, lints=True)
    assert without_allowed(problems)[0] == []
    for path in (RULES, TESTS):
        assert formatted(tmp_path / path) == (tmp_path / path).read_text()
    assert max(map(len, (tmp_path / RULES).read_text().splitlines())) <= 200
    tests, wrong = read_tests([], [tmp_path / TESTS])
    assert wrong == []
    assert rules is not None
    (result,) = [run_test(rules, test, {}, now=0.0) for test in tests]
    assert result.differences == ()


@pytest.mark.parametrize(
    "to", ["https://[::1]/x", "https://10.0.0.1:8443/", "https://ci.example/\U0001f600", "https://EX\u00c4MPLE.com/"]
)
def test_any_address_makes_rules_that_are_right(to: str, tmp_path: Path) -> None:
    passes(tmp_path, "github", to)


def test_the_job_runs_the_commands(tmp_path: Path) -> None:
    write(tmp_path, "github", "https://ci.example/")
    job = (tmp_path / job_of(Path())).read_text()
    for each in ("gateway fmt --check", "gateway check routes.yaml --strict", "gateway test routes.yaml"):
        assert each in job


def test_what_has_to_be_replaced_is_told_in_the_file_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--provider", "twilio", "--to", "https://ci.example/"]) == 0
    lines = RULES.read_text().splitlines()
    [at] = [number for number, line in enumerate(lines) if "public_url: https://hooks.example.com/" in line]
    assert lines[at - 1].strip().startswith("# replace this by the address")
    assert (
        "to replace: `public_url` in routes.yaml, by the address that the provider calls\n" in capsys.readouterr().out
    )
    assert main(["init", "other", "--provider", "github", "--to", "https://ci.example/"]) == 0
    assert "to replace" not in capsys.readouterr().out


def test_in_a_folder_of_a_repository_the_job_is_at_its_root_and_checks_that_folder(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "our edge" / "rules").mkdir(parents=True)
    assert repository_of(tmp_path / "our edge" / "rules") == (tmp_path, Path("our edge/rules"))
    assert repository_of(tmp_path / "our edge" / ".." / "our edge") == (tmp_path, Path("our edge"))
    files = starter("github", "https://ci.example/", Path("our edge/rules"))
    job = Path(".github/workflows/rules-our-edge-rules.yml")
    assert files.keys() == {Path("our edge/rules") / RULES, Path("our edge/rules") / TESTS, job}
    assert files[job].startswith("name: rules-our-edge-rules\n")
    assert "gateway check 'our edge/rules/routes.yaml' --strict" in files[job]


def test_two_folders_of_a_repository_have_a_job_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    for folder in (".", "payments", "Pay ments", "pay-ments", "支払い"):
        assert main(["init", folder, "--provider", "github", "--to", "https://ci.example/"]) == 0
    jobs = {path.name: path.read_text() for path in (tmp_path / ".github/workflows").iterdir()}
    assert sorted(jobs) == [
        "rules-2.yml",
        "rules-pay-ments-2.yml",
        "rules-pay-ments.yml",
        "rules-payments.yml",
        "rules.yml",
    ]
    assert "gateway check 'Pay ments/routes.yaml' --strict" in jobs["rules-pay-ments.yml"]
    assert "gateway check pay-ments/routes.yaml --strict" in jobs["rules-pay-ments-2.yml"]
    assert "name: rules-2\n" in jobs["rules-2.yml"]


@pytest.mark.parametrize(
    ("provider", "to", "message"),
    [
        ("gihub", "https://a.example/", "expected a provider's name, got 'gihub', did you mean 'github'?"),
        ("x-unknown-x", "https://a.example/", "expected a provider's name, got 'x-unknown-x'; `gateway providers`"),
        ("github", "ftp://a", "--to: expected an http or https URL, got the scheme 'ftp'"),
    ],
)
def test_what_it_cannot_write(provider: str, to: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        starter(provider, to)
