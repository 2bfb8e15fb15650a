"""The settings of the papers, by benchmark, and what nobody has published about them.

Sources: Tables 1, 2 and 6 of arXiv 2502.09992 v3 with the repository's EVAL.md and eval_llada_lm_eval.sh (LLaDA-8B),
Table 6 of arXiv 2505.19223 (LLaDA 1.5), arXiv 2606.25331 (iLLaDA). Names are those of lm-evaluation-harness. Instruct
models were evaluated with other tools, so there they are the nearest tasks, not the papers' own.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llada_jax.fields import InputError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """settings: of harness.Settings and the samplers. shots: None: those of the task. unknown: what is not published;
    our default stands there. note: where sources differ."""

    settings: dict[str, Any]
    shots: int | None = None
    unknown: str = ""
    note: str = ""


_METRIC = "which of acc and acc_norm"
_ANY = "*"  # a task that the paper does not have


def _bound(mc_num: int, shots: int | None, cfg_scale: float = 0.0, unknown: str = _METRIC) -> Benchmark:
    return Benchmark(dict(mc_num=mc_num, mini_batch=min(8, mc_num), cfg_scale=cfg_scale), shots, unknown)


def _writes(length: int, block: int, eos: str = "", shots: int | None = None, unknown: str = "", note: str = ""):
    """One token a pass. eos: C, the end of a text is committed last; L, it is never predicted."""
    options = {"C": {"confidence_eos_eot_inf": True}, "L": {"logits_eos_inf": True}, "": {}}[eos]
    return Benchmark(dict(gen_length=length, block_length=block, **options), shots, unknown, note)


def _grows(most: int, block: int) -> Benchmark:
    return Benchmark(
        dict(gen_length=most, block_length=block, variable_length=True), None, "shots, ends of text, task variant"
    )


_METRICS = "which of strict and flexible match"
_DEFAULT = {_ANY: _bound(128, None, unknown="everything: the paper does not have this task")}
_BASE = {
    "mmlu": _bound(1, 5), "cmmlu": _bound(1, 5), "ceval-valid": _bound(1, 5), "arc_challenge": _bound(128, 0),
    "hellaswag": _bound(128, 0), "truthfulqa_mc2": _bound(128, 0, unknown=""), "winogrande": _bound(128, 5, unknown=""),
    "piqa": _bound(128, 0), "gpqa_main_n_shot": _bound(128, 5), "bbh": _writes(1024, 1024),
    "gsm8k": _writes(1024, 1024, unknown=_METRICS, note="paper: 4 shots, script: the task's 5"),
    "minerva_math": _writes(1024, 1024), "humaneval": _writes(1024, 1024, shots=0),
    "mbpp": _writes(1024, 1024, note="paper: 4 shots, script: the task's 3"),
}  # fmt: skip
_GUIDED = {"arc_challenge": 0.5, "hellaswag": 0.5, "truthfulqa_mc2": 2.0, "piqa": 0.5, "gpqa_main_n_shot": 0.5}
_CONFIDENCE = Benchmark(dict(method="confidence"), None, "shots, guidance, normalisation by length")

PRESETS: dict[str, dict[str, Benchmark]] = {
    "llada_base": _DEFAULT | _BASE,
    # Classifier-free guidance, where the paper reports it beside its main table.
    "llada_base_cfg": _DEFAULT | _BASE | {
        name: dataclasses.replace(_BASE[name], settings=_BASE[name].settings | {"cfg_scale": scale})
        for name, scale in _GUIDED.items()
    },
    "llada_instruct": _DEFAULT | {
        "mmlu_generative": _writes(3, 3, shots=5), "mmlu_pro": _writes(256, 256, shots=0),
        "arc_challenge_chat": _writes(512, 512, shots=0), "gsm8k_cot": _writes(512, 512, "C", shots=4),
        "minerva_math": _writes(512, 512, "C", shots=0), "gpqa_main_generative_n_shot": _writes(64, 64, "C", shots=5),
        "humaneval_instruct": _writes(512, 512, "L", shots=0, note="the paper's text has C"),
        "mbpp_instruct": _writes(256, 256, "C", shots=4), "ifeval": _writes(512, 512, "C", unknown="shots"),
    },
    # The semi-autoregressive numbers of the same model.
    "llada_instruct_blocks": _DEFAULT | {
        "gsm8k_cot": _writes(256, 8, shots=4), "minerva_math": _writes(512, 64, shots=0),
    },
    "llada_1_5": _DEFAULT | {
        "gsm8k_cot": _writes(256, 16, "C", unknown="shots"), "minerva_math": _writes(1024, 128, "C", unknown="shots"),
        "gpqa_main_generative_n_shot": _writes(256, 16, unknown="shots"),
        "humaneval_instruct": _writes(512, 32, "C", unknown="shots"),
        "mbpp_instruct": _writes(512, 32, "C", unknown="shots"),
        "ifeval": _writes(256, 16, "C", unknown="shots", note="Table 6 of the VRPO paper: 512/32"),
    },
    "illada_base": _DEFAULT | {
        "piqa": _CONFIDENCE, "arc_challenge": _CONFIDENCE, "hellaswag": _CONFIDENCE, "bbh": _grows(1024, 32),
        "gsm8k": _grows(1024, 32), "minerva_math": _grows(1024, 32), "mbpp": _grows(1024, 32),
        "humaneval": _grows(512, 512),
    },
    "illada_instruct": _DEFAULT | {
        "gsm8k_cot": _grows(2048, 32), "humaneval_instruct": _grows(2048, 32), "mmlu_pro": _grows(4096, 32),
        "minerva_math": _grows(4096, 32), "mbpp_instruct": _grows(2048, 16), "mmlu_generative": _grows(4, 4),
        "mmlu_redux_generative": _grows(3, 3),
    },
}  # fmt: skip


def benchmark(preset: str | None, task: str) -> Benchmark:
    """What a preset says of a task, or of the group that it begins with: mmlu stands for mmlu_anatomy.

    None: the defaults. Raises InputError for an unknown preset.
    """
    if preset is None:
        return Benchmark({})
    if preset not in PRESETS:
        raise InputError(f"--preset={preset} is not one of {', '.join(PRESETS)}")
    known = PRESETS[preset]
    names = [name for name in known if task == name or task.startswith(f"{name}_")]
    return known[max(names, key=len, default=_ANY)]


def by_settings(preset: str | None, tasks: Sequence[str]) -> list[tuple[Benchmark, list[str]]]:
    """The tasks in groups that can be asked together."""
    groups: list[tuple[Benchmark, list[str]]] = []
    for task in tasks:
        found = benchmark(preset, task)
        same = next(
            (names for known, names in groups if (known.settings, known.shots) == (found.settings, found.shots)), None
        )
        if same is None:
            groups.append((found, [task]))
        else:
            same.append(task)
    return groups
