"""`python -m deploy.embedded.supervise`: the background process behind `up`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from deploy.embedded import lock
from deploy.embedded.blueprint import draw
from deploy.embedded.configuration import Configuration
from deploy.embedded.stack import ALREADY_RUNS, WHILE_STDIN
from deploy.embedded.supervisor import Draw, Supervisor


def main(draw: Draw = draw) -> int:
    """Own the stack until told to stop. Exit code: 0 stopped, 1 failed, ALREADY_RUNS."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("aiokafka").setLevel(logging.ERROR)  # a broker that is not up yet is no news here
    configuration = Configuration.read(os.environ)
    configuration.home.mkdir(parents=True, exist_ok=True)
    descriptor = lock.acquire(configuration.home / "lock")
    if descriptor is None:
        return ALREADY_RUNS
    attached = WHILE_STDIN in sys.argv[1:]
    return asyncio.run(Supervisor(configuration, descriptor, draw).run(while_stdin=attached))


if __name__ == "__main__":
    sys.exit(main())
