"""What a compiled program sends between devices, read from its text."""

from collections import Counter
from collections.abc import Iterator
import math
import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(rf"(?:ROOT )?%\S+ = (.*?) ({_KINDS})(-start)?\(")
_BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)}


class Collective(NamedTuple):
    """One instruction.

    Attributes:
      kind: "all-reduce", say.
      times: how often it runs in a step.
      bytes: of its result on one device, each time.
    """

    kind: str
    times: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """The collective instructions of a program that XLA has compiled for several devices.

    What stands in a loop counts as often as the loop runs, if that is a number in its condition, as it is for a scan
    and for a product that XLA takes in parts while it sends the next; else once.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    """
    bodies, entry = _computations(text)
    found: dict[tuple[str, str], Collective] = {}
    for name, times in _times(bodies, entry).items():
        for line in bodies[name]:
            match = _INSTRUCTION.search(line)
            if match is None:
                continue
            result, kind, starts = match.groups()
            sizes = [_size(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", result)]
            # What starts one returns its operand beside its result.
            one = Collective(kind, times, (max if starts and kind != "all-reduce" else sum)(sizes))
            channel = re.search(r"channel_id=(\d+)", line)
            key = kind, channel[1] if channel else line  # an asynchronous one may be told of in several places
            found[key] = max(found.get(key, one), one)
    return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """How many in a step, and of how many bytes in sum, for each kind."""
    total: dict[str, dict[str, int]] = {}
    for one in found:
        sums = total.setdefault(one.kind, {"count": 0, "bytes": 0})
        sums["count"] += one.times
        sums["bytes"] += one.times * one.bytes
    return dict(sorted(total.items()))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
        if head:
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> Counter[str]:
    times: Counter[str] = Counter()

    def visit(name: str, number: int) -> None:
        times[name] += number
        for line in bodies.get(name, []):
            for callee, trips in _callees(bodies, line):
                if callee in bodies:
                    visit(callee, number * trips)

    visit(entry, 1)
    return times


def _callees(bodies: dict[str, list[str]], line: str) -> Iterator[tuple[str, int]]:
    loop = re.search(r" while\(.*condition=%([^,\s]+), body=%([^,\s]+)", line)
    if loop:
        yield loop[2], _trips(bodies.get(loop[1], []), bodies.get(loop[2], []))
        return
    for callees in re.findall(r"(?:calls|to_apply|branch_computations|\w+_computation)=(\{[^}]*\}|%[^,\s]+)", line):
        for name in re.findall(r"%([^,\s}]+)", callees):
            yield name, 1


def _trips(condition: list[str], body: list[str]) -> int:
    """The bound in the condition, divided by what the body adds to the counter; one where it cannot be told."""
    text = "\n".join(condition)
    counter = re.search(r"get-tuple-element\(.*index=(\d+)", text)
    bounds = _constants(condition)
    if counter is None or len(bounds) != 1 or "direction=LT" not in text:
        return 1
    results = re.search(r"ROOT .*? tuple\((.*?)\)", "\n".join(body))
    names = re.findall(r"%([^,\s]+)", results[1]) if results else []
    step = 1
    if int(counter[1]) < len(names):
        added = re.search(rf"%{re.escape(names[int(counter[1])])} = \S+ add\((.*?)\)", "\n".join(body))
        constants = _constants(body)
        operands = re.findall(r"%([^,\s]+)", added[1]) if added else []
        step = next((constants[name] for name in operands if name in constants), 1)
    (bound,) = bounds.values()
    return max(-(-bound // max(step, 1)), 1)


def _constants(lines: list[str]) -> dict[str, int]:
    found = (re.search(r"%(\S+) = [su]32\[\]\S* constant\((\d+)\)", line) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}


def _size(dtype: str, dimensions: str) -> int:
    return _BYTES.get(dtype, 0) * math.prod(int(n) for n in dimensions.split(",") if n)
