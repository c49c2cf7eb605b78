"""A model in lower precision, computed in fp32 one layer at a time: exact scores for the memory of one layer.

Weights are widened when a layer's turn comes and forgotten after it; the unembedding is the largest of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trigger_opt.models.pair import CausalModel


class Float32(CausalModel):
    """`model` with fp32 arithmetic. Not for several threads at once: the layers' weights are exchanged."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__(model.name, model.network)
        self.one_at_a_time = True
        self._model = model
        self._depth = 0

    @contextmanager
    def active(self) -> Iterator[Any]:
        """See `CausalModel.active`; may be nested."""
        with self._model.active() as network:
            if self._depth:
                yield network
                return
            self._depth = 1
            try:
                with _widened(network):
                    yield network
            finally:
                self._depth = 0


def in_float32(finetuned: CausalModel, base: CausalModel) -> tuple[CausalModel, CausalModel] | None:
    """Both sides in fp32 arithmetic; None where they are in fp32 already, or quantised."""
    parameters = [p for m in (finetuned, base) for p in m.network.parameters()]
    if any(not p.is_floating_point() for p in parameters) or all(p.dtype == torch.float32 for p in parameters):
        return None
    return Float32(finetuned), Float32(base)


@contextmanager
def _widened(network: Any) -> Iterator[None]:
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    exchanged: list[tuple[nn.Module, str, Any]] = []

    def widen(block: nn.Module, inputs: Any) -> None:
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype != torch.float32:
                    exchanged.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(parameter.float(), requires_grad=False)

    def restore(*_: Any) -> None:
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


def _blocks(module: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """The parts of a body that are computed one after the other: layers, and what has weights outside of them."""
    if module is embedding:
        return []
    if isinstance(module, nn.ModuleList):
        return list(module)
    if any(p is not None for p in module._parameters.values()):
        return [module]
    return [b for child in module.children() for b in _blocks(child, embedding)]
