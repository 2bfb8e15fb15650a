r"""Trains a SentencePiece tokenizer with LLaDA's special tokens on text.

python tools/train_tokenizer.py --files='corpus/**/*.txt' --output=runs/tokenizer.model \
    --vocab_size=16384

Files are .txt, .jsonl ({"text": …} a line) or .parquet (column text), also with .gz, or an embedded
source: couplets, python_reference. Texts of more than 256 MB are sampled by line.
"""

import itertools

from absl import flags

from llada_jax import cli
from llada_jax.data.sources import expand_files, read_documents
from llada_jax.data.train_tokenizer import MODEL_TYPES, train_tokenizer

FILES = flags.DEFINE_list("files", None, "Comma-separated globs or embedded sources.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "The tokenizer file to write, ….model.", required=True)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 16384, "Ids, at most; fewer if the text is small.")
MODEL_TYPE = flags.DEFINE_enum("model_type", "bpe", list(MODEL_TYPES), "Kind of pieces.")


def main(_argv: list[str]) -> None:
    files = expand_files(FILES.value)
    # By line: pieces never span lines, and a text file of any size can be read.
    texts = itertools.chain.from_iterable(read_documents(file, "line") for file in files)
    tokenizer = train_tokenizer(texts, OUTPUT.value, VOCAB_SIZE.value, MODEL_TYPE.value)
    print(f"{OUTPUT.value}: {tokenizer.vocab_size} ids from {len(files)} sources")


if __name__ == "__main__":
    cli.run(main)
