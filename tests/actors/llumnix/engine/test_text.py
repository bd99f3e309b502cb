"""Incremental text against the whole decode and brute-force search, however the bytes are divided into tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.llumnix.engine.text import IncrementalText
from tests.actors.llumnix.engine.fakes import first_stop

ALPHABET = st.text("abcAé日😀 \n", max_size=40)


@st.composite
def split_bytes(draw):
    """Bytes, often valid UTF-8 and sometimes not, cut anywhere."""
    raw = draw(ALPHABET).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at:]
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    return raw, [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


stop_lists = st.lists(
    st.one_of(st.text("abcé日", min_size=1, max_size=5), st.sampled_from(["ab", "aab", "abab", "b", "�", "日a"])),
    max_size=4,
).map(tuple)


def play(text: IncrementalText, tokens: list[bytes], carry=lambda text: text) -> tuple[list[str], str | None]:
    pieces = []
    for token in tokens:
        piece, stop = text.push(token)
        pieces.append(piece)
        if stop is not None:
            return pieces, stop
        text = carry(text)
    piece, stop = text.finish()
    return [*pieces, piece], stop


@settings(max_examples=1500, deadline=None)
@given(split_bytes(), stop_lists, st.booleans())
def test_any_split_gives_the_text_up_to_the_first_stop(parts, stops, include):
    raw, tokens = parts
    whole = raw.decode("utf-8", "replace")
    found = first_stop(whole, stops)
    want = whole if found is None else whole[: found[0] if include else found[0] - len(found[1])]
    pieces, stop = play(IncrementalText(stops, include), tokens)
    assert "".join(pieces) == want
    assert stop == (found[1] if found else None)


@settings(max_examples=500, deadline=None)
@given(split_bytes(), stop_lists)
def test_state_travels(parts, stops):
    _, tokens = parts

    def carry(text):
        other = IncrementalText(stops)
        other.restore(text.state())
        assert other.state() == text.state()
        return other

    assert play(IncrementalText(stops), tokens, carry) == play(IncrementalText(stops), tokens)


@settings(max_examples=300, deadline=None)
@given(split_bytes(), stop_lists)
def test_nothing_is_held_without_a_reason(parts, stops):
    """What is held back is a beginning of a stop string; without stop strings only incomplete code points wait."""
    _, tokens = parts
    text = IncrementalText(stops)
    released = ""
    for i, token in enumerate(tokens):
        piece, stop = text.push(token)
        if stop is not None:
            return
        released += piece
        sofar = b"".join(tokens[: i + 1]).decode("utf-8", "replace")
        held = sofar[len(released) :].rstrip("�")
        assert sofar.startswith(released) or "�" in sofar
        assert "�" in sofar or any(s.startswith(held) for s in (*stops, ""))


def test_half_a_code_point_waits():
    text = IncrementalText()
    raw = "日".encode()
    assert [text.push(raw[i : i + 1])[0] for i in range(3)] == ["", "", "日"]
    assert text.push(raw[:2])[0] == "" and text.finish()[0] == "�"


def test_possible_beginning_of_a_stop_string_waits_and_is_released_when_it_cannot_be():
    text = IncrementalText(("<end>",))
    assert text.push(b"hello <e") == ("hello ", None)
    assert text.push(b"x") == ("<ex", None)
    assert text.push(b"<en") == ("", None)
    assert text.push(b"d> more") == ("", "<end>")


def test_before_min_tokens_text_is_no_part_of_a_stop_string():
    text = IncrementalText(("ab",))
    assert text.push(b"ab a", check_stop=False) == ("ab a", None)
    assert text.push(b"b") == ("b", None)
    assert text.push(b" ab") == (" ", "ab")


def test_sixty_four_long_stop_strings():
    stops = tuple("x" * 900 + chr(ord("A") + i % 26) * (i // 26 + 1) for i in range(64))
    text = IncrementalText(stops)
    released = "".join(text.push(b"x" * 7)[0] for _ in range(300))
    assert len(released) == 2100 - 900
    piece, stop = text.push(b"BB")
    assert stop == "x" * 900 + "B" and piece == ""
