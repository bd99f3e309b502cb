"""A world for the migration protocol: one source, one destination, one request, and everything that can go wrong between.

Immutable and hashable, so that it can be walked at random (hypothesis) and exhaustively (breadth first). The network is the
most hostile one: every message ever sent may be delivered at any time, any number of times, or never. The oracle knows
nothing of the protocol: token i of the request has value i; a token computed from keys and values that never were in its
blocks has value -1; the ingress keeps a journal by the rule that it follows live.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from actors.llumnix.engine.request import Request, SamplingParams, SequenceSnapshot
from actors.llumnix.migration import messages as m
from actors.llumnix.migration.protocol import (
    DestinationPhase,
    DestinationState,
    Limits,
    SourcePhase,
    SourceState,
    step_destination,
    step_source,
)

LAYOUT = m.KVLayout("numerics", 2, 64)
BLOCK = 2
OLD_EPOCH, EPOCH = 1, 10


@dataclass(frozen=True)
class Owner:
    """A request inside an engine. ``computed`` counts tokens in its blocks; output token i is sampled from i+prompt computed."""

    epoch: int
    computed: int
    output: tuple[int, ...]
    sent: int
    """Output tokens that left the outbox for good (the ingress acknowledged them)."""
    valid: bool = True
    """Its blocks hold what they should."""
    detached: bool = False


@dataclass(frozen=True)
class World:
    source: SourceState
    destination: DestinationState
    src: Owner | None
    dst: Owner | None = None
    prompt: int = 1
    max_tokens: int = 3
    to_dst: frozenset = frozenset()
    to_src: frozenset = frozenset()
    # the source's engine and driver
    held: bool = False
    src_work: tuple = ()
    """Actions that the source's driver still has to do: Advance, Reclaim."""
    src_alive: bool = True
    preempted: bool = False
    # the destination's
    reserved: int | None = None
    have: tuple[int, ...] = ()
    """Tokens present in each reserved block."""
    dst_work: tuple = ()
    dst_alive: bool = True
    dst_fence: int = -1
    stop_fetch: bool = False
    # authority and client
    last_epoch: int = EPOCH
    void: int = -1
    """The destination is to drop everything up to this epoch, and has not been told yet."""
    cancelled: bool = False
    cancel_src: bool = False
    cancel_dst: bool = False
    # ingress
    newest: int = OLD_EPOCH
    journal: tuple[int, ...] = ()
    error: str = ""
    finished: tuple[str, ...] = ()
    faults: int = field(default=0)
    """Faults that may still be injected: death, broken connection, preemption, lack of memory, a client that leaves."""
    lag: bool = True
    """The ingress polls now and then; else it reads every token at once (fewer worlds)."""


def start(
    limits: Limits | None = None, max_tokens: int = 3, prompt: int = 1, faults: int = 1, lag: bool = True
) -> World:
    limits = limits or Limits(last_stage_max_blocks=1, max_stages=2)
    world = World(
        SourceState("r", EPOCH, LAYOUT, limits),
        DestinationState("r", EPOCH, LAYOUT),
        Owner(OLD_EPOCH, prompt, (0,), 0),
        prompt=prompt,
        max_tokens=max_tokens,
        faults=faults,
        lag=lag,
    )
    return _source(world, m.Start())


# ---- drivers: what the live migrator does, in the small ----------------------------------------------------------------


def _source(w: World, event) -> World:
    state, actions = step_source(w.source, event)
    w = replace(w, source=state)
    for action in actions:
        match action:
            case m.Send(message):
                if isinstance(message, m.CopyStage | m.Commit):
                    message = replace(message, offer=message.block_ids)
                w = replace(w, to_dst=w.to_dst | {message})
            case m.Advance() | m.Reclaim():
                w = replace(w, src_work=(*w.src_work, action))
            case m.Unhold():
                w = replace(w, held=False)
            case m.Reattach(epoch):
                assert w.src is not None and w.src.detached, "reattach of a request that is not detached"
                w = replace(w, src=replace(w.src, detached=False, epoch=w.src.epoch if epoch is None else epoch))
                if w.cancelled and not w.cancel_src:  # the engine's fence
                    w = replace(w, src=None)
            case m.Release():
                assert w.src is not None and w.src.detached, "release of a request that is not detached"
                w = replace(w, src=None)
            case m.Finish(outcome):
                assert "source" not in w.finished, "the source finished twice"
                w = replace(w, finished=(*w.finished, "source", outcome))
    return w


def _destination(w: World, event) -> World:
    state, actions = step_destination(w.destination, event)
    w = replace(w, destination=state)
    for action in actions:
        match action:
            case m.Send(message):
                w = replace(w, to_src=w.to_src | {message})
            case m.Reserve() | m.Fetch() | m.Attach():
                w = replace(w, dst_work=(*w.dst_work, action))
            case m.CancelReservation():
                assert not any(isinstance(x, m.Fetch) for x in w.dst_work), "blocks given back while being written"
                w = replace(w, reserved=None, have=())
            case m.StopFetch():
                w = replace(w, stop_fetch=True)
            case m.Drop(epoch):
                w = _fence(w, epoch)
            case m.Finish():
                pass
    return w


def _fence(w: World, epoch: int) -> World:
    w = replace(w, dst_fence=max(w.dst_fence, epoch))
    if w.dst is not None and w.dst.epoch <= epoch:
        w = replace(w, dst=None)
    return w


def _tokens_in(owner: Owner, blocks: Iterator[int] | tuple[int, ...]) -> list[int]:
    return [max(0, min(BLOCK, owner.computed - BLOCK * j)) for j in blocks]


def _decode(owner: Owner, w: World) -> Owner | None:
    value = len(owner.output) if owner.valid else -1
    return replace(owner, computed=owner.computed + 1, output=(*owner.output, value))


def _ended(owner: Owner, w: World) -> bool:
    return len(owner.output) >= w.max_tokens


def _read(w: World, owner: Owner) -> tuple[World, Owner]:
    """The ingress polls an outbox and acknowledges everything."""
    if owner.epoch < w.newest:
        return w, replace(owner, sent=len(owner.output))
    w = replace(w, newest=owner.epoch)
    if owner.sent > len(w.journal):
        return replace(w, error=f"tokens {len(w.journal)}..{owner.sent - 1} were lost"), owner
    journal = w.journal + owner.output[len(w.journal) :]
    return replace(w, journal=journal), replace(owner, sent=len(owner.output))


# ---- everything that can happen next ------------------------------------------------------------------------------------


def moves(w: World) -> Iterator[tuple[str, World]]:
    """Every (label, next world)."""
    yield from _network(w)
    yield from _engines(w)
    if w.src_alive:
        yield from _source_moves(w)
    if w.dst_alive:
        yield from _destination_moves(w)
    yield from _faults(w)


def _network(w: World) -> Iterator[tuple[str, World]]:
    if w.dst_alive:
        for message in w.to_dst:
            yield f"-> {type(message).__name__}", _destination(w, message)
    if w.src_alive:
        for message in w.to_src:
            yield f"<- {type(message).__name__}", _source(w, message)


def _engines(w: World) -> Iterator[tuple[str, World]]:
    for name in ("src", "dst"):
        owner = getattr(w, name)
        if owner is None:
            continue
        if owner.sent < len(owner.output) and not owner.detached:
            read, acked = _read(w, owner)
            yield f"ingress reads {name}", replace(read, **{name: acked})
            if not w.lag:
                return
        if owner.detached:
            continue
        if _ended(owner, w):
            if owner.sent == len(owner.output):
                yield f"{name} ends", replace(w, **{name: None})
        else:
            yield f"{name} decodes", replace(w, **{name: _decode(owner, w)})


def _source_moves(w: World) -> Iterator[tuple[str, World]]:
    for i, action in enumerate(w.src_work):
        rest = replace(w, src_work=w.src_work[:i] + w.src_work[i + 1 :])
        if isinstance(action, m.Advance):
            yield "boundary", _advance(rest, action)
        else:
            known_void = replace(rest, last_epoch=w.last_epoch + 1, void=max(w.void, action.failed_epoch))
            if w.cancelled:
                yield "reclaim refused", _source(replace(rest, void=known_void.void), m.Reclaimed(None))
            else:
                yield "reclaimed", _source(known_void, m.Reclaimed(known_void.last_epoch))
                if w.last_epoch == EPOCH:  # The answer is lost once; the driver asks again.
                    yield "reclaim answer lost", replace(known_void, src_work=w.src_work)
    if w.source.phase in (SourcePhase.PREPARING, SourcePhase.COPYING, SourcePhase.COMMITTING):
        yield "source times out", _source(w, m.Timeout())
    if not w.dst_alive:
        yield "source loses peer", _source(w, m.PeerLost())
    if w.cancel_src:
        after = replace(w, cancel_src=False)
        if after.src is not None and not after.src.detached:
            after = replace(after, src=None)
        yield "cancel at source", _source(after, m.Stop(m.AbortReason.CANCELLED))


def _advance(w: World, action: m.Advance) -> World:
    owner = w.src
    if owner is None or _ended(owner, w):
        return _source(w, m.Gone(m.AbortReason.FINISHED))
    if w.preempted:
        return _source(w, m.Gone(m.AbortReason.PREEMPTED))
    blocks = -(-owner.computed // BLOCK)
    w = replace(w, held=True)
    if blocks - action.first <= action.at_most:
        unacked_from = owner.sent
        snapshot = SequenceSnapshot(
            request=Request("r", (0,) * w.prompt, SamplingParams(), 0.0, epoch=owner.epoch),
            output_token_ids=owner.output,
            num_computed_tokens=owner.computed,
            block_hashes=(),
            text_state=b"",
            num_preemptions=0,
            cached_tokens=unacked_from,
        )
        w = replace(w, src=replace(owner, detached=True))
        return _source(w, m.Detached(action.first, tuple(range(action.first, blocks)), snapshot))
    full = tuple(range(action.first, owner.computed // BLOCK))
    return _source(w, m.Grew(action.first, full, (), blocks))


def _destination_moves(w: World) -> Iterator[tuple[str, World]]:
    for i, action in enumerate(w.dst_work):
        rest = replace(w, dst_work=w.dst_work[:i] + w.dst_work[i + 1 :])
        match action:
            case m.Reserve(stage, num_blocks, _):
                size = max(num_blocks, len(w.have))
                reserved = replace(rest, reserved=size, have=w.have + (0,) * (size - len(w.have)))
                yield "reserve", _destination(reserved, m.Reserved(stage, size, 0))
                if w.faults:
                    yield "no memory", _destination(replace(rest, faults=w.faults - 1), m.ReserveFailed(stage))
            case m.Fetch(stage, first, _, offer, _):
                assert w.reserved is not None and w.reserved >= first + len(offer), "a copy outside the reservation"
                # The source's lease is checked at the end of the copy.
                if w.held and w.src is not None and not w.stop_fetch:
                    have = list(w.have)
                    have[first : first + len(offer)] = _tokens_in(w.src, offer)
                    yield "fetch", _destination(replace(rest, have=tuple(have)), m.Fetched(stage))
                elif w.stop_fetch or not w.held or not w.src_alive:
                    yield "fetch fails", _destination(rest, m.FetchFailed(stage))
                else:  # The request ended, its blocks are held: what is read is what it was.
                    yield "fetch", _destination(rest, m.Fetched(stage))
            case m.Attach(commit):
                yield "attach", _attach(rest, commit)
    if w.destination.phase in (DestinationPhase.READY, DestinationPhase.COMPLETING, DestinationPhase.FETCHING):
        yield "destination times out", _destination(w, m.Timeout())
    if not w.src_alive:
        yield "destination loses peer", _destination(w, m.PeerLost())
    if w.void > w.dst_fence:
        yield "void at destination", _fence(w, w.void)
    if w.cancel_dst:
        yield "cancel at destination", _fence(replace(w, cancel_dst=False), 1 << 60)


def _attach(w: World, commit: m.Commit) -> World:
    snapshot = commit.snapshot
    if w.destination.epoch <= w.dst_fence:
        return _destination(w, m.AttachFailed("fenced"))
    assert w.dst is None, "attached twice"
    computed = snapshot.num_computed_tokens
    present = [max(0, min(BLOCK, computed - BLOCK * j)) for j in range(-(-computed // BLOCK))]
    assert w.reserved is not None and w.reserved >= len(present), "attached with too few blocks"
    valid = all(have >= want for have, want in zip(w.have, present, strict=False))
    output, first = snapshot.output_token_ids, snapshot.cached_tokens
    owner = Owner(w.destination.epoch, max(computed, w.prompt), output, min(first, len(output)), valid)
    if not computed:  # Prefilled again, from the tokens.
        owner = replace(owner, computed=w.prompt + len(output) - 1, valid=True)
    w = replace(w, dst=owner, reserved=None, have=())
    return _destination(w, m.Attached())


def _faults(w: World) -> Iterator[tuple[str, World]]:
    if not w.faults:
        return
    less = replace(w, faults=w.faults - 1)
    if w.src_alive:
        yield "source dies", replace(less, src_alive=False, src=None, held=False, src_work=())
        if w.src is not None and not w.src.detached and not w.preempted:
            yield "source preempts", replace(less, preempted=True)
    if w.dst_alive:
        dead = replace(less, dst_alive=False, dst=None, reserved=None, have=(), dst_work=())
        yield "destination dies", dead
    if w.src_alive and w.dst_alive:
        yield "connection breaks at source", _source(less, m.PeerLost())
        yield "connection breaks at destination", _destination(less, m.PeerLost())
    if not w.cancelled:
        yield "client leaves", replace(less, cancelled=True, cancel_src=True, cancel_dst=True)


# ---- what must always hold ---------------------------------------------------------------------------------------------


def check(w: World) -> None:
    """Raise AssertionError if the world is wrong in any state, or leaks in a state where everything has ended."""
    assert not w.error, w.error
    assert w.journal == tuple(range(len(w.journal))), f"the client saw {w.journal}"
    assert len(w.journal) <= w.max_tokens
    owners = [o for o in (w.src, w.dst) if o is not None and not o.detached]
    assert len({o.epoch for o in owners}) == len(owners), "two owners of one epoch"
    if w.src is not None and not w.src.detached and EPOCH in [o.epoch for o in owners]:
        assert w.src.epoch != EPOCH, "the source goes on under the migration's epoch"
    newest = max((o.epoch for o in owners), default=0)
    assert sum(o.epoch == newest for o in owners) <= 1
    committed = any(isinstance(x, m.Commit) for x in w.to_dst)
    if committed and w.src is not None and not w.src.detached:
        assert w.src.epoch > EPOCH, "COMMIT is out and the source goes on under the old epoch"
    if quiet(w):
        if w.src_alive:
            assert not w.held, "the source still holds blocks for the peer"
            assert w.src is None or not w.src.detached, "a detached request is left behind"
        if w.dst_alive:
            assert w.reserved is None, "the destination still has blocks reserved"
        assert len(owners) <= 1 or w.src is None or w.dst is None or _superseded(w), "two owners at the end"
        if w.cancelled:
            assert not owners, "the client is gone and the request lives on"
        elif w.src_alive and w.dst_alive and len(w.journal) < w.max_tokens:
            assert owners, "nobody has the request"


def _superseded(w: World) -> bool:
    """The destination's copy is void, and it is about to be told."""
    return w.void >= EPOCH > w.dst_fence


def quiet(w: World) -> bool:
    """Nothing is under way on either side: both machines ended (or the destination's never began), nobody is to be told."""
    source_done = not w.src_alive or (w.source.ended and not w.src_work)
    begun = w.destination.phase is not DestinationPhase.NEW
    destination_done = not w.dst_alive or ((w.destination.ended or not begun) and not w.dst_work)
    source_told = not w.src_alive or not w.cancel_src
    destination_told = not w.dst_alive or (w.void <= w.dst_fence and not w.cancel_dst)
    return source_done and destination_done and source_told and destination_told
