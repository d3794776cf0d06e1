"""Reads the text of a program compiled for TPU: its cost in cycles, and what it sends to others.

The TPU compiler writes its own estimate, `"estimated_cycles":"N"`, on every fusion, matrix product
and copy; kernels (custom calls) carry none. Loop bodies count once for every trip.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip


class Op(NamedTuple):
    """One instruction, the computation it is in, and how often a run of the program executes it."""

    name: str
    kind: str
    result: str
    text: str
    computation: str
    times: int

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one execution; None where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else None


class Program:
    """A compiled program's computations, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations[start[2]] = []
                if start[1]:
                    self.entry = start[2]
            elif line.startswith("  "):
                lines.append(line)

    def ops(
        self, inside_fusions: bool = False, computation: str = "", times: int = 1
    ) -> Iterator[Op]:
        """Every instruction that runs; those of fusions, which share a cost, on request."""
        computation = computation or self.entry
        for line in self.computations[computation]:
            if not (found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)):
                continue
            op = Op(found[1], found[3], found[2], line, computation, times)
            yield op
            trips = self.trips(line) if op.kind == "while" else 1
            for name in _called(op, inside_fusions):
                yield from self.ops(inside_fusions, name, times * trips)

    def trips(self, line: str) -> int:
        """How often a while loop runs: what its line says, or the constant it counts up to."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", line)[1]]  # type: ignore
        limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
        return max(map(int, limits), default=1)

    def group(self, op: Op) -> str:
        """What kind of work an instruction is, for a table."""
        body = [op.text]
        if fused := re.search(r"calls=%?([\w.\-]+)", op.text):
            body = self.computations[fused[1]]
        kinds = {k for line in body for k in re.findall(r" ([a-z][\w\-]*)\(", line)}
        if kinds & {"convolution", "dot"}:
            return "matrix products"
        slices = kinds & {"dynamic-update-slice", "dynamic-slice"}
        if slices and not kinds & {"reduce", "exponential"}:
            return "activations kept and read"
        if op.kind in ("copy", "transpose", "pad", "slice", "concatenate", "reshape"):
            return "copies and layouts"
        if kinds & {"gather", "scatter", "sort"}:
            return "look-ups"
        return "elementwise and sums"


def _called(op: Op, inside_fusions: bool) -> list[str]:
    """The computations an instruction runs, besides the small ones that reduce two values."""
    if op.kind == "while":
        return re.findall(r"body=%?([\w.\-]+)", op.text)
    if op.kind in ("call", "async-start"):
        return re.findall(r"(?:to_apply|calls|called_computations=\{)=?%?([\w.\-]+)", op.text)
    if op.kind == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", op.text)
        named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.text)
        return re.findall(r"%([\w.\-]+)", branches[1]) if branches else named
    if inside_fusions and op.kind == "fusion":
        return re.findall(r"calls=%?([\w.\-]+)", op.text)
    return []


def cycles(program: Program) -> Counter[str]:
    """Estimated cycles of one run, by group of work; kernels are not in it."""
    total: Counter[str] = Counter()
    for op in program.ops():
        if op.cycles:
            total[program.group(op)] += op.cycles * op.times
    return total


def kernels(program: Program) -> Counter[str]:
    """How often a run calls each kernel, by the name its `pallas_call` was given."""
    total: Counter[str] = Counter()
    for op in program.ops():
        if 'custom_call_target="tpu_custom_call"' in op.text:
            name = re.search(r'op_name="([^"]*)"', op.text)
            parts = [p for p in name[1].split("/") if p != "pallas_call"] if name else ["?"]
            total[parts[-1]] += op.times
    return total


def collective_bytes(program: Program) -> Counter[str]:
    """Bytes that a chip's collectives are about in one run, by kind: the size of the whole array,
    gathered or about to be reduced.

    An asynchronous one is cut into pieces inside several fusions, a chain of one number, shape and
    channel, which count once. The TPU compiler writes some reduce-scatters as a fusion of that name
    around an all-reduce.
    """
    total: Counter[str] = Counter()
    pieces, alone = set(), {(op.computation, op.name) for op in program.ops()}
    for op in program.ops(inside_fusions=True):
        kind = op.kind.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", op.text)
        if kind not in COLLECTIVES or not channel:
            continue
        chain = re.search(r'chain_id="(\d+)"', op.text)
        if chain and (op.computation, op.name) not in alone:
            piece = (kind, chain[1], channel[1], op.result.partition("{")[0])
            if piece in pieces:
                continue
            pieces.add(piece)
        size = _bytes(op.result)
        if kind == "all-reduce" and op.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= _group_size(op.text)
        total[kind] += size * op.times
    return total


def _group_size(text: str) -> int:
    """How many chips take part in one group of a collective, in either notation."""
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(groups[1])
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return groups[1].count(",") + 1
    raise ValueError(f"replica groups in an unknown notation: {text.strip()}")


def _bytes(result: str) -> int:
    """The size of an instruction's result as its type gives it; of a tuple, all of it."""
    return sum(
        WIDTHS.get(dtype, 4) * math.prod(map(int, re.findall(r"\d+", shape)))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    )
