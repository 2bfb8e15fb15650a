"""A gcloud, kubectl, xpk, srun and scontrol that only pretend, and run the scripts of launch/ against them.

Each fake refuses a flag that the real program does not document, with code 2 as they do, and notes every call. The
tables were compared with gcloud 528.0.0, xpk 1.16.0 (`--help`), Slurm 22.05 and kubectl 1.32.
"""

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
PLACE = ["--project=p", "--zone=us-central2-b"]
TRAIN = ["--config=configs/pretrain_tiny.py", "--workdir=gs://bucket/a b"]

# Program → the words before the flags → the flags; "=" marks those with a value, "!" those that must be there.
_GCLOUD = "--project= --quiet --verbosity= --format= --impersonate-service-account="
_SSH = """--batch-size= --dry-run --force-key-file-overwrite --plain --ssh-key-file= --strict-host-key-checking=
    --worker= --zone= --internal-ip --tunnel-through-iap --ssh-key-expiration= --ssh-key-expire-after="""
_QUEUED = "compute tpus queued-resources"
FLAGS = {
    "gcloud": {
        f"{_QUEUED} create": _GCLOUD
        + """ --zone= --runtime-version=! --accelerator-type= --topology= --type= --node-id= --node-count=
        --node-prefix= --async --data-disk= --description= --guaranteed --internal-ips --labels= --metadata=
        --metadata-from-file= --network= --range= --reserved --scopes= --service-account= --shielded-secure-boot
        --spot --subnetwork= --tags=
        --valid-after-duration= --valid-after-time= --valid-until-duration= --valid-until-time=
        --reservation-host-folder= --reservation-host-organization= --reservation-host-project=""",
        f"{_QUEUED} describe": f"{_GCLOUD} --zone=",
        f"{_QUEUED} delete": f"{_GCLOUD} --zone= --async --force",
        f"{_QUEUED} ssh": f"{_GCLOUD} {_SSH} --node= --ssh-flag= --command=! --output-directory=",
        f"{_QUEUED} scp": f"{_GCLOUD} {_SSH} --node= --scp-flag= --compress --recurse",
        "config get-value": "",
        "storage buckets create": f"""{_GCLOUD} --location= --uniform-bucket-level-access --default-storage-class=
        --enable-hierarchical-namespace --placement= --soft-delete-duration=""",
        "storage buckets add-iam-policy-binding": f"{_GCLOUD} --member=! --role=! --condition=",
        "container clusters get-credentials": f"{_GCLOUD} --location= --region= --zone= --internal-ip --dns-endpoint",
    },
    "kubectl": {"create": "-f! --validate= --dry-run= --save-config", "logs": "-f -l", "delete": "-l --wait="},
    "docker": {"build": "-f --build-arg -t --pull", "push": ""},
    "xpk": {
        "workload create": """--command=! --tpu-type= --device-type= --storage= --num-nodes= --scheduler=
        --ramdisk-directory= --mtc-enabled --debug-dump-gcs= --deploy-stacktrace-sidecar --use-pathways
        --restart-on-exit-codes= --workload=! --cluster=! --project= --project-number= --zone= --namespace= --dry-run
        --skip-validation --quiet --docker-name= --use-parallel-containers --output-manifest-file= --num-slices=
        --priority= --max-restarts= --ttl-seconds-after-finished= --termination-grace-period-seconds=
        --colocated-python-sidecar-image= --enable-debug-logs --env-file= --env= --base-docker-image= --script-dir=
        --docker-image= --docker-image-pull-secret= --use-vertex-tensorboard --experiment-name= --on-demand
        --reservation= --spot --flex"""
    },
    "sbatch": {"": "--nodes= --gpus-per-node= --time= --partition= --account= --signal= --requeue --job-name="},
    "srun": {"": "--gpu-bind= --kill-on-bad-exit= --wait= --ntasks= --nodes="},
    "scontrol": {"requeue": ""},
    "scancel": {"": ""},
}

# Calls are appended to "calls". gcloud's answers to "describe" and to a question for the run's state come one by one
# from script.json; the last one stays. An answer that begins with ERROR goes to stderr, with code 1. "fail" maps a
# verb to such answers, of which None is a success.
PROGRAM = """
import json, os, sys
from pathlib import Path
here, name, arguments = Path(__file__).parent, Path(__file__).name, sys.argv[1:]
with (here / "calls").open("a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
flags = json.loads((here / "flags.json").read_text())[name]
words = next((w for w in sorted(flags, key=len, reverse=True) if arguments[: len(w.split())] == w.split()), None)
if words is None:
    sys.exit(print(f"ERROR: ({name}) Invalid choice: {arguments[:4]}", file=sys.stderr) or 2)
known = {flag.rstrip("=!"): flag.strip("-abcdefghijklmnopqrstuvwxyz") for flag in flags[words].split()}
given = set()
for argument in arguments[len(words.split()) :]:
    flag, equals, _ = argument.partition("=")
    if name in ("srun", "sbatch") and not argument.startswith("-"):
        break
    if not argument.startswith("-") or argument == "-":
        continue
    if flag not in known or (equals == "=") != ("=" in known[flag]):
        sys.exit(print(f"ERROR: ({name}) unrecognized arguments: {argument}", file=sys.stderr) or 2)
    given.add(flag)
if missing := [flag for flag in known if "!" in known[flag] and flag not in given]:
    sys.exit(print(f"ERROR: ({name}) argument {missing[0]}: Must be specified.", file=sys.stderr) or 2)
script = json.loads((here / "script.json").read_text())
def next_of(answers):
    answer = answers.pop(0) if len(answers) > 1 else answers[0]
    (here / "script.json").write_text(json.dumps(script))
    if answer is not None and answer.startswith("ERROR"):
        sys.exit(answer)
    return answer
if name == "gcloud":
    if words == "config get-value":
        print(script.get(arguments[2], ""))
    elif "describe" in arguments:
        answer = next_of(script["states"])
        if answer == "NONE":
            place = "projects/p/locations/us-central2-b/queuedResources/n"
            sys.exit(f"ERROR: (gcloud.describe) NOT_FOUND: Resource '{place}' was not found")
        print(answer)
    elif any("worker.sh state" in a for a in arguments):
        print(next_of(script["runs"]))
    else:
        verb = next((a.split("worker.sh ")[1].split()[0] for a in arguments if "worker.sh " in a), arguments[3])
        if verb in script.get("fail", {}):
            next_of(script["fail"][verb])
elif name == "kubectl" and words == "create":
    (here / "manifest").write_text(sys.stdin.read())
elif name == "srun":
    sys.exit(script.get("code", 0))
"""


class Fakes:
    """A directory for the PATH with the pretending programs in it."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir()
        (directory / "flags.json").write_text(json.dumps(FLAGS))
        for name in FLAGS:
            program(directory / name, PROGRAM)
        self.answer()

    def answer(self, **script: Any) -> None:
        """What the programs answer from now on."""
        (self.directory / "script.json").write_text(json.dumps(script))

    def calls(self) -> list[list[str]]:
        """Every call so far but for gcloud's defaults, each from the program's name on."""
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in map(json.loads, lines) if call[1:2] != ["config"]]

    def actions(self) -> list[str]:
        """The calls of gcloud, each in a word."""
        words = []
        for call in self.calls():
            command = next((a for a in call if a.startswith("--command=")), "")
            words.append(command.split("worker.sh ")[1].split()[0] if "worker.sh" in command else call[4])
        return words

    def launch(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command that finds these programs first."""
        return launch(*command, PATH=f"{self.directory}:{os.environ['PATH']}", **environment)


def launch(*command: object, cwd: Any = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the checkout to its end."""
    run: Any = dict(cwd=cwd, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    return subprocess.run([str(part) for part in command], env=os.environ | environment, **run)


def program(path: Path, source: str) -> None:
    """Writes an executable Python program."""
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(source)}")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def prepared(checkout: Path, *extras: str, python: str, directory: str = ".venv-llada") -> None:
    """Makes the environment of a checkout look ready, with a Python that is this program."""
    for name in ("requirements.txt", "pyproject.toml"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    (checkout / "launch").mkdir(exist_ok=True)
    for path in LAUNCH.glob("*.[ps][yh]"):
        (checkout / "launch" / path.name).write_bytes(path.read_bytes())
    environment = checkout / directory
    (environment / "bin").mkdir(parents=True)
    program(environment / "bin" / "python", python)
    sys.path.insert(0, str(LAUNCH))
    import environment as made  # pyright: ignore[reportMissingImports]

    (environment / made.MARKER).write_text(made.wanted(list(extras)))
