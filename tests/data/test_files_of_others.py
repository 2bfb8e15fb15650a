"""What others wrote is data: nothing of it is run, nothing leads out of its directory, nothing takes all memory."""

import ast
import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, normalizers

from llada_jax import files
from llada_jax.data import chat_template, sources
from llada_jax.data.dataset import open_dataset, read_column
from llada_jax.data.prepare import prepare_dataset
from llada_jax.data.tokenizer import BOS, END_HEADER, EOS, EOT, MASK, START_HEADER, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.files import read_json

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tokenizer"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "春风"}]

# Pickle and what it hides in.

RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code"}


def _offences(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.split(".")[0] in RUNS_CODE)
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("eval", "exec", "compile", "__import__"):
                yield called
            elif called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
                yield "np.load without allow_pickle=False"
            elif called == "torch.load" and given.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            elif called.endswith((".read_pickle", ".load_pickle", ".fromfile_pickle")) or given.get("shell") == "True":
                yield called


@pytest.mark.parametrize("folder", ["llada_jax", "tools", "launch", "configs"])
def test_no_source_loads_a_pickle_or_runs_a_string(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    assert [(path.name, what) for path in files for what in _offences(ast.parse(path.read_text()))] == []


def test_the_search_for_pickles_finds_them():
    hidden = "import pickle\nfrom dill import load\nnp.load(x, allow_pickle=True)\nnp.load(x)\ntorch.load(x)\neval(x)"
    assert len(list(_offences(ast.parse(hidden)))) == 6


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_pickle_in_place_of_an_array_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "objects.npy", np.asarray([_Bomb()], object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(_Bomb()))
    np.savez(tmp_path / "several.npz", x=np.zeros(1, np.int32))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    for name in ("objects.npy", "plain.npy", "several.npy"):
        with pytest.raises(InputError, match=name):
            read_column(tmp_path / name, np.int32, 1)
    assert not (tmp_path / "exploded").exists()


# Chat templates.


def with_template(directory, template):
    directory.mkdir()
    for path in GOLDEN.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% for m in messages %}{{ m.update({'role': 'system'}) }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_reaches_python_objects(tmp_path, template):
    tokenizer = with_template(tmp_path / "t", template)
    try:
        text = tokenizer.decode(tokenizer.encode_chat(MESSAGES), keep_special=True)
    except InputError as error:
        assert "its chat template fails" in str(error) and "\n" not in str(error)
    else:
        assert text.strip() == "" or text == "[Undefined, Undefined]", (
            text
        )  # jinja2 shows what is out of reach as nothing


ENDLESS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a large range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "doubling": "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "padding": "{{ 'a'.center(10 ** 11) }}",
    "formatting": "{{ '%9999999999d' % 1 }}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "a syntax error": "{% for %}",
    "a wrong type": "{{ messages + 1 }}",
    "its own refusal": "{{ raise_exception('roles must\nalternate') }}",
    "half of a surrogate pair": "{{ messages[0].content }}{{ '\\ud83d' }}",
}


WORDS = {
    "loops in loops": f"takes over {chat_template.SECONDS} seconds",
    "a large range": "Range too big",
    "doubling": "needs more memory",
    "much text": f"makes over {chat_template.CHARACTERS} characters",
    "its own refusal": "refuses these messages: roles must alternate",
    "half of a surrogate pair": "what its chat template makes: character 2 is none of Unicode",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_bound_ends_in_one_line(tmp_path, kind):
    tokenizer = with_template(tmp_path / "bad", ENDLESS[kind])
    with pytest.raises(InputError, match="bad: .*its chat template") as error:
        tokenizer.encode_chat(MESSAGES)
    assert "\n" not in str(error.value) and WORDS.get(kind, "") in str(error.value)
    good = with_template(tmp_path / "good", "{{ messages[0].content }}")  # the next one is not hurt
    assert good.decode(good.encode_chat(MESSAGES)) == "hi"


def test_a_strangers_template_gives_what_jinja_gives(tmp_path):
    template = "{% for m in messages %}\n{{ bos_token }}{{ m['role'] | upper }}: {{ m.content }}\n{% endfor %}"
    tokenizer = with_template(tmp_path / "t", template)
    expected = chat_template.environment().from_string(template).render(messages=MESSAGES, bos_token="x")
    text = tokenizer.decode(tokenizer.encode_chat(MESSAGES), keep_special=True)
    assert text == expected.replace("x", "<|startoftext|>")


@pytest.mark.parametrize("template", [3, {"a": 1}, ["x"], [{"name": "default"}], [{"name": "default", "template": 1}]])
def test_a_template_that_is_no_text_is_named(tmp_path, template):
    for path in GOLDEN.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(InputError, match=str(tmp_path)):
        load_tokenizer(tmp_path).encode_chat(MESSAGES)


def test_a_tokenizer_that_panics_is_named(tmp_path):
    tokenizer = json.loads((GOLDEN / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="tokenizer.json: the tokenizer fails on this text .*retry-limit") as error:
        load_tokenizer(tmp_path).encode("a" * 60)
    assert "\n" not in str(error.value)


def with_parts(directory, **parts):
    """The golden tokenizer with another normalizer or decoder."""
    tokenizer = tokenizers.Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


Replace = normalizers.Replace
GROWING = {  # each makes gigabytes of a letter, by a file of a few kilobytes
    "replacements": [Replace("a", "b" * 600), Replace("b", "c" * 600), Replace("c", "d" * 600)],
    "expressions": [Replace(Regex("x*"), "y")] * 30,
    "prefixes": [normalizers.Prepend("a" * 9000), Replace("a", "b" * 20000)],
    "without end": [Replace("", "b" * 4000)] * 100,
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_normalizer_that_takes_all_memory_is_refused(tmp_path, kind):
    tokenizer = with_parts(tmp_path / "t", normalizer=normalizers.Sequence(GROWING[kind]))
    with pytest.raises(InputError, match="tokenizer.json: what it replaces may make .* bytes of 1; "):
        tokenizer.encode("a")
    tokenizer = with_parts(tmp_path / "d", decoder=decoders.Sequence([decoders.Replace("a", "aa" * 600)] * 3))
    with pytest.raises(InputError, match="tokenizer.json: what it replaces may make .* bytes of 2; "):
        tokenizer.decode(tokenizer.encode("aa")[:1] * 2)


def test_normalizers_as_they_are_published_are_not_refused(tmp_path):
    llama = normalizers.Sequence([normalizers.Prepend("▁"), Replace(" ", "▁")])
    forms = [normalizers.NFKD(), normalizers.Lowercase(), Replace(Regex(" {2,}"), " "), normalizers.Nmt()]
    for i, part in enumerate([llama, normalizers.Sequence(forms), normalizers.BertNormalizer(), None]):
        tokenizer = with_parts(tmp_path / str(i), normalizer=part)
        for text in ("", "a", "a b  c ﷺ" * 9999):
            assert bool(tokenizer.encode(text)) == bool(text)


@pytest.mark.parametrize("replacement, letters", [(3000, 200_000), (60, 100)])
def test_a_table_of_sentencepiece_that_takes_all_memory_is_refused(tmp_path, replacement, letters):
    (tmp_path / "rules.tsv").write_text("61\t" + " ".join(["62"] * replacement))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["bcd"] * 9), model_prefix=str(tmp_path / "t"), vocab_size=40, hard_vocab_limit=False,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"), bos_piece=BOS, eos_piece=EOS, minloglevel=3,
        control_symbols=[MASK, START_HEADER, END_HEADER, EOT],
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    if replacement == 60:
        assert len(tokenizer.encode("a" * letters)) > letters
        return
    with pytest.raises(InputError, match="t.model: what it replaces may make 2.0e.08 bytes of 200000"):
        tokenizer.encode("a" * letters)


@pytest.mark.parametrize("id", [2**24, 2**31, 2**32 - 1])
def test_ids_that_no_vocabulary_has_are_refused(tmp_path, id):
    tokenizer = json.loads((GOLDEN / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = id
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=f"tokenizer.json: has the id {id}, none may exceed 16777215"):
        load_tokenizer(tmp_path)


# Names that lead elsewhere.

NAMES = ["../x", "..", ".", "", "/etc/passwd", "a/b", "a/../../x", "x\0y", "rows/", "春" * 86, None, 3]


@pytest.fixture
def dataset(tmp_path):
    tokenizer = load_tokenizer(GOLDEN)
    prepare_dataset(
        tmp_path / "d", items=["a b c"] * 9, tokenizer=tokenizer, row_length=8, packing="document", workers=1,
        progress=False,
    )  # fmt: skip
    return tmp_path / "d"


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("what", ["shard", "tokenizer"])
def test_names_of_a_manifest_do_not_leave_its_directory(dataset, name, what):
    manifest = json.loads((dataset / "manifest.json").read_text())
    (manifest["shards"][0] if what == "shard" else manifest["tokenizer"])["file"] = name
    (dataset / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json: names the file .* no plain file name"):
        open_dataset(dataset)


def test_links_out_of_a_dataset_are_refused_and_links_within_are_not(dataset):
    shard = next(dataset.glob("rows-*"))
    shard.rename(dataset / "elsewhere")
    shard.symlink_to("elsewhere")
    assert open_dataset(dataset)[0]["length"] > 0
    (dataset / "elsewhere").rename(dataset.parent / "elsewhere")
    shard.unlink()
    shard.symlink_to("../elsewhere")
    with pytest.raises(InputError, match=f"{shard.name}: is a link out of its directory"):
        open_dataset(dataset)


# Sizes.


def test_files_that_cannot_be_what_they_are_named_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_JSON", 100)
    (tmp_path / "large.json").write_text("[" * 101)
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "latin.json").write_bytes(b'{"x": "\xe9"}')
    for name, words in [
        ("large.json", "has 101 bytes"), ("endless.json", "not a file"), ("gone.json", "not a file"),
        ("list.json", "not a JSON object"), ("latin.json", "not UTF-8 .* at byte 7"), (".", "not a file"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_json(tmp_path / name)


@pytest.mark.parametrize("documents", sources.DOCUMENTS)
def test_a_small_file_that_unpacks_to_one_endless_line_is_refused(tmp_path, monkeypatch, documents):
    monkeypatch.setattr(sources, "_LARGEST_DOCUMENT", 10**6)
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"a\n" + b"a" * (10**6 + 1)))
    with pytest.raises(InputError, match="x.txt.gz:2: too large for a line"):
        list(sources.read_documents(str(path), documents))
    (tmp_path / "y.txt").write_bytes(b"a\n" * 10**6)
    if documents == "paragraph":
        with pytest.raises(InputError, match="too large for a paragraph .* documents=line"):
            list(sources.read_documents(str(tmp_path / "y.txt"), documents))


def test_a_large_text_in_a_small_parquet_is_refused(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "x" * 2000]}), tmp_path / "x.parquet")
    monkeypatch.setattr(sources, "_LARGEST_DOCUMENT", 1999)
    with pytest.raises(InputError, match="x.parquet: row 2: too large for a document"):
        list(sources.read_documents(str(tmp_path / "x.parquet")))
