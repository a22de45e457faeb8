"""What a compiled program sends between devices, read from its HLO text (`compiled.as_text()`).

    %all-gather.7 = bf16[8,64,1024]{2,1,0} all-gather(%x), replica_groups=[8,8]<=[64], dimensions={0}
    ROOT %while.3 = (...) while(%t), body=%region_2, backend_config={"known_trip_count":{"n":"59"}}

TPUs have two forms of their own. An all-gather may go on within a chain of fusions, one product after another; each of
them names it again, with the chain's number. And what is called all-reduce-scatter is an all-reduce of which a device
keeps its share, a reduce-scatter that is.
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
# replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}: they differ along these axes, or along parts of them, 'data':(1)2.
# In between, device_ids=([8,8]T(1,0)) may say in which order the devices are.
MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective in a program.

    Attributes:
        count: how often it runs, loops counted by their turns.
        bytes: of the full arrays that are gathered, reduced or exchanged, on one device.
        sent: bytes that a device sends if devices pass them round in rings.
        hidden: how many of `count` are asynchronous: the device works on while they run.
    """

    count: int = 0
    bytes: float = 0.0
    sent: float = 0.0
    hidden: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, turns: int) -> "Traffic":
        return Traffic(*(turns * amount for amount in dataclasses.astuple(self)))


def collectives(program: str, devices: int) -> dict[str, Traffic]:
    """The traffic of a program for `devices` devices, by kind of collective; kinds that do not occur are left out."""
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
        """Of a computation and all it calls."""
        found: dict[str, Traffic] = {}
        called: Counter[str] = Counter()
        for line in computations.get(name, ()):
            if match := COLLECTIVE.search(line):
                kind, one = match[2], _one(match[2], match[1], match[4], bool(match[3]), devices)
                if name.startswith("all-reduce-scatter") and kind == "all-reduce":
                    kind, one = "reduce-scatter", dataclasses.replace(one, sent=one.sent / 2)
                found[kind] = found.get(kind, Traffic()) + one
                continue  # what it applies is an addition
            turns = TRIPS.search(line)
            for names in CALLS.findall(line):
                for callee in names.strip("{}").split(","):
                    called[callee.strip().removeprefix("%")] += int(turns[1]) if turns else 1
        for callee, turns_taken in called.items():
            for kind, amount in traffic(callee).items():
                if callee in wrapped:
                    amount = dataclasses.replace(amount, hidden=amount.count)
                found[kind] = found.get(kind, Traffic()) + amount * turns_taken
        return found

    return traffic(entry)


def _one(kind: str, result: str, rest: str, starts: bool, devices: int) -> Traffic:
    """The traffic of one instruction, from the type of its result and what stands behind its name."""
    n, size = _group_size(rest) or devices, _bytes(result)
    if starts and kind == "all-gather":
        size *= n / (n + 1)  # an asynchronous one returns its operand too
    elif starts and kind == "collective-permute":
        size /= 2
    elif kind == "reduce-scatter":
        size *= n  # its result is one share
    rounds = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
    return Traffic(1, size, size * rounds.get(kind, (n - 1) / n), int(starts or CHAIN.search(rest) is not None))


def _group_size(rest: str) -> int:
    """Returns how many devices take part together; 0 if that is not given, which means all."""
    if match := GROUPS.search(rest):
        return int(match[1]) if match[1] else len((match[2] or "").split(","))
    if match := MESH_GROUPS.search(rest):
        sizes = dict(re.findall(r"('[^']*')=(\d+)", match[1]))
        axes = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 0


def _bytes(types: str) -> float:
    """Of the arrays in an HLO type such as '(f32[8,4]{1,0}, bf16[16]{0})'."""
    return sum(
        (1.0 if letters == "pred" else int(bits or 0) / 8) * math.prod(map(int, filter(None, shape.split(","))))
        for letters, bits, shape in ARRAY.findall(types)
    )
