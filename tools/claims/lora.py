r"""LoRA against fine-tuning of all parameters on the questions of the quickstart, and what weights in few bits cost.

python tools/claims/lora.py --workdir=DIR [--checkpoints=DIR,DIR]

LLaDA is trained on couplets and fine-tuned on questions about them as in tools/quickstart.py: every way from the same
base, on the same rows and masks. Then the model of all parameters, and each of --checkpoints, is held in fewer bits and
compared with itself in float32.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import llada_jax
from llada_jax import cli
from llada_jax.config import RunConfig
from llada_jax.configs import quickstart as recipe
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.evaluation import reversal
from llada_jax.interop import hf
from llada_jax.model import lora
from llada_jax.model.quantize import FEW_BITS
from llada_jax.tools import quickstart
from llada_jax.tools.claims import runs, show
from llada_jax.training import optimizer
from llada_jax.training.check import phases
from llada_jax.training.run import train
from llada_jax.training.step import split

# How the base is held while adapters are trained; None: all parameters are trained, in float32.
WAYS = {"all parameters": None, **{f"LoRA on {base}": base for base in ("bfloat16", *FEW_BITS)}}
# Arguments of `load`; what is not in few bits is in the dtype, which is also that of compute.
PRECISIONS = {
    "bfloat16": {"dtype": "bfloat16"},
    **{f"{bits}, rest {dtype}": {"dtype": dtype, "quantize": bits}
       for bits in FEW_BITS for dtype in ("float32", "bfloat16")},
}  # fmt: skip
_RANK, _ALPHA, _RATE = 16, 32.0, 5e-3  # of adapters; the rate of learning at its highest
_COMPARED = 8  # couplets, or random pairs, on which a checkpoint is compared with itself in fewer bits
_MIB = 2**20

Pair = tuple[list[int], list[int]]  # token ids of a prompt and its answer


def claim(workdir: Path, config: RunConfig, checkpoints: Sequence[Path]) -> str:
    couplets = quickstart.choose_couplets(config)
    corpus = quickstart.write_corpus(couplets, workdir)
    taught, others = quickstart.split(couplets, config)
    quickstart.write_questions(workdir / "questions.jsonl", taught)
    train(quickstart.pretraining(config, "llada", corpus, workdir), workdir / "llada" / "pretrain", title="base")
    tokenizer = load_tokenizer(workdir / "tokenizer.model")
    place = lambda way: workdir / way.replace(" ", "-")

    def tuned(way: str) -> dict[str, Any]:
        run = tuning(config, WAYS[way], workdir)
        train(run, place(way), title=way)
        return measure(run, place(way), tokenizer, {"taught": taught, "others": others})

    results, steps = workdir / "results.jsonl", {"steps": config.train.steps, "tuning": config.quickstart.sft_steps}
    tunings = [runs.once(results, {"way": way, **steps}, lambda way=way: tuned(way)) for way in WAYS]
    questions = lambda: compare(place("all parameters"), pairs_of(tokenizer, taught[:_COMPARED]))
    compared = [runs.once(results, {"checkpoint": "the fine-tuned one", **steps}, questions)]
    for path in checkpoints:
        known = lambda path=path: compare(path, random_pairs(path))
        compared.append(runs.once(results, {"checkpoint": path.name}, known))
    return conclude(workdir, tunings, compared)


def tuning(config: RunConfig, base: str | None, workdir: Path) -> RunConfig:
    """Fine-tuning of `workdir`/llada/pretrain on the taught questions; `base` is of WAYS."""
    run = quickstart.fine_tuning(config, "llada", workdir)
    if base:
        run.lora.update(dict(rank=_RANK, alpha=_ALPHA, base=base))
        times = _RATE / max(rate for _, rate, _ in run.optimizer.schedule)
        run.optimizer.schedule = tuple((kind, rate * times, end) for kind, rate, end in run.optimizer.schedule)
    return run


def measure(run: RunConfig, place: Path, tokenizer, asked: dict[str, list[reversal.Couplet]]) -> dict[str, Any]:
    """The share of right answers to the questions about some couplets, and what the run took."""
    base = run.lora.base if run.lora.rank else None
    model = hf.load(place, quantize=base if base in FEW_BITS else None)
    trainable, _ = split(model, lora.is_trainable if base else lambda _: True)
    moments = jax.eval_shape(optimizer.make_optimizer(run.optimizer, **phases(run)).init, trainable)
    frozen = jax.eval_shape(lambda model: lora.frozen_base(model, base), hf.load(run.train.init_from)) if base else ()
    right = {}
    for (name, couplets), direction in itertools.product(asked.items(), ("forward", "backward")):
        answers, _ = quickstart.ask(model, tokenizer, couplets, direction)
        right[f"{name}, {direction}"] = reversal.accuracy(answers, couplets, direction)
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["4_speed/seconds_per_step"] for line in lines if "4_speed/seconds_per_step" in line]
    return {
        "right": right, "trained": sum(x.size for x in jax.tree.leaves(trainable)),
        "state_mib": (_bytes(trainable) + _bytes(moments)) / _MIB, "frozen_mib": _bytes(frozen) / _MIB,
        "step_seconds": float(np.median(seconds)),
    }  # fmt: skip


def _bytes(tree) -> float:
    bits = {"int4": 4}  # of which NumPy's itemsize is a byte
    return sum(x.size * bits.get(x.dtype.name, 8 * x.dtype.itemsize) / 8 for x in jax.tree.leaves(tree))


def pairs_of(tokenizer, couplets: Sequence[reversal.Couplet]) -> list[Pair]:
    """The questions in both directions with their answers."""
    asked = [(quickstart.FORWARD[0], couplet) for couplet in couplets]
    asked += [(quickstart.BACKWARD[0], couplet[::-1]) for couplet in couplets]
    encode = lambda text: tokenizer.encode_chat([{"role": "user", "content": text}])
    return [(encode(form.format(given)), tokenizer.encode(wanted)) for form, (given, wanted) in asked]


def random_pairs(place: Path, count: int = _COMPARED, length: int = 16) -> list[Pair]:
    """For a checkpoint without a tokenizer: tokens of which none is special."""
    c = hf.load(place).config
    special = {c.mask_token_id, c.bos_token_id, c.eos_token_id, c.pad_token_id, c.eot_token_id}
    plain = [token for token in range(c.vocab_size) if token not in special]
    drawn = np.random.default_rng(0).choice(plain, (count, 2, length))
    return [(prompt.tolist(), answer.tolist()) for prompt, answer in drawn]


def compare(place: Path, pairs: Sequence[Pair]) -> dict[str, Any]:
    """{precision: {nats: mean |difference| of the bound a token, same: share of greedy tokens}}, to float32."""
    prompts, answers = map(list, zip(*pairs, strict=True))
    lengths = np.asarray([len(answer) for answer in answers])

    def bounds_and_tokens(**arguments):
        model = hf.load(place, **arguments)
        bounds = llada_jax.log_likelihood(model, prompts, answers, mc_num=128) / lengths
        tokens = np.asarray(llada_jax.generate(model, prompts, gen_length=int(lengths.max())))
        return bounds, tokens[:, -lengths.max() :]

    bounds, tokens = bounds_and_tokens(dtype="float32")
    found = {}
    for name, arguments in PRECISIONS.items():
        own_bounds, own_tokens = bounds_and_tokens(**arguments)
        nats, same = np.abs(own_bounds - bounds).mean(), np.mean(own_tokens == tokens)
        found[name] = {"nats": float(nats), "same": float(same)}
    return found


def conclude(workdir: Path, tunings: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]]) -> str:
    head = ("trained", *tunings[0]["right"], "parameters", "MiB with moments", "MiB frozen", "s/step")
    rows = [
        (x["way"], *(f"{share:.0%}" for share in x["right"].values()), f"{x['trained']:,}", f"{x['state_mib']:.1f}",
         f"{x['frozen_mib']:.1f}", f"{x['step_seconds']:.2f}")
        for x in tunings
    ]  # fmt: skip
    tables = [show.table(head, rows)]
    rows = [(x["checkpoint"], *(f"{x[p]['nats']:.4f}, {x[p]['same']:.0%}" for p in PRECISIONS)) for x in compared]
    tables.append(show.table(("checkpoint", *PRECISIONS), rows))
    said = "\n\n".join(tables)
    (workdir / "lora.md").write_text(f"{said}\n", encoding="utf-8")
    return said


def small() -> RunConfig:
    """The quickstart with fewer couplets and smaller batches, for a quarter of an hour of one core."""
    config = recipe.get_config().unlock()
    q = config.quickstart
    config.train.steps, q.couplets, q.sft_steps, q.sft_batch_size = 400, 60, 240, 32
    return config


def main(_argv: list[str]) -> None:
    workdir = runs.opened(flags.FLAGS.workdir, pictures=False)
    print(claim(workdir, small(), [Path(place) for place in flags.FLAGS.checkpoints]))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of models, results.jsonl and the tables.", required=True)
    flags.DEFINE_list("checkpoints", [], "Published checkpoints or workdirs that are held in fewer bits, too.")
    cli.run(main)
