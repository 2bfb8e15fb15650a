"""Reads text from files (.txt, .jsonl, .parquet, also .gz) and from two sources that come with the package."""

import ast
import csv
import glob
import gzip
import json
import os
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from llada_jax.fields import InputError
from llada_jax.files import require_file
from llada_jax.storage.buckets import is_bucket

EMBEDDED = ("couplets", "python_reference")  # names that stand where a file may
COUPLETS = Path(__file__).with_name("couplets.tsv")
DOCUMENTS = ("file", "paragraph", "line")  # what one document of a text file is

_TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".py")
_LARGEST_DOCUMENT = 2**26  # bytes; one document, or line, is held and tokenised by one process


def expand_files(patterns: str | Sequence[str]) -> list[str]:
    """Sorted paths that match comma-separated globs (`**` allowed); embedded names are kept.

    Raises InputError for a pattern without a match, for a directory, an empty file, whatever else is no regular file,
    and a name that is not UTF-8.
    """
    if isinstance(patterns, str):
        patterns = patterns.split(",")
    found = set()
    for pattern in filter(None, (str(pattern).strip() for pattern in patterns)):
        if is_bucket(pattern):
            raise InputError(f"{pattern}: text is prepared from files of this machine; copy or mount the bucket first")
        # A name is tried as it stands first: brackets are common in file names.
        is_name = pattern in EMBEDDED or os.path.exists(pattern)  # False for names that no file can have, too
        matches = [pattern] if is_name else glob.glob(pattern, recursive=True)
        files = [match for match in matches if not Path(match).is_dir()]
        if not files:
            if matches:
                raise InputError(f"{pattern}: is a directory; name files, as in '{pattern.rstrip('/')}/**/*.txt'")
            raise InputError(f"{pattern}: no such file; give files or globs like 'corpus/**/*.txt'")
        found.update(files)
    if not found:
        raise InputError("no files given; name them by comma-separated globs, as in 'corpus/**/*.txt'")
    for path in found.difference(EMBEDDED):
        check_unicode(path, f"{path!r}, the name of a file")
        require_file(Path(path))
        if Path(path).stat().st_size == 0:
            raise InputError(f"{path}: is empty; remove it or leave it out of the pattern")
    return sorted(found)


def read_documents(path: str, documents: str = "file") -> Iterator[str]:
    """The documents of a text, JSONL ({"text": …}) or Parquet (column text) file or embedded name.

    `documents` says what a document of a text file is: the whole "file", a "paragraph" (parted by
    blank lines) or a "line". `.gz` is unpacked, blank documents are left out. Raises InputError
    with the line (or row) number for whatever cannot be read.
    """
    if documents not in DOCUMENTS:
        raise InputError(f"documents is {documents!r}, must be one of {', '.join(DOCUMENTS)}")
    kind = _kind(path)
    if kind == "embedded":
        texts = python_reference() if path == "python_reference" else map(_couplet_document, couplets())
    elif kind == "parquet":
        texts = _parquet_texts(path)
    elif kind == "jsonl":
        texts = (_text_field(value, where) for where, value in json_lines(path))
    else:
        texts = {"file": _whole_file, "paragraph": _paragraphs, "line": _lines}[documents](path)
    return (text for text in texts if text.strip())


def read_jsonl(path: str, line: str) -> Iterator[tuple[str, object]]:
    """Pairs ("file:line", value) of a JSONL file; `line`, for the InputError of other files, is an example of one."""
    if _kind(path) != "jsonl":
        raise InputError(f"{path}: is not .jsonl; data of this kind is read from that, one {line} a line")
    yield from json_lines(path)


def check_unicode(text: str, where: str) -> str:
    """`text`, if it can be written as UTF-8. Raises InputError, which begins with `where`, otherwise."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is none of Unicode (half of a surrogate pair, or a byte that is not "
            "UTF-8); repair it"
        ) from error
    return text


def couplets() -> list[tuple[str, str, str]]:
    """Classical Chinese couplets (first line, second line, source) that come with the package."""
    with COUPLETS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(first, second, source) for first, second, source in rows[1:]]


def couplet_text(first: str, second: str) -> str:
    """A couplet as running text."""
    return f"{first}，{second}。"


def python_reference() -> Iterator[str]:
    """English text on every machine: Python's language reference and its library's docstrings.

    A document is one topic or the docstrings of one module, in a fixed order; the text depends on
    the version of Python. Nothing is imported: the source files are parsed.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    topics = library / "pydoc_data" / "topics.py"
    if not topics.exists():
        raise InputError(f"{topics}: this Python was installed without its documentation; give files of text")
    for node in ast.walk(ast.parse(topics.read_bytes())):
        if isinstance(node, ast.Dict):
            yield from (ast.literal_eval(value) for value in node.values)
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        if not _NO_LIBRARY.intersection(path.relative_to(library).parts):
            yield from _docstrings(path)


_NO_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "pydoc_data",
}


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in others' strings
        tree = ast.parse(path.read_bytes())
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", path.stem)
                texts.append(f"{name}: {text}")
    if texts:
        yield "\n\n".join(texts)


def _kind(path: str) -> str:
    if path in EMBEDDED:
        return "embedded"
    suffix = Path(path.removesuffix(".gz")).suffix.lower()
    if suffix in _TEXT:
        return "text"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    raise InputError(f"{path}: cannot read {suffix or 'a file without suffix'}; use .txt, .jsonl or .parquet")


def _lines(path: str) -> Iterator[str]:
    return (line for _, line in _numbered_lines(path))


def _paragraphs(path: str) -> Iterator[str]:
    paragraph, size = [], 0
    for where, line in _numbered_lines(path):
        if line.strip():
            paragraph.append(line)
            size += len(line) + 1
            _require_size(size, where, "a paragraph", "use documents=line")
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph, size = [], 0
    if paragraph:
        yield "\n".join(paragraph)


def _whole_file(path: str) -> Iterator[str]:
    lines, size = [], 0
    for _, line in _numbered_lines(path):
        lines.append(line)
        size += len(line) + 1
        _require_size(size, path, "one document", "use documents=paragraph or documents=line")
    yield "\n".join(lines)


def _require_size(size: int, where: str, what: str, remedy: str) -> None:
    if size > _LARGEST_DOCUMENT:
        raise InputError(f"{where}: too large for {what} (over {_LARGEST_DOCUMENT >> 20} MB); {remedy}")


def _numbered_lines(path: str) -> Iterator[tuple[str, str]]:
    """Pairs ("file:line", line without its end); decoded one by one, so that errors name it."""
    number = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            lines = iter(lambda: file.readline(_LARGEST_DOCUMENT + 1), b"")  # what is packed may be one endless line
            for number, line in enumerate(lines, start=1):
                _require_size(len(line), f"{path}:{number}", "a line", "cut it")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # byte order mark
                yield f"{path}:{number}", line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1} of the line); convert the file"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}:{number + 1}: broken gzip data ({error}); copy the file again") from error
    except OSError as error:
        raise InputError(f"{path}:{number + 1}: cannot be read ({error.strerror})") from error


def json_lines(path: str) -> Iterator[tuple[str, object]]:
    for where, line in _numbered_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); every line must be one JSON object") from error
        yield where, value


def _text_field(value: object, where: str) -> str:
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"an object with keys {sorted(value)[:8]}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise InputError(f'{where}: needs {{"text": "…"}}, found {found}')
    return check_unicode(text, where)


def _parquet_texts(path: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise InputError(f"{path}: no column 'text'; its columns are {names}")
            # Few rows at a time: a small file may repeat a large text any number of times.
            for batch in file.iter_batches(batch_size=16, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise InputError(
                            f"{path}: row {number}: column 'text' holds "
                            f"{type(text).__name__}, not text; repair or drop the row"
                        )
                    _require_size(len(text), f"{path}: row {number}", "a document", "cut it")
                    yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: row {number + 1}: not readable as Parquet ({reason}); copy it again") from error


def _couplet_document(couplet: tuple[str, str, str]) -> str:
    return couplet_text(*couplet[:2])
