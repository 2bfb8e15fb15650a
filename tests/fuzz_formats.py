"""The formats that tests/fuzz.py damages: how a valid one is made, and all that the project reads of it.

FORMATS: {name: (make, read)}; make(directory) writes valid files and returns those to damage, read(directory) reads.
"""

import dataclasses
import gzip
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llada_jax.config import run_config
from llada_jax.data import KINDS, chat, dataset, pipeline, prepare, sources
from llada_jax.data.kind import Plan
from llada_jax.data.tokenizer import BOS, END_HEADER, EOS, EOT, MASK, START_HEADER, load_tokenizer
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.fields import InputError
from llada_jax.files import CHECKSUMS, write_checksums
from llada_jax.interop.workdir import abstract_model, frugal, named_leaves
from llada_jax.model.config import PRESETS
from llada_jax.storage.mirror import Workdir

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
TOKENIZER = load_tokenizer(GOLDEN)
TEXTS = ["春风得意马蹄疾，一日看尽长安花。", "The quick  brown fox\n\njumps over\tthe lazy dog.", "x = 1\r\n"]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "春风"}]
TEMPLATES = [
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m.content | trim }}{% endfor %}",
    "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages | tojson }}",
    "{% macro f(m, n) %}{{ m.content[:n] }}{% endmacro %}{% set ns = namespace(k=0) %}{% for m in messages %}"
    "{% set ns.k = ns.k + loop.index * 2 %}{{ f(m, ns.k) ~ ns.k }}{% endfor %}{{ '%s' % ns.k }}{{ 'a'.center(9) }}",
]


def _model():
    import jax

    from llada_jax.model.transformer import Transformer

    config = dataclasses.replace(
        PRESETS["tiny"], d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, mlp_hidden_size=24, vocab_size=32,
        embedding_size=64, max_sequence_length=32,
    )  # fmt: skip
    return Transformer(config, jax.random.key(0))


def make_published(root):
    from llada_jax.interop import hf

    hf.save_hf(_model(), root / "m", 6000)
    return root / "m"


def make_safetensors(root):
    return [path for path in make_published(root).iterdir() if path.name != "config.json"]


def make_hf_config(root):
    return [make_published(root) / "config.json"]


def read_published(root):
    from llada_jax.interop import hf

    hf.load(root / "m")


def make_tokenizer_json(root):
    shutil.copytree(GOLDEN, root / "bytes")
    unigram = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), *((c, -2.0) for c in "▁abcdefgh春"), ("▁a", -1.0)], 0)
    )
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    split = pre_tokenizers.Split(Regex("(\\w+|x)+ "), "isolated")
    unigram.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), split, pre_tokenizers.Digits()])
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens([BOS, EOS, MASK])
    (root / "unigram").mkdir()
    unigram.save(str(root / "unigram" / "tokenizer.json"))
    return [root / "bytes" / "tokenizer.json", root / "unigram" / "tokenizer.json"]


def make_tokenizer_config(root):
    shutil.copytree(GOLDEN, root / "t")
    return [root / "t" / "tokenizer_config.json", root / "t" / "special_tokens_map.json"]


def make_chat_template(root):
    for i, template in enumerate(TEMPLATES):
        shutil.copytree(GOLDEN, root / str(i))
        (root / str(i) / "chat_template.jinja").write_text(template)
    return [root / str(i) / "chat_template.jinja" for i in range(len(TEMPLATES))]


def make_sentencepiece(root):
    for name in ("ours", "normalised"):
        (root / name).mkdir()
    ours, normalised = root / "ours" / "tokenizer.model", root / "normalised" / "tokenizer.model"
    train_tokenizer(TEXTS * 20, ours, 300)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(normalised.with_suffix("")), vocab_size=60,
        hard_vocab_limit=False, normalization_rule_name="nmt_nfkc", bos_piece=BOS, eos_piece=EOS, minloglevel=3,
        control_symbols=[MASK, START_HEADER, END_HEADER, EOT],
    )  # fmt: skip
    return [ours, normalised]


def read_tokenizers(root):
    for directory in sorted(root.iterdir()):
        read_tokenizer(directory)


def read_tokenizer(directory):
    tokenizer = load_tokenizer(directory)
    for text in [*TEXTS, "a" * 60, "ｱ① " * 5]:
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        tokenizer.decode(ids, keep_special=True)
        tokenizer.piece(ids[0] if ids else 0)
    for id in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.eot_id, 7, tokenizer.vocab_size + 3):
        tokenizer.piece(id)
    tokenizer.encode_chat(MESSAGES)


def make_text(root):
    (root / "a.txt").write_text("\n\n".join(TEXTS))
    (root / "b.txt.gz").write_bytes(gzip.compress("\n\n".join(TEXTS).encode()))
    return [root / "a.txt", root / "b.txt.gz"]


def make_jsonl(root):
    lines = "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS))
    (root / "a.jsonl").write_text(lines)
    return [root / "a.jsonl"]


def make_parquet(root):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(300)), "text": TEXTS * 100})
    pyarrow.parquet.write_table(table, root / "a.parquet", row_group_size=100, compression="snappy")
    pyarrow.parquet.write_table(table, root / "b.parquet", compression="zstd", use_dictionary=False)
    return [root / "a.parquet", root / "b.parquet"]


def read_corpus(root):
    for path in sources.expand_files([str(path) for path in sorted(root.iterdir())]):
        for documents in sources.DOCUMENTS:
            for text in sources.read_documents(path, documents):
                text.encode()


def make_chat(root):
    (root / "a.jsonl").write_text("\n".join(json.dumps({"messages": MESSAGES * n}) for n in (1, 2, 3)))
    return [root / "a.jsonl"]


def read_chat(root):
    plan = Plan("chat", 64, "document", "file", "drop", 0.0, 100)
    for where, messages in chat.read(sources.expand_files(str(root / "a.jsonl"))[0], plan):
        chat.encode(messages, where, TOKENIZER, plan)


def _make_data(root):
    tokenizer = load_tokenizer(GOLDEN)
    prepare.prepare_dataset(
        root / "d", items=[text * 3 for text in TEXTS] * 4, tokenizer=tokenizer, row_length=32, packing="document",
        rows_per_shard=12, workers=1, progress=False,
    )  # fmt: skip
    return root / "d"


def make_manifest(root):
    return [_make_data(root) / "manifest.json"]


def make_shards(root):
    data = _make_data(root)
    return [*data.glob("rows-*"), data / "lengths.npy", data / "tokenizer.json"]


def read_data(root):
    order = pipeline.ordered([dataset.open_dataset(root / "d")], seed=1)
    for kind in KINDS:
        for batch in pipeline.batches(
            order, batch_size=4, kind=kind, start_step=0, num_steps=3, seed=0, eos_id=2, threads=1, prefetch=1
        ):
            assert batch["tokens"].shape == (4, 32) and np.all(batch["tokens"] >= 0)
    for i in range(len(order.sources[0])):
        order.sources[0][i]


def read_shards(root):
    """Reads a dataset whose manifest tells the sizes of the shards as they are: no size gives a change away."""
    path = root / "d" / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        file = root / "d" / shard["file"]
        shard["bytes"] = file.stat().st_size if file.is_file() else 0
    path.write_text(json.dumps(manifest))
    read_data(root)


def _make_workdir(root):
    from llada_jax.interop import hf

    model = _model()
    hf.save_workdir(model, root / "w")
    config = run_config("tiny")
    config.model.update(dataclasses.asdict(model.config))
    (root / "w" / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True))
    return root / "w"


def make_run_config(root):
    path = _make_workdir(root) / "config.json"
    config = run_config("tiny")
    config.model.update(json.loads(path.read_text())["model"])
    path.write_text(json.dumps(config.to_dict(), indent=1))
    return [path]


def make_checkpoint(root):
    """Without checksums, so that Orbax and TensorStore read what is damaged."""
    workdir = _make_workdir(root)
    (workdir / "checkpoints" / "0" / CHECKSUMS).unlink()
    return [path for path in (workdir / "checkpoints").rglob("*") if path.is_file()]


def make_ocdbt_checkpoint(root):
    """As runs save them, with checksums."""
    from orbax.checkpoint import v1 as ocp

    step = _make_workdir(root) / "checkpoints" / "0"
    shutil.rmtree(step)
    leaves = dict(named_leaves(_model()))
    with frugal(leaves.values()):
        ocp.save_checkpointables(str(step), {"model": leaves})
    write_checksums(step)
    return [path for path in step.rglob("*") if path.is_file()]


def read_run_config(root):
    from llada_jax.interop import hf
    from llada_jax.training import workdir

    model = hf.load_config(root / "w")
    abstract_model(model, None)
    config = run_config("tiny")
    config.model.update(dataclasses.asdict(model))
    workdir.claim(Workdir(root / "w"), config, workdir.begun(Workdir(root / "w"), config))


def read_workdir(root):
    from llada_jax.interop import hf

    hf.load(root / "w")


HEAVY = ["safetensors", "hf_config", "run_config", "checkpoint", "ocdbt_checkpoint"]  # which JAX reads
FORMATS = {
    "safetensors": (make_safetensors, read_published),
    "hf_config": (make_hf_config, read_published),
    "tokenizer": (make_tokenizer_json, read_tokenizers),
    "tokenizer_config": (make_tokenizer_config, read_tokenizers),
    "chat_template": (make_chat_template, read_tokenizers),
    "sentencepiece": (make_sentencepiece, read_tokenizers),
    "text": (make_text, read_corpus),
    "jsonl": (make_jsonl, read_corpus),
    "parquet": (make_parquet, read_corpus),
    "chat": (make_chat, read_chat),
    "manifest": (make_manifest, read_data),
    "shards": (make_shards, read_shards),
    "run_config": (make_run_config, read_run_config),
    "checkpoint": (make_checkpoint, read_workdir),
    "ocdbt_checkpoint": (make_ocdbt_checkpoint, read_workdir),
}


def _make_wrong(root):
    (root / "x").write_bytes(bytes(20))
    return [root / "x"]


def _read_wrong(root):
    """By turns, after the bytes of the file, what no reader may do."""
    kind = sum((root / "x").read_bytes()) % 5 if (root / "x").is_file() else 0
    if kind == 1:
        raise KeyError("x")
    if kind == 2:
        raise InputError("two\nlines")
    if kind == 3:
        os.abort()
    if kind == 4:
        pickle.loads(pickle.dumps(Path()))


WRONG = {"wrong": (_make_wrong, _read_wrong)}  # so that a test can see that the fuzzer sees it
