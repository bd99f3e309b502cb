"""The table of scores: int8, dense or compressed rows, the same bits whoever counted; saved, loaded, looked up from torch.

Scores are computed in float64 by one order of operations in both layouts, so that they round alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from actors.cooccurrence.count import PairCounts
from actors.cooccurrence.errors import CooccurrenceError
from actors.cooccurrence.settings import CooccurrenceSettings, Lexicon, fingerprint

PMI_STEP = 0.1
"""Nats of one int8 step of pmi, ppmi and log: -12.7 to 12.7 covers log N of 300,000 pairs of a word seen once."""
FORMAT = 1
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class PairTable:
    """Scores of pairs. ``dense``: [V, V] int8; else ``keys`` int64 (row * V + column, ascending) and ``values`` int8, and what is

    not there is computed from ``log_n`` (pmi) or is 0. ``marginals`` n [V] int64: pairs that a word is part of.
    """

    settings: CooccurrenceSettings
    vocab_size: int
    fingerprint: str
    step: float
    pairs: int
    units: int
    marginals: np.ndarray = field(repr=False)
    dense: np.ndarray | None = field(default=None, repr=False)
    keys: np.ndarray | None = field(default=None, repr=False)
    values: np.ndarray | None = field(default=None, repr=False)
    snapshot: int = 0
    """0: of a pre-pass; else the number of the online snapshot."""

    @cached_property
    def version(self) -> str:
        """Names the table's content, its layout included; goes into checkpoints."""
        digest = hashlib.sha256(f"{self.fingerprint}:{self.snapshot}:{self.step}:{self.pairs}".encode())
        for part in (self.marginals, self.dense, self.keys, self.values):
            if part is not None:
                digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.dense, self.keys, self.values) if part is not None)

    def row(self, word: int) -> np.ndarray:
        """Scores [V] of ``word`` with every other, float32."""
        everything = torch.arange(self.vocab_size)[None]
        return self.scores(torch.tensor([word]), everything)[0].numpy()

    def scores(self, first_E: torch.Tensor, keys_ES: torch.Tensor) -> torch.Tensor:
        """Scores [E, S] of word ``first_E[e]`` with each of ``keys_ES[e]``, float32, on the words' device."""
        if self.dense is not None:
            return self.dense_on(first_E.device)[first_E[:, None], keys_ES].float() * self.step
        return self._sparse_scores(first_E, keys_ES)

    def dense_on(self, device: torch.device | str) -> torch.Tensor:
        """The dense table on ``device``, moved there once.

        Raises:
            CooccurrenceError: the table is not dense.
        """
        if self.dense is None:
            raise CooccurrenceError("This needs a dense table: set cooccurrence.layout=dense.")
        moved = self._moved
        if str(device) not in moved:
            moved[str(device)] = torch.from_numpy(self.dense).to(device)
        return moved[str(device)]

    @cached_property
    def _moved(self) -> dict[str, torch.Tensor]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_moved", None)  # what was put onto devices is not sent to other processes
        return state

    def _sparse_scores(self, first_E: torch.Tensor, keys_ES: torch.Tensor) -> torch.Tensor:
        if self.keys is None or self.values is None:
            raise CooccurrenceError("The table has neither a dense nor a sparse part.")
        device = first_E.device
        cache = self._moved
        if f"{device}:keys" not in cache:
            cache[f"{device}:keys"] = torch.from_numpy(self.keys).to(device)
            cache[f"{device}:values"] = torch.from_numpy(self.values).to(device)
            cache[f"{device}:log_n"] = torch.from_numpy(_log_marginals(self.marginals)).to(device)
        keys, values, log_n = (cache[f"{device}:{name}"] for name in ("keys", "values", "log_n"))
        wanted = first_E[:, None] * self.vocab_size + keys_ES
        unseen = torch.zeros(wanted.shape, dtype=torch.float64, device=device)
        if self.settings.normalisation == "pmi":
            unseen = (_log_unseen(self.settings, self.pairs) - log_n[first_E][:, None]) - log_n[keys_ES]
        quantised = (unseen / self.step).round().clamp(-127, 127)
        if len(keys):
            place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            quantised = torch.where(keys[place] == wanted, values[place].double(), quantised)
        return quantised.float() * self.step

    def save(self, path: Path) -> None:
        """One ``.npz`` file, whole or not at all."""
        about = {"format": FORMAT, "version": self.version, "settings": asdict(self.settings)}
        about |= {n: getattr(self, n) for n in ("vocab_size", "fingerprint", "step", "pairs", "units", "snapshot")}
        arrays = {n: getattr(self, n) for n in ("marginals", "dense", "keys", "values") if getattr(self, n) is not None}
        write_arrays(path, about, arrays)

    @classmethod
    def load(cls, path: Path) -> PairTable:
        """
        Raises:
            CooccurrenceError: there is no such file, it is no table, of another format, or damaged.
        """
        about, arrays = read_arrays(path, "co-occurrence table")
        if about.get("format") != FORMAT or "settings" not in about:
            raise CooccurrenceError(
                f"{path} is a table of format {about.get('format')}, this program reads {FORMAT}: build it anew."
            )
        named: dict[str, Any] = {
            n: about[n] for n in ("vocab_size", "fingerprint", "step", "pairs", "units", "snapshot")
        }
        table = cls(settings=CooccurrenceSettings(**about["settings"]), **named, **cast(dict[str, Any], arrays))
        if table.version != about["version"]:
            raise CooccurrenceError(
                f"{path} is damaged: its content is not that of version {about['version']}. Build it anew."
            )
        return table

    def require(self, lexicon: Lexicon, settings: CooccurrenceSettings) -> None:
        """
        Raises:
            CooccurrenceError: the table was counted with other settings or another vocabulary.
        """
        if self.vocab_size != lexicon.size:
            raise CooccurrenceError(
                f"The table is of {self.vocab_size} words, the tokenizer of {lexicon.size}: build it anew."
            )
        if self.fingerprint != fingerprint(settings, lexicon):
            differing = [
                f"{f.name}={getattr(self.settings, f.name)}" for f in dataclasses.fields(settings)
                if getattr(self.settings, f.name) != getattr(settings, f.name)
            ]  # fmt: skip
            raise CooccurrenceError(
                f"The table was counted otherwise ({', '.join(differing) or 'with another vocabulary'}): build it anew."
            )


def build_table(counts: PairCounts, lexicon: Lexicon, settings: CooccurrenceSettings, snapshot: int = 0) -> PairTable:
    """Scores of counted pairs.

    With C[a, b] the ordered pairs (an unordered pair of one word with itself is two), n = sum over b of C, N = sum of n:
    pmi = log((C + alpha) N / (n_a n_b)) (Church and Hanks 1990, smoothed).

    Raises:
        CooccurrenceError: nothing was counted, or the vocabulary is larger than the layout allows.
    """
    layout = settings.layout_for(lexicon.size)
    if not len(counts):
        raise CooccurrenceError(
            "No two words were counted together: the corpus is empty or its documents are single words."
        )
    rows, columns, values = _symmetric(counts, lexicon.size)
    marginals = np.zeros(lexicon.size, np.int64)
    np.add.at(marginals, rows, values)
    pairs = int(marginals.sum())
    seen = values >= settings.min_count
    rows, columns, values = rows[seen], columns[seen], values[seen]
    step = _step(settings, values, marginals, rows)
    common: dict[str, Any] = {
        "settings": settings, "vocab_size": lexicon.size, "fingerprint": fingerprint(settings, lexicon), "step": step,
        "pairs": pairs, "units": counts.units, "marginals": marginals, "snapshot": snapshot,
    }  # fmt: skip
    quantised = np.zeros(len(rows), np.int8)
    for part in _blocks(len(rows), 1 << 20):
        scores = _scores(settings, values[part], rows[part], columns[part], marginals, pairs)
        quantised[part] = _quantise(scores, step)
    if layout == "csr":
        return PairTable(**common, keys=rows * lexicon.size + columns, values=quantised)
    dense = np.zeros((lexicon.size, lexicon.size), np.int8)
    if settings.normalisation == "pmi":
        log_n, unseen = _log_marginals(marginals), _log_unseen(settings, pairs)
        for part in _blocks(lexicon.size, _BLOCK_ROWS):
            dense[part] = _quantise((unseen - log_n[part, None]) - log_n[None, :], step)
    dense[rows, columns] = quantised
    return PairTable(**common, dense=dense)


def _symmetric(counts: PairCounts, vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both orders of each pair, sorted by row and column."""
    low, high = counts.keys // vocab, counts.keys % vocab
    same = low == high
    rows, columns = np.concatenate([low, high[~same]]), np.concatenate([high, low[~same]])
    values = np.concatenate([np.where(same, 2 * counts.counts, counts.counts), counts.counts[~same]])
    order = np.argsort(rows * vocab + columns, kind="stable")
    return rows[order], columns[order], values[order]


def _scores(
    settings: CooccurrenceSettings, values: np.ndarray, rows: np.ndarray, columns: np.ndarray, n: np.ndarray, pairs: int
) -> np.ndarray:
    kind = settings.normalisation
    if kind == "raw":
        return values.astype(np.float64)
    if kind == "log":
        return np.log1p(values.astype(np.float64))
    if kind == "conditional":
        return values / n[rows]
    log_n = _log_marginals(n)
    pmi = ((np.log(values + settings.alpha) + np.log(pairs)) - log_n[rows]) - log_n[columns]
    return np.maximum(pmi, 0.0) if kind == "ppmi" else pmi


def _log_unseen(settings: CooccurrenceSettings, pairs: int) -> float:
    return float(np.log(0 + settings.alpha) + np.log(pairs))


def _log_marginals(n: np.ndarray) -> np.ndarray:
    """log n, a word that was never counted taken as seen once."""
    return np.log(np.maximum(n, 1).astype(np.float64))


def _step(settings: CooccurrenceSettings, values: np.ndarray, n: np.ndarray, rows: np.ndarray) -> float:
    """Size of one int8 step: fixed for logarithms, a 127th of the largest for proportions and counts."""
    if settings.normalisation in ("pmi", "ppmi", "log"):
        return PMI_STEP
    largest = values.max() if settings.normalisation == "raw" else (values / n[rows]).max()
    return float(largest) / 127


def _quantise(scores: np.ndarray, step: float) -> np.ndarray:
    return np.clip(np.rint(scores / step), -127, 127).astype(np.int8)


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def write_arrays(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """``about`` as JSON beside arrays in one ``.npz``; through a temporary neighbour and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_arrays(path: Path, what: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What ``write_arrays`` wrote; no pickle is read.

    Raises:
        CooccurrenceError: no such file, or not of that kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(arrays.pop("about").tobytes()), arrays
    except FileNotFoundError as error:
        raise CooccurrenceError(f"There is no {what} {path}.") from error
    except Exception as error:  # numpy raises what its readers do; a foreign file is the user's mistake in each case
        raise CooccurrenceError(f"{path} is no {what} that can be read ({type(error).__name__}).") from error
