"""worker.sh on a host that only pretends: its Python notes what it is given, its gcsfuse mounts nothing."""

import io
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from fakes import launch, prepared, program

# Prints its arguments; saves for a second and ends with 75 at SIGTERM; ends with 3 unless it is asked to "wait".
TRAINER = """
import os, signal, sys, time
def save(*_):
    time.sleep(1)
    sys.exit(print("saved", flush=True) or 75)
signal.signal(signal.SIGTERM, save)
print(sys.argv[1:], "cache", os.environ.get("JAX_COMPILATION_CACHE_DIR"), flush=True)
print("pre-training: step 40/99 elbo 1.2 nats/token\\npre-training: step 120 validation", flush=True)
time.sleep(60 * ("wait" in sys.argv))
print("error: no such field" if "bad" in sys.argv else "3 steps from step 7", flush=True)
sys.exit(3)
"""
# One bucket can be mounted; mountpoint, findmnt and fusermount know by the file "mounted" which it is.
MOUNTS = {
    "mountpoint": "import pathlib, sys; sys.exit(not (pathlib.Path(__file__).parent / 'mounted').exists())",
    "findmnt": "import pathlib; print((pathlib.Path(__file__).parent / 'mounted').read_text())",
    "fusermount": "import pathlib; (pathlib.Path(__file__).parent / 'mounted').unlink(missing_ok=True)",
    "gcsfuse": """
        import pathlib, sys
        here = pathlib.Path(__file__).parent
        *flags, bucket, place = sys.argv[1:]
        assert set(flags) == {"--implicit-dirs", "--rename-dir-limit=200000"} and place.endswith("/bucket")
        if (here / "forbidden").exists():
            sys.exit("Error: fs.NewServer: 403 Forbidden")
        (here / "mounted").write_text(bucket)
        """,
}


class Host:
    def __init__(self, home: Path):
        self.home, self.checkout, self.bin = home, home / "llada_jax", home / "bin"
        self.checkout.mkdir()
        self.bin.mkdir()
        prepared(self.checkout, "tpu", "gcs", python=TRAINER)
        for name, source in MOUNTS.items():
            program(self.bin / name, source)

    def worker(self, *words: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return launch("bash", self.checkout / "launch/worker.sh", *words, HOME=str(self.home), PATH=path)

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return self.worker("run", "none", "llada_jax.train", *flags)

    def state(self) -> str:
        return self.worker("state").stdout.splitlines()[0]

    def log(self) -> str:
        path = self.checkout / "run.log"
        return path.read_text() if path.exists() else ""

    def bring(self, *names: str) -> None:
        """What tpu_vm.sh setup does before worker.sh: the archive, unpacked over the checkout."""
        with tarfile.open(self.home / "llada_jax.tgz", "w:gz") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
                (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                (self.checkout / name).touch()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host.worker("stop")


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_goes_on_in_the_background_and_says_how_it_ended(host):
    assert host.state() == "NOTHING"
    assert host.worker("run", "gs://b/c", "llada_jax.train", "--workdir=gs://b/a b").returncode == 0
    until(lambda: host.state().startswith("EXITED"))
    assert host.worker("state").stdout == "EXITED 3 step 120\nsaid: 3 steps from step 7\n"
    assert "['-m', 'llada_jax.train', '--workdir=gs://b/a b', '--distributed'] cache gs://b/c" in host.log()


def test_the_line_that_says_most_is_the_error(host):
    host.run("bad")
    until(lambda: host.state().startswith("EXITED"))
    assert host.worker("state").stdout.splitlines()[1] == "said: error: no such field"


def test_the_step_is_that_of_this_run(host):
    (host.checkout / "run.log").write_text("== the run before\nstep 9000/9000\n")
    host.run("wait")
    until(lambda: "validation" in host.log())
    assert host.state() == "RUNNING step 120"


def test_stop_lets_the_run_save(host):
    host.run("wait")
    until(lambda: "cache" in host.log())
    assert host.worker("stop").returncode == 0
    assert host.log().endswith("saved\n") and host.state().startswith("NOTHING")


def test_a_second_run_takes_the_place_of_the_first(host):
    host.run("wait")
    until(lambda: "cache" in host.log())
    assert host.run("wait").returncode == 0
    assert host.log().count("saved") == 1 and host.state().startswith("RUNNING")


def test_after_a_reboot_nothing_runs_though_another_process_has_the_number(host):
    host.run("wait")
    until(lambda: "cache" in host.log())
    os.killpg(int((host.checkout / "run.pid").read_text()), signal.SIGKILL)
    (host.checkout / "run.pid").write_text(str(os.getpid()))
    until(lambda: host.state().startswith("NOTHING"))
    assert host.worker("stop").returncode == 0  # and this process lives


def test_a_mount_that_a_reboot_took_away_is_made_again_before_the_run(host):
    host.bring("a.py")
    assert host.worker("setup", "mine").returncode == 0
    assert (host.bin / "mounted").read_text() == "mine" and (host.checkout / "bucket").is_symlink()
    (host.bin / "mounted").unlink()
    assert host.run("--workdir=bucket/run").returncode == 0
    assert (host.bin / "mounted").read_text() == "mine"


def test_another_bucket_is_mounted_instead(host):
    host.bring("a.py")
    host.worker("setup", "mine")
    host.worker("setup", "other")
    assert (host.bin / "mounted").read_text() == "other"


def test_a_run_does_not_start_without_its_bucket(host):
    refused = host.run("--workdir=bucket/run")
    assert refused.returncode == 2 and "setup --bucket=BUCKET" in refused.stderr
    host.bring("a.py")
    host.worker("setup", "mine")
    (host.bin / "mounted").unlink()
    (host.bin / "forbidden").touch()
    failed = host.run("--workdir=bucket/run")
    assert failed.returncode == 1 and "403 Forbidden" in failed.stderr and host.state() == "NOTHING"


def test_setup_removes_the_files_that_are_gone_and_no_others(host):
    host.bring("kept.py", "room/gone 床.py")
    host.worker("setup")
    (host.checkout / "runs").mkdir()
    (host.checkout / "runs/mine").touch()
    host.bring("kept.py")
    assert host.worker("setup").returncode == 0
    assert not (host.checkout / "room/gone 床.py").exists()
    assert (host.checkout / "kept.py").exists() and (host.checkout / "runs/mine").exists()


def test_a_host_without_python_installs_one_and_waits_for_the_machine_s_own_updates(host):
    program(host.bin / "sudo", "import os, sys\nos.execvp(sys.argv[1], sys.argv[1:])")
    program(host.bin / "add-apt-repository", "")
    program(host.bin / "sleep", "")
    source = """
        import os, pathlib, sys
        here = pathlib.Path(__file__).parent
        assert os.environ["DEBIAN_FRONTEND"] == "noninteractive" and "DPkg::Lock::Timeout=600" in sys.argv
        (here / "apt").open("a").write(" ".join(sys.argv[1:]) + "\\n")
        if "update" in sys.argv and (here / "apt").read_text().count("update") < 3:
            sys.exit("E: Could not get lock /var/lib/apt/lists/lock")
        """
    program(host.bin / "apt-get", source)
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        program(host.bin / name, "import sys\nsys.exit(1)")  # too old
    host.bring("a.py")
    done = host.worker("setup")
    lines = (host.bin / "apt").read_text().splitlines()
    assert [line.split()[3] for line in lines] == ["update"] * 3 + ["install"] and "python3.12-venv" in lines[-1]
    assert done.returncode == 2 and "no Python 3.11 or newer" in done.stderr  # what this apt-get installed was nothing
