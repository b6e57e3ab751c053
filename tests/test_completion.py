"""What shells complete: asked as they ask, through the part that `gateway completion` prints for each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from argcomplete.shell_integration import shellcode

from dev.tools import TOOLS
from gateway.cli import main
from tests.tools import needed

pytestmark = pytest.mark.rotated(share=1 / 6, group="completion")

RULES = Path(__file__).resolve().parent.parent / "routes.yaml"
ASK = {
    "bash": """
eval "$({gateway} completion bash)"
line={line!r}
COMP_LINE=$line COMP_POINT=${{#line}} COMP_TYPE=9
read -ra COMP_WORDS <<< "$line"
_python_argcomplete gateway
printf '%s\\n' "${{COMPREPLY[@]}}"
""",
    # Its line editor, which there is only at a terminal, and the part of its completion system that ours calls.
    "zsh": """
module_path=(${{FPATH%/share/*}}/lib/*/zsh/*(N) $module_path)  # of one that was unpacked
compdef() {{ :; }}
_describe() {{ print -rl -- "${{(@P)2%%:*}}"; }}
eval "$({gateway} completion zsh)"
BUFFER={line!r} CURSOR=${{#BUFFER}} words=(${{(z)BUFFER}})
_python_argcomplete
""",
    "fish": "{gateway} completion fish | source; complete -C {line!r} | string split -f1 \\t",
}


@pytest.mark.parametrize("shell", ASK)
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gateway ru", {"run"}),
        ("gateway de", {"dead", "deliveries", "destination"}),
        ("gateway route p", {"pause"}),
        ("gateway route pause b", {"build-on-push"}),
        ("gateway dead list --ro", {"--route"}),
        ("gateway events sea", {"search"}),
        ("gateway events search --ind", {"--index"}),
        ("gateway run --index-d", {"--index-days"}),
        ("gateway replay --route build", {"build-on-push"}),
        ("gateway send git", {"github"}),
        ("gateway completion f", {"fish"}),
        ("gateway listen --for", {"--forward"}),
        ("gateway listen --source git", {"github"}),
        ("gateway trigger git", {"github", "gitlab"}),
        ("gateway trigger github pu", {"pull_request", "push"}),
        ("gateway trigger github --sou", {"--source"}),
        ("gateway trigger stripe invoice.payment_failed --source git", {"github"}),
    ],
)
def test_a_shell_completes_commands_options_and_names(
    shell: str, line: str, expected: set[str], tmp_path: Path
) -> None:
    assert offered(shell, line, tmp_path) == expected


@pytest.mark.parametrize("shell", ASK)
def test_names_are_left_out_where_there_are_no_rules(shell: str, tmp_path: Path) -> None:
    assert offered(shell, "gateway route pause b", tmp_path, rules=tmp_path / "none.yaml") == set()


def offered(shell: str, line: str, folder: Path, *, rules: Path = RULES) -> set[str]:
    program = found(shell)
    (folder / "gateway").write_text(f'#!/bin/sh\nexec {sys.executable} -m gateway "$@"\n')
    (folder / "gateway").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    told = subprocess.run(
        [program, *(["-f"] if shell == "zsh" else []), "-c", ASK[shell].format(gateway="gateway", line=line)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=os.environ | {"PATH": path, "GATEWAY_RULES": str(rules)},
    )
    return {word.strip() for word in told.stdout.split()}


def found(shell: str) -> str:
    """Return a shell's path, fetched if it is one that can be; without it the test is skipped."""
    if program := shutil.which(shell):
        return program
    if shell in TOOLS:
        return str(needed(shell))
    pytest.skip(f"needs {shell}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_part(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == shellcode(["gateway"], shell=shell) + "\n"


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
