"""metrics.jsonl without gaps or repetitions, TensorBoard's file, and what a full disk does to both."""

import json
import os
import struct
import subprocess
import sys

import pytest

from llada_jax.training import monitor, writer


@pytest.fixture(autouse=True)
def nothing_was_said_before(monkeypatch):
    monkeypatch.setattr(monitor, "_warned", set())


def test_metrics_are_cut_back_to_the_checkpoint_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n[{"step": 1}]\n{"step": 3}\n{"st')
    lines = writer.Lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n'
    lines.write({"step": 3})
    lines.close()
    assert path.read_text().endswith('1}\n{"step": 3}\n') and not (tmp_path / "metrics.jsonl.tmp").exists()


def test_lines_wait_for_a_full_disk_and_hold_a_checkpoint_back(tmp_path):
    lines = writer.Lines(tmp_path / "metrics.jsonl", 0)
    lines.close()
    lines._file = full = open("/dev/full", "ab", buffering=2**20)
    lines.write({"step": 1})
    with pytest.raises(OSError, match="No space left"):
        lines.flush()
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo])
def test_what_is_no_file_is_moved_out_of_the_way(tmp_path, capsys, make):
    make(tmp_path / "metrics.jsonl")
    lines = writer.Lines(tmp_path / "metrics.jsonl", 3)
    lines.write({"step": 4})
    lines.flush()
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 4}\n' and (tmp_path / "metrics.jsonl.damaged").exists()
    assert capsys.readouterr().err.count("metrics.jsonl: not a file") == 1


def test_metrics_that_cannot_be_opened_are_gone_without_and_hold_nothing_back(tmp_path, capsys):
    lines = writer.Lines(tmp_path / "nowhere" / "metrics.jsonl", 0)
    lines.write({"step": 1})
    lines.flush()
    lines.close()
    assert "No such file or directory; the run goes on without it" in capsys.readouterr().err


def read(path):
    from tensorboardX.proto.event_pb2 import Event

    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_tensorboard_gets_what_is_flushed_and_hides_what_is_trained_again(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    board = writer.Board(tmp_path, 4)
    board.add_scalar("loss", 0.5, 5)
    board.add_text("sample", "床前", 5)
    board.flush()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    found = read(path)
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].step, found[1].session_log.status) == (5, SessionLog.START)  # TensorBoard drops steps from 5 on
    assert found[2].summary.value[0].simple_value == 0.5 and found[3].step == 5
    board.close()


def test_tensorboard_does_not_bring_pytorch_in(tmp_path):
    """Where it is installed it can be imported afterwards, but is not on the way."""
    program = f"""if True:
        import sys
        from pathlib import Path
        from llada_jax.training.writer import Board
        Board(Path({str(tmp_path)!r}), 0).close()
        print("torch" in sys.modules, "tensorboardX" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False True\n"


def test_tensorboard_goes_on_in_a_new_file_after_a_full_disk(tmp_path, capsys):
    board = writer.Board(tmp_path, 0)
    board.add_scalar("loss", 0.5, 1)
    board.flush()
    (first,) = tmp_path.glob("events.out.tfevents.*")

    class Full:
        def write_event(self, event):
            raise OSError(28, "No space left on device")

    board._writer.close()
    board._writer = Full()
    board.add_scalar("loss", 0.4, 2)  # lost here; it is in metrics.jsonl
    board.add_scalar("loss", 0.3, 3)
    board.close()
    (second,) = set(tmp_path.glob("events.out.tfevents.*")) - {first}
    assert [event.step for event in read(first)][-1] == 1 and [event.step for event in read(second)] == [0, 3]
    assert capsys.readouterr().err.count("TensorBoard's file: No space left on device") == 1


def test_a_line_of_metrics_is_valid_json_whatever_the_numbers(tmp_path):
    from llada_jax.training.metrics import _number

    lines = writer.Lines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1, **{str(i): _number(x) for i, x in enumerate([1.5, float("nan"), float("inf")])}})
    lines.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "0": 1.5, "1": None, "2": None}
