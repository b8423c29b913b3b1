"""Runs benchmarks, says what they do while they do it, and writes the report."""

from collections.abc import Sequence
import dataclasses
import pathlib
import time
from typing import Any

import tqdm

from optax_mtl.experiments import _logic_gates, _multidigits, _multidigits_report, _report

_BENCHMARKS: dict[str, tuple[Any, Any]] = {  # what is run, and what is made of it
    "multidigits": (_multidigits, _multidigits_report.section),
    "logic-gates": (_logic_gates, _logic_gates.section),
}


def compare(
    benchmarks: Sequence[str],
    *,
    methods: Sequence[str] | None,
    out: pathlib.Path,
    command: str,
    **options: Any,
) -> None:
    """Runs the benchmarks and writes the report.

    Args:
      benchmarks: their names.
      methods: names of the methods; None for each benchmark's own choice.
      out: directory of the report.
      command: what was typed, for the report.
      **options: fields of the benchmarks' `Config`; those that are None are left at their defaults, and those that a
        benchmark does not have do not concern it.
    """
    start = time.perf_counter()
    sections = []
    for name in benchmarks:
        benchmark, section_of = _BENCHMARKS[name]
        fields = {field.name for field in dataclasses.fields(benchmark.Config)}
        config = benchmark.Config(**{k: v for k, v in options.items() if k in fields and v is not None})
        chosen = benchmark.DEFAULT_METHODS if methods is None else methods
        print(f"\n{name}\n{'=' * len(name)}\n{_report.bullets(benchmark.protocol(config), 100)}\n")
        with tqdm.tqdm(
            total=benchmark.ticks(config, chosen),
            bar_format="{desc:28}|{bar}| {percentage:3.0f} % {elapsed}",
            disable=None,  # where there is no terminal
            leave=False,
        ) as bar:

            def advance(running: str, ticks: int, bar: Any = bar) -> None:
                bar.set_description_str(running)
                bar.update(ticks)

            runs = benchmark.run(config, chosen, advance)
        section = section_of(config, runs)
        print(section.text())
        sections.append(section)
    report = _report.write(out, sections, command=command, start=start)
    print(f"\n{time.perf_counter() - start:.0f} s. Report, pictures and all numbers: {report}")
