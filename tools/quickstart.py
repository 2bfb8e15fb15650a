"""The whole line in one go: pre-train LLaDA and an autoregressive control, compare, fine-tune both, ask, report.

python tools/quickstart.py --config=configs/quickstart.py --workdir=DIR
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags

from llada_jax import cli, inputs
from llada_jax.config import RunConfig
from llada_jax.data import prepare, sources
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.evaluation import reversal
from llada_jax.fields import InputError
from llada_jax.interop.workdir import load_model
from llada_jax.model.transformer import parameter_count
from llada_jax.sampling import left_to_right, prompts
from llada_jax.sampling.generate import generate
from llada_jax.tools import report
from llada_jax.training.run import train

# The first phrasing of each direction is the one that is asked; all are taught.
FORWARD = ("{}的下一句是什么？", "请接下一句：{}", "{}，下一句是？")
BACKWARD = ("{}的上一句是什么？", "请接上一句：{}", "{}，上一句是？")
KINDS = ("llada", "arm")
NAMES = {"llada": "LLaDA", "arm": "autoregressive control"}


def quickstart(config: RunConfig, workdir: Path) -> dict:
    """Runs all stages in `workdir` (each continues where it stopped) and returns what report.json holds."""
    start, clock = time.perf_counter(), Clock()
    couplets = choose_couplets(config)
    corpus = write_corpus(couplets, workdir)
    runs = {"llada": "llada/pretrain", "arm": "arm/pretrain", "llada_sft": "llada/sft", "arm_sft": "arm/sft"}
    for kind in KINDS:
        with clock.stage(f"{NAMES[kind]}: pre-training"):
            train(pretraining(config, kind, corpus, workdir), workdir / runs[kind], title=f"{kind} pre-training")
    models = {kind: load_model(workdir / runs[kind]) for kind in KINDS}
    tokenizer = load_tokenizer(workdir / "tokenizer.model")
    with clock.stage("reversal"):
        table, lines, trajectories = compare(models, tokenizer, couplets)
        print_reversal(table)
    taught, asked = split(couplets, config)
    write_questions(workdir / "questions.jsonl", taught)
    for kind in KINDS:
        with clock.stage(f"{NAMES[kind]}: fine-tuning"):
            train(fine_tuning(config, kind, workdir), workdir / runs[f"{kind}_sft"], title=f"{kind} fine-tuning")
    tuned = {kind: load_model(workdir / runs[f"{kind}_sft"]) for kind in KINDS}
    with clock.stage("questions"):
        questions, more = ask_all(tuned, tokenizer, taught, asked)
        print_questions(questions)
    trajectories += more
    result = {
        "config": "quickstart",
        "seed": config.train.seed,
        "couplets": len(couplets),
        "seconds": round(time.perf_counter() - start, 1),
        "stages": clock.stages,
        "models": {kind: _describe(models[kind]) for kind in KINDS},
        "runs": runs,
        "reversal": table,
        "protocols": {k: v.format(candidates=min(32, len(couplets))) for k, v in reversal.PROTOCOLS.items()},
        "questions": questions,
        "examples": examples(couplets, lines),
        "trajectories": trajectories,
    }
    temporary = workdir / "report.json.tmp"
    temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(workdir / "report.json")
    return result


class Clock:
    """Names each stage on the terminal and remembers how long it took."""

    def __init__(self):
        self.stages: list[dict] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.stages.append({"name": name, "seconds": round(time.perf_counter() - start, 1)})


def choose_couplets(config: RunConfig) -> list[tuple[str, str]]:
    """The first couplets of the embedded corpus whose text fits a row of `data.row_length` characters."""
    room = config.data.row_length - 2  # BOS and EOS
    fitting = [(a, b) for a, b, _ in sources.couplets() if len(sources.couplet_text(a, b)) <= room]
    wanted = config.quickstart.couplets or len(fitting)
    if wanted > len(fitting):
        raise InputError(f"config.quickstart.couplets is {wanted}; {len(fitting)} couplets fit config.data.row_length")
    return fitting[:wanted]


def write_corpus(couplets: Sequence[tuple[str, str]], workdir: Path) -> Path:
    """couplets.txt, one a line, and a tokenizer of single characters for it and for the words of the questions."""
    texts = [sources.couplet_text(*couplet) for couplet in couplets]
    corpus, tokenizer = workdir / "couplets.txt", workdir / "tokenizer.model"
    workdir.mkdir(parents=True, exist_ok=True)
    corpus.write_text("\n".join(texts) + "\n", encoding="utf-8")
    if not tokenizer.exists():
        train_tokenizer([*texts, *FORWARD, *BACKWARD], tokenizer, 8192, "char")
    return corpus


def split(couplets: Sequence[tuple[str, str]], config: RunConfig):
    """(couplets whose questions are taught, couplets whose questions are never seen)."""
    order = np.random.default_rng(config.train.seed).permutation(len(couplets))
    cut = round(config.quickstart.question_share * len(couplets))
    return [couplets[i] for i in sorted(order[:cut])], [couplets[i] for i in sorted(order[cut:])]


def write_questions(path: Path, couplets: Sequence[tuple[str, str]]) -> None:
    """Every phrasing, both directions, as chat messages in JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for first, second in couplets:
            pairs = [(form.format(first), second) for form in FORWARD] + [
                (form.format(second), first) for form in BACKWARD
            ]
            for question, answer in pairs:
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def pretraining(config: RunConfig, kind: str, corpus: Path, workdir: Path) -> RunConfig:
    run = _without_quickstart(config)
    if kind == "arm":  # the same rows in the same order
        run.data.path = str(workdir / "llada/pretrain/data")
        run.model.causal, run.objective.name = True, "autoregressive"
    else:
        run.data.files, run.data.tokenizer = str(corpus), str(workdir / "tokenizer.model")
    return run


def fine_tuning(config: RunConfig, kind: str, workdir: Path) -> RunConfig:
    run, q = _without_quickstart(config), config.quickstart
    run.train.init_from = str(workdir / kind / "pretrain")
    run.train.steps, run.train.batch_size = q.sft_steps, q.sft_batch_size
    run.optimizer.schedule = q.sft_schedule
    run.data.kind, run.data.row_length, run.data.packing = "chat", q.sft_row_length, "document"
    run.data.files = str(workdir / "questions.jsonl")
    run.objective.name = "sft" if kind == "llada" else "autoregressive"
    run.model.causal = kind == "arm"
    if q.sft_text_weight:  # plain couplets among the questions, so that they are not forgotten
        text = workdir / "couplets"
        prepare.prepare_dataset(
            text, files=str(workdir / "couplets.txt"), tokenizer=load_tokenizer(workdir / "tokenizer.model"),
            row_length=q.sft_row_length, packing="document", documents="line", progress=False,
        )  # fmt: skip
        run.data.mixture = ((str(text), q.sft_text_weight),)
    return run


def _without_quickstart(config: RunConfig) -> RunConfig:
    run = config.copy_and_resolve_references().unlock()
    del run.quickstart
    return run


def compare(models: dict, tokenizer, couplets: Sequence[tuple[str, str]]):
    """(the reversal table, what each model wrote, two trajectories) of the pre-trained models."""
    table: dict = {"llada": {}, "arm": {}, "arm_ranking": {}, "count": len(couplets)}
    lines, trajectories = {}, []
    for direction in ("forward", "backward"):
        lines["llada", direction], replay = reversal.fill_lines(models["llada"], tokenizer, couplets, direction)
        write = reversal.write_forward if direction == "forward" else reversal.write_backward
        lines["arm", direction] = write(models["arm"], tokenizer, couplets)
        for kind in KINDS:
            table[kind][direction] = reversal.accuracy(lines[kind, direction], couplets, direction)
        table["arm_ranking"][direction] = reversal.rank(models["arm"], tokenizer, couplets, direction)
        first, second = couplets[0]
        title = f"The line after {first}" if direction == "forward" else f"The line before {second}"
        trajectories.append(_trajectory(tokenizer, title, replay["sampled"], 0, replay["hidden"][0]))
    return table, lines, trajectories


def ask_all(tuned: dict, tokenizer, taught, asked):
    """(share of questions answered right, two trajectories) after fine-tuning, for seen and unseen couplets."""
    questions: dict = {kind: {} for kind in KINDS}
    trajectories = []
    for name, couplets in (("seen", taught), ("unseen", asked)):
        for kind in KINDS:
            row: dict = {"count": len(couplets)}
            for direction in ("forward", "backward"):
                answers, replay = ask(tuned[kind], tokenizer, couplets, direction)
                row[direction] = reversal.accuracy(answers, couplets, direction)
                if kind == "llada" and name == "seen":
                    title = (FORWARD if direction == "forward" else BACKWARD)[0].format(
                        couplets[0][direction == "backward"]
                    )
                    trajectories.append(_trajectory(tokenizer, title, replay, 0, slice(-_ANSWER_ROOM, None)))
            questions[kind][name] = row
    return questions, trajectories


_ANSWER_ROOM = 10  # tokens of a reply: a line and the end of the turn, then EOS


def ask(model, tokenizer, couplets: Sequence[tuple[str, str]], direction: str):
    """The replies to the first phrasing, and for LLaDA the sampled rows."""
    form, given = (FORWARD[0], 0) if direction == "forward" else (BACKWARD[0], 1)
    asked = [tokenizer.encode_chat([{"role": "user", "content": form.format(c[given])}]) for c in couplets]
    if model.config.causal:
        return left_to_right.continue_ids(model, tokenizer, asked, _ANSWER_ROOM), None
    rows, real = inputs.left_pad(asked, tokenizer.pad_id)
    _, sampled = generate(model, rows, real, gen_length=_ANSWER_ROOM, return_stats=True)
    return [prompts.reply_text(tokenizer, row) for row in np.asarray(sampled.tokens)[:, -_ANSWER_ROOM:]], sampled


def _trajectory(tokenizer, title: str, sampled, row: int, columns: slice) -> dict:
    step = np.asarray(sampled.step)[row, columns]
    frames = sampled.trajectory(int(step.max()) + 1, tokenizer.mask_id)[:, row, columns]
    pieces = [[tokenizer.piece(token) for token in frame] for frame in frames]
    return {
        "title": title,
        "prompt": "",
        "frames": [["▒"] * len(step), *pieces],
        "confidence": [round(float(p), 4) for p in np.asarray(sampled.probability)[row, columns]],
        "commit_step": [int(s) for s in step],
    }


def examples(couplets: Sequence[tuple[str, str]], lines: dict, most: int = 4) -> list[dict]:
    """A few couplets as both models completed them: the first ones, and some that LLaDA got wrong."""
    chosen = []
    for direction, title in (("forward", "Next line"), ("backward", "Previous line")):
        wrong = [i for i, c in enumerate(couplets) if lines["llada", direction][i] != c[direction == "forward"]]
        for i in [*range(most // 2), *wrong[: most // 2]]:
            given, expected = couplets[i] if direction == "forward" else couplets[i][::-1]
            chosen.append(
                {"title": title, "direction": direction, "given": given, "expected": expected}
                | {kind: lines[kind, direction][i] for kind in KINDS}
            )
    return chosen


def print_reversal(table: dict) -> None:
    print(f"\nReversal, {table['count']} couplets, whole line right    next line  previous line")
    for kind, name in (*NAMES.items(), ("arm_ranking", "  (its ranking of given lines)")):
        print(f"  {name:44s}{table[kind]['forward']:11.1%}{table[kind]['backward']:15.1%}")
    print(flush=True)


def print_questions(questions: dict) -> None:
    print("\nQuestions after fine-tuning                           next line  previous line")
    for kind, name in NAMES.items():
        for which, row in questions[kind].items():
            label = f"{name}, question {'taught' if which == 'seen' else 'never seen'} ({row['count']})"
            print(f"  {label:50s}{row['forward']:9.1%}{row['backward']:15.1%}")
    print(flush=True)


def _describe(model) -> dict:
    c = model.config
    return {"parameters": parameter_count(c), "layers": c.n_layers, "d_model": c.d_model}


def main(_argv: list[str]) -> None:
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if config is None or not workdir:
        raise InputError("--config=configs/quickstart.py and --workdir=DIR are needed")
    if "quickstart" not in config:
        raise InputError("--config: has no group 'quickstart'; use configs/quickstart.py or one like it")
    result = quickstart(config, Path(workdir))
    for trajectory in result["trajectories"]:
        print(trajectory["title"])
        for i, frame in enumerate(trajectory["frames"]):
            print(f"  {i:3d}  {''.join(frame)}")
    print(f"\n{result['seconds']:.0f} seconds in all. Report: {report.render(Path(workdir))}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/quickstart.py or one like it.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where everything goes.")
    cli.run(main)
