"""A model that was made here loads in PyTorch with transformers, and says there what it says here."""

import dataclasses
import json
import random
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
from reference import REFERENCE
from tiny import TINY

from llada_jax.config import run_config
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.train_tokenizer import MODEL_TYPES, train_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.interop.tokenizer_json import write_tokenizer
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.generate import generate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["the quick brown fox, the lazy dog; the end.\nsystem user assistant café 床前明月光，\n\n"] * 20
MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": " the\nfox? "},
    {"role": "assistant", "content": "dog"}, {"role": "user", "content": "床前"},
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """transformers copies a model's code into its cache before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield
        sys.path[:] = [path for path in sys.path if path != place]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 340, "bpe")


def make(tokenizer, **changes):
    rows = -(-tokenizer.vocab_size // 64) * 64
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "bos", "eos", "pad", "eot")}
    c = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size, embedding_size=rows, **ids, **changes)
    return Transformer(c, jax.random.key(0))


def read(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "illada"])
@pytest.mark.parametrize("changes", [{}, dict(weight_tying=True, n_kv_heads=4, rope_theta=1e4)], ids=["", "tied"])
def test_pytorch_computes_the_same_logits(tmp_path, tokenizer, rng, changes, family):
    model = make(tokenizer, family=family, **changes)
    hf.save_hf(model, tmp_path / "out", "20KB", tokenizer=tokenizer)
    theirs = read(tmp_path / "out")
    tokens = rng.integers(0, model.config.embedding_size, (2, 12), np.int32)
    documents = np.array([[1] * 5 + [2] * 4 + [0] * 3, [0] * 2 + [1] * 10], np.int32)
    positions = np.tile(np.arange(12, dtype=np.int32) % 5, (2, 1))
    to_torch = lambda x: torch.from_numpy(x).long()
    cases = [
        (dict(), dict()),
        (dict(attention_mask=to_torch(documents > 0)), dict(mask=jnp.asarray((documents > 0).astype(np.int32)))),
        (
            dict(segment_ids=to_torch(documents), position_ids=to_torch(positions)),
            dict(mask=jnp.asarray(documents), positions=jnp.asarray(positions)),
        ),
    ]
    real = documents > 0
    for given, wanted in cases:
        ours = np.asarray(model(jnp.asarray(tokens), **wanted))
        found = theirs(to_torch(tokens), **given).logits.detach().numpy()
        np.testing.assert_allclose(found[real], ours[real], atol=1e-5 * np.abs(ours).max(), rtol=0)
    half = read(tmp_path / "out", dtype=torch.bfloat16)(to_torch(tokens)).logits
    assert half.dtype == torch.bfloat16
    ours = np.asarray(model(jnp.asarray(tokens)))
    np.testing.assert_allclose(half.float().detach().numpy(), ours, atol=0.05 * np.abs(ours).max(), rtol=0)


@pytest.mark.parametrize("changes", [{}, dict(family="illada", weight_tying=True)], ids=["llada", "illada"])
def test_pytorch_fills_the_same_masks(tmp_path, tokenizer, rng, changes):
    """Of prompts of different lengths, in blocks, with fewer passes than tokens."""
    model = make(tokenizer, **changes)
    hf.save_hf(model, tmp_path / "out", tokenizer=tokenizer)
    prompt, real = rng.integers(7, 300, (2, 5)), np.array([[0, 0, 1, 1, 1], [1] * 5])
    options = dict(gen_length=12, block_length=6, steps=8)
    found = read(tmp_path / "out").generate(torch.from_numpy(prompt), torch.from_numpy(real), **options).numpy()
    wanted = np.asarray(generate(model, prompt, real, **options))
    np.testing.assert_array_equal(found[1], wanted[1])
    shifted = np.asarray(generate(model, prompt[:1, 2:], **options))  # rotary embeddings count distances alone
    np.testing.assert_array_equal(found[0, 2:], shifted[0])


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_its_tokenizer_gives_our_ids(tmp_path, kind):
    ours = train_tokenizer(TEXTS, tmp_path / "tokenizer.model", 340, kind)
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, tmp_path / "out")
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    draw = random.Random(0)
    parts = [
        *"the quick brown fox\n  <0x41>\té床前😀",
        "the ",
        "system",
        "user",
        " dog",
        "\n\n",
        "\r\n",
        "<unk>",
        "<0x41>",
    ]
    for _ in range(200):
        text = "".join(draw.choices(parts, k=draw.randrange(40)))
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos_id, *ids]
        assert again.encode(text) == ids
        assert theirs.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == text == again.decode(ids)
    chat = theirs.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    assert chat == ours.encode_chat(MESSAGES) == again.encode_chat(MESSAGES)
    for name in ("bos", "eos", "pad", "mask"):
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_id") == getattr(again, f"{name}_id")


def test_without_a_space_in_its_vocabulary_a_space_is_a_byte(tmp_path):
    ours = train_tokenizer(["床前明月光\n"] * 9, tmp_path / "tokenizer.model", 300, "char")
    write_tokenizer(ours, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("床 ▁")["input_ids"] == [ours.bos_id, *ours.encode("床 ▁")]


def test_a_tokenizer_that_normalises_is_not_converted(tmp_path, tokenizer):
    trainer = sentencepiece.SentencePieceTrainer
    names = "<|mdm_mask|>,<|start_header_id|>,<|end_header_id|>,<|eot_id|>"
    trainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "nmt"), vocab_size=60, minloglevel=3,
        bos_piece="<|startoftext|>", eos_piece="<|endoftext|>", control_symbols=names, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(InputError, match="nmt.model: normalises its text"):
        hf.save_hf(make(tokenizer), tmp_path / "out", tokenizer=load_tokenizer(tmp_path / "nmt.model"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, tokenizer):
    model = Transformer(TINY, jax.random.key(0))
    with pytest.raises(InputError, match="tokenizer: has 3.. ids, the model knows 64"):
        hf.save_hf(model, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def workdir(tmp_path, tokenizer):
    """What a run leaves behind."""
    place = tmp_path / "run"
    hf.save_workdir(make(tokenizer), place)
    config = run_config("tiny")
    config.model.update(json.loads((place / "config.json").read_text())["model"])
    config.data.update(files="books/*.txt", row_length=48)
    config.train.batch_size = 24
    (place / "config.json").write_text(json.dumps(config.to_dict()))
    lines = [{"step": 5, "1_loss/loss": 9.0}, {"step": 5, "0_validation/elbo_nats_per_token": 3.14159}]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "0_val')
    tokenizer.save(place / "tokenizer")
    return place


@pytest.mark.parametrize("objective", ["pretrain", "sft"])
def test_the_card_of_a_run_says_what_it_is_and_its_code_runs(tmp_path, workdir, objective, capsys):
    config = json.loads((workdir / "config.json").read_text())
    config["objective"]["name"] = objective
    (workdir / "config.json").write_text(json.dumps(config))
    hf.save_hf(hf.load(workdir), tmp_path / "couplets", source_dir=workdir)
    card = (tmp_path / "couplets" / "README.md").read_text()
    for words in ("# couplets\n", "books/*.txt", "0 of 24 rows of 48 tokens", "3.1416 nats per token, at step 5"):
        assert words in card
    assert ("apply_chat_template" in card) == ("--chat=yes" in card) == (objective == "sft")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    exec(code, {"DIR": tmp_path / "couplets"})
    assert capsys.readouterr().out
    assert json.loads((tmp_path / "couplets" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_what_was_exported_comes_back(tmp_path, workdir):
    model = hf.load(workdir)
    hf.save_hf(model, tmp_path / "out", source_dir=workdir)
    again = hf.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(model))
    hf.save_hf(again, tmp_path / "twice", source_dir=tmp_path / "out")
    for name in ("config.json", "modeling_llada.py", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_published_checkpoint_keeps_its_own_files(tmp_path):
    source = REFERENCE / "ckpt_a_mha"
    hf.save_hf(hf.load(source), tmp_path / "out", source_dir=source)
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {p.name for p in source.iterdir()}
