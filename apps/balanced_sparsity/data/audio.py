"""Wave files and mel features, in numpy alone: RIFF and NIST headers, resampling, silence, mel filters."""

from __future__ import annotations

import io
import wave
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from apps.program.errors import UserError

Samples = NDArray[np.float32]


def read_wave(data: bytes, name: str) -> tuple[Samples, int]:
    """(samples in -1 to 1 of the first channel, samples a second) of a 16-bit RIFF or NIST SPHERE file.

    Raises:
        UserError: another format.
    """
    if data[:7] == b"NIST_1A":
        return _nist(data, name)
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getsampwidth() != 2:
                raise UserError(f"{name} has {8 * file.getsampwidth()} bits a sample; 16 are read.")
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            return (raw[:: file.getnchannels()] / 32768).astype(np.float32), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise UserError(f"{name} is no wave file: {error}.") from error


def _nist(data: bytes, name: str) -> tuple[Samples, int]:
    """NIST SPHERE: a text header whose second line is its size in bytes, then samples."""
    try:
        size = int(data[8:16])
        fields = dict(line.split(None, 2)[::2] for line in data[16:size].decode("ascii").splitlines() if " -" in line)
        rate = int(fields["sample_rate"])
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{name} has a NIST header that cannot be read.") from error
    order = "<i2" if fields.get("sample_byte_format", "01") == "01" else ">i2"
    body = data[size:]
    return (np.frombuffer(body[: len(body) // 2 * 2], dtype=order) / 32768).astype(np.float32), rate


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """By a polyphase filter (scipy)."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = int(np.gcd(rate, wanted))
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def raise_volume(samples: Samples, target_dbfs: float = -30.0) -> Samples:
    """Quiet recordings are raised to a mean of ``target_dbfs`` below full scale; loud ones stay."""
    power = float(np.mean(samples.astype(np.float64) ** 2))
    if power <= 0:
        return samples
    change = target_dbfs - 10 * np.log10(power)
    return samples * np.float32(10 ** (change / 20)) if change > 0 else samples


def drop_silence(samples: Samples, rate: int, below_db: float = 40.0, keep_ms: float = 210.0) -> Samples:
    """Cuts out pauses longer than ``keep_ms``: windows of 30 ms whose power is ``below_db`` under the loudest one's."""
    from scipy.ndimage import binary_dilation

    size = 30 * rate // 1000
    windows = len(samples) // size
    if windows < 2:
        return samples
    power = (samples[: windows * size].reshape(windows, size).astype(np.float64) ** 2).mean(axis=1)
    voiced = power > power.max() * 10 ** (-below_db / 10)
    voiced = binary_dilation(voiced, np.ones(round(keep_ms / 30)))
    kept = samples[: windows * size][np.repeat(voiced, size)]
    return kept if len(kept) else samples


def mel_frames(
    samples: Samples, rate: int, channels: int = 40, window_ms: float = 25.0, step_ms: float = 10.0
) -> Samples:
    """Mel power spectrogram float32 [frames, channels]: centred Hann windows, Slaney's mel scale and area norm."""
    size, step = int(rate * window_ms / 1000), int(rate * step_ms / 1000)
    padded = np.pad(samples.astype(np.float64), size // 2)
    count = 1 + max(0, len(padded) - size) // step
    if len(padded) < size:
        padded = np.pad(padded, (0, size - len(padded)))
    starts = np.arange(count) * step
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    frames = padded[starts[:, None] + np.arange(size)] * hann
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    return (power @ mel_filters(rate, size, channels).T).astype(np.float32)


def log_mel(samples: Samples, rate: int, channels: int = 40) -> Samples:
    """Log mel spectrogram [frames, channels], each channel with mean 0 and deviation 1 over the recording."""
    logs = np.log(mel_frames(samples, rate, channels) + 1e-6)
    return ((logs - logs.mean(axis=0)) / (logs.std(axis=0) + 1e-3)).astype(np.float32)


@lru_cache(maxsize=8)
def mel_filters(rate: int, size: int, channels: int) -> NDArray[np.float64]:
    """Triangles [channels, size // 2 + 1] from 0 to half the rate, each of area 2 / (its width in Hz).

    Slaney's scale (Auditory Toolbox, 1998): linear to 1 kHz, 3 mel each 200 Hz, then logarithmic, 27 mel a factor of 6.4.
    """
    bins = np.linspace(0, rate / 2, size // 2 + 1)
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(rate / 2), channels + 2))
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return triangles * (2 / (edges[2:] - edges[:-2]))[:, None]


_MEL_1KHZ = 15.0
_LOG_STEP = np.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    return float(3 * hz / 200 if hz < 1000 else _MEL_1KHZ + np.log(hz / 1000) / _LOG_STEP)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < _MEL_1KHZ, mel * 200 / 3, 1000 * np.exp(_LOG_STEP * (mel - _MEL_1KHZ)))
