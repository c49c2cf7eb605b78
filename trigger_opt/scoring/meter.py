"""What a search costs: operations done, the least that would have done, and the machine's own rate."""

import time
from dataclasses import dataclass
from typing import Any

import torch

# Seconds spent on the machine's own rate; the first product always counts.
_MEASURING = 0.5


@dataclass
class Meter:
    """Sums over an engine's candidate passes.

    Attributes:
        evaluations: candidates scored, once per context. flops: multiplications and additions of the matrices.
        least_flops: what exact scoring of the same candidates needs at least, each from its first change on.
        seconds: time in those passes. gradient_flops: of token gradients, not in `flops`.
    """

    evaluations: int = 0
    flops: float = 0.0
    least_flops: float = 0.0
    seconds: float = 0.0
    gradient_flops: float = 0.0

    def add(self, other: "Meter") -> None:
        """Count what another engine did too."""
        self.evaluations += other.evaluations
        self.flops += other.flops
        self.least_flops += other.least_flops
        self.seconds += other.seconds
        self.gradient_flops += other.gradient_flops

    @property
    def rate(self) -> float:
        """Operations a second in candidate passes."""
        return self.flops / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Cost:
    """Operations of one model: a token through its body, a position through its unembedding."""

    per_token: float
    per_position: float


def cost_of(network: Any) -> Cost:
    """2 operations a weight. Of a layer of experts only those a token visits count.

    A matrix held in 4 bits counts by the numbers it stands for.
    """
    head = network.get_output_embeddings().weight
    config = network.config.get_text_config()
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None) or 1
    visited = getattr(config, "num_experts_per_tok", None) or 1
    body = 0.0
    embedding = network.get_input_embeddings()
    skipped = {id(p) for p in embedding.parameters()} | {id(head)}
    for name, parameter in network.named_parameters():
        if id(parameter) in skipped or parameter.ndim < 2:
            continue
        size = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        body += size * (visited / experts if ".experts." in name else 1.0)
    return Cost(2 * body, 2.0 * embedding.weight.shape[0] * embedding.weight.shape[1])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square product of 2048 in `dtype`: the best of ten, or of what half a second allows."""
    size = 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 10 and sum(times) < _MEASURING:
        started = time.perf_counter()
        (left @ right)[0, 0].item()
        times.append(time.perf_counter() - started)
    return float(2 * size**3 / min(times))
