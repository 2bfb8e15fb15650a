"""Documents and dialogues are read as they stand; what cannot be read is named by file and line."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llada_jax.data import sources
from llada_jax.data.sources import expand_files, read_documents
from llada_jax.fields import InputError


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "documents, expected",
    [
        ("file", ["a\nb\n\n \n春"]),  # but for the last line end
        ("paragraph", ["a\nb", "春"]),
        ("line", ["a", "b", "春"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_files_are_cut_into_documents(tmp_path, documents, expected, packed):
    data = "\ufeffa\r\nb\n\n \n春\n".encode()
    path = tmp_path / ("x.txt.gz" if packed else "x.txt")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert list(read_documents(str(path), documents)) == expected


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    texts = ["a\nb", "春风 😀", "x"]
    jsonl = write(tmp_path / "x.jsonl", *(json.dumps({"text": text, "id": 1}) for text in texts), "")
    table = pyarrow.table({"id": [1, 2, 3], "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    assert list(read_documents(jsonl)) == texts
    assert list(read_documents(str(tmp_path / "x.parquet"))) == texts


def test_blank_documents_are_left_out(tmp_path):
    assert list(read_documents(write(tmp_path / "x.jsonl", '{"text": " "}', '{"text": "a"}'))) == ["a"]


@pytest.mark.parametrize(
    "name, lines, words",
    [
        ("x.jsonl", ['{"text": "a"}', "{"], "x.jsonl:2: not JSON"),
        ("x.jsonl", ['{"text": "a"}', "", '{"txt": "a"}'], "x.jsonl:3: needs .*'txt'"),
        ("x.jsonl", ['{"text": 3}'], "x.jsonl:1: needs"),
        ("x.jsonl", ["[1]"], "x.jsonl:1: needs .* list"),
        ("x.jsonl", ['{"text": "\\ud800"}'], "x.jsonl:1: character 0 is none of Unicode .half of a surrogate"),
        ("x.jsonl", ['{"text": "a"}', b'{"text": "\xff"}'], "x.jsonl:2: not UTF-8"),
        ("x.txt", ["a", "b", b"\xe6\x98"], "x.txt:3: not UTF-8"),
        ("x.txt.gz", ["a"], "x.txt.gz:1: broken gzip"),
        ("x.parquet", ["PAR1"], "x.parquet.* not readable as Parquet"),
        ("x.docx", ["a"], "x.docx: cannot read .docx"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, lines, words):
    path = write(tmp_path / name, *lines)
    with pytest.raises(InputError, match=words) as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)


def test_parquet_without_text_names_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column 'text'.*body"):
        list(read_documents(str(tmp_path / "x.parquet")))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="y.parquet: row 2"):
        list(read_documents(str(tmp_path / "y.parquet")))


def test_one_giant_document_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGEST_DOCUMENT", 10)
    path = write(tmp_path / "x.txt", "12345", "67890", "12345")
    with pytest.raises(InputError, match="documents=paragraph"):
        list(read_documents(path))
    assert len(list(read_documents(path, "line"))) == 3


def test_patterns_expand_sorted_and_once(tmp_path):
    (tmp_path / "sub").mkdir()
    names = [write(tmp_path / name, "a") for name in ("b.txt", "sub/a.txt", "a[1].txt")]
    patterns = f"{tmp_path}/**/*.txt,{names[0]},{names[2]},couplets"
    assert expand_files(patterns) == sorted([*names, "couplets"])
    assert expand_files(patterns.split(",")) == expand_files(patterns)


@pytest.mark.parametrize(
    "pattern, words",
    [("none*.txt", "no such file"), ("sub", "directory"), ("empty.txt", "empty"), ("", "no files")],
)
def test_patterns_that_lead_nowhere(tmp_path, monkeypatch, pattern, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=words):
        expand_files(pattern)


@pytest.mark.parametrize("pattern", [b"*.txt", b"caf\xe9.txt"])
def test_a_name_that_is_not_utf8_is_refused_in_one_line(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "a")
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")), "a")
    with pytest.raises(InputError, match="the name of a file: character 3 is none of Unicode") as error:
        expand_files(os.fsdecode(pattern))
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("pattern", ["x" * 300, "d/" * 3000, "a\0b", "a\0*"])
def test_names_that_no_file_can_have_are_no_files(pattern):
    with pytest.raises(InputError, match="no such file"):
        expand_files(pattern)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".txt.gz"])
def test_pipes_and_devices_are_not_read(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "*"):
        with pytest.raises(InputError, match="not a file"):
            expand_files(f"{tmp_path}/{name}{suffix}")


def test_couplets_are_read_from_their_table(tmp_path, monkeypatch):
    table = write(tmp_path / "c.tsv", "first\tsecond\tsource", '床前"明\t疑是\t静夜思', "甲\t乙\t丙", "")
    monkeypatch.setattr(sources, "COUPLETS", tmp_path / "c.tsv")
    assert table and sources.couplets() == [('床前"明', "疑是", "静夜思"), ("甲", "乙", "丙")]
    assert list(read_documents("couplets")) == ['床前"明，疑是。', "甲，乙。"]


def test_the_couplets_of_the_package_are_whole():
    couplets = sources.couplets()
    assert len(couplets) > 100 and all(all(field.strip() for field in row) for row in couplets)


def test_python_reference_reads_sources_without_importing(tmp_path, monkeypatch):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "test").mkdir()
    write(tmp_path / "pydoc_data" / "topics.py", "topics = {'assert': 'The assert statement'}")
    write(tmp_path / "m.py", '"""Module."""', "raise SystemExit", "def f():", '    """Does f."""')
    write(tmp_path / "test" / "bad.py", "not python at all (")
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(sources.python_reference()) == ["The assert statement", "m: Module.\n\nf: Does f."]
