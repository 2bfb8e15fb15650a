"""What one step costs: the schedule of the compiled program played through on one device.

Fusions take the cycles that the compiler estimates; attention kernels, which it doesn't price, their FLOPs at an
assumed share of peak; collectives, and what moves to the host and back, the time of `links`. What the schedule issues
synchronously makes the TensorCore wait; what it starts early and awaits late costs only what the work in between
doesn't cover. Loops multiply their body.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from llada_jax.tools.ahead.hlo import Instruction, Program, array_bytes, first_group, host_copy
from llada_jax.tools.ahead.links import Transfer

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip


Tally = dict[Any, float]  # what is not there is 0


def _tally() -> Any:
    return dataclasses.field(default_factory=lambda: collections.defaultdict(float))


@dataclasses.dataclass
class Cost:
    """Additive over what is executed. Seconds are of one device."""

    seconds: float = 0.0  # by the schedule, waits included
    work: Tally = _tally()  # "matmul", … -> seconds
    cycles: float = 0.0
    transfers: Tally = _tally()  # Transfer -> times
    waits: Tally = _tally()  # kind -> seconds exposed
    unpriced: Tally = _tally()  # what -> times
    heaviest: Tally = _tally()  # op_name -> seconds

    def add(self, other: "Cost", times: float = 1.0) -> None:
        for field in dataclasses.fields(Cost):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, dict):
                for key, value in theirs.items():
                    mine[key] += value * times
            else:
                setattr(self, field.name, mine + theirs * times)


class Machine:
    """Plays a program. `transfer(kind, payload, group)` prices a collective, or with no group what goes "to host" or
    comes "from host"; `kernel(instruction)` a Pallas kernel."""

    def __init__(
        self,
        program: Program,
        *,
        clock: float,
        bandwidth: float,
        transfer: Callable[[str, float, list[int]], Transfer],
        kernel: Callable[[Instruction], float | None],
        loop_trips: Callable[[Instruction], float],
        devices: int,
    ):
        self._program, self._clock, self._bandwidth, self._devices = program, clock, bandwidth, devices
        self._transfer, self._kernel, self._loop_trips = transfer, kernel, loop_trips
        self._of = functools.cache(self._play)
        self._started: dict[str, tuple[str, Transfer]] = {}  # asynchronous operations by the name of each phase

    def run(self) -> Cost:
        return self._of(self._program.entry)

    def _play(self, computation: str) -> Cost:
        """One pass through a computation. `free`: when each road, the links or a way of the host, is next idle."""
        cost, free = Cost(), collections.defaultdict(float)
        arrives: dict[str, tuple[str, float]] = {}
        for i in self._program.computations[computation]:
            if i.opcode == "while":
                trips = self._program.trips(i)
                cost.add(self._of(i.attribute("body")), self._loop_trips(i) if trips is None else trips)
            elif i.opcode == "conditional":
                branches = [self._of(name) for name in _branches(i) if name in self._program.computations]
                cost.add(max(branches, key=lambda branch: branch.seconds, default=Cost()))
            elif i.opcode == "call":
                cost.add(self._of(self._program.called(i)))
            elif (found := self._collective(i)) is not None:
                key, phase, moved = found
                if phase in ("start", "whole"):
                    assert moved is not None
                    cost.transfers[moved] += 1
                    road = moved.kind if moved.network == "host" else "links"
                    free[road] = max(free[road], cost.seconds) + moved.seconds
                    arrives[key] = moved.kind, free[road]
                if phase in ("done", "whole") and key in arrives:
                    kind, at = arrives.pop(key)
                    cost.waits[kind] += max(at - cost.seconds, 0.0)
                    cost.seconds = max(at, cost.seconds)
            else:
                self._compute(i, cost)
        return cost

    def _compute(self, i: Instruction, cost: Cost) -> None:
        seconds = i.cycles / self._clock
        if "splash" in i.op_name and i.op_name.endswith("reduce_sum"):
            # The parts of dq that the backward kernel leaves to be added: priced at some ten million cycles, 30 times
            # what reading them takes and more than the kernel itself (libtpu 0.0.52).
            moved = self._program.operand_bytes(i) + array_bytes(i.type)
            seconds = min(seconds, 2 * moved / self._bandwidth)
        kind = "matmul" if self._multiplies(i) else "vector"
        if i.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', i.text)
            priced = self._kernel(i)
            if priced is not None:
                seconds, kind = priced, "attention"
            elif not seconds and target:
                cost.unpriced[target[1]] += 1
        elif i.opcode == "async-start" and "sparsecore" in i.text:
            cost.unpriced["sparse core"] += 1
        cost.cycles += i.cycles
        cost.seconds += seconds
        if seconds:
            cost.work[kind] += seconds
            cost.heaviest[i.op_name or i.opcode] += seconds

    def _multiplies(self, i: Instruction) -> bool:
        return i.opcode in ("convolution", "dot") or (
            i.opcode == "fusion" and self._holds_product(self._program.called(i))
        )

    @functools.cache  # noqa: B019 (a machine lives for one program)
    def _holds_product(self, computation: str) -> bool:
        return any(self._multiplies(i) for i in self._program.computations.get(computation, ()))

    def _collective(self, i: Instruction) -> tuple[str, str, Transfer | None] | None:
        """(what its end refers to, "start", "done" or "whole", the transfer) of an instruction that is one."""
        if (copied := host_copy(i)) is not None:
            self._started[i.name] = i.name, self._transfer(*copied, [])
            return i.name, "start", self._started[i.name][1]
        plain = re.sub(r"-(start|done|update)$", "", i.opcode)
        if plain in KINDS:
            if i.opcode.endswith("-done"):
                return i.operands[0], "done", None
            return i.name, "start" if i.opcode.endswith("-start") else "whole", self._priced(plain, i)
        if i.opcode in ("send", "recv"):
            moved = self._transfer("collective-permute", array_bytes(i.type), [0, self._devices - 1])
            return i.name, "start", dataclasses.replace(moved, kind=i.opcode)
        if i.opcode in ("send-done", "recv-done"):
            return i.operands[0], "done", None
        if i.opcode in ("async-done", "async-update", "copy-done"):
            return self._asynchronous(i)
        if i.opcode not in ("fusion", "async-start"):
            return None
        called = self._program.called(i)
        inner = self._inner(called)
        if inner is None:
            return None
        text = " ".join(j.text for j in self._program.computations[called] if j.opcode == "custom-call")
        channel = "channel " + (m[1] if (m := re.search(r"channel_id=(\d+)", inner.text)) else inner.name)
        if "AsyncCollectiveStart" in text:
            return channel, "start", self._priced(inner.opcode, inner)
        if "AsyncCollectiveDone" in text:
            return channel, "done", None
        if called.startswith("async_collective_fusion"):
            return None  # work that runs while the collective does
        kind = "reduce-scatter" if called.startswith("all-reduce-scatter") else inner.opcode
        if i.opcode == "fusion":
            return i.name, "whole", self._priced(kind, inner)
        self._started[i.name] = i.name, self._priced(kind, inner)
        return i.name, "start" if i.operands else "prepared", self._started[i.name][1]

    def _asynchronous(self, i: Instruction) -> tuple[str, str, Transfer | None] | None:
        """The middle or end of an asynchronous operation; None if that moves nothing between devices or to the host.

        A sparse core is made ready at async-start, and begins with the data that async-update hands it.
        """
        before = i.operands[0] if i.operands else ""
        if before not in self._started:
            return None
        key, moved = self._started[before]
        if i.opcode != "async-update":
            return key, "done", None
        self._started[i.name] = key, moved
        return key, "start" if before == key else "going", moved

    @functools.cache  # noqa: B019
    def _inner(self, computation: str) -> Instruction | None:
        """The collective inside a fusion, if there is one."""
        for i in self._program.computations.get(computation, ()):
            if i.opcode in KINDS:
                return i
            if (
                i.opcode in ("fusion", "call", "custom-call")
                and (found := self._inner(self._program.called(i))) is not None
            ):
                return found
        return None

    def _priced(self, kind: str, i: Instruction) -> Transfer:
        return self._transfer(kind, self._payload(kind, i), first_group(i.text, self._devices))

    def _payload(self, kind: str, i: Instruction) -> float:
        """Bytes of the whole array: what a gather gives, what a reduction takes."""
        operands, result = self._program.operand_bytes(i), array_bytes(i.type)
        if i.opcode.endswith("-start"):  # its type holds operands, results and sometimes more
            result = max(result - operands, operands)
        return result if kind == "all-gather" else operands or result


def _branches(i: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.text)
    names = listed[1].replace("%", "").split(", ") if listed else []
    return names + [name for a in ("true_computation", "false_computation") if (name := i.attribute(a))]
