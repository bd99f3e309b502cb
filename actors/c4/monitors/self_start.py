"""An actor's endless loop as its own first call: it begins again with every restart, whoever is there to ask for it."""

from __future__ import annotations

import logging
import threading
from typing import Any

import ray

logger = logging.getLogger("sextant.c4")

AGAIN_S = 2.0


class SelfStart:
    """Make it in the actor's constructor; begin its method ``run`` with ``if not self_start.begin(): return``.

    A call that an actor sends to itself while Ray still takes it for restarting is refused, so the call is sent again until
    it has arrived.
    """

    def __init__(self) -> None:
        self._begun = threading.Event()
        self._me: Any = ray.get_runtime_context().current_actor
        threading.Thread(target=self._call, name="c4-self-start", daemon=True).start()

    def begin(self) -> bool:
        """True for the one call that is to run the loop."""
        first = not self._begun.is_set()
        self._begun.set()
        return first

    def _call(self) -> None:
        while not self._begun.is_set():
            try:
                self._me.run.remote()
            except Exception:
                logger.exception("an actor could not call itself and tries again")
            self._begun.wait(AGAIN_S)
