"""The encoders: the classic one is transformers' BERT weight for weight; documents stay apart; heads hand out what they saw."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from apps.mcmisp.model import Electra, Encoder, MaskedLM, ModelConfig
from apps.mcmisp.model.encoder import positions_in_documents

VOCAB = 61


def spec(**options):
    return ModelConfig(**{"layers": 2, "width": 32, "heads": 4, "max_positions": 24, **options}).spec(VOCAB)


def rows(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randint(5, VOCAB, (count, size), generator=torch.Generator().manual_seed(1))


def copy_from_transformers(model: MaskedLM, theirs) -> None:
    bert, head = theirs.bert, theirs.cls.predictions
    ours = model.encoder
    with torch.no_grad():
        ours.tokens.weight.copy_(bert.embeddings.word_embeddings.weight)
        # Every token is of type 0: that embedding is a constant beside the position's.
        ours.positions.weight.copy_(
            bert.embeddings.position_embeddings.weight + bert.embeddings.token_type_embeddings.weight[0]
        )
        ours.embedding_norm.load_state_dict(bert.embeddings.LayerNorm.state_dict())
        for mine, their in zip(ours.layers, bert.encoder.layer, strict=True):
            attention = their.attention.self
            for name in ("weight", "bias"):
                parts = [getattr(getattr(attention, part), name) for part in ("query", "key", "value")]
                getattr(mine.attention.qkv, name).copy_(torch.cat(parts))
            mine.attention.out.load_state_dict(their.attention.output.dense.state_dict())
            mine.attention_norm.load_state_dict(their.attention.output.LayerNorm.state_dict())
            mine.feed_forward.up.load_state_dict(their.intermediate.dense.state_dict())
            mine.feed_forward.down.load_state_dict(their.output.dense.state_dict())
            mine.feed_forward_norm.load_state_dict(their.output.LayerNorm.state_dict())
        model.head.dense.load_state_dict(head.transform.dense.state_dict())
        model.head.norm.load_state_dict(head.transform.LayerNorm.state_dict())
        model.head.bias.copy_(head.bias)


def test_the_classic_encoder_is_transformers_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=24, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():  # biases and gains too, so that a forgotten one shows
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.tie_weights()
    model = MaskedLM(spec(family="classic")).eval()
    copy_from_transformers(model, theirs)
    ids = rows()
    chosen = torch.tensor([0, 5, 17, 47])
    got, _ = model(ids, None, chosen)
    expected = theirs(ids).logits.flatten(0, 1)[chosen]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-5)
    maps = theirs(ids, output_attentions=True).attentions
    _, captured = model(ids, None, chosen, guided={0: (1, 3), 1: (0,)}, backend="maps")
    torch.testing.assert_close(captured[0].scores_BGSS.softmax(-1), maps[0][:, [1, 3]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(captured[1].scores_BGSS.softmax(-1), maps[1][:, :1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["modern", "classic"])
def test_documents_packed_into_a_row_do_not_see_each_other(family):
    torch.manual_seed(0)
    model = Encoder(spec(family=family)).eval()
    ids = rows(1)
    document = torch.tensor([[0] * 6 + [1] * 10])
    packed, _ = model(ids, document)
    alone = torch.cat([model(ids[:, :6])[0], model(ids[:, 6:])[0]], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_positions_begin_anew_with_each_document():
    document = torch.tensor([[3, 3, 3, 4, 4, 7], [1, 1, 1, 1, 1, 1]])
    got = positions_in_documents(document, document)
    assert got.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("family", ["modern", "classic"])
def test_rows_and_maps_hand_out_the_same_scores_and_compute_the_same_output(family):
    torch.manual_seed(0)
    model = Encoder(spec(family=family)).eval()
    ids, document = rows(), torch.tensor([[0] * 9 + [1] * 7] * 3)
    guided = {0: (0, 2), 1: (1, 2)}
    out_rows, by_rows = model(ids, document, guided=guided, backend="rows")
    out_maps, by_maps = model(ids, document, guided=guided, backend="maps")
    plain, none = model(ids, document)
    assert none == [] and [c.layer for c in by_rows] == [0, 1]
    torch.testing.assert_close(out_rows, plain, atol=0, rtol=0)
    torch.testing.assert_close(out_maps, plain, atol=1e-5, rtol=1e-5)
    for mine, other in zip(by_rows, by_maps, strict=True):
        scores = mine.q_BGSD @ mine.k_BGSD.transpose(-2, -1) * mine.scale
        torch.testing.assert_close(scores, other.scores_BGSS, atol=1e-6, rtol=1e-5)


def test_rotary_attention_depends_on_distance_alone():
    torch.manual_seed(0)
    model = Encoder(spec()).eval()
    ids = rows(1)
    shifted = torch.cat([torch.full((1, 3), 4), ids], dim=1)
    document = torch.tensor([[9] * 3 + [0] * ids.shape[1]])
    torch.testing.assert_close(model(shifted, document)[0][:, 3:], model(ids)[0], atol=1e-5, rtol=1e-5)


def test_an_ablated_head_is_one_whose_output_rows_are_zero():
    torch.manual_seed(0)
    model = Encoder(spec()).eval()
    ids = rows()
    ablated, _ = model(ids, ablated={1: (2,)})
    with torch.no_grad():
        model.layers[1].attention.out.weight[:, 16:24] = 0
    torch.testing.assert_close(ablated, model(ids)[0], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(ablated, model(ids, ablated={0: (2,)})[0], atol=1e-4)


def test_the_modern_encoder_has_no_biases_and_ties_its_head():
    model = MaskedLM(spec())
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    full = model.encoder.tokens.weight.numel()
    others = sum(p.numel() for p in model.parameters()) - full
    assert (
        others < 2 * 32 * (4 * 32 + 3 * 96) + 32 * 32 + 1000
    )  # layers, the dense layer, gains: no second V x E matrix


def test_named_sizes_and_overrides():
    base = ModelConfig(size="base", family="classic").spec(30_522)
    assert (base.layers, base.width, base.heads, base.ffn) == (12, 768, 12, 3072)
    parameters = sum(p.numel() for p in MaskedLM(base).parameters())
    assert 109e6 < parameters < 111e6  # BERT-base: 110 M
    gated, plain = ModelConfig(size="tiny").spec(10), ModelConfig(size="tiny", family="classic").spec(10)
    assert abs(3 * gated.ffn / (2 * plain.ffn) - 1) < 0.05
    with pytest.raises(ValidationError, match="cannot be divided among 7 heads"):
        ModelConfig(heads=7)


def test_a_row_beyond_max_positions_is_refused():
    with pytest.raises(ValueError, match=r"rows of 30 tokens are longer than model.max_positions 24"):
        Encoder(spec())(rows(1, 30))


def test_electra_replaces_masked_tokens_alone_and_shares_embeddings():
    torch.manual_seed(0)
    model = Electra(ModelConfig(layers=2, width=32, heads=4, objective="electra"), VOCAB)
    assert model.generator.encoder.tokens is model.discriminator.tokens
    assert model.generator.encoder.spec.width == 16
    original = rows()
    chosen = torch.tensor([2, 7, 20, 33])
    masked = original.clone()
    masked.view(-1)[chosen] = 4
    out = model(masked, original, None, chosen, torch.rand(4), guided={0: (0,)}, generator_guided={1: (0,)})
    untouched = torch.ones(original.numel(), dtype=torch.bool)
    untouched[chosen] = False
    assert torch.equal(out.ids_BS.view(-1)[untouched], original.view(-1)[untouched])
    assert torch.equal(out.ids_BS.view(-1)[chosen], out.sampled_M)
    assert torch.equal(out.replaced_BS, out.ids_BS != original)
    assert len(out.discriminator_captures) == len(out.generator_captures) == 1
    loss = torch.nn.functional.binary_cross_entropy_with_logits(out.detection_BS, out.replaced_BS.float())
    loss.backward()
    # No gradient passes from the discriminator through the sampling (Clark et al., section 3.1).
    assert all(p.grad is None for n, p in model.generator.named_parameters() if not n.startswith("encoder.tokens"))


def test_electra_samples_the_generators_distribution():
    from apps.mcmisp.model.electra import _sample

    logits = torch.tensor([[0.0, 1.0, 2.0, -9.0]])
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for uniform in (draws, torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1))):
        taken = torch.bincount(_sample(logits.expand(20_000, 4), uniform), minlength=4) / 20_000
        torch.testing.assert_close(taken, logits.softmax(-1)[0], atol=0.015, rtol=0)
