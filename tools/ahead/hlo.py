"""Reads the scheduled program that the TPU compiler dumps: computations, trip counts, groups of devices.

The text is `*.after_codegen.txt` of `compiler_options={"xla_dump_to": DIR}`; `compiled.as_text()` fails on programs
with asynchronous updates. Each instruction stands where it is issued, and fusions carry the compiler's own
`estimated_cycles`.
"""

import dataclasses
import functools
import math
import re

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]")
_PLACED = re.compile(r"\b([a-z]+[a-z0-9]*\[[\d,]*\])(\{[^}]*\})?")  # an array and its layout
_HOST = "S(5)"  # the memory space of the host, in a layout
_BEGIN = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str  # such as bf16[8,128]{1,0:T(8,128)}, or a tuple of such
    opcode: str
    text: str  # operands and attributes
    is_root: bool = False

    @property
    def cycles(self) -> int:
        """The compiler's estimate, TensorCore cycles; 0 where it gives none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(match[1]) if match and int(match[1]) < 2**60 else 0

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.text[: _closing(self.text) + 1])

    @property
    def op_name(self) -> str:
        """The JAX operations that it came from, as a path."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""

    def attribute(self, name: str) -> str:
        """A computation that it names, such as body= of a while; "" if it doesn't."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return match[1] if match else ""


@dataclasses.dataclass
class Program:
    computations: dict[str, list[Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a while runs, or None where that depends on data.

        XLA states it, or the condition compares the counter, which starts at 0, with a constant.
        """
        stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        if stated:
            return int(stated[1])
        condition = self.computations.get(loop.attribute("condition"), [])
        by_name = {i.name: i for i in condition}
        for test in condition:
            if test.is_root and test.opcode == "compare":
                constants = [by_name[name] for name in test.operands if by_name[name].opcode == "constant"]
                found = [re.match(r"\((\d+)\)", constant.text) for constant in constants]
                if len(found) == 1 and found[0]:
                    return int(found[0][1])
        return None

    def called(self, instruction: Instruction) -> str:
        """The computation that a fusion, call, asynchronous start or offloaded operation runs; "" for none."""
        for name in ("calls", "to_apply"):
            if instruction.attribute(name) in self.computations:
                return instruction.attribute(name)
        offloaded = re.search(r"called_computations=\{%?([\w.\-]+)", instruction.text)
        return offloaded[1] if offloaded and offloaded[1] in self.computations else ""

    @functools.cached_property
    def types(self) -> dict[str, str]:
        return {i.name: i.type for instructions in self.computations.values() for i in instructions}

    def operand_bytes(self, instruction: Instruction) -> float:
        return sum(array_bytes(self.types.get(name, "")) for name in instruction.operands)


def parse(text: str) -> Program:
    """The program of a dump. Raises ValueError when there is none in it."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        begin = _BEGIN.match(line)
        if begin:
            current = computations.setdefault(begin[2], [])
            entry = begin[2] if begin[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(match[2], match[3], bool(match[1])))
    if not entry:
        raise ValueError("no ENTRY computation in the dump")
    return Program(computations, entry)


def _whole_lines(text: str) -> list[str]:
    lines: list[str] = []
    for line in text.split("\n"):  # quoted attributes may hold line breaks
        if lines and line.startswith(('"', "}}")):
            lines[-1] += " " + line
        else:
            lines.append(line)
    return lines


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([a-z][\w\-]*)", rest[end:])
    return Instruction(
        name, rest[:end], opcode[1] if opcode else "", rest[end + (opcode.end() if opcode else 0) :], is_root
    )


def _closing(text: str) -> int:
    """Where the parenthesis that `text` opens first is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def array_bytes(type_: str) -> float:
    """Bytes of all arrays in a type, without the padding of tiles."""
    return sum(_BYTES.get(kind, 0) * math.prod(dims) for kind, dims in arrays(type_))


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(element type, dimensions) of each array in a type."""
    return [(k, tuple(int(d) for d in dims.split(",") if d)) for k, dims in _ARRAY.findall(type_) if k in _BYTES]


def host_copy(i: Instruction) -> tuple[str, float] | None:
    """("to host" or "from host", bytes) of an instruction that begins such a copy, of an array or of a slice of one."""
    if i.opcode not in ("copy-start", "async-start") or _HOST not in i.type:
        return None
    placed = [(array, _HOST in layout) for array, layout in _PLACED.findall(i.type)]
    # A copy's type is (target, source, context), another operation's ((operands), result, context).
    _, to_host = placed[0] if i.opcode == "copy-start" else placed[-2]
    return "to host" if to_host else "from host", max(array_bytes(array) for array, on_host in placed if not on_host)


def without_host(type_: str) -> str:
    """A type without its arrays in the memory of the host."""
    return " ".join(array for array, layout in _PLACED.findall(type_) if _HOST not in layout)


def first_group(text: str, devices: int) -> list[int]:
    """The devices that the first one of a collective's groups joins, in the order of the mesh.

    Reads the four ways of writing `replica_groups`, and `source_target_pairs` (the first pair). Raises ValueError for
    another.
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return [int(i) for i in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = ([int(i) for i in (group or "").split(",") if i] for group in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape)[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        kept = set(re.findall(r"'([^']+)'", named[2]))
        if kept <= set(sizes) and ":" not in named[2] and "device_ids" not in named[0]:
            ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
            return ids[tuple(slice(None) if name in kept else 0 for name in sizes)].ravel().tolist()
    if re.search(r"replica_groups=\{\}", text):
        return list(range(devices))
    raise ValueError(f"can't read the groups of a collective: {text[:300]}")
