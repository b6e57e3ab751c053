"""`gateway`, which is also `python -m gateway`: imports the command line, which takes a second or more, and runs it."""

import sys


def main() -> int:
    """Run a command and return its exit code; 130 also for a Ctrl-C before the command line is imported."""
    try:
        from gateway.cli import main as run  # noqa: PLC0415 - or a Ctrl-C meanwhile prints a traceback

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
