"""`python -m services.common.bus`: create every topic of the platform and check its partitions, then end.

Run once where a broker is new, before any service connects. Reads KAFKA_BOOTSTRAP_SERVERS and
KAFKA_REPLICATION (default 1).
"""

import asyncio
import os
import sys

from services.common.bus.admin import ensure_topics
from services.common.errors import HeadraceError
from services.common.topics import all_topics

_WITHIN_S = 60.0


def main() -> int:
    """0 when every topic is there, 1 with one sentence where the broker is not reached or differs."""
    bootstrap = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", "")
    if not bootstrap:
        sys.stderr.write("KAFKA_BOOTSTRAP_SERVERS is not set.\n")
        return 1
    replication = int(os.environ.get("KAFKA_REPLICATION", "1"))
    try:
        made = asyncio.run(ensure_topics(bootstrap, all_topics(), replication=replication, timeout=_WITHIN_S))
    except HeadraceError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    sys.stdout.write(f"{len(made)} topics made, {len(all_topics()) - len(made)} were there.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
