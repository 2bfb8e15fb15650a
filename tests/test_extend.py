"""The diffs that the READMEs show apply to the package, and what they add works without any other change."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from test_docs import PAGES, ROOT

DIFFS = {
    str(page.parent.relative_to(ROOT / "llada_jax")): re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL)
    for page in PAGES
    if "```diff" in page.read_text()
}


def test_every_extension_of_the_readmes_applies_and_works(tmp_path):
    assert set(DIFFS) == {"objectives", "sampling", "interop", "data"}
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "llada_jax", copy / "llada_jax", ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    environment = os.environ | {
        "GIT_CEILING_DIRECTORIES": str(tmp_path), "PYTHONPATH": str(copy),
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
    }  # fmt: skip
    for room, (diff,) in DIFFS.items():
        done = subprocess.run(
            ["git", "apply", "-"], cwd=copy, input=diff, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"the diff of {room}/README.md does not apply: {done.stderr}"
    command = [sys.executable, str(Path(__file__).with_name("extended.py")), str(tmp_path)]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
