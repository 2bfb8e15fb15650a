"""The command: a killed evaluation goes on where it was, results name their settings, mistakes are one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from ports import free_port
from reference import REFERENCE

from llada_jax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "tests/golden/tasks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "c"
    shutil.copytree(REFERENCE / "ckpt_e_train", directory)
    config = json.loads((directory / "config.json").read_text()) | {"max_sequence_length": 512}
    (directory / "config.json").write_text(json.dumps(config))
    load_tokenizer(REFERENCE.parent / "tokenizer").save(directory)
    return directory


def start(*arguments, devices=8):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}",
        "HF_DATASETS_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, "-m", "llada_jax.evaluate", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_as_one_that_was_not(checkpoint, tmp_path):
    couplets = [{"first": f"line {i}", "second": f"other {i}"} for i in range(2)]
    (tmp_path / "couplets.json").write_text(json.dumps(couplets))
    common = [
        f"--checkpoint={checkpoint}", "--tasks=local_mc,reversal", f"--include_path={TASKS}",
        "--preset=llada_base", "--mc_num=16", "--limit=2", "--batch_size=1",
        f"--couplets={tmp_path / 'couplets.json'}", "--block_length=8", "--gen_length=8",
    ]  # fmt: skip
    requests = tmp_path / "killed/requests.jsonl"
    process = start(*common, f"--output={tmp_path / 'killed'}")
    while process.poll() is None and not (requests.exists() and requests.read_bytes().count(b"\n") >= 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = requests.read_bytes()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed/results.json").exists()
    for name in ("killed", "whole"):
        code, out, err = finished(*common, f"--output={tmp_path / name}")
        assert code == 0, err
        assert "local_mc" in out and "reversal_backward" in out
    whole_lines = done[: done.rindex(b"\n") + 1]
    assert requests.read_bytes().startswith(whole_lines)  # nothing was asked again
    keys = [json.loads(line)["key"] for line in requests.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len((tmp_path / "whole/requests.jsonl").read_text().splitlines())
    killed, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    assert killed["results"] == whole["results"] and set(killed["results"]) >= {"local_mc", "reversal_forward"}
    assert killed["n-samples"]["reversal_forward"] == {"original": 2, "effective": 2}
    table = (tmp_path / "killed/results.md").read_text()
    assert "acc_norm" in table and "- mc_num: 16" in table and "everything: the paper does not have" in table
    assert killed["config"]["reversal"]["sampling"]["logits_eos_inf"] is True


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(checkpoint, tmp_path):
    """Four devices each, all rows spread over them; the first process writes."""
    port = free_port()
    common = [
        f"--checkpoint={checkpoint}", "--tasks=local_mc,local_gsm", f"--include_path={TASKS}", "--mc_num=16",
        "--limit=3", "--gen_length=8", "--block_length=8", "--steps=4",
    ]  # fmt: skip
    code, _, err = finished(*common, f"--output={tmp_path / 'one'}")
    assert code == 0, err
    join = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id"]
    each = [start(*common, f"--output={tmp_path / 'two'}", *join, str(i), devices=4) for i in range(2)]
    said = [process.communicate(timeout=600) for process in each]
    assert [process.returncode for process in each] == [0, 0], said
    assert "local_mc" in said[0][0] and "local_mc" not in said[1][0]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"]
    answers = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "requests.jsonl").read_text().splitlines()
        answers.append({line["key"]: line["answer"] for line in map(json.loads, lines)})
    assert answers[0].keys() == answers[1].keys()
    for key, answer in answers[0].items():
        expected = answer if isinstance(answer, str) else pytest.approx(answer, rel=1e-5)
        assert answers[1][key] == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": "local_infill"}, "task local_infill runs code that the model writes; allow it with"),
        ({"include_path": "nowhere"}, "--include_path=nowhere: no such directory"),
        ({"mc_num": "12"}, "mc_num 12 is not a multiple of mini_batch 8"),
        ({"couplets": str(TASKS / "expected.json"), "tasks": "reversal"}, "must be a JSON list of"),
    ],
)
def test_mistakes_are_one_line(checkpoint, tmp_path, changes, message):
    given = {"checkpoint": checkpoint, "tasks": "local_mc", "include_path": TASKS, "output": tmp_path / "out"} | changes
    code, _, err = finished(*[f"--{name}={value}" for name, value in given.items()])
    assert code == 2 and message in err, err
    assert "Traceback" not in err
