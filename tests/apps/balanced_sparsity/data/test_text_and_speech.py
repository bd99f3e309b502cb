"""Text becomes the numbers of the most frequent words; recordings become mel frames; the splits are the data's own."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
import torch

from apps.balanced_sparsity.config import DataConfig
from apps.balanced_sparsity.data import audio, speech, text
from apps.balanced_sparsity.data.load import load_data
from apps.program.errors import UserError


def test_tokens_are_lower_case_words_and_marks_with_ends_of_lines():
    assert text.tokens_of("Don't stop, <unk> !\n\n = A-B @-@ 3.5 =") == [
        "don't", "stop", ",", "<unk>", "!", "<eos>", "=", "a", "-", "b", "@-@", "3", ".", "5", "=", "<eos>",
    ]  # fmt: skip


def test_the_most_frequent_words_keep_their_names(tmp_path):
    (tmp_path / "a.txt").write_text(("b b b b a a a c\n" * 20) + "rare words here\n")
    data = text.text_files(str(tmp_path), str(tmp_path / "a.txt"), vocabulary=4)
    # <unk>, then by count (b 80, a 60), of equal ones (<eos> 21, c 20) the more frequent.
    assert data.words == ("<unk>", "b", "a", "<eos>")
    assert data.train[:9].tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 3] and data.train[-4:].tolist() == [0, 0, 0, 3]
    assert torch.equal(data.train, data.test)


def test_without_a_test_file_the_end_of_each_file_is_held_out(tmp_path):
    for name, word in (("a.txt", "x"), ("b.txt", "y")):
        (tmp_path / name).write_text(f"{word} " * 200)
    data = text.text_files(str(tmp_path), None, vocabulary=10, held_out=0.25)
    names = np.array(data.words)
    assert len(data.train) == 2 * 151 and len(data.test) == 2 * 50  # a file has 200 words and one <eos>, here unseen
    assert set(names[data.test]) == {"x", "y", "<unk>"} and names[data.train[0]] == "x"


def test_too_little_text_or_none_is_a_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("just a few words")
    with pytest.raises(UserError, match="too few"):
        text.text_files(str(tmp_path / "a.txt"), None, 10)
    with pytest.raises(UserError, match=r"no data at .*WikiText"):
        text.text_files(str(tmp_path / "b.tar"), None, 10)


def test_the_embedded_text_is_real():
    data = text.embedded(1000, limit=30_000)
    assert len(data.train) == 27_000 and {"the", "return", "<eos>"} <= set(data.words)


def riff(samples: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def test_riff_and_nist_files_of_the_same_samples_are_the_same():
    samples = np.arange(-500, 500, dtype=np.int16)
    header = (
        f"NIST_1A\n   1024\nsample_count -i {len(samples)}\nsample_rate -i 8000\nsample_byte_format -s2 10\nend_head\n"
    )
    nist = header.encode().ljust(1024) + samples.astype(">i2").tobytes()
    for data in (riff(samples, 8000), nist):
        read, rate = audio.read_wave(data, "x.wav")
        assert rate == 8000 and np.array_equal(read, (samples / 32768).astype(np.float32))
    with pytest.raises(UserError, match=r"x\.wav is no wave file"):
        audio.read_wave(b"RIFFnonsense", "x.wav")


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 3000.0, 7000.0])
def test_a_tone_is_loudest_in_the_channel_around_its_pitch(hertz):
    rate = 16_000
    tone = np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)
    frames = audio.mel_frames(tone, rate)
    assert frames.shape == (101, 40)
    # Slaney's mel scale by hand: 3 / 200 mel a Hz below 1 kHz, 27 / ln 6.4 mel a factor e above.
    top = 15 + np.log(8) / (np.log(6.4) / 27)
    mel = hertz * 3 / 200 if hertz < 1000 else 15 + np.log(hertz / 1000) / (np.log(6.4) / 27)
    assert abs(int(frames[50].argmax()) - (mel / top * 41 - 1)) <= 1


def test_mel_filters_have_unit_area_in_hertz():
    filters = audio.mel_filters(16_000, 400, 40)
    wide = filters[25:]  # those that cover several bins; a bin is 40 Hz
    assert np.allclose(wide.sum(axis=1) * 40, 1.0, atol=0.03)


def test_silence_goes_and_quiet_recordings_are_raised():
    random = np.random.default_rng(0)
    speech_part, pause = random.normal(0, 0.1, 8000), np.zeros(16_000)
    samples = np.concatenate([speech_part, pause, speech_part]).astype(np.float32)
    kept = audio.drop_silence(samples, 16_000)
    assert 16_000 <= len(kept) < 16_000 + 2 * 16_000 * 0.25
    quiet = (samples * 1e-3).astype(np.float32)
    assert 10 * np.log10(np.mean(audio.raise_volume(quiet) ** 2)) == pytest.approx(-30, abs=0.01)
    assert np.array_equal(audio.raise_volume(samples * 9), samples * 9)


def test_digits_row_by_row_are_the_images():
    data = speech.digit_rows()
    assert data.train.frames.shape == (1500, 8, 8) and data.test.lengths.tolist() == [8] * 297


def test_spoken_digits_names_say_what_they_are(tmp_path):
    tone = 3000 * np.sin(np.arange(2400) / 5)
    for name in ("3_ann_0", "4_ann_7", "5_bob_12"):
        (tmp_path / f"{name}.wav").write_bytes(riff(tone, 8000))
    data = speech.spoken_digits(str(tmp_path))
    assert data.test.labels.tolist() == [3] and data.train.labels.tolist() == [4, 5]
    (tmp_path / "hello.wav").write_bytes(riff(tone, 8000))
    with pytest.raises(UserError, match="is not named"):
        speech.spoken_digits(str(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "image_folder", "spoken_digits", "timit_phones", "text", "speakers"])
def test_data_that_is_not_named_is_refused_with_how_to_get_it(name):
    with pytest.raises(UserError, match=r"data\.(train|test) names no .*https://"):
        load_data(DataConfig(name=name))


@pytest.mark.shared_data
def test_the_timit_sample_splits_into_voices_and_phones(shared_data):
    archive = str(shared_data / "speech" / "timit_sample.tar.xz")
    data = speech.speakers(archive)
    assert (len(data.speakers), len(data.enrolled), len(data.held_out)) == (16, 80, 80)
    held_out = {frames.data_ptr() for _, frames in data.held_out}
    assert not held_out & {frames.data_ptr() for frames in data.recovery}
    phones = speech.timit_phones(archive)
    assert len(phones.classes) == 39 and len(phones.train) > 2 * len(phones.test) > 0
