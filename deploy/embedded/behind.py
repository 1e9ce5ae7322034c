"""What `make up` leaves to the background: `python -m deploy.embedded.behind`.

The first start of a stack runs plain Python. The hot path is compiled out of everybody's way, and then the
processes that requests run through are replaced by such that run it, without a request noticing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from deploy.embedded import native
from deploy.embedded.configuration import REPOSITORY
from deploy.embedded.process import EmbeddedError
from deploy.embedded.stack import Stack

_MODULE = "deploy.embedded.behind"


def begun() -> str:
    """Let a process of its own compile; the sentence says whether, empty where there is nothing to do."""
    if os.environ.get("HEADRACE_NATIVE") == "0" or native.find() is not None:
        return ""
    if reason := native.missing() or native.failure():
        return native.PLAIN.format(reason)
    subprocess.Popen(  # noqa: S603 - our own module
        ["nice", "-n", "19", sys.executable, "-m", _MODULE, "--here"],  # noqa: S607 - as the system has it
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return (
        "The hot path is being compiled in the background. In some minutes gateway, router and workers are "
        "replaced by compiled ones; no request is lost."
    )


def compile_and_renew(stack: Stack) -> bool:
    """Compile, and let `stack`, where it runs, go on with what was compiled. False where it does not."""
    try:
        native.build()
        # Whoever edited a source meanwhile gets what the sources say, not what they said.
        return native.find() is not None and stack.renew()
    except (native.NativeError, EmbeddedError, OSError):
        return False  # the reason stands in the log of the compiler or of the supervisor


def main() -> int:
    """Never fails: the source runs as well."""
    parser = argparse.ArgumentParser(prog=_MODULE, description="Compile the hot path, then use it.")
    parser.add_argument("--here", action="store_true", help="in this process, until it is done")
    if parser.parse_args().here:
        compile_and_renew(Stack(os.environ))
    elif sentence := begun():
        print(sentence)  # noqa: T201 - a command
    return 0


if __name__ == "__main__":
    sys.exit(main())
