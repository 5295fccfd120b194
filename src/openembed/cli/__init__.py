"""The command line. Commands import what they need when they run, so ``openembed --help`` loads no torch."""

from __future__ import annotations

import errno
import sys

import typer

from openembed.cli import data, evaluate, mine, models, recipes, search, sweep

app = typer.Typer(
    name="openembed",
    help="Turn language models into retrievers: run, train, evaluate, index and search embedding models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (models, search, mine, evaluate, recipes, sweep, data):
    module.register(app)


def main() -> None:
    """Runs the command line; user errors end with one clear line on standard error and exit code 2."""
    try:
        app()
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail(f"no space left on the device{_at(error)}; nothing half-written was kept. Free space and run again.")
        raise
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        sys.exit(130)


def fail(message: str) -> None:
    """Writes ``error: message`` to standard error and exits with code 2."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _at(error: OSError) -> str:
    return f" while writing {error.filename}" if error.filename else ""
