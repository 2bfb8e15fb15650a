"""babysit.py against a gcloud that plays preemption, reboot, stock-out, a wrong zone and what else may happen."""

import shlex
import signal
import subprocess
import sys
import time

import pytest
from fakes import LAUNCH, PLACE, TRAIN

sys.path.insert(0, str(LAUNCH))
import babysit as module  # pyright: ignore[reportMissingImports]

CAPACITY = 'ERROR: (gcloud.create) There is no more capacity in the zone "us-central2-b"; you can try in another zone'
QUOTA = "ERROR: (gcloud.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded. Limit: 16 in zone z."
LOGIN = (
    "ERROR: (gcloud.describe) You do not currently have an active account selected.\nPlease run:\n  $ gcloud auth login"
)
EXPIRED = (
    "ERROR: (gcloud.describe) There was a problem refreshing your current auth tokens: ('invalid_grant: Bad Request')"
)
OFFLINE = EXPIRED.replace("('invalid_grant: Bad Request')", "HTTPSConnectionPool: Max retries exceeded")
ZONE = "ERROR: (gcloud.describe) PERMISSION_DENIED: Permission denied on 'locations/us-moon1-a' (or it may not exist)."
TYPE = "ERROR: (gcloud.create) INVALID_ARGUMENT: Accelerator type v5litepod-17 is not available in zone us-central2-b"
SILENT = "ERROR: (gcloud.ssh) [/usr/bin/ssh] exited with return code [255]."
TAKEN = 'ERROR: (gcloud.ssh) This TPU has terminal state "PREEMPTED", so it cannot be used anymore.'


@pytest.fixture
def babysit(fakes):
    command = [sys.executable, LAUNCH / "babysit.py", "--name=n", "--type=v5litepod-16", *PLACE, "--poll_seconds=0"]
    return lambda *flags: fakes.launch(*command, *flags, *TRAIN)


def changes(fakes):
    """What was done to the TPU and the run."""
    return [word for word in fakes.actions() if word not in ("describe", "state", "scp")]


def test_a_preemption_is_gone_through_to_the_end(fakes, babysit):
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "NONE", "ACTIVE"]
    fakes.answer(states=states, runs=["NOTHING", "RUNNING", "NOTHING", "RUNNING", "EXITED 0"])
    done = babysit("--spot", "--delete_when_done")
    assert done.returncode == 0, done.stderr
    first = ["describe", "create", "describe", "describe", "state", "scp", "setup", "run", "describe", "state"]
    again = ["describe", "describe", "delete", *first[:2], *first[3:], "describe", "state", "delete"]
    assert fakes.actions() == first + again
    created = [call for call in fakes.calls() if call[4] == "create"]
    started = [a for call in fakes.calls() for a in call if "worker.sh run " in a]
    assert created[0] == created[1] and "--spot" in created[0]
    assert started[0] == started[1] and shlex.split(started[0])[-2:] == TRAIN
    assert "preempted: the TPU is SUSPENDED" in done.stderr


def test_a_node_that_is_taken_away_while_its_request_says_active_is_replaced_at_once(fakes, babysit):
    fakes.answer(states=["ACTIVE", "NONE", "ACTIVE"], runs=[TAKEN, "NOTHING", "EXITED 0"])
    assert babysit().returncode == 0
    assert changes(fakes) == ["delete", "create", "setup", "run"]


def test_flags_of_the_tpu_reach_gcloud(fakes, babysit):
    fakes.answer(states=["NONE", "ACTIVE"], runs=["NOTHING", "EXITED 0"])
    flags = ["--reserved", "--network=net", "--service-account=a@b", "--internal-ips", "--slices=2", "--cache=none"]
    assert babysit(*flags).returncode == 0
    create, *others = [call for call in fakes.calls() if call[4] != "describe"]
    assert {"--reserved", "--network=net", "--service-account=a@b", "--internal-ips", "--node-count=2"} <= set(create)
    assert all("--tunnel-through-iap" in call for call in others)
    assert any("worker.sh run none llada_jax.train" in a for call in others for a in call)


def test_a_run_that_goes_on_is_left_alone(fakes, babysit):
    fakes.answer(states=["ACTIVE"], runs=["RUNNING", SILENT, "RUNNING step 5\nsaid: step 5/9", "EXITED 0 step 9"])
    assert babysit().returncode == 0
    assert set(fakes.actions()) == {"describe", "state"}


def test_a_rebooted_host_starts_again_and_counts_no_crash(fakes, babysit):
    fakes.answer(states=["ACTIVE"], runs=["RUNNING step 7", SILENT, "NOTHING", "EXITED 0"])
    assert babysit("--retries=0").returncode == 0
    assert changes(fakes) == ["setup", "run"]


def test_a_run_that_has_saved_starts_again_and_counts_no_crash(fakes, babysit):
    fakes.answer(states=["ACTIVE"], runs=["EXITED 75", "RUNNING", "EXITED 75", "EXITED 0"])
    done = babysit("--retries=0")
    assert done.returncode == 0, done.stderr
    assert changes(fakes).count("run") == 2 and "has saved; it starts again" in done.stderr


def test_crashes_at_the_same_step_end_the_watch(fakes, babysit):
    fakes.answer(states=["ACTIVE"], runs=["RUNNING step 40", "EXITED 1 step 40\nsaid: error: boom"])
    done = babysit("--retries=2")
    assert done.returncode == 1 and changes(fakes).count("run") == 2
    assert done.stderr.splitlines()[-1].endswith(
        "error: the run ended with code 1: error: boom; no new step after 2 retries, giving up"
    )


def test_progress_between_crashes_makes_the_watch_patient_again(fakes, babysit):
    crashes = [f"EXITED 134 step {10 * i}" for i in range(1, 5)]
    fakes.answer(states=["ACTIVE"], runs=[*crashes, "EXITED 0"])
    assert babysit("--retries=1").returncode == 0
    assert changes(fakes).count("run") == 4


def test_a_long_run_whose_log_names_no_step_makes_the_watch_patient_again(monkeypatch):
    runs = iter(["EXITED 1", *["RUNNING"] * 60, "EXITED 1", *["RUNNING"] * 59, "EXITED 1"])
    answers = {"state": lambda: "ACTIVE", "run_state": lambda: next(runs)}
    monkeypatch.setattr(module, "run", lambda command, _: (0, answers.get(command[2], str)(), ""))
    watch = module.Watch(module.parser().parse_args(["--name=n", "--type=t", "--poll_seconds=0", "--retries=1"]), [])
    with pytest.raises(module.Stop, match="no new step after 1 retries"):
        watch.until_the_end()
    assert next(runs, None) is None


def test_no_capacity_is_waited_for_without_end(fakes, babysit):
    failed = "FAILED\tThere is no more capacity in the zone"
    fakes.answer(
        states=["NONE"] * 7 + [failed, "NONE", "ACTIVE"], runs=["EXITED 0"], fail={"create": [CAPACITY] * 6 + [None]}
    )
    done = babysit("--retries=0")
    assert done.returncode == 0 and done.stderr.count("no capacity: ") == 7, done.stderr
    assert changes(fakes).count("delete") == 1


def test_a_network_that_is_down_is_waited_for_without_end(fakes, babysit):
    fakes.answer(states=[OFFLINE] * 6 + ["ACTIVE"], runs=["EXITED 0"])
    done = babysit("--retries=0")
    assert done.returncode == 0 and done.stderr.count("the network: ") == 6


def test_quota_is_a_mistake_at_first_and_waited_for_once_there_was_a_tpu(fakes, babysit):
    fakes.answer(states=["ACTIVE", "SUSPENDED", "NONE", "NONE", "ACTIVE"], runs=["RUNNING", "EXITED 0"],
                 fail={"create": [QUOTA, None]})  # fmt: skip
    done = babysit()
    assert done.returncode == 0 and "quota: create: " in done.stderr
    fakes.answer(states=["NONE"], fail={"create": [QUOTA]})
    assert babysit().returncode == 2


def test_a_tpu_that_stops_answering_is_replaced(fakes, babysit):
    fakes.answer(
        states=["ACTIVE"] * 6 + ["NONE", "ACTIVE"], runs=["RUNNING step 3", *[SILENT] * 5, "NOTHING", "EXITED 0"]
    )
    done = babysit("--retries=0")
    assert done.returncode == 0 and "can't be used and is replaced" in done.stderr, done.stderr
    assert changes(fakes) == ["delete", "create", "setup", "run"]


def test_a_setup_that_fails_again_and_again_ends_the_watch_if_nothing_ever_worked(fakes, babysit):
    fakes.answer(states=["ACTIVE"], runs=["NOTHING"], fail={"setup": ["ERROR: pip could not install"]})
    done = babysit("--retries=1")
    assert done.returncode == 1 and changes(fakes).count("delete") == 1
    assert "pip could not install" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "script, flags, code, message",
    [
        (dict(states=["ACTIVE"], runs=["EXITED 2\nsaid: error: no such field: lr"]), [], 2, "error: no such field: lr"),
        (dict(states=["ACTIVE"], runs=["EXITED 130\nsaid: step 9"]), [], 130, "somebody interrupted the run"),
        (dict(states=["ACTIVE"], runs=[SILENT]), [], 2, "no TPU has ever answered"),
        (dict(states=[ZONE]), [], 2, "Permission denied on 'locations/us-moon1-a'"),
        (dict(states=[LOGIN]), [], 2, "You do not currently have an active account"),
        (dict(states=[EXPIRED]), [], 2, "invalid_grant"),
        (dict(states=["NONE"], fail={"create": [TYPE]}), [], 2, "v5litepod-17 is not available"),
        (dict(states=["FAILED\tNot found: accelerator type v5p-7"]), [], 2, "accelerator type v5p-7"),
        (dict(states=["FAILED\tINVALID_ARGUMENT: no such runtime"]), [], 2, "no such runtime"),
        (dict(states=["NONE"]), ["--type=tpu7x-8"], 2, "TPU 7x comes through GKE only"),
        (dict(states=["NONE"]), ["--zone="], 2, "no zone"),
        (dict(states=["ACTIVE"], runs=["NOTHING"]), ["--tags=t", "--type=v4-8", "--project="], 2, "no project"),
    ],
)
def test_what_will_not_pass_ends_the_watch_with_its_reason(fakes, babysit, script, flags, code, message):
    fakes.answer(**script)
    done = babysit("--retries=0", *flags)
    assert done.returncode == code and message in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [[], ["--name=n"], ["--name=n", "--type=v4-8", "--retries=x"]])
def test_a_mistake_in_its_own_flags_is_one_line(fakes, flags):
    done = fakes.launch(sys.executable, LAUNCH / "babysit.py", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_command_that_hangs_is_ended_with_what_it_started():
    start = time.monotonic()
    code, _, errors = module.run(["bash", "-c", "sleep 60 & wait"], 0.2)
    assert code == 1 and "did not answer" in errors and time.monotonic() - start < 10


def test_waits_become_longer_up_to_a_limit(monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    watch = module.Watch(module.parser().parse_args(["--name=n", "--type=t", "--poll_seconds=60"]), [])
    for _ in range(7):
        watch._heed("There is no more capacity")
    assert waited == [60 * polls for polls in (1, 3, 7, 15, 30, 30, 30)]


def test_an_interrupted_watch_says_that_the_run_goes_on(fakes):
    fakes.answer(states=["ACTIVE"], runs=["RUNNING"])
    command = [sys.executable, LAUNCH / "babysit.py", "--name=n", "--type=v4-8", *PLACE, "--poll_seconds=60", *TRAIN]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        fakes.answer(states=["WAITING_FOR_RESOURCES"])
        path = f"{fakes.directory}:/usr/bin:/bin"
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"PATH": path})
        assert process.stderr and "WAITING_FOR_RESOURCES" in process.stderr.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == code and "the run go on" in errors and "Traceback" not in errors


def test_a_dry_run_shows_the_commands_and_runs_none(fakes, babysit):
    done = babysit("--dry_run")
    assert done.returncode == 0 and fakes.calls() == []
    shown = [line.split()[5] for line in done.stderr.splitlines()]
    assert shown == ["create", "scp", "ssh", "ssh"], done.stderr
