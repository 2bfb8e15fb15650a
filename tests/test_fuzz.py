"""Damaged files of every format: what was there, or one clear line. tests/fuzz.py tries more of them."""

import pytest
from fuzz import fuzz
from fuzz_formats import FORMATS, HEAVY

LIGHT = [name for name in FORMATS if name not in HEAVY]


@pytest.mark.parametrize(
    "names, inputs", [(LIGHT, 300), pytest.param(HEAVY, 25, marks=pytest.mark.slow)], ids=["light", "heavy"]
)
def test_damaged_files_are_refused_in_one_line_without_crash_hang_or_much_memory(names, inputs):
    for name, told in fuzz(names, inputs, seed=1).items():
        assert told["else"] == {}, name
        assert told["accepted"] + told["refused"] == inputs, name
        assert told["refused"] > inputs / 10, name  # the damage reaches what is read
        assert told["peak"] < 2**29, name


def test_what_a_reader_does_wrong_is_seen():
    told = fuzz(["wrong"], 20)["wrong"]
    kinds = {outcome.split()[0] for outcome in told["else"]}
    assert {"KeyError", "several", "crash", "unpickled"} <= kinds
