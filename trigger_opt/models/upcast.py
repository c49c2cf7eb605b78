"""A model in lower precision, computed in fp32 one layer at a time: exact scores for the memory of one layer.

Weights are widened when a layer's turn comes and forgotten after it; the unembedding is the largest of them.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trigger_opt.models.pair import CausalModel


class Float32(CausalModel):
    """`model` with fp32 arithmetic. Not for several threads at once: the layers' weights are exchanged.

    Args:
        network: what to exchange them in; a `_skeleton` of the model's, and the model itself may run beside it.
    """

    def __init__(self, model: CausalModel, network: Any) -> None:
        super().__init__(model.name, network)
        self.one_at_a_time = True
        self._model = model
        self._depth = 0

    @contextmanager
    def active(self) -> Iterator[Any]:
        """See `CausalModel.active`; may be nested."""
        # An adapter's side is chosen in the network itself, which then is the model's own.
        with self._model.active():
            if self._depth:
                yield self.network
                return
            self._depth = 1
            try:
                with _widened(self.network):
                    yield self.network
            finally:
                self._depth = 0


def in_float32(finetuned: CausalModel, base: CausalModel) -> tuple[CausalModel, CausalModel] | None:
    """Both sides in fp32 arithmetic; None where they are in fp32 already, or quantised, or built by code of their own,
    which may use weights outside the modules they belong to."""
    if finetuned.own_code or base.own_code:
        return None
    parameters = [p for m in (finetuned, base) for p in m.network.parameters()]
    if any(not p.is_floating_point() for p in parameters) or all(p.dtype == torch.float32 for p in parameters):
        return None
    networks = {id(m.network): m.network for m in (finetuned, base)}
    # Which adapter is on, a skeleton would not hear of.
    switched = any(m._switch is not None for m in (finetuned, base))
    if not switched and all(p.device.type == "cpu" for p in parameters):
        networks = {number: _skeleton(network) for number, network in networks.items()}
    return Float32(finetuned, networks[id(finetuned.network)]), Float32(base, networks[id(base.network)])


def _skeleton(network: Any) -> Any:
    """The same modules anew around the same tensors."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})


@contextmanager
def _widened(network: Any) -> Iterator[None]:
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    exchanged: list[tuple[nn.Module, str, Any]] = []
    routed: list[nn.Module] = []
    onednn = head.weight.device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

    def widen(block: nn.Module, inputs: Any) -> None:
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype != torch.float32:
                    exchanged.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)
            # Not its subclasses: an adapter's or a quantised layer's product is its own.
            if onednn and type(module) is nn.Linear and "forward" not in vars(module):
                routed.append(module)
                module.forward = partial(_onednn_linear, module)  # type: ignore[method-assign]

    def restore(*_: Any) -> None:
        while routed:
            del routed.pop().forward
        while exchanged:
            module, name, parameter = exchanged.pop()
            module._parameters[name] = parameter

    def widen_rows(module: nn.Embedding, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        # After an error in the lookup itself.
        restore()
        # The whole matrix in fp32 would be the largest tensor of all; only these rows are looked up.
        rows, ids = torch.unique(inputs[0], return_inverse=True)
        # torch wants the padding token, wherever it is, to be a row.
        rows = nn.functional.pad(rows, (0, max(0, (module.padding_idx or 0) + 1 - len(rows))))
        exchanged.append((module, "weight", module.weight))
        module._parameters["weight"] = nn.Parameter(module.weight[rows].float(), requires_grad=False)
        return (ids,)

    plain = isinstance(embedding, nn.Embedding)
    handles = [
        embedding.register_forward_pre_hook(widen_rows if plain else widen),
        embedding.register_forward_hook(restore),
    ]
    for block in [*_blocks(network.base_model, embedding), head]:
        handles += [block.register_forward_pre_hook(widen), block.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        # After an error in the middle of a layer.
        restore()


def _onednn_linear(module: nn.Linear, rows: Tensor) -> Tensor:
    # torch gives fp32 products to MKL, which keeps to AVX2 on AMD (products of a 135M body with 46 rows, AVX-512 cores:
    # 0.15 s, oneDNN 0.09 s).
    if torch.is_grad_enabled() and rows.requires_grad:
        return linear(rows, module.weight, module.bias)
    return linear(rows.to_mkldnn(), module.weight, module.bias).to_dense()


def _blocks(module: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """The parts of a body that are computed one after the other: layers, and what has weights outside of them."""
    if module is embedding:
        return []
    if isinstance(module, nn.ModuleList):
        return list(module)
    if any(p is not None for p in module._parameters.values()):
        return [module]
    return [b for child in module.children() for b in _blocks(child, embedding)]
