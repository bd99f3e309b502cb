"""Long random walks through worlds too large to exhaust: more tokens, several faults, more stages, a lagging ingress."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from actors.llumnix.migration.protocol import Limits

from . import model

FAVOURED = ("boundary", "reserve", "fetch", "attach", "-> ", "<- ")


class Migration(RuleBasedStateMachine):
    """One rule a kind of move, so that hypothesis can shrink to the moves that matter."""

    @initialize(
        prompt=st.integers(1, 6),
        max_tokens=st.integers(2, 12),
        faults=st.integers(0, 3),
        limits=st.builds(
            Limits,
            mode=st.sampled_from(["live", "live", "live", "recompute"]),
            last_stage_max_blocks=st.integers(0, 2),
            max_stages=st.integers(1, 4),
        ),
    )
    def begin(self, prompt: int, max_tokens: int, faults: int, limits: Limits) -> None:
        self.world = model.start(limits, max_tokens=max_tokens, prompt=prompt, faults=faults)

    def _go(self, pick: int, wanted) -> None:
        moves = sorted((m for m in model.moves(self.world) if wanted(m[0])), key=lambda m: m[0])
        if moves:
            _, self.world = moves[pick % len(moves)]

    @rule(pick=st.integers(0, 1000))
    def protocol_moves_on(self, pick: int) -> None:
        self._go(pick, lambda label: label.startswith(FAVOURED))

    @rule(pick=st.integers(0, 1000))
    def engines_decode(self, pick: int) -> None:
        self._go(pick, lambda label: label.endswith(("decodes", "ends")) or label.startswith("ingress"))

    @rule(pick=st.integers(0, 1000))
    def anything(self, pick: int) -> None:
        self._go(pick, lambda label: True)

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "world"):
            model.check(self.world)

    def teardown(self) -> None:
        """However it went, time-outs and what is under way bring it to an end in which nothing is left."""
        if not hasattr(self, "world"):
            return
        ends = ("boundary", "reserve", "fetch", "attach", "void", "cancel at", "reclaimed", "reclaim refused")
        ends += ("source times out", "destination times out", "source loses peer", "destination loses peer")
        for _ in range(100):
            if model.quiet(self.world):
                break
            self._go(0, lambda label: label.startswith(ends))
        assert model.quiet(self.world), f"it does not come to an end: {self.world}"
        model.check(self.world)


TestMigration = Migration.TestCase
TestMigration.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
