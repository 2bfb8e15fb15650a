"""tpu_vm.sh against a gcloud that only pretends: what it would run, and what it does when that fails."""

import io
import shlex
import subprocess
import tarfile
from pathlib import Path

import pytest
from fakes import LAUNCH, PLACE, ROOT, TRAIN, launch, program


@pytest.fixture
def tpu_vm(fakes):
    return lambda action, *flags: fakes.launch("bash", LAUNCH / "tpu_vm.sh", action, "--name=n", *PLACE, *flags)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--type=v5litepod-16"], ["--node-id=n", "--runtime-version=v2-alpha-tpuv5-lite"]),
        (["--type=v6e-8", "--spot"], ["--spot", "--runtime-version=v2-alpha-tpuv6e"]),
        (["--type=v5p-32", "--slices=2"], ["--node-count=2", "--node-prefix=n", "--runtime-version=v2-alpha-tpuv5"]),
        (["--type=v4-32", "--runtime=mine"], ["--runtime-version=mine"]),
        (
            [
                "--type=v4-8",
                "--reserved",
                "--network=net",
                "--subnetwork=sub",
                "--internal-ips",
                "--service-account=a@b",
            ],
            ["--reserved", "--network=net", "--subnetwork=sub", "--internal-ips", "--service-account=a@b"],
        ),
    ],
)
def test_create_asks_for_a_queued_resource(fakes, tpu_vm, flags, wanted):
    done = tpu_vm("create", *flags)
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert call[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "n"]
    assert {*wanted, *PLACE, flags[0].replace("--type", "--accelerator-type")} <= set(call)
    assert ("--spot" in call) == ("--spot" in flags) and ("--node-id=n" in call) != ("--slices=2" in flags)
    assert done.stderr.startswith("+ gcloud compute tpus queued-resources create n ")


def test_run_hands_the_flags_to_every_host_unchanged(fakes, tpu_vm):
    assert tpu_vm("run", *TRAIN, "--x=$(touch y); 床").returncode == 0
    (call,) = fakes.calls()
    assert {"--node=all", "--worker=all"} <= set(call)
    command = next(a.removeprefix("--command=") for a in call if a.startswith("--command="))
    started = ["run", "gs://bucket/compilation_cache", "llada_jax.train", *TRAIN, "--x=$(touch y); 床"]
    assert shlex.split(command) == ["bash", "llada_jax/launch/worker.sh", *started]


@pytest.mark.parametrize(
    "flags, directory",
    [
        (["--workdir=gs://b/runs/a/"], "gs://b/runs/compilation_cache"),
        (["--workdir=gs://b"], "gs://b/compilation_cache"),
        (["--workdir", "bucket/a"], "bucket/compilation_cache"),
        (["--workdir=a"], "compilation_cache"),
        (["--workdir=gs://b/a", "--cache=/dev/shm/c"], "/dev/shm/c"),
        (["--workdir=gs://b/a", "--cache=none"], "none"),
        ([], "none"),
    ],
)
def test_compiled_programs_are_kept_beside_the_workdir(fakes, tpu_vm, flags, directory):
    tpu_vm("run", *flags)
    command = next(a for a in fakes.calls()[0] if a.startswith("--command="))
    assert shlex.split(command)[3] == directory


def test_setup_copies_what_the_checkout_holds_now(fakes, tpu_vm, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    for name in ("common.sh", "tpu_vm.sh"):
        (checkout / "launch" / name).write_bytes((LAUNCH / name).read_bytes())
    (checkout / "gone.py").touch()
    (checkout / "a b 床.py").touch()
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "gone.py").unlink()
    program(fakes.directory / "gcloud", f"import shutil, sys\nshutil.copy(sys.argv[5], {str(tmp_path / 'copied')!r})")
    done = fakes.launch("bash", checkout / "launch/tpu_vm.sh", "setup", "--name=n", *PLACE, "--quiet")
    assert done.stderr.splitlines()[:-2] == [] or "gone.py" not in done.stderr
    names = tarfile.open(fileobj=io.BytesIO((tmp_path / "copied").read_bytes())).getnames()
    assert sorted(names) == ["a b 床.py", "launch/common.sh", "launch/tpu_vm.sh"]


def test_setup_copies_first_and_then_prepares_every_host(fakes, tpu_vm):
    assert tpu_vm("setup", "--bucket=gs://b").returncode == 0
    copy, prepare = fakes.calls()
    assert (
        copy[4] == "scp" and copy[6] == "n:llada_jax.tgz" and {"--node=all", "--worker=all"} <= set(copy) & set(prepare)
    )
    assert any(a.endswith("worker.sh setup b") for a in prepare)


def test_tpus_without_external_addresses_are_reached_through_a_tunnel(fakes, tpu_vm):
    for action, flag in (("run", "--internal-ips"), ("setup", "--internal-ip"), ("stop", "--tunnel-through-iap")):
        assert tpu_vm(action, flag).returncode == 0
    run, *setup, stop = fakes.calls()
    assert "--tunnel-through-iap" in run and "--tunnel-through-iap" in stop
    assert all("--internal-ip" in call for call in setup) and "--internal-ips" not in run


def test_gcloud_never_waits_for_an_answer(fakes, tpu_vm):
    fakes.answer(states=["ACTIVE"], runs=["RUNNING"])
    for action in ("setup", "run", "logs", "status", "state", "run_state", "stop", "ssh", "delete"):
        assert tpu_vm(action).returncode == 0
    assert tpu_vm("create", "--type=v4-8").returncode == 0
    assert all("--quiet" in call for call in fakes.calls())


def test_ssh_opens_a_shell_on_the_first_host(fakes, tpu_vm):
    assert tpu_vm("ssh", "--tunnel-through-iap").returncode == 0
    assert {"--node=0", "--worker=0", "--ssh-flag=-t", "--command=bash -l"} <= set(fakes.calls()[0])


@pytest.mark.parametrize(
    "command, script, message",
    [
        ([], {}, "say what to do"),
        (["create", *PLACE], {}, "--name=NAME is needed"),
        (["create", "--name=n", "--zone=z"], {}, "no project: give --project=ID"),
        (["create", "--name=n"], {"project": "p"}, "no zone: give --zone=ZONE"),
        (["create", "--name=n", *PLACE], {}, "--type is needed"),
        (["create", "--name=n", *PLACE, "--type=tpu7x-8"], {}, "TPU 7x comes through GKE only"),
        (["create", "--name=n", *PLACE, "--type=v4-8", "--slices=two"], {}, "--slices=two is not a number"),
        (["delete", "--name=n", *PLACE, "--workdir=w"], {}, "delete takes no --workdir=w"),
    ],
)
def test_what_is_missing_is_one_line(fakes, command, script, message):
    fakes.answer(**script)
    done = fakes.launch("bash", LAUNCH / "tpu_vm.sh", *command)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert fakes.calls() == []


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "gke_jobset.sh"])
def test_a_missing_program_is_one_line(tmp_path, script):
    needed = ["--name=n", "--type=v6e", "--cluster=c", "--image=i", "--bucket=b", "--topology=4x4"]
    flags = ["state", "--name=n"] if script == "tpu_vm.sh" else needed
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}" if Path(f"/usr/bin/{name}").exists() else f"/bin/{name}")
    done = launch("bash", LAUNCH / script, *flags, PATH=str(tmp_path))
    assert done.returncode == 2 and "is not installed" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_state_is_a_word_and_a_failure_has_its_reason(fakes, tpu_vm):
    fakes.answer(states=["NONE", "ACTIVE\t", "FAILED\tQuota limit 'X' has been exceeded."])
    states = [tpu_vm("state").stdout for _ in range(3)]
    assert states == ["NONE\n", "ACTIVE\n", "FAILED: Quota limit 'X' has been exceeded.\n"]


@pytest.mark.parametrize(
    "error",
    [
        "ERROR: (gcloud) PERMISSION_DENIED: Permission denied on 'locations/us-moon1-a' (or it may not exist).",
        "ERROR: (gcloud.describe) NOT_FOUND: The location us-moon1-a is not found",
    ],
)
def test_a_wrong_zone_is_not_taken_for_a_tpu_that_is_not_there(fakes, tpu_vm, error):
    fakes.answer(states=[error])
    done = tpu_vm("state")
    assert done.returncode == 1 and done.stdout == "" and done.stderr == f"{error}\n"


def test_status_says_how_the_run_is(fakes, tpu_vm):
    fakes.answer(states=["ACTIVE"], runs=["RUNNING step 12\nsaid: step 12/99"])
    assert tpu_vm("status", "--quiet").stdout == "n: ACTIVE\nRUNNING step 12\nsaid: step 12/99\n"


@pytest.mark.parametrize(
    "action, verbs",
    [
        ("create", ["create"]), ("setup", ["scp", "ssh"]), ("run", ["ssh"]), ("logs", ["ssh"]), ("ssh", ["ssh"]),
        ("state", ["describe"]), ("run_state", ["ssh"]), ("status", ["describe", "ssh"]), ("stop", ["ssh"]),
        ("delete", ["delete"]),
    ],
)  # fmt: skip
def test_a_dry_run_shows_the_commands_and_runs_none(fakes, tpu_vm, action, verbs):
    done = tpu_vm(action, "--dry_run", *["--type=v4-8"] * (action == "create"))
    assert done.returncode == 0 and fakes.calls() == [] and done.stdout == "", done.stderr
    assert [shlex.split(line)[5] for line in done.stderr.splitlines()] == verbs


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_shell(path):
    assert launch("bash", "-n", path).returncode == 0
    sourced = path.name in ("environment.sh", "common.sh")
    assert sourced or "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "gke_jobset.sh", "quickstart.sh"])
def test_help_is_the_head_of_the_script(script):
    done = launch("bash", LAUNCH / script, "--help", cwd=ROOT.parent)
    assert done.returncode == 0 and f"bash launch/{script}" in done.stdout and done.stderr == ""
    assert "set -euo" not in done.stdout
