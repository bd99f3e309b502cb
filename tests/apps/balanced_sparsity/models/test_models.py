"""The networks are the papers': counts of parameters, where dropout is and is not, padding that does not count."""

from __future__ import annotations

import pytest
import torch

from apps.balanced_sparsity.config import ModelConfig, VggConfig
from apps.balanced_sparsity.models.build import Shape, build_model
from apps.balanced_sparsity.models.speaker_encoder import SpeakerEncoder, trained_speaker_encoder, windows_of
from apps.balanced_sparsity.models.speech_lstm import SpeechLstm
from apps.balanced_sparsity.models.vgg import VGG16, Vgg
from apps.balanced_sparsity.models.word_lstm import WordLstm
from apps.balanced_sparsity.store import load_trained
from apps.program.errors import UserError


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_vgg16_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Vgg(VGG16, 3, 1000, hidden=(4096, 4096), pooled=7, dropout=0.5, batch_norm=False)
    assert count(model) == 138_357_544


@pytest.mark.parametrize(("hidden", "million"), [(650, 19.8), (1500, 66.0)])
def test_zarembas_medium_and_large_models(hidden, million):
    """10,000 words; embedding + 2 x 4h(2h + 2) + softmax."""
    with torch.device("meta"):
        model = WordLstm(10_000, hidden, 2, 0.5, 0.05)
    assert count(model) == 10_000 * hidden + 2 * 4 * hidden * (2 * hidden + 2) + 10_000 * (hidden + 1)
    assert round(count(model) / 1e6, 1) == million


def test_dropout_never_touches_the_recurrent_connections():
    """With everything that is not recurrent dropped, the state still evolves as an LSTM's with inputs of zero."""
    torch.manual_seed(0)
    model = WordLstm(11, 6, 1, 0.999999, 0.3).train()
    words = torch.randint(0, 11, (5, 2))
    start = (torch.rand(1, 2, 6), torch.rand(1, 2, 6))
    logits, (h, c) = model(words, start)
    _, (h_expected, c_expected) = model.lstm(torch.zeros(5, 2, 6), start)
    assert torch.allclose(h, h_expected, atol=1e-6) and torch.allclose(c, c_expected, atol=1e-6)
    assert torch.allclose(logits, model.decoder.bias.expand_as(logits), atol=1e-6)


def test_weights_of_the_language_model_are_drawn_from_its_interval():
    model = WordLstm(50, 8, 2, 0.0, 0.05)
    assert all(float(parameter.detach().abs().max()) <= 0.05 for parameter in model.parameters())
    assert float(model.embedding.weight.detach().abs().max()) > 0.04


def test_frames_beyond_a_sequences_length_do_not_count():
    torch.manual_seed(0)
    model = SpeechLstm(4, 3, 5, 2, 0.0).eval()
    short, lengths = torch.rand(2, 6, 4), torch.tensor([6, 3])
    longer = torch.cat([short, 100 * torch.rand(2, 4, 4)], dim=1)
    longer[1, 3:] = 77.0
    assert torch.allclose(model(short, lengths), model(longer, lengths), atol=1e-5)


def test_images_too_small_for_the_stages_are_a_sentence():
    config = ModelConfig(vgg=VggConfig(stages=((4,), (4,), (4,), (4,))))
    with pytest.raises(UserError, match="cannot be halved 4 times"):
        build_model(config, Shape(1, 10, 8))


def test_windows_overlap_by_half_and_a_short_last_one_is_left_out():
    frames = torch.arange(160 + 80 + 50.0)[:, None]
    windows = windows_of(frames)  # begin at 0 and 80; at 160 there are 130 of 160, enough
    assert windows.shape == (3, 160, 1) and windows[:, 0, 0].tolist() == [0, 80, 160]
    assert float(windows[2, 129, 0]) == 289 and float(windows[2, 130:].abs().max()) == 0
    assert windows_of(frames[:250])[:, 0, 0].tolist() == [0, 80]  # 90 of 160 are too few
    assert windows_of(frames[:10]).shape == (1, 160, 1)


def test_the_encoders_voice_is_a_unit_vector_and_rescaling_changes_nothing():
    torch.manual_seed(0)
    model, frames = SpeakerEncoder(), torch.rand(3, 20, 40) * torch.logspace(-3, 2, 40)
    outputs, voices = model(frames)
    assert [tuple(one.shape) for one in outputs] == [(3, 20, 256)] * 3
    assert torch.allclose(voices.norm(dim=1), torch.ones(3), atol=1e-5)
    for _ in range(2):  # twice: the scale that is there already is taken back
        model.rescale_(frames.std(dim=(0, 1)) * (1 + torch.rand(40)))
        assert torch.allclose(model(frames)[1], voices, atol=1e-4)


def test_weights_that_are_not_the_encoders_are_refused(tmp_path):
    torch.save({"model_state": {"lstm.weight_ih_l0": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not hold the weights"):
        trained_speaker_encoder(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match="is no model of this app"):
        load_trained(tmp_path / "other.pt")
