"""The streams of a served LSTM: who is open, what is refused and why, who makes room. Plain Python and torch, no Ray."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from apps.balanced_sparsity.models.speech_lstm import SpeechLstm
from apps.balanced_sparsity.models.word_lstm import WordLstm
from apps.balanced_sparsity.pruning.packed_modules import BalancedLSTM
from apps.balanced_sparsity.serving.lstm import LstmServer, StreamError
from apps.balanced_sparsity.store import load_trained
from apps.program.errors import UserError

LARGEST_VALUE = 1e6
"""Of a frame: beyond it sums may overflow, and a state with NaN in it would stay so for ever."""


@dataclass(frozen=True)
class Refusal:
    """A request that is not served: an HTTP status and a sentence for the client. A value: it passes between processes."""

    status: int
    sentence: str


@dataclass(frozen=True)
class Opened:
    """A stream that has begun, at zero."""

    stream: str
    evicted: str | None
    """The stream that was closed to make room."""


@dataclass(frozen=True)
class Stepped:
    """Answer to some frames."""

    stream: str
    frames: int
    """Of the stream so far."""
    outputs: list[list[float]]
    """[frames of the request, outputs]."""
    mean: list[float] | None
    """Mean of all outputs of the stream: what the speech LSTM answers for the frames so far; None for the word LSTM."""


@dataclass(frozen=True)
class StreamInfo:
    """Of one stream."""

    stream: str
    frames: int
    state_bytes: int
    idle_s: float


@dataclass(frozen=True)
class TableInfo:
    """Of all streams of a process."""

    streams: int
    max_streams: int
    evicted: int
    """So far."""
    frames: int
    """So far, of all streams there were."""


@dataclass(frozen=True)
class ServedNet:
    """What is stepped: a network's LSTM and linear head, and how a frame is made of what a client sends."""

    lstm: BalancedLSTM | nn.LSTM
    head: nn.Module
    features: int
    """Numbers of a frame as a client sends it."""
    embedding: nn.Embedding | None = None
    """Of a language model, whose frame is the number of a word."""

    @property
    def averages(self) -> bool:
        """Whether the network's answer is the mean over the frames (its head is linear, so the outputs' mean is it)."""
        return self.embedding is None


def load_served(start: str | Path, packed: str | Path | None = None) -> ServedNet:
    """The network of a trained model, with the packed weights of `export` if they are given.

    Raises:
        UserError: it is no LSTM that answers frame by frame, or there is no such file. BalancedFormatError: a tampered one.
    """
    model = load_trained(start).model()
    if not isinstance(model, (SpeechLstm, WordLstm)):
        raise UserError(f"{start} is no LSTM that can be served frame by frame: give a speech_lstm or a word_lstm.")
    if packed is not None:
        from apps.balanced_sparsity.exported import load_exported

        load_exported(model, Path(packed))
    model.eval().requires_grad_(False)
    if isinstance(model, WordLstm):
        return ServedNet(model.lstm, model.decoder, 1, model.embedding)
    return ServedNet(model.lstm, model.classifier, model.lstm.input_size)


@dataclass
class _Entry:
    """Beside the LSTM's own state."""

    used: float
    total: torch.Tensor | None = field(default=None, repr=False)


class StreamTable:
    """The streams of one process; not to be called from several threads at once. Every method may answer with a ``Refusal``.

    When ``max_streams`` are open, the one unused for longest is closed for a new one, but only if it was unused for
    ``evict_after_idle_s``: nobody loses a stream that is in use, the newcomer is told to come later (429).
    """

    def __init__(
        self,
        net: ServedNet,
        max_streams: int = 1024,
        evict_after_idle_s: float = 60.0,
        max_frames: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._net, self._server = net, LstmServer(net.lstm, net.head, max_streams)
        self._max_streams, self._idle_s, self._max_frames, self._clock = (
            max_streams,
            evict_after_idle_s,
            max_frames,
            clock,
        )
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the one unused for longest first
        self._evicted = self._frames = 0

    def open(self, stream: str) -> Opened | Refusal:
        """Begins a stream. 409: it is open; 429: all that are open are in use."""
        now, evicted = self._clock(), None
        if stream in self._entries:
            return Refusal(409, f"The stream {stream!r} is open already: close it first or choose another name.")
        if len(self._entries) >= self._max_streams:
            oldest, entry = next(iter(self._entries.items()))
            if now - entry.used < self._idle_s:
                return Refusal(
                    429,
                    f"All {self._max_streams} streams are in use: close one, or come again when one was unused for "
                    f"{self._idle_s:g} s.",
                )
            self._forget(oldest)
            self._evicted, evicted = self._evicted + 1, oldest
        self._server.open(stream)
        self._entries[stream] = _Entry(now)
        return Opened(stream, evicted)

    def step(self, stream: str, frames: Sequence[Sequence[float]]) -> Stepped | Refusal:
        """Outputs after each frame. 404: no such stream; 400: frames that do not fit, none of which is taken then."""
        entry = self._entries.get(stream)
        if entry is None:
            return self._unknown(stream)
        inputs = self._inputs(frames)
        if isinstance(inputs, Refusal):
            return inputs
        try:
            outputs = torch.stack([self._server.step(stream, frame) for frame in inputs])
        except StreamError as error:  # the checks before leave none that is known of
            return Refusal(400, f"The stream {stream!r} could not go on: {error}.")
        entry.used = self._clock()
        self._entries.move_to_end(stream)
        self._frames += len(outputs)
        count, mean = self._server.status(stream).frames, None
        if self._net.averages:
            # float64: the mean of a long stream is not worse than that of a short one.
            added = outputs.double().sum(0)
            entry.total = added if entry.total is None else entry.total + added
            mean = (entry.total / count).tolist()
        return Stepped(stream, count, outputs.tolist(), mean)

    def status(self, stream: str) -> StreamInfo | Refusal:
        """Of one stream, which does not count as using it. 404: no such stream."""
        entry = self._entries.get(stream)
        if entry is None:
            return self._unknown(stream)
        told = self._server.status(stream)
        return StreamInfo(stream, told.frames, told.state_bytes, self._clock() - entry.used)

    def close(self, stream: str) -> StreamInfo | Refusal:
        """Ends a stream. 404: no such stream."""
        told = self.status(stream)
        if isinstance(told, StreamInfo):
            self._forget(stream)
        return told

    def info(self) -> TableInfo:
        """Counts."""
        return TableInfo(len(self._entries), self._max_streams, self._evicted, self._frames)

    def _forget(self, stream: str) -> None:
        self._server.close(stream)
        del self._entries[stream]

    def _unknown(self, stream: str) -> Refusal:
        return Refusal(
            404,
            f"The stream {stream!r} is not open: it was never opened, was closed, was unused for so long that it made room, or "
            "the process that held it began anew.",
        )

    def _inputs(self, frames: Sequence[Sequence[float]]) -> torch.Tensor | Refusal:
        """Frames as the LSTM takes them, float32 [frames, input size]."""
        wide = self._net.features
        if not 1 <= len(frames) <= self._max_frames:
            return Refusal(400, f"A request has 1 to {self._max_frames} frames, not {len(frames)}.")
        wrong = next((number for number, frame in enumerate(frames) if len(frame) != wide), None)
        if wrong is not None:
            return Refusal(400, f"A frame has {wide} numbers; frame {wrong} has {len(frames[wrong])}.")
        values = torch.tensor(frames, dtype=torch.float64)
        if not bool((values.abs() <= LARGEST_VALUE).all()):  # NaN is not, either
            return Refusal(400, f"A frame's numbers are from -{LARGEST_VALUE:g} to {LARGEST_VALUE:g}, and none is NaN.")
        embedding = self._net.embedding
        if embedding is None:
            return values.float()
        words = values[:, 0]
        if not bool(((words == words.round()) & (words >= 0) & (words < embedding.num_embeddings)).all()):
            return Refusal(
                400, f"A frame is the number of a word, a whole one from 0 to {embedding.num_embeddings - 1}."
            )
        return embedding(words.long())
