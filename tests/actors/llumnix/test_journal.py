"""The journal against an oracle: whatever is repeated, late or out of date, the client sees each token once, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.llumnix.engine.request import TokenChunk
from actors.llumnix.journal import Journal, JournalError


def chunk(index, tokens, epoch=1, text=None, **kwargs):
    text = "".join(f"<{t}>" for t in tokens) if text is None else text
    return TokenChunk("r", epoch, index, tuple(tokens), text, **kwargs)


def test_tokens_are_accepted_once_and_in_order():
    journal = Journal("r")
    assert journal.accept(chunk(0, [5, 6])).text == "<5><6>"
    assert journal.accept(chunk(0, [5, 6])) is None
    delta = journal.accept(chunk(2, [7], finish_reason="length"))
    assert (delta.token_ids, delta.text, delta.finish_reason) == ((7,), "<7>", "length")
    assert journal.token_ids == [5, 6, 7] and journal.finished and journal.dropped_chunks == 1


def test_a_gap_is_a_protocol_error():
    journal = Journal("r")
    journal.accept(chunk(0, [1]))
    with pytest.raises(JournalError, match="tokens 1 to 2 are missing"):
        journal.accept(chunk(3, [4]))


def test_an_older_epoch_is_fenced_even_when_its_tokens_are_new():
    journal = Journal("r")
    journal.accept(chunk(0, [1], epoch=3))
    assert journal.accept(chunk(1, [2], epoch=2)) is None
    assert journal.token_ids == [1]
    journal.fence(9)
    assert journal.accept(chunk(1, [2], epoch=3)) is None
    assert journal.accept(chunk(1, [2], epoch=9)).token_ids == (2,)


def test_a_chunk_that_overlaps_is_cut_in_tokens_text_and_logprobs():
    journal = Journal("r")
    journal.accept(chunk(0, [1], text="a"))
    journal.accept(chunk(1, [2], text=""))  # held back: may begin a stop string
    delta = journal.accept(chunk(1, [2, 3], epoch=2, text="bc", logprobs=("x", "y")))
    assert (delta.token_ids, delta.text, delta.logprobs) == ((3,), "bc", ("y",))


def test_an_overlap_inside_a_chunk_cannot_be_divided():
    journal = Journal("r")
    journal.accept(chunk(0, [1, 2]))
    with pytest.raises(JournalError, match="inside a chunk"):
        journal.accept(chunk(1, [2, 3]))


def test_other_tokens_for_known_positions_are_a_protocol_error():
    journal = Journal("r")
    journal.accept(chunk(0, [1, 2]))
    with pytest.raises(JournalError, match="other tokens"):
        journal.accept(chunk(0, [1, 9], epoch=2))


def test_an_end_before_known_tokens_is_an_error_unless_it_is_a_failure():
    journal = Journal("r")
    journal.accept(chunk(0, [1, 2]))
    with pytest.raises(JournalError, match="ends the request after 1 tokens"):
        journal.accept(chunk(0, [1], finish_reason="stop"))
    delta = journal.accept(chunk(0, [], finish_reason="error", error="lost", text=""))
    assert delta.finish_reason == "error" and journal.finished


def test_nothing_is_accepted_after_the_end():
    journal = Journal("r")
    journal.accept(chunk(0, [1], finish_reason="stop"))
    assert journal.accept(chunk(1, [2], epoch=5)) is None
    assert journal.token_ids == [1]


@given(data=st.data())
def test_any_interleaving_of_owners_yields_the_sequence_exactly_once(data):
    """Owners take over one after the other; each sends again from some boundary at or before the client's end (its
    unacknowledged chunks), while stale chunks of earlier owners keep arriving. Oracle: the sequence itself."""
    tokens = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=30))
    texts = [data.draw(st.sampled_from(["", "a", "bc", "é"])) for _ in tokens]
    journal, received, stale = Journal("r"), [], []
    seen_text, boundaries, epoch = "", [0], 1

    def send(start, stop, with_epoch):
        finish = "length" if stop == len(tokens) else None
        return chunk(start, tokens[start:stop], with_epoch, "".join(texts[start:stop]), finish_reason=finish)

    position = 0
    while not journal.finished:
        action = data.draw(st.sampled_from(["step", "step", "migrate", "stale", "repeat"]))
        if action == "migrate":
            epoch += data.draw(st.integers(1, 3))
            position = data.draw(st.sampled_from([b for b in boundaries if b <= len(received)]))
            continue
        if action == "stale" and stale:
            old = data.draw(st.sampled_from(stale))
            if old.epoch < journal.epoch:
                assert journal.accept(old) is None
            continue
        start = data.draw(st.sampled_from(boundaries)) if action == "repeat" else position
        later = [b for b in boundaries if b > start]
        stop = (
            data.draw(st.sampled_from(later))
            if later and start < len(received)
            else data.draw(st.integers(start + 1, len(tokens)))
        )
        sent = send(start, stop, epoch)
        delta = journal.accept(sent)
        stale.append(sent)
        if delta is not None:
            received.extend(delta.token_ids)
            seen_text += delta.text
            boundaries.append(stop)
        position = max(position, stop) if action != "repeat" else position
    assert received == tokens == journal.token_ids
    assert seen_text == "".join(texts)
