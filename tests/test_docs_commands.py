"""Commands of the READMEs are run as they stand there: those that are cheap in full, of the others the start."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import PAGES, ROOT, commands

ONE_DEVICE = "--xla_force_host_platform_device_count=1"
SMALL = """--config.train.steps=1 --config.model.d_model=32 --config.model.n_layers=1 --config.model.n_heads=2
    --config.model.n_kv_heads=2 --config.model.mlp_hidden_size=48 --config.data.row_length=32
    --config.train.eval_every=0 --config.data.vocab_size=320 --config.train.batch_size=4
    --config.checkpoint.every_steps=1 --config.data.validation_fraction=0 --config.train.sample_every=0"""
IN_FULL = {  # the beginning of a line: what is added to it, and what it prints; in this order
    "python tools/train_tokenizer.py": ("--vocab_size=300", "tokenizer.model: 300 ids from 1 sources"),
    "python tools/prepare_data.py --files": ("--row_length=64 --workers=1", "DATA: 3 rows, 152 tokens, 8 documents"),
    "python tools/prepare_data.py --kind=chat": ("--row_length=64 --workers=1", "CHAT: 2 rows, "),
    "python -m llada_jax.train --config=configs/pretrain_tiny.py --workdir=runs/books": (SMALL, "step 1"),
    "python -m llada_jax.sample --checkpoint=runs/books": ("", "It was "),
    "python tools/digest.py": ("--checkpoint=runs/books", " step 1"),
}
LINES = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


def words_of(line: str, more: str) -> list[str]:
    words = shlex.split(re.sub(r"\[(--[^]]*)\]", r"\1", line), comments=True) + more.split()
    return [words[0], *(str(ROOT / word) if word.startswith("tools/") else word for word in words[1:])]


def cases() -> list[tuple[list[str], str]]:
    """(words, what is printed): IN_FULL, then other training commands with --print_config, then --help of the rest."""
    found = []
    for start, (more, printed) in IN_FULL.items():
        (line, *_) = [line for line in LINES if line.startswith(start)]
        found.append((words_of(line, more), printed))
    others = [line for line in LINES if not line.startswith(tuple(IN_FULL)) and "/NAME.py" not in line]
    for line in others:
        if line.startswith("python -m llada_jax.train "):
            found.append((words_of(line, "--print_config"), "--config.train.steps="))
    for program in sorted({tuple(words_of(line, "")[: 3 if " -m " in line else 2]) for line in others}):
        found.append(([*program, "--help"], "--"))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("commands")
    for folder in ("corpus", "books"):
        (place / folder).mkdir()
        (place / folder / "a.txt").write_text("It was the best of times, it was the worst of times.\n" * 40)
    (place / "corpus" / "b.jsonl").write_text('{"text": "It was the best of times, it was the worst."}\n' * 8)
    dialogue = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A mask."}]}
    (place / "dialogues.jsonl").write_text(f"{json.dumps(dialogue)}\n" * 2)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {ONE_DEVICE}"}
    command = [sys.executable, str(Path(__file__).with_name("commands.py"))]
    done = subprocess.run(
        command, cwd=place, env=environment, input=json.dumps([words for words, _ in cases()]), capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_commands_of_the_readmes_run(results):
    for (words, printed), (code, output) in zip(cases(), results, strict=True):
        assert code == 0 and printed in output, f"{shlex.join(words)}\n{output}"


def test_most_commands_are_run():
    assert len(cases()) >= 20
