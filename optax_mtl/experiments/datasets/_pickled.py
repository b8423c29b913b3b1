"""Reads Python's pickles as data: nothing that a file names is imported, made or called.

To unpickle a file of unknown origin is to run whatever it says. Here its opcodes are only listed, by the standard
library's disassembler, and followed as far as the published files of CIFAR-100 need: Python 2 wrote them, in protocol
2, and they hold dictionaries, lists, tuples, numbers, bytes, and arrays of bytes (NumPy's `_reconstruct`, of which only
shape, order and content are looked at). All else is refused.
"""

from dataclasses import dataclass
import io
import pickletools
from typing import Any

import numpy as np

from optax_mtl.experiments.datasets._common import DataError

_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_RECONSTRUCT, "numpy ndarray", "numpy dtype")
_MARK = object()


@dataclass(eq=False)
class _Made:
    """What a file wants made: a name, which is not looked up, its arguments and the state."""

    name: str
    arguments: Any
    state: Any = None


def read(content: bytes, where: object) -> dict[bytes, Any]:
    """The dictionary that a pickle holds.

    Args:
      content: the file's.
      where: the file, for error messages.

    Returns:
      Keys as in the file; values that are arrays as uint8 arrays, which may not be written to.
    """
    try:
        found = _followed(content, where)
        return {key: _array(value) if isinstance(value, _Made) else value for key, value in found.items()}
    except DataError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DataError(f"{where} is truncated, or not the published file ({error}): fetch it again") from error


def _followed(content: bytes, where: object) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any  # of whatever type the opcode has

    def since_mark() -> list[Any]:
        start = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
        match opcode.name:
            case "BININT" | "BININT1" | "BININT2" | "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(opcode.name, argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin-1"))
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = stack[-int(opcode.name[-1]) :]
                del stack[-len(items) :]
                stack.append(tuple(items))
            case "GLOBAL" if argument in _NAMES:
                stack.append(argument)
            case "GLOBAL":
                raise DataError(
                    f"{where} asks for Python's {argument.replace(' ', '.')!r}, which the published file does not: "
                    "nothing of it was run, and it is refused; do not open it with pickle, and fetch it again"
                )
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(_Made(name, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "PROTO" | "STOP":
                pass
            case _:
                raise DataError(
                    f"{where} has the pickle opcode {opcode.name}, which the published file does not: nothing of it "
                    "was run, and it is refused; fetch the published one"
                )
    (found,) = stack
    return found


def _array(made: _Made) -> np.ndarray:
    _, shape, dtype, fortran, content = made.state
    if made.name not in _RECONSTRUCT or dtype.name != "numpy dtype" or dtype.arguments[0] != b"u1":
        raise ValueError("an array of something else than bytes")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
