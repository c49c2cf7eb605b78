"""`python -m benchmarks.scale`: the tables of docs/scale.md, from the program's own plan. Nothing is measured."""

from collections.abc import Iterator
from dataclasses import dataclass

from trigger_opt.models.plan import SearchLoad, WeightLoad, plan_from_count

CARDS_GB = (24, 48, 80)
# Of what a card is sold with, about so much is left to a program.
_LEFT = 0.94
# As +experiment=gcg_warmup searches: six trigger tokens, twelve after the slot, six scored; what passes hold at once.
LENGTH, AFTER, SCORED = 6, 12, 6
_WIDTH, _CONTEXTS, _AT_ONCE = 512, 8, 4096


@dataclass(frozen=True)
class Shape:
    """A published model's figures."""

    name: str
    num_parameters: int
    num_layers: int
    d_model: int
    d_ff: int
    vocab: int
    num_kv_heads: int
    head_dim: int

    @property
    def body(self) -> int:
        """Parameters outside embedding and unembedding."""
        return self.num_parameters - 2 * self.vocab * self.d_model


QWEN_7B = Shape("Qwen2.5-7B", 7_615_616_512, 28, 3584, 18944, 152_064, 4, 128)


def flops(shape: Shape, *, length: int = LENGTH, after: int = AFTER, scored: int = SCORED) -> float:
    """Of one evaluation: a candidate in one context, on both models."""
    tokens = (length + 1) / 2 + after + scored - 1
    return 2 * (2 * shape.body * tokens + 2 * shape.vocab * shape.d_model * scored)


def memory_rows(shape: Shape) -> Iterator[tuple[str, str, float]]:
    """(kind of pair, precision, GB at the peak)."""
    tokens = LENGTH + AFTER + SCORED
    search = SearchLoad(
        search_width=min(_WIDTH * _CONTEXTS, _AT_ONCE // tokens), tokens_per_candidate=tokens, scored_positions=SCORED,
        context_tokens=40 * (60 + LENGTH), gradient_tokens=_CONTEXTS * tokens,
    )  # fmt: skip
    figures = {name: value for name, value in vars(shape).items() if name != "name"}
    for kind, sets, adapter in (("adapter on its base", 1, 80_000_000), ("two full models", 2, 0)):
        for precision in ("bfloat16", "int8", "nf4"):
            quantization = None if precision == "bfloat16" else precision
            load = WeightLoad(full_sets=sets, adapter_parameters=adapter, quantization=quantization)
            yield kind, precision, plan_from_count(**figures, load=load, search=search).total_bytes / 1e9


def memory_table(shape: Shape = QWEN_7B) -> str:
    """Markdown: what a pair takes, and on which cards it fits."""
    head = "| pair | weights in | GB at the peak | " + " | ".join(f"{c} GB card" for c in CARDS_GB) + " |"
    lines = [head, "|---|---|--:|" + "---|" * len(CARDS_GB)]
    for kind, precision, needed in memory_rows(shape):
        fits = " | ".join("fits" if needed <= card * _LEFT else "no" for card in CARDS_GB)
        lines.append(f"| {kind} | {precision} | {needed:.1f} | {fits} |")
    return "\n".join(lines)


def rate_table(shape: Shape = QWEN_7B) -> str:
    """Markdown: evaluations a second by the card's rate and the share of it that candidate passes reach."""
    each = flops(shape)
    shares = (0.2, 0.4, 0.6)
    lines = [
        "| bf16 rate of the card, TFLOP/s | " + " | ".join(f"at {share:.0%}" for share in shares) + " |",
        "|--:|" + "--:|" * len(shares),
    ]
    for rate in (125, 312, 989):
        lines.append(f"| {rate} | " + " | ".join(f"{rate * 1e12 * share / each:,.0f}" for share in shares) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print both."""
    print(f"{flops(QWEN_7B) / 1e9:,.0f} GFLOP an evaluation\n\n{rate_table()}\n\n{memory_table()}")


if __name__ == "__main__":
    main()
