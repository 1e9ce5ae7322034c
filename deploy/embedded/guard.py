"""The second rope beside PR_SET_PDEATHSIG: ends the process groups of a supervisor that was killed.

Runs as a file of its own, with the standard library only. Standard input carries `+<group> <seconds>` and
`-<group>` lines; its end means that the supervisor is gone. Groups get `<seconds>` to end by themselves (the
kernel has already told each child), then SIGKILL. The supervisor's lock is inherited open, so that nobody
starts anew before everything is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time


def exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end(groups: dict[int, float]) -> None:
    """SIGKILL each group after its grace; return when all are gone, or a second later: what nobody reaps
    still has its number."""
    died = time.monotonic()
    last = max(groups.values(), default=0.0) + 1.0
    left = dict(groups)
    while left and time.monotonic() - died < last:
        for group, grace in list(left.items()):
            if not exists(group):
                del left[group]
            elif time.monotonic() - died >= grace:
                try:
                    os.killpg(group, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    del left[group]
        time.sleep(0.02)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: dict[int, float] = {}
    for line in sys.stdin:
        sign, words = line[:1], line[1:].split()
        if sign == "+":
            groups[int(words[0])] = float(words[1])
        elif sign == "-":
            groups.pop(int(words[0]), None)
    end(groups)


if __name__ == "__main__":
    main()
