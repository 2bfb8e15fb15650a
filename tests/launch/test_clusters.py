"""gke_jobset.sh, xpk.sh and slurm_gpu.sh: what the clusters are asked for, and what follows from each exit code."""

import re
import shlex
import subprocess

import pytest
import yaml
from fakes import LAUNCH, PLACE, ROOT, TRAIN, launch, prepared

JOBSET = ["--name=n", "--image=i:1", "--type=7x", "--topology=2x2x4", "--slices=2"]
XPK = ["--name=n", "--cluster=c", "--type=tpu7x-4x4x4", "--image=i", *PLACE]


@pytest.fixture
def jobset(fakes):
    """The manifest that kubectl is given."""

    def submit(*flags):
        done = fakes.launch("bash", LAUNCH / "gke_jobset.sh", *JOBSET, *flags)
        assert done.returncode == 0, done.stderr
        assert fakes.calls() == [["kubectl", "create", "-f", "-"]]
        manifest = (fakes.directory / "manifest").read_text()
        assert manifest == done.stdout
        return yaml.safe_load(manifest)

    return submit


def pod_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_a_jobset_is_filled_in(jobset):
    awkward = '--config.train.sample_prompt="@NAME@" & \\ 床'
    made = jobset(*TRAIN, awkward)
    (job,) = made["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], pod_of(made)
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (2, 4, 4, 0)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu7x"
    assert pod["containers"][0]["args"] == [*TRAIN, awkward]
    assert pod["containers"][0]["env"] == [
        {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://bucket/compilation_cache"}
    ]
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 4


def test_a_jobset_has_no_blank_left(fakes):
    flags = [flag for flag in JOBSET if not flag.startswith("--image")]
    done = fakes.launch("bash", LAUNCH / "gke_jobset.sh", *flags, "--image=i@sha256:1", "--bucket=b", "--dry_run")
    assert not re.search("@[A-Z_]+@", done.stdout)


def test_a_jobset_mounts_a_bucket_only_if_asked(jobset):
    without = jobset(*TRAIN)
    assert "volumes" not in pod_of(without) and "volumeMounts" not in pod_of(without)["containers"][0]


def test_a_bucket_is_mounted_for_pods_on_the_host_s_network(jobset):
    made = jobset("--bucket=gs://b", "--cache=none", "--workdir=/bucket/run")
    (volume,) = pod_of(made)["volumes"]
    attributes = volume["csi"]["volumeAttributes"]
    assert pod_of(made)["hostNetwork"] and attributes["hostNetworkPodKSA"] == "true"
    assert attributes["bucketName"] == "b" and "rename-dir-limit=200000" in attributes["mountOptions"].split(",")
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert job["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert pod_of(made)["containers"][0]["env"] == []


@pytest.mark.parametrize(
    "code, disrupted, action",
    [
        (2, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_what_a_cluster_does_after_each_exit_code(jobset, code, disrupted, action):
    """Plays Kubernetes' Job controller and JobSet's, as their documentation has them."""
    spec = jobset(*TRAIN)["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]):
        on_code, on_condition = rule.get("onExitCodes"), rule.get("onPodConditions")
        text = ""
        if on_code and code in on_code["values"]:
            assert (on_code["operator"], on_code["containerName"]) == ("In", "llada-jax")
            text = f"Container llada-jax for pod default/n-slice-0-0 failed with exit code {code} matching"
        elif on_condition and disrupted:
            text = "Pod default/n-slice-0-0 has condition DisruptionTarget matching"
        if text:
            assert rule["action"] == "FailJob"
            reason, message = "PodFailurePolicy", f"{text} FailJob rule at index {i}"
            break
    taken = "RestartJobSet"  # JobSet's own, which counts towards maxRestarts
    for rule in spec["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            taken = rule["action"]
            break
    assert taken == action and spec["failurePolicy"]["maxRestarts"] == 100


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--name="], "--name is needed"),
        (["--name=My_Run"], "--name=My_Run: at most 40"),
        (["--type=v3"], "--type=v3 is not one of"),
        (["--topology=4by4"], "--topology=4by4 is not like"),
        (["--topology=2x3", "--chips_per_host=4"], "6 chips are no whole hosts"),
        (["--chips_per_host=0"], "--chips_per_host=0 is not a number"),
    ],
)
def test_a_mistake_in_a_jobset_s_flags_is_one_line(fakes, flags, message):
    done = fakes.launch("bash", LAUNCH / "gke_jobset.sh", *JOBSET, *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == "" and fakes.calls() == []


def test_a_dry_run_prints_the_manifest_alone(fakes):
    done = fakes.launch("bash", LAUNCH / "gke_jobset.sh", *JOBSET, *TRAIN, "--dry_run")
    assert yaml.safe_load(done.stdout)["kind"] == "JobSet" and done.stderr == "" and fakes.calls() == []


def test_xpk_starts_the_run_again_after_every_code_but_a_mistake(fakes):
    done = fakes.launch("bash", LAUNCH / "xpk.sh", *XPK, "--restarts=7", "--storage=s", *TRAIN)
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    flags = dict(flag.partition("=")[::2] for flag in call[3:])
    assert flags["--tpu-type"] == "tpu7x-4x4x4" and flags["--max-restarts"] == "7" and flags["--storage"] == "s"
    first, _, last = flags["--restart-on-exit-codes"].replace("1,", "").partition("-")
    again = {1, 42, *range(int(first), int(last) + 1), *range(127, 256)}  # the last are XPK's own
    assert again == set(range(1, 256)) - {2}
    assert flags["--env"] == "JAX_COMPILATION_CACHE_DIR=gs://bucket/compilation_cache"


def test_xpk_s_shell_runs_the_trainer_itself_so_that_sigterm_reaches_it(fakes, tmp_path):
    """The container's shell as XPK 1.16 writes it."""
    fakes.launch("bash", LAUNCH / "xpk.sh", *XPK, *TRAIN)
    command = next(flag for flag in fakes.calls()[0] if flag.startswith("--command=")).removeprefix("--command=")
    assert shlex.split(command) == ["exec", "python", "-m", "llada_jax.train", *TRAIN]
    source = "#!/bin/bash\ntrap 'echo saved; kill %1; exit 75' TERM; echo ready; sleep 60 & wait"
    (tmp_path / "python").write_text(source)
    (tmp_path / "python").chmod(0o755)
    shell = f"""_sigterm() (kill -SIGTERM $! 2>/dev/null;)
        trap _sigterm SIGTERM
        ({command}) & PID=$!
        while kill -0 $PID 2>/dev/null; do sleep 0.1; done
        wait $PID; exit $?"""
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    with subprocess.Popen(["bash", "-c", shell], stdout=subprocess.PIPE, text=True, env=environment) as container:
        assert container.stdout is not None and container.stdout.readline() == "ready\n"
        container.terminate()
        assert container.stdout.read() == "saved\n" and container.wait(timeout=20) == 75


def test_xpk_s_dry_run_shows_one_command(fakes):
    done = fakes.launch("bash", LAUNCH / "xpk.sh", *XPK, *TRAIN, "--dry_run")
    words = shlex.split(done.stderr)
    assert words[:4] == ["+", "xpk", "workload", "create"] and fakes.calls() == []
    assert shlex.split(words[-1].removeprefix("--command="))[-2:] == TRAIN


@pytest.fixture
def slurm(fakes, tmp_path):
    """Runs the batch script as a job of Slurm would, in a checkout whose environment is ready."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    prepared(checkout, "gpu", python="")
    job = dict(SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(checkout))

    def submit(code=0, **environment):
        fakes.answer(code=code)
        return fakes.launch("bash", LAUNCH / "slurm_gpu.sh", *TRAIN, **job, **environment)

    return submit


def test_slurm_starts_the_trainer_on_every_gpu(fakes, slurm):
    done = slurm()
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls()
    assert call[0] == "srun" and call[-5:] == ["-m", "llada_jax.train", "--distributed", *TRAIN]
    assert "--kill-on-bad-exit=0" in call  # the first to end must not end the others, which save


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_slurm_queues_the_job_again_only_if_the_run_has_saved_and_stopped(fakes, slurm, code):
    assert slurm(code).returncode == code
    assert fakes.calls()[1:] == [["scontrol", "requeue", "17"]] * (code == 75)


def test_a_cancelled_job_stays_cancelled(fakes, slurm):
    program = "#!/bin/bash\nkill -TERM $PPID; sleep 0.2; exit 75"  # scancel's signal reaches the batch script as well
    (fakes.directory / "srun").write_text(program)
    assert slurm().returncode == 75 and fakes.calls() == []


def test_slurm_s_directives_ask_for_a_signal_to_the_steps_before_the_time_limit():
    text = (LAUNCH / "slurm_gpu.sh").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    assert directives["signal"] == "TERM@300" and "requeue" in directives  # with B: it would go to the batch script
    assert directives["open-mode"] == "append" and directives["ntasks-per-gpu"] == "1"


def test_slurm_s_script_outside_of_a_job_is_one_line():
    outside = launch("bash", LAUNCH / "slurm_gpu.sh", *TRAIN)
    assert outside.returncode == 2 and "not a Slurm job" in outside.stderr and len(outside.stderr.splitlines()) == 1


def test_an_image_holds_what_the_package_needs_and_no_environment_of_this_machine():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(ignored)
    assert not {"configs", "tools", "llada_jax", "launch"} & set(ignored)
    extras = re.search(r"^ARG EXTRAS=(.*)$", (LAUNCH / "Dockerfile").read_text(), re.M)
    assert extras and extras[1].split(",") == ["tpu", "gcs"]
