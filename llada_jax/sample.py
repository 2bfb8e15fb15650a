"""Samples from a checkpoint: completion, infilling of [MASK] spans, replies of fine-tuned models.

python -m llada_jax.sample --checkpoint=DIR --prompt='床前明月光，' --gen_length=8
python -m llada_jax.sample --checkpoint=DIR --prompt='[MASK*5]，疑是地上霜。' --trajectory
"""

import contextlib
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_config
from llada_jax.parallel import join, processes
from llada_jax.parallel.mesh import make_mesh
from llada_jax.sampling import prompts
from llada_jax.sampling.generate import generate, infill
from llada_jax.streams import stream

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The workdir of a training run, or a published checkpoint.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "The prompt; may be given several times. [MASK] or [MASK*N]: masks.")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", None, "Tokens to append; default 32, or none if the prompt has masks.")
_STEPS = flags.DEFINE_integer("steps", None, "Forward passes in all; default: one for each token.")
_BLOCK_LENGTH = flags.DEFINE_integer("block_length", None, "Semi-autoregressive blocks; default: one block.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_CFG_SCALE = flags.DEFINE_float("cfg_scale", 0.0, "Classifier-free guidance.")
_REMASKING = flags.DEFINE_enum("remasking", "low_confidence", ["low_confidence", "random"], "What stays masked.")
_CHAT = flags.DEFINE_enum("chat", "auto", ["auto", "yes", "no"], "Apply the chat template; auto: if fine-tuned.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0, upper_bound=2**32 - 1)
_TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Show the text after every step.")


def main(_argv: list[str]) -> None:
    with processes.all_or_none():
        workdir, objective, tokenizer = _open()
    with contextlib.ExitStack() as stack:
        mesh = None
        if jax.process_count() > 1:  # the model is split over the devices of all
            mesh = make_mesh(dict(data=1, fsdp=-1, tensor=1, context=1))
            stack.enter_context(jax.set_mesh(mesh))
        model = hf.load(workdir, mesh=mesh)
        is_chat = objective == "sft" if _CHAT.value == "auto" else _CHAT.value == "yes"
        for prompt in _PROMPT.value:
            ids = (
                tokenizer.encode_chat([{"role": "user", "content": prompt}])
                if is_chat
                else prompts.encode_prompt(tokenizer, prompt)
            )
            row, trajectory = _sample(model, tokenizer, ids)
            if processes.is_first():
                _print(tokenizer, ids, is_chat, row, trajectory)


def _open() -> tuple[Path, str | None, Tokenizer]:
    if not _CHECKPOINT.value:
        raise InputError("--checkpoint is needed: the --workdir of a training run")
    if not _PROMPT.value or not all(_PROMPT.value):
        raise InputError("--prompt is needed and must not be empty")
    workdir = Path(_CHECKPOINT.value)
    config = load_config(workdir)
    objective = config.get("objective", {}).get("name")  # a published model tells of none, also when converted
    if objective == "autoregressive":
        raise InputError(f"{workdir}: holds an autoregressive control; the diffusion sampler can't use it")
    return workdir, objective, load_tokenizer(hf.tokenizer_directory(workdir))


def _sample(model, tokenizer: Tokenizer, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The sampled row [S], and the row after every step [steps, S]. Infilling alone takes the prompt as a whole."""
    key = stream(_SEED.value, "sample")
    has_masks = tokenizer.mask_id in ids
    gen_length = _GEN_LENGTH.value if _GEN_LENGTH.value is not None else (0 if has_masks else 32)
    if gen_length == 0:
        if _CFG_SCALE.value or _REMASKING.value != "low_confidence" or _BLOCK_LENGTH.value is not None:
            raise InputError("infilling alone takes no --cfg_scale, --remasking or --block_length; give --gen_length")
        steps = ids.count(tokenizer.mask_id) if _STEPS.value is None else _STEPS.value
        sampled = infill(
            model, np.asarray([[*ids, tokenizer.eos_id]]), steps=steps, temperature=_TEMPERATURE.value, key=key
        )
        return np.asarray(sampled.tokens)[0], sampled.trajectory(steps, tokenizer.mask_id)[:, 0]
    steps = gen_length + ids.count(tokenizer.mask_id) if _STEPS.value is None else _STEPS.value
    block_length = gen_length if _BLOCK_LENGTH.value is None else _BLOCK_LENGTH.value
    tokens, trajectory = generate(
        model, np.asarray([ids]), gen_length=gen_length, steps=steps, block_length=block_length,
        temperature=_TEMPERATURE.value, cfg_scale=_CFG_SCALE.value, remasking=_REMASKING.value, key=key,
        return_trajectory=True,
    )  # fmt: skip
    return np.asarray(tokens)[0], trajectory[:, 0]


def _print(tokenizer: Tokenizer, ids: list[int], is_chat: bool, row: np.ndarray, trajectory: np.ndarray) -> None:
    start = len(ids) if is_chat else 1
    if _TRAJECTORY.value:
        for i, state in enumerate(trajectory, start=1):
            print(f"{i:4d} {''.join(tokenizer.piece(token) for token in state[start:])}", file=sys.stderr)
    print(prompts.reply_text(tokenizer, row[start:]) if is_chat else tokenizer.decode(row[start:]))


if __name__ == "__main__":
    join.define_flags()
    cli.run(join.joined(main))
