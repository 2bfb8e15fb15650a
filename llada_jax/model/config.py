"""What a model is: `ModelConfig`, and the published shapes."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from llada_jax.inputs import InputError

# What the backward pass computes again, from nothing to most: nothing; all but the matrix products; also the MLP's;
# also the projections; all but the inputs of the layers. "offload" keeps what "projections" does, and the inputs, but
# on the host, save for the attention output.
REMAT = ("none", "matmuls", "projections", "attention", "full", "offload")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one Transformer. The field names are those of the published LLaDA `config.json`.

    Defaults are LLaDA-8B (arXiv 2502.09992, Table 5, and its checkpoint).
    """

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # fewer than n_heads: grouped-query attention
    mlp_hidden_size: int = 12288
    vocab_size: int = 126464  # ids that the tokenizer can produce; 0 in a run config: the tokenizer's
    embedding_size: int = 126464  # rows of the embedding and of the head; 0: vocab_size to the next 64
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False  # the head is the embedding
    causal: bool = False  # only for the autoregressive control
    mask_token_id: int = 126336
    bos_token_id: int = 126080
    eos_token_id: int = 126081
    pad_token_id: int = 126081
    eot_token_id: int = 126348
    init: str = "mitchell"  # "mitchell" (LLaDA) or "normal" (iLLaDA); see model.py
    init_std: float = 0.02
    # How it is computed, not what it is:
    dtype: str = "bfloat16"  # of activations and matrix products; parameters are float32
    residual: str = "parameters"  # the residual stream is as wide as the "parameters", or as what is "compute"d with
    remat: str = "full"  # what the backward pass computes again; see REMAT
    attention_kernel: str = "auto"  # "splash" (TPU), "cudnn" (GPU), "xla"; "auto": that of the platform. attention.py
    # Where it comes from; see interop/:
    family: str = "llada"  # under whose names it is published: "llada" or "illada"
    published: str = dataclasses.field(default="", repr=False)  # the config.json that it was loaded with, word for word

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def __post_init__(self):
        def require(ok: bool, message: str):
            if not ok:
                raise InputError(f"config.model: {message}")

        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, must be positive")
        for name, value in dataclasses.asdict(self).items():
            most = 1e300 if type(getattr(ModelConfig, name)) is float else 2**31 - 1
            require(not isinstance(value, int) or value <= most, f"{name} is {str(value)[:30]}, far too large")
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
                0 <= getattr(self, name) < self.embedding_size,
                f"{name} {getattr(self, name)} is outside the {self.embedding_size} rows of the embedding",
            )
        require(self.dtype in ("bfloat16", "float32"), f"dtype {self.dtype!r} is not one of bfloat16, float32")
        require(
            self.residual in ("parameters", "compute"), f"residual {self.residual!r} is not one of parameters, compute"
        )
        require(self.remat in REMAT, f"remat {self.remat!r} is not one of {', '.join(REMAT)}")
        require(self.init in ("mitchell", "normal"), f"init {self.init!r} is not one of mitchell, normal")
        require(self.family in ("llada", "illada"), f"family {self.family!r} is not one of llada, illada")


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
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    fields: dict[str, Any] = dict(group)
    unknown = sorted(set(fields) - set(defaults))
    if unknown:
        raise InputError(f"config.model: unknown field {', '.join(unknown)}; known: {', '.join(sorted(defaults))}")
    for name, value in fields.items():
        kind = type(defaults[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InputError(f"config.model: {name} is {value!r}, must be of type {kind.__name__}")
    return ModelConfig(**fields)
