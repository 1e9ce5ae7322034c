"""What a service waits for before it takes traffic, with the reason for each part that is not ready."""

from __future__ import annotations

from collections.abc import Callable

Check = Callable[[], str | None]


class Health:
    """Named parts, each ready or not ready with a reason. A service without parts is ready."""

    def __init__(self, *waiting_for: str) -> None:
        """`waiting_for` are parts that are not ready from the start ("starting")."""
        self._states: dict[str, str | None] = dict.fromkeys(waiting_for, "starting")
        self._checks: dict[str, Check] = {}
        self._draining = False

    def set_ready(self, part: str) -> None:
        """`part` works."""
        self._states[part] = None

    def set_unready(self, part: str, reason: str) -> None:
        """`part` does not work; `reason` is shown to whoever asks."""
        self._states[part] = reason

    def add_check(self, part: str, check: Check) -> None:
        """Ask `check` each time instead: None for ready, else the reason. It must return at once."""
        self._checks[part] = check

    def start_draining(self) -> None:
        """Not ready from now on, whatever the parts say: no new traffic is wanted."""
        self._draining = True

    @property
    def ready(self) -> bool:
        """Whether traffic is wanted."""
        return not self.reasons()

    def reasons(self) -> dict[str, str]:
        """The parts that are not ready, and why."""
        found = {part: reason for part, reason in self._states.items() if reason is not None}
        for part, check in self._checks.items():
            reason = check()
            if reason is not None:
                found[part] = reason
        if self._draining:
            found["process"] = "draining"
        return found

    def parts(self) -> list[str]:
        """Every part that is known, in the order in which it was named."""
        return list(dict.fromkeys([*self._states, *self._checks]))
