"""Counts the traffic between devices in a compiled program, from its HLO text (`compiled.as_text()`).

    %all-gather.7 = bf16[8,64,1024]{2,1,0} all-gather(%x), replica_groups=[8,8]<=[64], dimensions={0}
    ROOT %while.3 = (...) while(%t), body=%region_2, backend_config={"known_trip_count":{"n":"59"}}

Programs for TPUs have two special forms. An all-gather may overlap with a chain of fusions; each fusion repeats the
instruction with the chain_id of the chain, and it is counted once. A computation named all-reduce-scatter holds an
all-reduce whose result each device keeps in part, and is counted as a reduce-scatter.
"""

import dataclasses
import functools
import math
import operator
import re
from collections import Counter

KINDS = "all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf" = (.*?) ({KINDS})(-start)?\((.*)")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLS = re.compile(r"(?:calls|to_apply|body|(?:branch|true|false)_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
WRAPPED = re.compile(r" async-start\(.*calls=%?([\w.\-]+)")
CHAIN = re.compile(r'chain_id="(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")  # bf16[8,64], f8e4m3fn[4], pred[3]
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})")
# replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}: the devices of a group differ along the axes in braces, or along a
# part of an axis, 'data':(1)2. An optional device_ids=([8,8]T(1,0)) specifies the order of the devices.
MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The traffic of one kind of collective in a program.

    Attributes:
        count: Number of executions, including the iterations of loops.
        bytes: Bytes of the full arrays that are gathered, reduced or exchanged, on one device.
        sent: Bytes that each device sends with ring algorithms.
        hidden: Number of asynchronous executions, which can overlap with other work.
    """

    count: int = 0
    bytes: float = 0.0
    sent: float = 0.0
    hidden: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * amount for amount in dataclasses.astuple(self)))


def collectives(program: str, devices: int) -> dict[str, Traffic]:
    """Returns the traffic of a program on `devices` devices by kind of collective, without kinds that do not occur."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    chains: set[str] = set()
    for line in program.splitlines():
        chain = set(CHAIN.findall(line))
        if match := COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif " = " in line and not chain & chains:
            lines.append(line)
        chains |= chain
    wrapped = set(WRAPPED.findall(program))

    @functools.cache
    def traffic(name: str) -> dict[str, Traffic]:
        """Returns the traffic of a computation and of the computations that it calls."""
        found: dict[str, Traffic] = {}
        called: Counter[str] = Counter()
        for line in computations.get(name, ()):
            if match := COLLECTIVE.search(line):
                kind, one = match[2], _one(match[2], match[1], match[4], bool(match[3]), devices)
                if name.startswith("all-reduce-scatter") and kind == "all-reduce":
                    kind, one = "reduce-scatter", dataclasses.replace(one, sent=one.sent / 2)
                found[kind] = found.get(kind, Traffic()) + one
                continue  # its to_apply is only the addition of a reduction
            trips = TRIPS.search(line)
            for names in CALLS.findall(line):
                for callee in names.strip("{}").split(","):
                    called[callee.strip().removeprefix("%")] += int(trips[1]) if trips else 1
        for callee, times in called.items():
            for kind, amount in traffic(callee).items():
                if callee in wrapped:
                    amount = dataclasses.replace(amount, hidden=amount.count)
                found[kind] = found.get(kind, Traffic()) + amount * times
        return found

    return traffic(entry)


def _one(kind: str, result: str, rest: str, starts: bool, devices: int) -> Traffic:
    """Returns the traffic of one instruction, from its result type and the `rest` of the line after its name."""
    n, size = _group_size(rest) or devices, _bytes(result)
    if starts and kind == "all-gather":
        size *= n / (n + 1)  # an asynchronous start also returns its operand
    elif starts and kind == "collective-permute":
        size /= 2
    elif kind == "reduce-scatter":
        size *= n  # the result is one of n shares
    rounds = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
    return Traffic(1, size, size * rounds.get(kind, (n - 1) / n), int(starts or CHAIN.search(rest) is not None))


def _group_size(rest: str) -> int:
    """Returns the number of devices in a group; 0 if the instruction has no groups, which means all devices."""
    if match := GROUPS.search(rest):
        return int(match[1]) if match[1] else len((match[2] or "").split(","))
    if match := MESH_GROUPS.search(rest):
        sizes = dict(re.findall(r"('[^']*')=(\d+)", match[1]))
        axes = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 0


def _bytes(types: str) -> float:
    """Returns the bytes of the arrays in an HLO type such as '(f32[8,4]{1,0}, bf16[16]{0})'."""
    return sum(
        (1.0 if letters == "pred" else int(bits or 0) / 8) * math.prod(map(int, filter(None, shape.split(","))))
        for letters, bits, shape in ARRAY.findall(types)
    )
