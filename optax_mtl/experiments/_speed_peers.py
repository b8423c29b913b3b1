"""Training steps of TorchJD, timed in a process of their own.

Run by its path, so that nothing of JAX is imported: torch's threads and XLA's would be in each other's way. It reads
commands, one JSON object a line, and answers each with a line: `{"error": ...}` if it cannot.

  {"do": "load", "kind": "mlp", "arrays": "network.npz", "device": "cpu"}   a network with its weights and its batch
  {"do": "step", "way": "TorchJD: autogram", "method": "upgrad"}            -> {"seconds": ...}
  {"do": "save", "arrays": "grads.npz"}                                     the losses and gradients of the last step
  {"do": "load_matrix", "arrays": "matrix.npz", "device": "cpu"}            one row a task, and two more such samples
  {"do": "aggregate", "method": "upgrad"}                                   -> {"seconds": ...}
"""

from collections.abc import Callable
import json
import os
import sys
import time
from typing import Any, NamedTuple

PLAIN = "torch: plain step"
MTL_BACKWARD = "TorchJD: mtl_backward"
BY_PARAMETER = "TorchJD: mtl_backward, Gramian by parameter"
ONE_BY_ONE = "TorchJD: mtl_backward, task after task"
AUTOGRAM = "TorchJD: autogram"
WAYS = (MTL_BACKWARD, BY_PARAMETER, ONE_BY_ONE, AUTOGRAM)  # as it comes, and with what its documentation offers


class PeersError(Exception):
    """TorchJD is not there, or could not do what was asked for."""


class Peer(NamedTuple):
    """An aggregator of TorchJD.

    Attributes:
      name: its class.
      options: of the number of tasks.
      weighs: whether it makes weights of a Gramian: then there is a class `...Weighting` as well, for autogram.
      least_tasks: how many it needs.
    """

    name: str
    options: Callable[[int], dict[str, Any]] = lambda n: {}
    weighs: bool = True
    least_tasks: int = 1


PEERS = {
    "upgrad": Peer("UPGrad"),
    "dual_proj": Peer("DualProj"),
    "mgda": Peer("MGDA"),
    "cagrad": Peer("CAGrad", lambda n: {"c": 0.5}),
    "pcgrad": Peer("PCGrad"),
    "gradvac": Peer("GradVac"),
    "imtl_g": Peer("IMTLG"),
    "aligned_mtl": Peer("AlignedMTL"),
    "fairgrad": Peer("FairGrad", lambda n: {"alpha": 2.0}),
    "nash_mtl": Peer("NashMTL", lambda n: {"n_tasks": n}, weighs=False),
    "con_fig": Peer("ConFIG", weighs=False),
    "krum": Peer("Krum", lambda n: {"n_byzantine": 1}, least_tasks=4),
    "graddrop": Peer("GradDrop", weighs=False),
    "trimmed_mean": Peer("TrimmedMean", lambda n: {"trim_number": 1}, weighs=False, least_tasks=3),
    "mean_tasks": Peer("Mean", weighs=False),
    "sum_tasks": Peer("Sum", weighs=False),
}


# What it has besides, from its module `aggregation` and the number of tasks; weights of two samples by themselves.
ALONE: dict[str, Callable[[Any, int], Any]] = {
    "pcd": lambda td, n: td.PCD(),
    "excess_mtl": lambda td, n: td.ExcessMTL(),
    "rlw": lambda td, n: td.Random(),
    "linear_scalarization": lambda td, n: td.Constant(_one_to(n)),
    "cr_mogm": lambda td, n: td.GramianWeightedAggregator(td.CRMOGMWeighting(td.MGDAWeighting())),
    "modo": lambda td, n: td.MoDoWeighting(),
    "sdmgrad": lambda td, n: td.SDMGradWeighting(),
}
_OF_SAMPLES = ("modo", "sdmgrad")


def ways(method: str, num_tasks: int) -> list[str]:
    """Those in which TorchJD can do the step."""
    peer = PEERS[method]
    if num_tasks < peer.least_tasks:
        return []
    return [way for way in WAYS if peer.weighs or way not in (BY_PARAMETER, AUTOGRAM)]


class Network:
    """A network of `_workloads.py`, built from its arrays by path."""

    def __init__(self, torch: Any, kind: str, arrays: dict[str, Any], device: str) -> None:
        self._torch, self._arrays, self._device = torch, arrays, device
        # Each parameter with the path of its array, and its index there if arrays of several layers are stacked.
        self.parameters: list[tuple[str, int | None, Any]] = []
        self.modules: list[Any] = []
        self.trunk = getattr(self, f"_{kind}")()
        self.trunk_parameters = [parameter for _, _, parameter in self.parameters]
        self.heads: list[Any] = []
        while f"heads/{len(self.heads)}/0/kernel" in arrays:
            self.heads.append(self._head(f"heads/{len(self.heads)}"))
        x = torch.tensor(arrays["x"], device=device)
        self.x = x.permute(0, 3, 1, 2).contiguous() if kind == "conv" else x
        self.y = torch.tensor(arrays["y"], device=device)

    def forward(self) -> tuple[Any, list[Any]]:
        """Features and losses."""
        features = self.trunk(self.x)
        return features, [((head(features) - y) ** 2).mean() for head, y in zip(self.heads, self.y, strict=True)]

    def grads(self) -> dict[str, Any]:
        """The gradients, as the arrays were given."""
        found: dict[str, Any] = {}
        for path, index, parameter in self.parameters:
            grad = _from_torch(parameter.grad.cpu().numpy())
            if index is None:
                found[path] = grad
            else:
                found.setdefault(path, self._arrays[path] * 0)[index] = grad
        return found

    def _mlp(self) -> Callable[[Any], Any]:
        layers = [self._dense(path) for path in self._paths("trunk")]
        self.modules = layers
        return self._stack([layer for dense in layers for layer in (dense, self._torch.nn.ReLU())])

    def _conv(self) -> Callable[[Any], Any]:
        nn = self._torch.nn
        for i, path in enumerate(self._paths("trunk")):
            _, _, m, n = self._arrays[f"{path}/kernel"].shape
            layer = nn.Conv2d(m, n, 3, stride=1 + (i > 0), padding=1)
            self.modules.append(self._fill(layer, {"weight": f"{path}/kernel", "bias": f"{path}/bias"}))
        through = self._stack([layer for conv in self.modules for layer in (conv, nn.ReLU())])
        return lambda x: through(x).mean((2, 3))

    def _transformer(self) -> Callable[[Any], Any]:
        functional = self._torch.nn.functional
        embed, norm = self._dense("trunk/embed"), self._norm("trunk/norm")
        blocks = []
        for i in range(len(self._arrays["trunk/layers/norm1/scale"])):
            norms = [self._norm(f"trunk/layers/{name}", i) for name in ("norm1", "norm2")]
            denses = [self._dense(f"trunk/layers/{name}", i) for name in ("qkv", "out", "up", "down")]
            blocks.append((*norms, *denses))
        self.modules = [embed, *(layer for block in blocks for layer in block), norm]

        def trunk(x: Any) -> Any:
            x = embed(x)
            for norm1, norm2, qkv, out, up, down in blocks:
                x = x + out(self._attention(qkv(norm1(x))))
                x = x + down(functional.gelu(up(norm2(x)), approximate="tanh"))
            return norm(x)

        return trunk

    def _attention(self, qkv: Any) -> Any:
        batch, length, _ = qkv.shape
        heads = int(self._arrays["attention_heads"])
        q, k, v = qkv.reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)

    def _head(self, path: str) -> Any:
        *hidden, last = [self._dense(layer) for layer in self._paths(path)]
        return self._stack([*(layer for dense in hidden for layer in (dense, self._torch.nn.ReLU())), last])

    def _paths(self, path: str) -> list[str]:
        """Those of the layers in the list at `path`."""
        count = 0
        while f"{path}/{count}/kernel" in self._arrays:
            count += 1
        return [f"{path}/{i}" for i in range(count)]

    def _stack(self, layers: list[Any]) -> Any:
        return self._torch.nn.Sequential(*layers)

    def _dense(self, path: str, index: int | None = None) -> Any:
        m, n = self._arrays[f"{path}/kernel"].shape[-2:]
        names = {"weight": f"{path}/kernel", "bias": f"{path}/bias"}
        return self._fill(self._torch.nn.Linear(m, n), names, index)

    def _norm(self, path: str, index: int | None = None) -> Any:
        layer = self._torch.nn.LayerNorm(self._arrays[f"{path}/scale"].shape[-1])
        return self._fill(layer, {"weight": f"{path}/scale", "bias": f"{path}/bias"}, index)

    def _fill(self, layer: Any, names: dict[str, str], index: int | None = None) -> Any:
        """Gives a layer its arrays."""
        layer = layer.to(self._device)
        for name, path in names.items():
            array = self._arrays[path] if index is None else self._arrays[path][index]
            parameter = getattr(layer, name)
            parameter.data.copy_(self._torch.tensor(_to_torch(array)))
            self.parameters.append((path, index, parameter))
        return layer


def _to_torch(array: Any) -> Any:
    """A kernel with its outputs first: `(m, n)` to `(n, m)`, `(3, 3, m, n)` to `(n, m, 3, 3)`."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(array: Any) -> Any:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


class Worker:
    """Does what it is told, one command after another."""

    def __init__(self, threads: int) -> None:
        import torch
        import torchjd
        from torchjd import aggregation, autogram, autojac

        torch.set_num_threads(threads)
        # As XLA does unless told otherwise.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self._torch, self._aggregation, self._autogram, self._autojac = torch, aggregation, autogram, autojac
        self.versions = {"torch": torch.__version__, "torchjd": _version(torchjd), "threads": torch.get_num_threads()}

    def load(self, kind: str, arrays: str, device: str) -> dict[str, Any]:
        """Takes a network; steps are its own from here on."""
        import numpy as np

        with np.load(arrays) as loaded:
            content = dict(loaded)
        # Two, as the engine's hooks slow down every forward pass.
        network, hooked = (Network(self._torch, kind, content, device) for _ in range(2))
        self._engine = self._autogram.Engine(*hooked.modules, batch_dim=None)
        self._networks = {PLAIN: network, **dict.fromkeys(WAYS, network), AUTOGRAM: hooked}
        self._device = device
        self._steps: dict[tuple[str, str | None], Callable[[], Any]] = {}
        return {}

    def step(self, way: str, method: str | None = None) -> dict[str, Any]:
        """From parameters and batch to the gradients of trunk and heads."""
        if (way, method) not in self._steps:
            self._steps[way, method] = self._make(way, method)
        run, network = self._steps[way, method], self._networks[way]
        self._synchronise()
        start = time.perf_counter()
        for _, _, parameter in network.parameters:
            parameter.grad = None
        self._last = network, run()
        self._synchronise()
        return {"seconds": time.perf_counter() - start}

    def save(self, arrays: str) -> dict[str, Any]:
        """Writes the losses and gradients of the last step."""
        import numpy as np

        network, losses = self._last
        np.savez(arrays, losses=[loss.item() for loss in losses], **network.grads())
        return {}

    def load_matrix(self, arrays: str, device: str) -> dict[str, Any]:
        """Takes gradients by themselves."""
        import numpy as np

        with np.load(arrays) as loaded:
            self._matrices = {name: self._torch.tensor(array, device=device) for name, array in loaded.items()}
        self._device = device
        self._aggregators: dict[str, Any] = {}
        return {}

    def aggregate(self, method: str) -> dict[str, Any]:
        """From gradients to an update."""
        grads, first, second = self._matrices.values()
        if method not in self._aggregators:
            self._aggregators[method] = self._make_alone(method, len(grads)).to(self._device)
        aggregate = self._aggregators[method]
        self._synchronise()
        start = time.perf_counter()
        _ = aggregate(first @ second.T) @ grads if method in _OF_SAMPLES else aggregate(grads)
        self._synchronise()
        return {"seconds": time.perf_counter() - start}

    def _make_alone(self, method: str, num_tasks: int) -> Any:
        if method in ALONE:
            return ALONE[method](self._aggregation, num_tasks)
        peer = PEERS[method]
        return getattr(self._aggregation, peer.name)(**peer.options(num_tasks))

    def _synchronise(self) -> None:
        if self._device != "cpu":
            self._torch.cuda.synchronize()

    def _make(self, way: str, method: str | None) -> Callable[[], Any]:
        network, stack = self._networks[way], self._torch.stack
        if method is None:

            def plain() -> Any:
                _, losses = network.forward()
                stack(losses).sum().backward()
                return losses

            return plain

        peer = PEERS[method]
        kind = f"{peer.name}Weighting" if way == AUTOGRAM else peer.name
        aggregate = getattr(self._aggregation, kind)(**peer.options(len(network.heads)))
        if way == AUTOGRAM:

            def autogram() -> Any:
                _, losses = network.forward()
                stacked = stack(losses)
                stacked.backward(aggregate(self._engine.compute_gramian(stacked)))  # weighs the heads as well
                return losses

            return autogram

        at_once = 1 if way == ONE_BY_ONE else None
        options = {"optimize_gramian_computation": True} if peer.weighs and way != MTL_BACKWARD else {}

        def mtl_backward() -> Any:
            features, losses = network.forward()
            self._autojac.mtl_backward(losses, features=features, parallel_chunk_size=at_once)
            self._autojac.jac_to_grad(network.trunk_parameters, aggregate, **options)
            return losses

        return mtl_backward


def _one_to(n: int) -> Any:
    import torch

    return torch.arange(1.0, n + 1)


def _version(module: Any) -> str:
    import importlib.metadata

    return importlib.metadata.version(module.__name__)


def main() -> None:
    """Answers commands until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what solvers print is not to be taken for an answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        worker = Worker(threads=int(sys.argv[1]))
    except ImportError as error:
        answer({"error": str(error)})
        return
    answer(worker.versions)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(getattr(worker, command.pop("do"))(**command))
        except Exception as error:  # of whatever kind, the process that asked has to know
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
