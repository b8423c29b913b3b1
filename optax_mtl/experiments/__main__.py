"""The command line: `optax-mtl compare`, `experiment`, `speed`, ...; or `python -m optax_mtl.experiments compare`."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import difflib
import importlib.util
import itertools
import math
import pathlib
import shlex
import shutil
import sys
from typing import Any, NoReturn, TypeVar

from optax_mtl.experiments import _speed_peers, _tpu, datasets
from optax_mtl.experiments._registry import GROUPS, METHODS
from optax_mtl.experiments.evidence import EXPERIMENTS

BENCHMARKS = {
    "multidigits": "two overlapping handwritten digits: left digit, right digit, parity of their sum",
    "logic-gates": "XOR and AND from two shared units, the experiment published with CDTT",
}
_DESCRIPTION = """\
Trains the same network with many methods, from the same weights on the same batches, and compares.

  multidigits   scikit-learn's handwritten digits, two overlapping on a canvas; three tasks on one trunk,
                and against one network a task
  logic-gates   XOR and AND from two shared units: how many seeds learn both, and how fast
"""
_EPILOG = """\
examples:
  Both benchmarks, with a choice of methods each, three minutes on two cores:
    %(prog)s
  Every method on one of them:
    %(prog)s --benchmark multidigits --methods all
  Weights for the whole trunk, each of its layers or each of its leaves:
    %(prog)s --benchmark multidigits --methods grain --seeds 32
  A quick look at three methods:
    %(prog)s --benchmark multidigits --methods mgda,cdtt,mao --seeds 3 --steps 300
  A longer run, its report kept apart:
    %(prog)s --benchmark multidigits --steps 6000 --seeds 20 --out long-run
  Three gates instead of two, and one more method:
    %(prog)s --benchmark logic-gates --gates xor,and,or --methods edm,cdtt,mgda

The report goes to the directory --out: report.md with findings, tables and pictures, results.json with all
the numbers. Every method runs with its default arguments, the same optimiser and the same budget.
"""
SCALE_WAYS = ("plain sum", "exact", "light", "feature-level")
SPEED_SECTIONS = ("steps", "balancing", "aggregation", "solvers", "tasks", "compilation")
WORKLOADS = ("mlp", "conv", "transformer")
_GROUPS = {
    "all": "the library's methods, each on the whole",
    "grain": "four of them on the whole, by layer and by leaf, two around Adam, and equal weighting and mao",
}
_EXTRAS = ("flax", "matplotlib", "skimage", "sklearn", "tqdm")  # what pip's extra `experiments` brings

_T = TypeVar("_T")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and name the nearest right option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, extras = super().parse_known_args(args, namespace)
        for option in extras:
            near = difflib.get_close_matches(option.split("=")[0], self._option_string_actions, 1)
            if near:
                self.error(f"unknown option {option}: did you mean {near[0]}?")
        return namespace, extras

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _one_of(kind: str, known: Iterable[str]) -> Callable[[str], str]:
    names = {name.replace("-", "_"): name for name in known}

    def check(name: str) -> str:
        if name in names.values():
            return name
        near = difflib.get_close_matches(name.lower().replace("-", "_"), names, 1, cutoff=0.5)
        hint = f"did you mean {names[near[0]]!r}?" if near else f"choose from {', '.join(names.values())}"
        raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}: {hint}")

    return check


def _several(check: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    return lambda text: list(dict.fromkeys(check(name.strip()) for name in text.split(",")))


def _whole(most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if text.isdecimal() and 1 <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1 to {most}, found {text!r}")

    return check


def _chips(text: str) -> int:
    if text.isdecimal() and int(text) in _tpu.TOPOLOGIES:
        return int(text)
    raise argparse.ArgumentTypeError(f"wanted one of {', '.join(map(str, _tpu.TOPOLOGIES))} chips, found {text!r}")


def _rate(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"wanted a number above 0, found {text!r}")


def _interpreter(text: str) -> str:
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"wanted a Python interpreter, found {text!r}")
    return text


def _listed(entries: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:18}{what}" for name, what in entries.items())


def _parser(prog: str) -> _Parser:
    parser = _Parser(prog=prog, description="Experiments with optax_mtl's methods.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        help="train with many methods and compare",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = compare.add_argument
    add(
        "--benchmark",
        type=_one_of("benchmark", ["all", *BENCHMARKS]),
        default="all",
        metavar="NAME",
        help="multidigits, logic-gates or all (default: all)",
    )
    add(
        "--methods",
        type=_several(_one_of("method", [*METHODS, *GROUPS])),
        metavar="A,B,...",
        help="which methods, or all, or grain: by layer, by leaf, around Adam (default: multidigits a choice; "
        "logic-gates those with its authors' numbers)",
    )
    add("--seeds", type=_whole(10_000), metavar="N", help="how many (default: multidigits 8, logic-gates 400)")
    add(
        "--steps",
        type=_whole(1_000_000),
        metavar="N",
        help="multidigits: training steps (default: 1500); logic-gates: epochs at most (default: 2500)",
    )
    add("--learning-rate", type=_rate, metavar="X", help="default: multidigits 0.002 (Adam), logic-gates 0.05 (SGD)")
    add("--batch-size", type=_whole(10_000), metavar="N", help="multidigits only (default: 128)")
    add("--width", type=_whole(10_000), metavar="N", help="multidigits only: units in a hidden layer (default: 64)")
    add(
        "--gates",
        type=_several(_one_of("gate", ("xor", "and", "or"))),
        metavar="A,B,...",
        help="logic-gates only (default: xor,and)",
    )
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("optax-mtl-report"),
        metavar="DIR",
        help="where the report goes (default: optax-mtl-report)",
    )
    add("--list", action="store_true", help="list methods and benchmarks, and stop")
    experiment = commands.add_parser(
        "experiment",
        help="put the claims of the papers to the test",
        description="Experiments, each on a claim:\n\n" + _listed(EXPERIMENTS),
        epilog="Pages, pictures and CSV files go to --out; what is interrupted goes on when called again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = experiment.add_argument
    add(
        "names",
        type=_several(_one_of("experiment", ["all", *EXPERIMENTS])),
        metavar="NAME,NAME,...",
        help=f"{', '.join(EXPERIMENTS)} or all",
    )
    add("--seeds", type=_whole(10_000), metavar="N", help="how many (default: the experiment's own, ten or more)")
    add("--steps", type=_whole(1_000_000), metavar="N", help="of training (default: the experiment's own)")
    add("--quick", action="store_true", help="a few seeds and steps, to see that it works")
    add("--fresh", action="store_true", help="forget what is kept in --out of earlier runs")
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("optax-mtl-evidence"),
        metavar="DIR",
        help="where pages and runs go (default: optax-mtl-evidence)",
    )
    leaves = commands.add_parser(
        "leaves",
        help="time a weighting for every leaf against the number of leaves",
        description="Compile time, program size and step time of upgrad on the whole, by leaf with blockwise, and by "
        "leaf with optax.partition (up to 100 leaves), and of the solves of four methods alone, against the number of "
        "leaves; three minutes on two cores.",
    )
    leaves.add_argument(
        "--leaves",
        type=_several(_whole(10_000)),
        dest="numbers",
        default=[1, 5, 20, 100, 500],
        metavar="N,N,...",
        help="how many (default: 1,5,20,100,500)",
    )
    leaves.add_argument("--size", type=_whole(10**7), default=1_000, metavar="N", help="of a leaf (default: 1000)")
    leaves.add_argument(
        "--tasks", dest="num_tasks", type=_whole(100), default=4, metavar="N", help="how many (default: 4)"
    )
    speed = commands.add_parser(
        "speed",
        help="time training steps: against an ordinary one, against the floor, against TorchJD",
        description="Times what a step computes, from parameters and batch to balanced gradients: against an ordinary "
        "step, against the gradients of all tasks alone, and against TorchJD on the same network, in the same run. Two "
        "to three minutes on two cores; all methods, sections and numbers of tasks with --full.",
    )
    add = speed.add_argument
    add("--full", action="store_true", help="every method, every network, up to 32 tasks, all sections")
    add(
        "--sections",
        type=_several(_one_of("section", SPEED_SECTIONS)),
        metavar="A,B,...",
        help=f"{', '.join(SPEED_SECTIONS)} (default: steps; with --full all)",
    )
    add(
        "--workloads",
        type=_several(_one_of("workload", WORKLOADS)),
        default=list(WORKLOADS),
        metavar="A,B,...",
        help=f"which networks (default: {','.join(WORKLOADS)})",
    )
    add(
        "--tasks",
        type=_several(_whole(32)),
        dest="numbers",
        metavar="N,N,...",
        help="how many (default: 2,8; with --full 2,4,8,16,32)",
    )
    add(
        "--methods",
        type=_several(_one_of("method", _speed_peers.PEERS)),
        metavar="A,B,...",
        help="which methods, on every network (default: upgrad, and on the mlp some or, with --full, all)",
    )
    add(
        "--peers-python",
        type=_interpreter,
        default=sys.executable,
        metavar="PATH",
        help="a Python with torch and torchjd (default: this one)",
    )
    add("--out", type=pathlib.Path, metavar="DIR", help="where speed.md and speed.json go (default: nowhere)")
    add("--resume", action="store_true", help="go on with the run whose report is in --out")
    scale = commands.add_parser(
        "scale",
        help="memory and communication of a step of a large network on TPUs, without a TPU",
        description="Compiles training steps of a transformer with several tasks, its parameters sharded, for TPU v5e "
        "chips, on a machine that has none: memory on each chip, and what they send each other. A minute a program on "
        'two cores; needs libtpu: pip install "optax-mtl[tpu-aot]".',
    )
    add = scale.add_argument
    add(
        "--chips",
        type=_several(_chips),
        default=[1, 16, 256],
        metavar="N,N,...",
        help=f"how many, of {', '.join(map(str, _tpu.TOPOLOGIES))} (default: 1,16,256)",
    )
    add(
        "--ways",
        type=_several(_one_of("way", SCALE_WAYS)),
        default=list(SCALE_WAYS),
        metavar="A,B,...",
        help=f"which steps (default: {','.join(SCALE_WAYS)})",
    )
    for name, default, what in (
        ("layers", 20, "layers"),
        ("width", 2048, "numbers at a position; attention has a head for every 128"),
        ("tasks", 8, "tasks"),
        ("sequences", 1, "sequences on each chip"),
        ("length", 1024, "positions in a sequence"),
        ("vocabulary", 32_768, "different tokens"),
        ("classes", 1024, "classes that a task tells apart"),
    ):
        add(f"--{name}", type=_whole(10**7), default=default, metavar="N", help=f"{what} (default: {default})")
    add("--out", type=pathlib.Path, metavar="DIR", help="where scale.md and scale.json go (default: nowhere)")
    data = commands.add_parser(
        "data",
        help="check and describe a data set of the papers, in a folder of yours",
        description="Reads a published data set from files that you have fetched, checks that they are whole, and says "
        "what is there. Nothing is downloaded; if files are missing, it says which, and where one gets them.",
    )
    add = data.add_argument
    add(
        "name",
        type=_one_of("data set", datasets.DATASETS),
        metavar="NAME",
        help=f"{', '.join(datasets.DATASETS)}",
    )
    add("folder", type=pathlib.Path, metavar="FOLDER", help="where its files are")
    add(
        "--no-checksums",
        dest="checksums",
        action="store_false",
        help="do without checksums and numbers of examples: for a part of a data set, or another version",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: the arguments; those of the process if None.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    console_script = pathlib.Path(sys.argv[0]).stem == "optax-mtl"
    prog = "optax-mtl" if console_script else "python -m optax_mtl.experiments"
    parser = _parser(prog)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["compare", *argv]
    options = vars(parser.parse_args(argv))
    command = options.pop("command")
    if options.pop("list", False):
        print("methods:", *(f"  {name:28}{m.summary}" for name, m in METHODS.items()), sep="\n")
        print("groups of methods:", *(f"  {name:28}{what}" for name, what in _GROUPS.items()), sep="\n")
        print("benchmarks:", *(f"  {name:28}{what}" for name, what in BENCHMARKS.items()), sep="\n")
        return
    if command == "data":
        try:
            print(datasets.describe(**options))
        except datasets.DataError as error:
            parser.error(str(error))
        return
    missing = [name for name in _EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'{", ".join(missing)} not installed. Write: pip install "optax-mtl[experiments]"')

    from optax_mtl.experiments import _compare, _leaves, _scale, _speed  # need the extra
    from optax_mtl.experiments.evidence import _runner

    as_typed = shlex.join([*prog.split(), *argv])
    if command == "leaves":
        _leaves.run(**options)
        return
    if command == "experiment":
        names = options.pop("names")
        try:
            _runner.run(list(EXPERIMENTS) if "all" in names else names, command=as_typed, **options)
        except _runner.OtherRunsError as error:
            parser.error(str(error))
        return
    if command == "scale":
        chips, ways, out = (options.pop(name) for name in ("chips", "ways", "out"))
        try:
            _scale.run(_scale.Sizes(**options), chips, ways, command=as_typed, out=out)
        except _tpu.MissingError as error:
            parser.error(str(error))
        return
    if command == "speed":
        if options["resume"] and options["out"] is None:
            parser.error("--resume goes on with the run whose report is in a directory: name it, --out DIR")
        _speed.run(**options, command=as_typed)
        return
    if options["methods"]:
        groups = (GROUPS.get(name, (name,)) for name in options["methods"])
        options["methods"] = list(dict.fromkeys(itertools.chain.from_iterable(groups)))
    benchmark = options.pop("benchmark")
    _compare.compare(
        list(BENCHMARKS) if benchmark == "all" else [benchmark],
        command=as_typed,
        **options,
    )


if __name__ == "__main__":
    main()
