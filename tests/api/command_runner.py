"""Runs commands one after the other, as a process of its own: starting one for each takes a second.

Reads lines of JSON, {"words": […], "environ": {…}}, and writes a line for each: the exit code, stdout and stderr.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from gateway.cli import main


def run(words: list[str], environ: dict[str, str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    os.environ.update(environ)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(**json.loads(line))) + "\n")
        sys.stdout.flush()
