r"""Turns files of text or dialogues into a directory of rows that training reads.

python tools/prepare_data.py --files='corpus/**/*.jsonl' --tokenizer=runs/tokenizer.model \
    --output=runs/data --row_length=4096 --validation_fraction=0.001
python tools/prepare_data.py --kind=chat --files=dialogues.jsonl --tokenizer=runs/tokenizer.model \
    --output=runs/chat --row_length=1024 --overlong=drop

Text files are .txt, .jsonl ({"text": …} a line) or .parquet (column text), also with .gz, or an
embedded source: couplets, python_reference. Dialogues are .jsonl, a line
{"messages": [{"role": …, "content": …}, …]}. The same command again reuses what is there.
"""

from absl import flags

from llada_jax import cli
from llada_jax.data import KINDS, kind, packing, prepare, sources
from llada_jax.data.tokenizer import load_tokenizer

FILES = flags.DEFINE_list("files", None, "Comma-separated globs or embedded sources.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "Directory to make, also gs://BUCKET/NAME or s3://.", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "File or directory of the tokenizer.", required=True)
KIND = flags.DEFINE_enum("kind", "text", list(KINDS), "Running text or dialogues.")
ROW_LENGTH = flags.DEFINE_integer("row_length", 4096, "Tokens of a row.", lower_bound=2, upper_bound=kind.LONGEST_ROW)
PACKING = flags.DEFINE_enum(
    "packing",
    "concatenate",
    list(packing.PACKINGS),
    "One stream cut to rows, or a row for each document.",
)
DOCUMENTS = flags.DEFINE_enum("documents", "file", list(sources.DOCUMENTS), "What a document of a text file is.")
OVERLONG = flags.DEFINE_enum("overlong", "error", list(kind.OVERLONG), "What to do with replies beyond row_length.")
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.0, "Share of the documents that goes to OUTPUT/validation."
)
WORKERS = flags.DEFINE_integer("workers", None, "Processes; all cores if not given.", lower_bound=1, upper_bound=1024)


def main(_argv: list[str]) -> None:
    manifest = prepare.prepare_dataset(
        OUTPUT.value,
        kind=KIND.value,
        files=FILES.value,
        tokenizer=load_tokenizer(TOKENIZER.value),
        row_length=ROW_LENGTH.value,
        packing=PACKING.value,
        documents=DOCUMENTS.value,
        overlong=OVERLONG.value,
        validation_fraction=VALIDATION_FRACTION.value,
        workers=WORKERS.value,
    )
    counts = [f"{manifest[name]:,} {name}" for name in ("rows", "tokens", "documents")]
    dropped = f", {manifest['dropped']:,} overlong replies dropped" if manifest["dropped"] else ""
    print(f"{OUTPUT.value}: {', '.join(counts)}{dropped}")


if __name__ == "__main__":
    cli.run(main)
