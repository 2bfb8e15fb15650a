"""Running text: documents are packed into rows of tokens, in which everything but padding may be masked."""

from collections.abc import Iterator, Sequence

import numpy as np

from llada_jax.data import packing, sources
from llada_jax.data.kind import Batch, Encoded, Kind, Place, Plan, Record, stack
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.fields import InputError


def read(path: str, plan: Plan) -> Iterator[tuple[str, str]]:
    """The documents of a file; see `sources.read_documents`."""
    return ((path, text) for text in sources.read_documents(path, plan.documents))


def encode(text: str, where: str, tokenizer: Tokenizer, plan: Plan) -> Encoded:
    """The ids of one document, which are still to be packed."""
    if not isinstance(text, str):
        raise InputError(f"{where}: is a {type(text).__name__}, not text")
    ids_N = np.asarray(tokenizer.encode(sources.check_unicode(text, where)), np.int32)
    return Encoded([ids_N], scored_tokens=len(ids_N) + 2, bytes=len(text.encode()))  # 2: BOS and EOS


def pack(plan: Plan, tokenizer: Tokenizer) -> packing.Packer:
    ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    return packing.Packer(plan.row_length, plan.packing, *ids)


def collate(
    records: Sequence[Record], place: Place, *, random_length_fraction: float = 0.0, split_fraction: float = 0.0
) -> Batch:
    """A batch in which all but padding is maskable, also in dialogues (fine-tuning as of iLLaDA)."""
    rows = stack(records)
    tokens_BL, segment_ids_BL = rows["tokens"], rows["segment_ids"]
    if random_length_fraction:
        tokens_BL, segment_ids_BL = packing.random_length(
            tokens_BL, segment_ids_BL, place.positions_B, fraction=random_length_fraction, seed=place.seed,
            pad_id=place.eos_id,
        )  # fmt: skip
    if split_fraction:
        segment_ids_BL = packing.split_in_two(
            segment_ids_BL, place.positions_B, fraction=split_fraction, seed=place.seed
        )
    return packing.token_batch(tokens_BL, segment_ids_BL, segment_ids_BL > 0)


KIND = Kind(read, encode, packing.row_fields, collate, pack=pack, options=("random_length_fraction", "split_fraction"))
