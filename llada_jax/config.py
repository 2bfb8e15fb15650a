"""What a model is and what a run is: `ModelConfig` with the published shapes, and the run config of every stage."""

import dataclasses
import json
from typing import Any

from ml_collections import ConfigDict

RunConfig = Any  # an ml_collections.ConfigDict, whose fields type checkers can't know


class InputError(ValueError):
    """A mistake of the user's: its message is one line that says what is wrong, where, and what to do.

    Entry points print the message alone and exit with code 2; see `llada_jax.cli`.
    """


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


def run_config(preset: str = "llada_8b") -> RunConfig:
    """The run config with LLaDA's recipe as its defaults; files in configs/ change what they need and `lock()` it.

    Every field is read in the one module that is named beside its group.
    """
    config: RunConfig = ConfigDict()
    config.model = ConfigDict(dataclasses.asdict(PRESETS[preset]))  # config.py, model_config()
    config.data = ConfigDict(  # data/, through train.py
        dict(
            files="couplets",  # globs of .txt, .jsonl, .parquet, or the embedded "couplets", "python_reference"
            path="",  # instead of files: a directory that tools/prepare_data.py made
            kind="text",  # "text", or "chat" for supervised fine-tuning
            documents="file",  # a document of a text file is a "file", "paragraph" or "line"
            tokenizer="",  # a SentencePiece .model or a tokenizer.json; "": one is trained on the files
            tokenizer_type="bpe",  # of a tokenizer that is trained here: "bpe", "unigram" or "char"
            vocab_size=8192,  # of such a one, at most
            row_length=4096,
            packing="concatenate",  # "concatenate" documents and cut, or one "document" a row
            overlong="error",  # a dialogue longer than a row is an "error", or is "drop"ped and counted
            validation_fraction=0.0,
            mixture=(),  # further sources: pairs (prepared directory, weight); data.files or data.path weighs 1
            random_length_fraction=0.01,  # rows cut to a length ~ U{1..row_length}; paper section 2.2
            split_fraction=0.0,  # rows cut in two that do not see each other; iLLaDA: 0.3
            on_damage="stop",  # at a row that cannot be read; or "skip": another takes its place, is counted and logged
            threads=4,
        )
    )
    config.objective = ConfigDict(  # losses.py, diffusion.py
        dict(
            name="pretrain",  # "pretrain", "sft" or "autoregressive"
            attention="padding",  # a token sees the whole row ("full"), all but "padding", or its own "documents"
            eps=1e-3,
            stratified=False,  # t spread evenly over the global batch
        )
    )
    config.optimizer = ConfigDict(  # optimizer.py
        dict(
            schedule=(("linear", 4e-4, "2000 steps"), ("constant", 4e-4, "100%")),
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            decay="matrices",  # "matrices", or "all" parameters
            clip_norm=1.0,  # 0: no clipping
            mu_dtype="float32",
        )
    )
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=1))  # sharding.py; -1: the devices that are left
    config.train = ConfigDict(  # train.py
        dict(
            steps=438690,
            batch_size=1280,  # rows of the global batch, whatever the mesh
            microbatches=1,  # gradient accumulation: parts that a batch is computed in
            seed=0,
            init_from="",  # start from the model of this workdir or published checkpoint
            log_every=10,
            eval_every=1000,
            eval_rows=256,
            sample_every=0,  # 0: never
            sample_prompt="",
            spike_sigma=0.0,  # skip an update so far above the last 128 in loss or gradient norm. 0: only if not finite
            rollback_after=20,  # updates skipped in a row; then back to a checkpoint and on with other data. 0: never
            rollback_rate=1.0,  # by which a rollback multiplies the learning rate
            stall_seconds=600.0,  # in one phase of a step, after which the stacks of all threads are printed; 0: never
        )
    )
    config.checkpoint = ConfigDict(  # checkpoint.py
        dict(
            every_steps=1000,
            every_minutes=0.0,  # and whenever so many have passed since the last save; 0: by steps only; train.py
            keep=3,  # the newest ones
            keep_every_steps=0,  # and for good those of every so many steps; 0: none
        )
    )
    return config


def set_slice(config: RunConfig, slices: dict[str, dict[str, Any]], name: str) -> None:
    """Sets mesh axes, `microbatches` and `remat` to what a config file says for a TPU slice; "" leaves them."""
    if name and name not in slices:
        raise InputError(f"no settings for the slice {name!r}; there are some for {', '.join(slices)}")
    for field, value in slices.get(name, {}).items():
        group = {"microbatches": config.train, "remat": config.model}.get(field, config.mesh)
        group[field] = value


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


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "config") -> list[str]:
    """The fields in which two resolved configs differ, each as `config.a.b: old -> new`."""
    lines = []
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}.{name}")
        elif json.dumps(a) != json.dumps(b):
            lines.append(f"{prefix}.{name}: {a!r} -> {b!r}")
    return lines
