"""How fast reservations are let go, and whether anybody is there to take them. Pure.

The window is what congestion control on a network is: each reservation that was released and ran into its deadline
halves how many may be out at once, each that was bound adds one to it.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST = 4
CALLED_S = 10.0
"""A kube-scheduler that called so long ago at most is taken to be alive, whatever its Lease says."""

PROBE = 1
"""Pods that may be out while nobody knows whether a kube-scheduler runs: who has no Lease shows it by calling."""


@dataclass(slots=True)
class Window:
    """How many pods may be released and not bound.

    Attributes:
        most: the largest it may grow.
        size: what it is now.
    """

    most: int = 256
    size: int = 256

    def expired(self) -> None:
        """Take note that a released reservation was not taken up in time."""
        self.size = max(self.size // 2, min(LEAST, self.most))

    def bound(self) -> None:
        """Take note that a released pod was bound."""
        self.size = min(self.size + 1, self.most)


@dataclass(frozen=True, slots=True)
class Heard:
    """What is known of kube-scheduler.

    Attributes:
        lease: its Lease is fresh (True) or not (False); None = it has none, or it cannot be read.
        called_s: seconds since its last call; None = it never called.
    """

    lease: bool | None
    called_s: float | None

    @property
    def there(self) -> bool:
        """Somebody certainly takes what is let go."""
        return bool(self.lease) or (self.called_s is not None and self.called_s <= CALLED_S)


def may_release(window: int, outstanding: int, heard: Heard) -> int:
    """Return how many more pods may be released now; 0 while kube-scheduler is not there to take them."""
    if heard.there:
        return max(window - outstanding, 0)
    return max(PROBE - outstanding, 0) if heard.lease is None else 0
