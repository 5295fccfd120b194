"""The command line. Commands import what they need when they run, so ``openembed --help`` loads no torch."""

from __future__ import annotations

import errno
import logging
import os
import sys

import typer

from openembed.cli import data, encode, evaluate, export, mine, models, recipes, search, serve, sweep

app = typer.Typer(
    name="openembed",
    help="Turn language models into retrievers: run, train, evaluate, index and search embedding models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (models, encode, search, serve, export, mine, evaluate, recipes, sweep, data):
    module.register(app)


def main() -> None:
    """Runs the command line; user errors end with one clear line on standard error and exit code 2."""
    _write_progress()
    try:
        app()
    except RuntimeError as error:
        _end_when_lost(error)
        raise
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        if type(error).__name__ == "OtherRankError":
            sys.exit(2)  # that rank has said it
        fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail(f"no space left on the device{_at(error)}; nothing half-written was kept. Free space and run again.")
        raise
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to resume\n")
        sys.exit(130)


def fail(message: str) -> None:
    """Writes ``error: message`` to standard error, with the rank where there are several, and exits with code 2."""
    rank = f"rank {os.environ.get('RANK', '0')}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    sys.stderr.write(f"error: {rank}{message}\n")
    sys.exit(2)


def _write_progress() -> None:
    """Lets what is logged of the progress of long work through to standard error: where no bar is drawn, it would be silent."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("openembed.progress")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _end_when_lost(error: RuntimeError) -> None:
    """Ends this rank with one line when another one is gone; its own message says why."""
    from openembed.train.distributed import lost_contact

    if lost_contact(error):
        fail("another rank has ended; its message says why. Run the same command again to resume.")


def _at(error: OSError) -> str:
    return f" while writing {error.filename}" if error.filename else ""
