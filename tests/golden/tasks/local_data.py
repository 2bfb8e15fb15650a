"""What the task files beside this one import: their data, wherever one starts from, and scoring functions."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

HOLE = "<|infill|>"  # where the gap of an infilling item is; the same string is the model's `infill_marker` option


def load(test=None, dev=None, **_):
    """lm-eval also passes metadata and model arguments; they are dropped."""
    import datasets

    files = {"test": test, "dev": dev}
    files = {split: str(Path(__file__).parent / "data" / name) for split, name in files.items() if name}
    return datasets.load_dataset("json", data_files=files)


def wino_text(doc):
    return int(doc["answer"]) - 1


def wino_choice(doc):
    at = doc["sentence"].index("_")
    return [doc["sentence"][:at] + doc["option1"], doc["sentence"][:at] + doc["option2"]]


def wino_target(doc):
    return doc["sentence"][doc["sentence"].index("_") + 1 :].strip()


def mc2(doc, results):
    p = np.exp(np.array([ll for ll, _ in results], np.float64))
    return {"acc": float(p[np.array(doc["labels"]) == 1].sum() / p.sum())}


def whole_program(resps, docs):
    """The item's code with each answer in its gap."""
    return [[doc["prompt"] + r + doc["suffix"] for r in resp] for resp, doc in zip(resps, docs, strict=True)]


def passes(doc, results):
    """1 if the program of the item runs its checks; each in a process of its own, 10 s at most."""
    program = results[0][0] if isinstance(results[0], list) else results[0]
    code = f"{program}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    try:
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return {"pass@1": 0.0}
    return {"pass@1": float(done.returncode == 0)}


def _holds(kind, argument, text):
    words = text.split()
    lines = text.split("\n")
    return {
        "no_comma": lambda: "," not in text,
        "lowercase": lambda: text == text.lower() and bool(text),
        "uppercase": lambda: text == text.upper() and bool(text),
        "keyword": lambda: re.search(rf"\b{re.escape(argument)}\b", text, re.IGNORECASE) is not None,
        "min_words": lambda: len(words) >= int(argument),
        "max_words": lambda: 0 < len(words) <= int(argument),
        "ends_with": lambda: text.rstrip().endswith(argument),
        "bullets": lambda: sum(line.startswith("* ") for line in lines) == int(argument),
        "paragraphs": lambda: len([p for p in text.split("***") if p.strip()]) == int(argument),
        "quoted": lambda: len(text) > 1 and text.strip().startswith('"') and text.strip().endswith('"'),
    }[kind]()


def instructions(doc, results):
    held = [_holds(c["kind"], c["argument"], results[0]) for c in doc["checks"]]
    return {"prompt_level_strict_acc": all(held), "inst_level_strict_acc": held}


def all_instructions(items):
    flat = [x for item in items for x in item]
    return sum(flat) / len(flat)
