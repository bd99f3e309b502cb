"""A served LSTM: one frame in, one output out, the state of every stream kept between; batch 1, where packed weights are fastest.

``LstmServer`` is plain Python and torch; whatever answers requests (an actor, a Serve deployment) holds one and calls it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from apps.balanced_sparsity.pruning.packed_modules import BalancedLSTM

State = tuple[torch.Tensor, torch.Tensor]


class StreamError(ValueError):
    """A request that does not fit its stream; the message says why, for the user."""


@dataclass(frozen=True)
class StreamStatus:
    """Of one stream."""

    frames: int
    state_bytes: int


class LstmServer:
    """Steps many independent streams through one LSTM (packed or dense, not bidirectional) and an optional head.

    Not safe to be called from several threads at once. When ``max_streams`` are open, the one unused for longest is closed for a
    new one: its next frame is refused, never answered from a wrong state.
    """

    def __init__(self, lstm: BalancedLSTM | nn.LSTM, head: nn.Module | None = None, max_streams: int = 1024):
        if lstm.bidirectional:
            raise ValueError("a bidirectional LSTM must hear the end first: it cannot be served frame by frame")
        if max_streams < 1:
            raise ValueError(f"max_streams must be at least 1, not {max_streams}")
        self._lstm, self._head = lstm.eval(), None if head is None else head.eval()
        self._max_streams = max_streams
        self._streams: OrderedDict[str, tuple[State | None, int]] = OrderedDict()

    def open(self, stream: str) -> None:
        """Begins a stream, at zero. StreamError if it is open."""
        if stream in self._streams:
            raise StreamError(f"the stream {stream!r} is open already")
        if len(self._streams) >= self._max_streams:
            self._streams.popitem(last=False)
        self._streams[stream] = (None, 0)

    @torch.inference_mode()
    def step(self, stream: str, frame: torch.Tensor) -> torch.Tensor:
        """Output [out] after one more ``frame`` [in], float32. StreamError: the stream is not open, or the frame does not fit."""
        state, count = self._state(stream)
        if tuple(frame.shape) != (self._lstm.input_size,) or not frame.is_floating_point():
            raise StreamError(f"a frame is {self._lstm.input_size} floats, not {frame.dtype} {list(frame.shape)}")
        if not bool(frame.isfinite().all()):
            raise StreamError("the frame holds NaN or infinity, which would spoil the stream's state for ever")
        x = frame.float().unsqueeze(0)
        if isinstance(self._lstm, BalancedLSTM):
            out, state = self._lstm.step(x, state)
        else:
            sequence, state = self._lstm(x.unsqueeze(1 if self._lstm.batch_first else 0), state)
            out = sequence.flatten(0, 1)
        self._streams[stream] = (state, count + 1)
        self._streams.move_to_end(stream)
        return (out if self._head is None else self._head(out)).squeeze(0)

    def close(self, stream: str) -> StreamStatus:
        """Ends a stream. StreamError if it is not open."""
        status = self.status(stream)
        del self._streams[stream]
        return status

    def status(self, stream: str) -> StreamStatus:
        """Frames so far and bytes of state. StreamError if the stream is not open."""
        state, count = self._state(stream)
        return StreamStatus(count, 0 if state is None else sum(part.nbytes for part in state))

    @property
    def open_streams(self) -> int:
        """How many there are."""
        return len(self._streams)

    def _state(self, stream: str) -> tuple[State | None, int]:
        if stream not in self._streams:
            raise StreamError(f"the stream {stream!r} is not open (at most {self._max_streams} are kept)")
        return self._streams[stream]
