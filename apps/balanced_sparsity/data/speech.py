"""Speech as sequences of mel frames: spoken digits, the phones of the TIMIT sample, digits row by row (embedded); speakers.

``SequenceData`` is for a classifier of whole sequences, ``SpeakerData`` for the trained speaker encoder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch

from apps.balanced_sparsity.data.audio import drop_silence, log_mel, mel_frames, raise_volume, read_wave, resample
from apps.balanced_sparsity.data.files import read_files
from apps.balanced_sparsity.data.images import digits
from apps.program.errors import UserError

FSDD_HOW = (
    "The Free Spoken Digit Dataset is had from https://github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0); name its "
    "folder recordings, or a tar archive of it, in data.train."
)
TIMIT_HOW = (
    "A sample of TIMIT comes with NLTK's data (timit.zip at https://www.nltk.org/nltk_data, non-commercial); name its folder, or "
    "a tar archive of it, in data.train."
)
SPEAKER_RATE = 16_000
"""Samples a second that the trained speaker encoder hears."""

# 61 phones of TIMIT's transcriptions to the 39 that are scored (Lee & Hon, 1989); q is left out.
_FOLDED = {
    "ux": "uw", "axr": "er", "ax-h": "ah", "ax": "ah", "ix": "ih", "ao": "aa", "em": "m", "en": "n", "nx": "n", "eng": "ng",
    "el": "l", "hv": "hh", "zh": "sh", "pcl": "sil", "tcl": "sil", "kcl": "sil", "bcl": "sil", "dcl": "sil", "gcl": "sil",
    "h#": "sil", "pau": "sil", "epi": "sil",
}  # fmt: skip


@dataclass(frozen=True)
class Sequences:
    """Frames float32 [N, T, F] padded with zeros, lengths int64 [N], labels int64 [N]."""

    frames: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SequenceData:
    """What is trained on, what is only evaluated, the classes' names."""

    train: Sequences
    test: Sequences
    classes: tuple[str, ...]


@dataclass(frozen=True)
class SpeakerData:
    """Mel spectrograms [frames, 40] of utterances, by what they are for.

    ``recovery`` is what a pruned encoder is retrained on (no labels are used there), ``enrolled`` makes a voice's reference,
    ``held_out`` is identified; nothing of ``held_out`` is in the others. Each of the latter is (speaker, spectrogram).
    """

    recovery: tuple[torch.Tensor, ...]
    enrolled: tuple[tuple[int, torch.Tensor], ...]
    held_out: tuple[tuple[int, torch.Tensor], ...]
    speakers: tuple[str, ...]


def digit_rows() -> SequenceData:
    """scikit-learn's digits read row by row: 8 frames of 8 pixels. Nothing to download."""
    data = digits()
    parts = []
    for images in (data.train, data.test):
        rows = images.pixels[:, 0].float() / 255
        parts.append(Sequences(rows, torch.full((len(rows),), rows.shape[1]), images.labels))
    return SequenceData(parts[0], parts[1], data.classes)


def spoken_digits(path: str, test_takes: int = 5) -> SequenceData:
    """Free Spoken Digits, ``<digit>_<speaker>_<take>.wav``; the takes below ``test_takes`` are the test set, as its authors say.

    Raises:
        UserError: missing or not what it should be.
    """
    train, test = [], []
    for name, data in read_files(path, (".wav",), FSDD_HOW):
        found = re.fullmatch(r"(\d)_([a-z]+)_(\d+)", name.stem)
        if found is None:
            raise UserError(f"{path}: {name} is not named <digit>_<speaker>_<take>.wav. {FSDD_HOW}")
        samples, rate = read_wave(data, str(name))
        (test if int(found[3]) < test_takes else train).append((log_mel(samples, rate), int(found[1])))
    if not train or not test:
        raise UserError(f"{path} lacks takes below {test_takes} or from there on. {FSDD_HOW}")
    return SequenceData(_padded(train), _padded(test), tuple(str(digit) for digit in range(10)))


def timit_phones(path: str, test_share: float = 0.25, longest: int = 60) -> SequenceData:
    """The TIMIT sample's phone segments, 39 classes; the last speakers by name are only evaluated.

    Args:
        longest: frames (10 ms) that are kept of a segment.

    Raises:
        UserError: missing or not what it should be.
    """
    recordings: dict[PurePosixPath, bytes] = {}
    phones: dict[PurePosixPath, str] = {}
    for name, data in read_files(path, (".wav", ".phn"), TIMIT_HOW):
        if name.suffix.lower() == ".wav":
            recordings[name.with_suffix("")] = data
        else:
            phones[name.with_suffix("")] = data.decode("ascii", errors="replace")
    speakers = sorted({name.parent.name for name in phones})
    held_out = set(speakers[len(speakers) - max(1, round(test_share * len(speakers))) :])
    found: list[tuple[str, str, np.ndarray]] = []
    for name in sorted(phones):
        if name not in recordings or name.stem.lower().startswith("sa"):  # the two sentences that everybody reads
            continue
        samples, rate = read_wave(recordings[name], str(name))
        frames = log_mel(samples, rate)
        for line in phones[name].splitlines():
            begin, end, phone = _phone(line, f"{path}: {name}.phn")
            first, last = round(begin / rate * 100), max(round(end / rate * 100), round(begin / rate * 100) + 1)
            piece = frames[first : min(last, first + longest)]
            if phone != "q" and len(piece):
                found.append((name.parent.name, _FOLDED.get(phone, phone), piece))
    classes = sorted({phone for speaker, phone, _ in found if speaker not in held_out})
    numbers = {phone: number for number, phone in enumerate(classes)}
    train = [(piece, numbers[phone]) for speaker, phone, piece in found if speaker not in held_out]
    test = [(piece, numbers[phone]) for speaker, phone, piece in found if speaker in held_out and phone in numbers]
    if len(speakers) < 2 or not train or not test:
        raise UserError(f"{path} does not hold recordings with phones of two speakers or more. {TIMIT_HOW}")
    return SequenceData(_padded(train), _padded(test), tuple(classes))


def speakers(timit: str, more: str | None = None, enrolled: int = 5) -> SpeakerData:
    """The TIMIT sample's voices, the first ``enrolled`` sentences of each (by name) known, the others held out.

    Args:
        more: further speech without speakers (spoken digits) to recover on, joined to pieces of several seconds.

    Raises:
        UserError: missing or not what it should be.
    """
    by_speaker: dict[str, list[torch.Tensor]] = {}
    for name, data in read_files(timit, (".wav",), TIMIT_HOW):
        by_speaker.setdefault(name.parent.name, []).append(_speaker_frames([read_wave(data, str(name))]))
    if len(by_speaker) < 2 or min(map(len, by_speaker.values())) <= enrolled:
        raise UserError(f"{timit} does not hold two speakers with more than {enrolled} recordings each. {TIMIT_HOW}")
    names = tuple(sorted(by_speaker))
    known = [(number, one) for number, name in enumerate(names) for one in by_speaker[name][:enrolled]]
    unknown = [(number, one) for number, name in enumerate(names) for one in by_speaker[name][enrolled:]]
    recovery = [one for _, one in known]
    if more is not None:
        of_voice: dict[str, list[tuple[np.ndarray, int]]] = {}
        for name, data in read_files(more, (".wav",), FSDD_HOW):
            voice = (name.stem.split("_") + [""])[1]
            of_voice.setdefault(voice, []).append(read_wave(data, str(name)))
        for voice in sorted(of_voice):
            recordings = of_voice[voice]
            recovery += [_speaker_frames(recordings[first : first + 12]) for first in range(0, len(recordings), 12)]
    return SpeakerData(tuple(recovery), tuple(known), tuple(unknown), names)


def _speaker_frames(recordings: list[tuple[np.ndarray, int]]) -> torch.Tensor:
    samples = np.concatenate([resample(one, rate, SPEAKER_RATE) for one, rate in recordings])
    return torch.from_numpy(mel_frames(drop_silence(raise_volume(samples), SPEAKER_RATE), SPEAKER_RATE))


def _padded(items: list[tuple[np.ndarray, int]]) -> Sequences:
    lengths = torch.tensor([len(frames) for frames, _ in items])
    frames = torch.zeros(len(items), int(lengths.max()), items[0][0].shape[1])
    for number, (one, _) in enumerate(items):
        frames[number, : len(one)] = torch.from_numpy(one)
    return Sequences(frames, lengths, torch.tensor([label for _, label in items]))


def _phone(line: str, where: str) -> tuple[int, int, str]:
    try:
        begin, end, phone = line.split()
        return int(begin), int(end), phone
    except ValueError as error:
        raise UserError(f"{where} has a line that is not 'begin end phone': {line[:40]!r}.") from error
