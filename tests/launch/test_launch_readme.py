"""Every command of launch/README.md, against programs that refuse what the real ones do not document."""

import re
import shlex
import sys

import pytest
from fakes import FLAGS, LAUNCH, ROOT, prepared

PROGRAMS = "bash|python|sbatch|gcloud|kubectl|docker|scancel"
TEXT = (LAUNCH / "README.md").read_text()
BLOCKS = [line for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S) for line in block.splitlines()]
SPANS = [span for span in re.findall(r"`([^`\n]+)`", TEXT) if re.match(rf"(\w+=\w+ )?({PROGRAMS}) \S", span)]
COMMANDS = list(dict.fromkeys([*BLOCKS, *SPANS]))
TRAIN = set("config workdir distributed coordinator num_processes process_id allow_config_change".split())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(fakes, tmp_path, command):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    prepared(checkout, python="")
    prepared(checkout, "test", python="", directory=".venv-llada-test")
    fakes.answer(project="p", **{"compute/zone": "us-central2-b"}, states=["ACTIVE"], runs=["EXITED 0"])
    words = shlex.split(command)
    extras = {}
    while "=" in words[0]:
        name, _, extras[name] = words.pop(0).partition("=")
    if words[:3] == ["python", "-m", "llada_jax.train"]:
        for flag in words[3:]:
            assert re.split("[.=]", flag.removeprefix("--"))[0] in TRAIN, flag
    elif words[0] == "sbatch":
        assert fakes.launch(*words).returncode == 0  # its own flags
        job = dict(SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(checkout))
        script = words.index("launch/slurm_gpu.sh")
        assert fakes.launch("bash", LAUNCH / "slurm_gpu.sh", *words[script + 1 :], **job).returncode == 0
    else:
        if words[0] == "python":
            words[0] = sys.executable
        if words[1] in ("launch/quickstart.sh", "launch/test.sh"):
            words[1] = str(checkout / words[1])
        done = fakes.launch(*words, **extras)
        assert done.returncode == 0, done.stderr
    for config in re.findall(r"--config=([\w/.]+)", command):
        assert (ROOT / config).is_file(), config


def test_the_page_has_commands_of_every_script():
    text = "\n".join(COMMANDS)
    scripts = {path.name for path in LAUNCH.glob("*.*")} - {
        "common.sh",
        "environment.sh",
        "environment.py",
        "worker.sh",
    }
    assert {name for name in scripts if f"launch/{name}" in text} == scripts - {
        "gke_jobset.yaml",
        "README.md",
        "colab_tpu.ipynb",
    }
    assert {"sbatch", "docker"} <= FLAGS.keys()
