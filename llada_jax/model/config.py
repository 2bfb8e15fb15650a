"""What a model is: `ModelConfig`, and the published shapes."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from llada_jax.fields import InputError, check_fields, choice, flag, integer, number, text

# What the backward pass computes again, from nothing to most: nothing; all but the matrix products; also the MLP's;
# also values and the output projection; also queries and keys; all but the inputs of the layers. "offload" keeps what
# "projections" does, and the inputs, but on the host, save for the attention output.
REMAT = ("none", "matmuls", "projections", "rotated", "attention", "full", "offload")

_MOST = 2**31 - 1
_ID = "id of the special token"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one Transformer. The field names are those of the published LLaDA `config.json`.

    Defaults are LLaDA-8B (arXiv 2502.09992, Table 5, and its checkpoint).
    """

    d_model: int = integer(4096, 1, _MOST, "width of the residual stream")
    n_layers: int = integer(32, 1, _MOST, "layers")
    n_heads: int = integer(32, 1, _MOST, "query heads")
    n_kv_heads: int = integer(32, 1, _MOST, "key and value heads; fewer than n_heads: grouped-query attention")
    mlp_hidden_size: int = integer(12288, 1, _MOST, "width of the SwiGLU MLP")
    vocab_size: int = integer(126464, 0, _MOST, "ids that the tokenizer can produce; 0 in a run config: its own number")
    embedding_size: int = integer(126464, 0, _MOST, "rows of embedding and head; 0: vocab_size to the next 64")
    max_sequence_length: int = integer(4096, 1, _MOST, "the longest row, tokens")
    rope_theta: float = number(500000.0, 0, 1e12, "base of the rotary embedding", above=True)
    rms_norm_eps: float = number(1e-5, 0, 1, "added to the mean square", above=True)
    weight_tying: bool = flag(False, "the head is the embedding")
    causal: bool = flag(False, "left-to-right attention: only for the autoregressive control")
    mask_token_id: int = integer(126336, 0, _MOST, f"{_ID} MASK")
    bos_token_id: int = integer(126080, 0, _MOST, f"{_ID} that begins a text")
    eos_token_id: int = integer(126081, 0, _MOST, f"{_ID} that ends a text")
    pad_token_id: int = integer(126081, 0, _MOST, f"{_ID} of padding")
    eot_token_id: int = integer(126348, 0, _MOST, f"{_ID} that ends a turn of a dialogue")
    init: str = choice("mitchell", ("mitchell", "normal"), "initialisation: that of LLaDA, or of iLLaDA")
    init_std: float = number(0.02, 0, 100, "standard deviation of init=normal", above=True)
    # How it is computed, not what it is:
    dtype: str = choice("bfloat16", ("bfloat16", "float32"), "of activations and products; parameters are float32")
    residual: str = choice("parameters", ("parameters", "compute"), "dtype of the residual stream: of which of the two")
    remat: str = choice("full", REMAT, "what the backward pass computes again; model/config.py lists it")
    attention_kernel: str = choice(
        "auto", ("auto", "xla", "splash", "cudnn", "splash_interpret"), "splash is for TPUs, cudnn for GPUs"
    )
    # Where it comes from; see interop/:
    family: str = text("llada", "whose names a published checkpoint of it has: a file of interop/families/")
    published: str = dataclasses.field(
        default="", repr=False, metadata=text("", "the config.json that it was loaded with", 2**26).metadata
    )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def __post_init__(self):
        def require(ok: bool, message: str):
            if not ok:
                raise InputError(f"config.model: {message}")

        check_fields(ModelConfig, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "config.model")
        require(self.vocab_size > 0, "vocab_size is 0, must be positive")
        require(self.d_model % self.n_heads == 0, f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        require(self.head_dim % 2 == 0, f"head size {self.head_dim} is odd; rotary embeddings need it even")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}",
        )
        require(
            self.vocab_size <= self.embedding_size,
            f"vocab_size {self.vocab_size} exceeds embedding_size {self.embedding_size}",
        )
        for name in ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "eot_token_id"):
            require(
                getattr(self, name) < self.embedding_size,
                f"{name} {getattr(self, name)} is outside the {self.embedding_size} rows of the embedding",
            )


# Published shapes: Table 5 of arXiv 2502.09992 (LLaDA and its controls) and arXiv 2606.25331 (iLLaDA).
_SMALL_1B: dict[str, Any] = dict(d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, mlp_hidden_size=5634)
_TINY_IDS: dict[str, Any] = dict(mask_token_id=3, bos_token_id=1, eos_token_id=2, pad_token_id=2, eot_token_id=6)
PRESETS: dict[str, ModelConfig] = {
    "llada_8b": ModelConfig(),
    "llada_1b": ModelConfig(**_SMALL_1B),
    "arm_1b": ModelConfig(**_SMALL_1B, causal=True),
    "arm_7b": ModelConfig(n_layers=28, n_kv_heads=8, mlp_hidden_size=13440, causal=True),
    "illada_8b": ModelConfig(
        n_kv_heads=8, mlp_hidden_size=14336, vocab_size=155136, embedding_size=155136,
        max_sequence_length=8192, weight_tying=True, init="normal", family="illada",
        mask_token_id=5, bos_token_id=1, eos_token_id=2, pad_token_id=2, eot_token_id=4,
    ),
    # For one machine. The ids are those that data/tokenizer.py gives the vocabularies it trains.
    "tiny": ModelConfig(
        d_model=256, n_layers=4, n_heads=4, n_kv_heads=4, mlp_hidden_size=704,
        vocab_size=8192, embedding_size=8192, max_sequence_length=1024, dtype="float32", remat="none", **_TINY_IDS,
    ),
    "small": ModelConfig(
        d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, mlp_hidden_size=1408,
        vocab_size=8192, embedding_size=8192, max_sequence_length=1024, dtype="float32", remat="none", **_TINY_IDS,
    ),
}  # fmt: skip


def model_config(group: Any) -> ModelConfig:
    """The `model` group of a run config as a `ModelConfig`. Raises InputError on an impossible shape."""
    if not isinstance(group, ConfigDict | dict):
        raise InputError(f"config.model is {group!r}, not a group of fields")
    values: dict[str, Any] = dict(group)
    check_fields(ModelConfig, values, "config.model")
    return ModelConfig(**values)
