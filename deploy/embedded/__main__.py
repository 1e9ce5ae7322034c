"""`python -m deploy.embedded up|down|status|logs`."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - said here, before an import fails on an older Python
    sys.exit("Headrace needs Python 3.11 or later; this is " + sys.version.split()[0] + ".")

import argparse
import os
import signal

from deploy.embedded.commands import down, logs, status, up
from deploy.embedded.process import EmbeddedError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 refused or failed with one sentence on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.embedded", description="The stack on this machine."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    starting = actions.add_parser("up", help="start everything and wait until it is ready")
    starting.add_argument("--no-examples", action="store_true", help="do not register the example models")
    actions.add_parser("down", help="stop everything; data stays")
    actions.add_parser("status", help="the parts; exit code 0 only if all are healthy")
    logging = actions.add_parser("logs", help="what the parts wrote")
    logging.add_argument("part", nargs="?", help="gateway, router, worker, worker-0, postgres, supervisor, …")
    logging.add_argument("-f", "--follow", action="store_true", help="go on with what they write")
    chosen = parser.parse_args(argv)
    # A start that is told to end stops what it has started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        match chosen.action:
            case "up":
                return up(os.environ, examples=not chosen.no_examples)
            case "down":
                return down(os.environ)
            case "status":
                return status(os.environ)
            case _:
                return logs(os.environ, chosen.part, follow=chosen.follow)
    except EmbeddedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
