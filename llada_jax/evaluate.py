"""Evaluates a checkpoint on tasks of lm-evaluation-harness, or on couplets in both directions.

python -m llada_jax.evaluate --checkpoint=DIR --tasks=arc_challenge,gsm8k --preset=llada_base --output=OUT
python -m llada_jax.evaluate --checkpoint=DIR --tasks=my_task --include_path=TASKS --limit=100 --output=OUT
python -m llada_jax.evaluate --checkpoint=DIR --tasks=reversal --couplets=poem_data.json --output=OUT

Every finished request is in OUT/requests.jsonl at once: the same command continues where it was stopped. At the end
OUT has results.json, as lm-eval writes it, and results.md, a table with the settings that made it.
"""

import contextlib
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.evaluation import presets, reversal
from llada_jax.evaluation.store import Store
from llada_jax.fields import InputError
from llada_jax.files import write_file
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_config
from llada_jax.parallel import join, processes
from llada_jax.parallel.mesh import inference_mesh
from llada_jax.sampling import options

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The workdir of a training run, or a published checkpoint.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks of lm-eval or of --include_path; or reversal.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory of requests and results.")
_PRESET = flags.DEFINE_enum("preset", None, list(presets.PRESETS), "The settings of a paper for each task.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Directory of task files.")
_COUPLETS = flags.DEFINE_string("couplets", None, 'Of the task reversal: a JSON list of {"first", "second"}.')
_LIMIT = flags.DEFINE_float("limit", None, "Documents of each task, or a share of them below 1.", lower_bound=0)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples in a prompt; default: the preset's, the task's.")
_BATCH_SIZE = flags.DEFINE_string("batch_size", "auto", "Rows at once on a device; no result depends on it.")
_APPLY_CHAT_TEMPLATE = flags.DEFINE_bool("apply_chat_template", False, "Ask in the turns of a dialogue.")
_SYSTEM_INSTRUCTION = flags.DEFINE_string("system_instruction", None, "What the dialogue begins with.")
_UNSAFE_CODE = flags.DEFINE_bool("confirm_run_unsafe_code", False, "Let tasks run code that the model writes.")
_LOG_SAMPLES = flags.DEFINE_bool("log_samples", False, "Also write samples_TASK.jsonl: documents and answers.")
_TENSOR = flags.DEFINE_integer("tensor", 0, "Devices that a copy of the model is split over; 0: as few as hold it.")
# Of harness.Settings, which says what they may be; that file needs lm-eval, this one only to run.
flags.DEFINE_string("method", None, "Of scoring: bound, or confidence (iLLaDA).")
flags.DEFINE_integer("mc_num", None, "Draws of the bound.")
flags.DEFINE_integer("mini_batch", None, "Draws over which the numbers of masked tokens are spread evenly.")
flags.DEFINE_float("stop_at", None, "Stop a question at this confidence in its leader; default: never (unbiased).")
flags.DEFINE_bool("check_greedy", None, "Also find whether the greedy answer is the one asked, as LAMBADA wants.")
flags.DEFINE_string("prefix", None, "The token before every text: none, bos or eos.")
flags.DEFINE_integer("gen_length", None, "Tokens to generate, whatever the task says.")
flags.DEFINE_string("infill_marker", None, "Where a text has its gap.")
flags.DEFINE_integer("max_length", None, "Tokens of prompt and answer; default: the model's context.")
flags.DEFINE_integer("context_length", None, "Tokens that a window of a long text is given, at least.")
flags.DEFINE_integer("seed", None, "Of every draw.")
options.define_flags()

_SETTINGS = (
    "method", "mc_num", "mini_batch", "stop_at", "check_greedy", "prefix", "gen_length", "infill_marker", "max_length",
    "context_length", "seed",
)  # fmt: skip
_MERGED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def main(_argv: list[str]) -> None:
    with processes.all_or_none():
        checkpoint, output, couplets = _checked()
        from llada_jax.evaluation.harness import LLaDA, Tasks

        names = [name for name in _TASKS.value if name != "reversal"]
        manager = _manager(Tasks, names) if names else None
        tokenizer = load_tokenizer(hf.tokenizer_directory(checkpoint))
    given = options.of_flags() | {name: flags.FLAGS[name].value for name in _SETTINGS if flags.FLAGS[name].present}
    with contextlib.ExitStack() as stack:
        mesh = inference_mesh(hf.load_config(checkpoint), _TENSOR.value)
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        model = hf.load(checkpoint, mesh=mesh)
        store = Store(output / "requests.jsonl")
        lm = LLaDA(model=model, tokenizer=tokenizer, store=store, batch_size=_BATCH_SIZE.value, **given)
        results: dict[str, Any] = {name: {} for name in _MERGED} | {"config": {"checkpoint": str(checkpoint)}}
        for benchmark, tasks in presets.by_settings(_PRESET.value, names):
            lm.configure(**benchmark.settings | given)
            _merge(results, _ask(lm, manager, benchmark, tasks), benchmark, tasks)
        if couplets:
            lm.configure(**reversal.OFFICIAL_SETTINGS | given)
            _merge(results, _reversal(lm, couplets), presets.Benchmark({}), ["reversal"])
    if processes.is_first():
        _write(output, results)


def _checked() -> tuple[Path, Path, list[reversal.Couplet]]:
    """(checkpoint, output, couplets) of the flags, before anything is loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-eval is not installed; pip install 'llada_jax[eval]'")
    if not _CHECKPOINT.value or not _TASKS.value or not _OUTPUT.value:
        raise InputError("--checkpoint, --tasks and --output are needed")
    if ("reversal" in _TASKS.value) != bool(_COUPLETS.value):
        raise InputError("--tasks=reversal and --couplets=FILE go together")
    if _INCLUDE_PATH.value and not os.path.isdir(_INCLUDE_PATH.value):
        raise InputError(f"--include_path={_INCLUDE_PATH.value}: no such directory")
    if _LIMIT.value is not None and _LIMIT.value >= 1 and _LIMIT.value != int(_LIMIT.value):
        raise InputError(f"--limit={_LIMIT.value}: give a whole number of documents, or a share below 1")
    checkpoint = Path(_CHECKPOINT.value)
    if load_config(checkpoint).get("objective", {}).get("name") == "autoregressive":
        raise InputError(f"{checkpoint}: holds an autoregressive control; only diffusion models are evaluated")
    return checkpoint, Path(_OUTPUT.value), reversal.read_couplets(_COUPLETS.value) if _COUPLETS.value else []


def _manager(make, names: list[str]):
    """The tasks of --include_path, and lm-eval's own, which take seconds to find, if a name is none of the former."""
    local = make(_INCLUDE_PATH.value, False, _UNSAFE_CODE.value) if _INCLUDE_PATH.value else None
    if local and set(names) <= set(local.all_tasks):
        return local
    manager = make(_INCLUDE_PATH.value, True, _UNSAFE_CODE.value)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise InputError(f"--tasks={','.join(unknown)}: no such task in lm-eval or --include_path")
    return manager


def _ask(lm, manager, benchmark: presets.Benchmark, tasks: list[str]) -> dict[str, Any]:
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval would fork for its standard errors, after JAX started threads
    import lm_eval

    limit = _LIMIT.value
    evaluate: Any = lm_eval.simple_evaluate
    shots = benchmark.shots if _NUM_FEWSHOT.value is None else _NUM_FEWSHOT.value
    return evaluate(
        model=lm, tasks=list(tasks), num_fewshot=shots, task_manager=manager, log_samples=_LOG_SAMPLES.value,
        limit=int(limit) if limit is not None and limit >= 1 else limit, bootstrap_iters=1000, torch_random_seed=None,
        apply_chat_template=_APPLY_CHAT_TEMPLATE.value, fewshot_as_multiturn=_APPLY_CHAT_TEMPLATE.value,
        system_instruction=_SYSTEM_INSTRUCTION.value, confirm_run_unsafe_code=_UNSAFE_CODE.value,
    )  # fmt: skip


def _reversal(lm, couplets: list[reversal.Couplet]) -> dict[str, Any]:
    """The official protocol as results of lm-eval: the share of replies that contain the line, of both directions."""
    from lm_eval.api.instance import Instance

    limit = (
        len(couplets) if _LIMIT.value is None else math.ceil(_LIMIT.value * (len(couplets) if _LIMIT.value < 1 else 1))
    )
    found: dict[str, Any] = {name: {} for name in _MERGED}
    for direction in ("forward", "backward"):
        task = f"reversal_{direction}"
        asked = reversal.official_questions(couplets[:limit], direction)
        contexts = [lm.apply_chat_template([{"role": "user", "content": question}]) for question, _ in asked]
        arguments = dict(until=[], do_sample=False, max_gen_toks=reversal.OFFICIAL_SETTINGS["gen_length"])
        requests = [
            Instance("generate_until", {}, (context, arguments), 0, (task, i, 1)) for i, context in enumerate(contexts)
        ]
        right = [wanted in reply for reply, (_, wanted) in zip(lm.generate_until(requests), asked, strict=True)]
        error = float(np.std(right, ddof=1) / math.sqrt(len(right))) if len(right) > 1 else math.nan
        found["results"][task] = {"alias": task, "acc,none": float(np.mean(right)), "acc_stderr,none": error}
        found["versions"][task], found["n-shot"][task] = "official", 0
        found["higher_is_better"][task] = {"acc": True}
        found["n-samples"][task] = {"original": len(couplets), "effective": len(right)}
    return found | {"config": lm.get_model_info()}


def _merge(results: dict[str, Any], found: dict[str, Any], benchmark: presets.Benchmark, tasks: list[str]) -> None:
    for name in _MERGED:
        results[name] |= found.get(name, {})
    results.setdefault("samples", {}).update(found.get("samples", {}))
    settings = found["config"] | {"preset": _PRESET.value, "unknown": benchmark.unknown, "note": benchmark.note}
    results["config"][",".join(tasks)] = settings
    results["config"]["jax"] = jax.__version__


def _write(output: Path, results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    dump = lambda value, indent: json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)
    for task, samples in results.pop("samples").items():
        lines = "".join(f"{dump(sample, None)}\n" for sample in samples)
        write_file(output / f"samples_{task}.jsonl", lines.encode())
    table = make_table(results) + ("\n" + make_table(results, "groups") if results["groups"] else "")
    settings = ""
    for tasks, made_by in results["config"].items():
        if isinstance(made_by, dict):
            lines = [f"- {name}: {value}\n" for name, value in made_by.items() if value not in (None, "")]
            settings += f"\n{tasks}:\n\n{''.join(lines)}"
    text = f"{table}\nCheckpoint {results['config']['checkpoint']}. Perplexities are upper bounds.\n{settings}"
    write_file(output / "results.json", f"{dump(results, 1)}\n".encode())
    write_file(output / "results.md", text.encode())
    print(table)


def command() -> None:
    """The console script llada-evaluate."""
    join.define_flags()
    cli.run(join.joined(main))


if __name__ == "__main__":
    command()
