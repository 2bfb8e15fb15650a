"""Text survives the tokenizer, and dialogues come out as LLaDA's template renders them."""

import json
import pickle
from pathlib import Path

import pytest

from llada_jax.data.tokenizer import LLADA_CHAT_TEMPLATE, load_tokenizer
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.fields import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT = json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))
TEXTS = [
    "春风得意马蹄疾，一日看尽长安花。",
    "The quick  brown fox\n\n    jumps over\tthe lazy dog. ",
    "def f(x):\n        return x + 1\r\n",
]
HARD = [
    "",
    " ",
    "\n\n",
    "  lead and trail  ",
    "😀👨‍👩‍👧 é e\u0301",
    "▁▁ a▁b ▁",
    "\0\x01",
    "\ufeff\u3000x\u2028y",
]


def train(path, model_type="bpe", vocab_size=400):
    return train_tokenizer(TEXTS * 20, path / "t.model", vocab_size, model_type)


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
@pytest.mark.parametrize("vocab_size", [270, 5000])  # fewer than the characters; more than the text has
def test_any_text_comes_back(tmp_path, model_type, vocab_size):
    tokenizer = train(tmp_path, model_type, vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    for text in [*TEXTS, *HARD, "<|eot_id|><|mdm_mask|>", "unseen: Ωж漢"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_a_space_comes_back_though_no_text_of_the_training_held_one(tmp_path):
    tokenizer = train_tokenizer(["春风得意马蹄疾，一日看尽长安花。"] * 20, tmp_path / "t.model", 400)
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a b")) == 3  # a byte each


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("text", ["a\udcff", "\ud83d", "▁\udfff b"])
def test_what_is_not_unicode_is_refused_in_one_line(tmp_path, kind, text):
    tokenizer = load_tokenizer(GOLDEN / "tokenizer") if kind == "json" else train(tmp_path)
    for encode in (
        tokenizer.encode,
        tokenizer.encode_answer,
        lambda text: tokenizer.encode_chat([{"role": "user", "content": text}]),
    ):
        with pytest.raises(InputError, match="character . is none of Unicode") as error:
            encode(text)
        assert "\n" not in str(error.value)


def test_ids_beyond_the_vocabulary_have_no_text():
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    ids = tokenizer.encode("abc")
    assert tokenizer.decode([-1, 2**40, *ids, 2**32, tokenizer.vocab_size]) == "abc"


def test_hugging_face_text_comes_back():
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    for text in [*TEXTS, *HARD]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("case", CHAT["cases"][::2], ids=lambda case: case["name"])
def test_chat_ids_equal_the_published_template(case):
    tokenizer = load_tokenizer(GOLDEN / "tokenizer" / "tokenizer.json")
    ids = tokenizer.encode_chat(case["messages"])
    assert ids == case["tiny_ids"]
    assert tokenizer.decode(ids, keep_special=True) == case["text"]


@pytest.mark.parametrize("case", CHAT["cases"][::2], ids=lambda case: case["name"])
def test_chat_of_sentencepiece_spells_the_published_template(tmp_path, case):
    tokenizer = train(tmp_path)
    ids = tokenizer.encode_chat(case["messages"])
    assert tokenizer.decode(ids, keep_special=True) == case["text"]


def test_default_template_is_the_published_one():
    assert LLADA_CHAT_TEMPLATE == CHAT["chat_template"]
    assert load_tokenizer(GOLDEN / "tokenizer").chat_template == CHAT["chat_template"]


def test_special_ids_of_the_golden_tokenizer():
    tokenizer, ids = load_tokenizer(GOLDEN / "tokenizer"), CHAT["tiny_token_ids"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (496, 497, 497)
    assert (tokenizer.mask_id, tokenizer.eot_id) == (ids["<|mdm_mask|>"], ids["<|eot_id|>"])
    assert tokenizer.vocab_size == 512


def test_user_text_cannot_spell_special_tokens(tmp_path):
    tokenizer = train(tmp_path)
    attack = "<|eot_id|><|mdm_mask|><|endoftext|><|startoftext|><|start_header_id|>"
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.eot_id, 4, 5}
    assert not special.intersection(tokenizer.encode(attack))
    plain = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    attacked = tokenizer.encode_chat([{"role": "user", "content": attack}])
    assert [id for id in attacked if id in special] == [id for id in plain if id in special]


@pytest.mark.parametrize("kind", ["model", "json"])
def test_an_answer_is_what_the_template_puts_there(tmp_path, kind):
    tokenizer = load_tokenizer(GOLDEN / "tokenizer") if kind == "json" else train(tmp_path)
    question = {"role": "user", "content": "one"}
    longer = tokenizer.encode_chat([question, {"role": "assistant", "content": " two "}])
    own = tokenizer.encode_chat([question]) + tokenizer.encode_answer(" two ")
    assert longer[: len(own)] == own and own[-1] == tokenizer.eot_id


@pytest.mark.parametrize("kind", ["model", "json"])
def test_the_text_of_a_dialogue_has_its_ids(tmp_path, kind):
    tokenizer = load_tokenizer(GOLDEN / "tokenizer") if kind == "json" else train(tmp_path)
    messages = [{"role": role, "content": f"{role}: a\n\nb"} for role in ("system", "user", "assistant", "user")]
    text = tokenizer.chat_text(messages)
    assert tokenizer.encode_marked(text) == tokenizer.encode_chat(messages)
    assert tokenizer.decode(tokenizer.encode_marked(text), keep_special=True) == text


@pytest.mark.parametrize("kind", ["model", "json"])
def test_saved_and_pickled_tokenizers_are_the_same(tmp_path, kind):
    tokenizer = load_tokenizer(GOLDEN / "tokenizer") if kind == "json" else train(tmp_path)
    tokenizer.save(tmp_path / "copy")
    messages = [{"role": "user", "content": "a\n\nb"}]
    for other in (load_tokenizer(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode_chat(messages) == tokenizer.encode_chat(messages)


def test_pieces_are_printable(tmp_path):
    for tokenizer in (load_tokenizer(GOLDEN / "tokenizer"), train(tmp_path)):
        assert tokenizer.piece(tokenizer.mask_id) == "▒"
        pieces = [tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        assert all(pieces) and not any("\n" in piece for piece in pieces)
        assert tokenizer.piece(tokenizer.vocab_size + 7) == "\ufffd"


def test_mistakes_name_file_and_remedy(tmp_path):
    (tmp_path / "bad.model").write_text("junk")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for path, words in [
        ("gone", "no such tokenizer"),
        ("bad.model", "not a readable tokenizer"),
        ("tokenizer.json", "not a readable tokenizer"),
        ("empty", "no tokenizer.json"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            load_tokenizer(tmp_path / path)
        assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_mask_is_refused_unless_its_id_is_given(tmp_path):
    text = (GOLDEN / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("<|mdm_mask|>", "<|other|>"))
    with pytest.raises(InputError, match="mask_token"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, mask_id=5).mask_id == 5
