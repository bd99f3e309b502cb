"""BLiMP (Warstadt et al. 2020) by pseudo-log-likelihood (Salazar et al. 2020): which of two sentences the model finds likelier.

Each token is masked in turn and its log-probability summed. Where the sentences differ in one word, only the tokens of that word
are scored (they condition on all others either way); elsewhere all are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from apps.mcmisp.data.sources import archive_members, read_text
from apps.mcmisp.data.tokenizer import CLS, MASK, PAD, SEP, TextTokenizer
from apps.mcmisp.evaluation.masked import word_predictor
from apps.program.errors import UserError

AT_ONCE = 256


@dataclass(frozen=True)
class Pair:
    """A grammatical sentence and its counterpart."""

    task: str
    good: str
    bad: str


def read_blimp(path: str | Path, pairs_per_task: int | None = None) -> list[Pair]:
    """Pairs of all tasks of a folder or tar archive of ``*.jsonl``.

    Raises:
        UserError: nothing there, or no BLiMP.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        files = [(file.name, read_text(file)) for file in sorted(source.rglob("*.jsonl"))]
    elif source.is_file():
        files = sorted(archive_members(source, (".jsonl",)))
    else:
        raise UserError(
            f"There is no BLiMP at {source}: get it from github.com/alexwarstadt/blimp, or leave evaluation.blimp out."
        )
    pairs: list[Pair] = []
    for name, text in files:
        task = Path(name).stem
        try:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
            pairs += [Pair(task, r["sentence_good"], r["sentence_bad"]) for r in records[:pairs_per_task]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source}:{name} is no task of BLiMP: {error}.") from error
    if not pairs:
        raise UserError(f"{source} holds no task of BLiMP (*.jsonl).")
    return pairs


def scored_tokens(good: list[int], bad: list[int], good_words: list[int], bad_words: list[int]) -> tuple[range, range]:
    """Tokens of each sentence that are scored. ``*_words``: the word's number of each token.

    One word differs: its tokens. Otherwise all.
    """
    count = lambda words: words[-1] + 1 if words else 0  # noqa: E731
    if count(good_words) == count(bad_words):
        by_word = [
            w for w in range(count(good_words))
            if [t for t, i in zip(good, good_words, strict=True) if i == w]
            != [t for t, i in zip(bad, bad_words, strict=True) if i == w]
        ]  # fmt: skip
        if len(by_word) == 1:
            return _span(good_words, by_word[0]), _span(bad_words, by_word[0])
    return range(len(good)), range(len(bad))


@torch.no_grad()
def pseudo_log_likelihoods(
    model: nn.Module, sentences: list[tuple[list[int], range]], device: torch.device
) -> list[float]:
    """Sum over the scored tokens of log p(token | all others), for each (ids, scored tokens)."""
    jobs = [(s, i) for s, (_, scored) in enumerate(sentences) for i in scored]
    jobs.sort(key=lambda job: len(sentences[job[0]][0]))
    sums = torch.zeros(len(sentences), dtype=torch.float64)
    predictor = word_predictor(model).eval()
    for start in range(0, len(jobs), AT_ONCE):
        part = jobs[start : start + AT_ONCE]
        size = max(len(sentences[s][0]) for s, _ in part) + 2
        ids = torch.full((len(part), size), PAD)
        document = torch.zeros(len(part), size, dtype=torch.int64)
        for row, (s, i) in enumerate(part):
            text = sentences[s][0]
            ids[row, : len(text) + 2] = torch.tensor([CLS, *text, SEP])
            document[row, : len(text) + 2] = 1
            ids[row, i + 1] = MASK
        place = torch.tensor([row * size + i + 1 for row, (_, i) in enumerate(part)])
        logits, _ = predictor(ids.to(device), document.to(device), place.to(device))
        gold = torch.tensor([sentences[s][0][i] for s, i in part], device=device)
        found = logits.float().log_softmax(-1).gather(1, gold[:, None]).squeeze(1).double().cpu()
        sums.index_add_(0, torch.tensor([s for s, _ in part]), found)
    return sums.tolist()


def blimp_scores(
    model: nn.Module, tokenizer: TextTokenizer, pairs: list[Pair], device: torch.device
) -> dict[str, list[bool]]:
    """Task -> for each of its pairs whether the good sentence is likelier (equal counts as wrong)."""
    begins = tokenizer.lexicon.begins_word
    sentences: list[tuple[list[int], range]] = []
    for pair in pairs:
        good, bad = tokenizer.encode([pair.good, pair.bad])
        words = [_word_numbers(ids, begins) for ids in (good, bad)]
        scored = scored_tokens(good, bad, *words)
        sentences += [(good, scored[0]), (bad, scored[1])]
    scores = pseudo_log_likelihoods(model, sentences, device)
    found: dict[str, list[bool]] = {}
    for number, pair in enumerate(pairs):
        found.setdefault(pair.task, []).append(scores[2 * number] > scores[2 * number + 1])
    return found


def accuracy(scores: dict[str, list[bool]]) -> float:
    """Mean over the tasks of their accuracies, in percent."""
    return 100 * sum(sum(right) / len(right) for right in scores.values()) / len(scores)


def _word_numbers(ids: list[int], begins: object) -> list[int]:
    numbers, current = [], -1
    for token in ids:
        current += bool(begins[token]) or current < 0  # type: ignore[index]
        numbers.append(current)
    return numbers


def _span(words: list[int], word: int) -> range:
    first = words.index(word)
    return range(first, first + words.count(word))


__all__ = ["Pair", "accuracy", "blimp_scores", "pseudo_log_likelihoods", "read_blimp", "scored_tokens"]
