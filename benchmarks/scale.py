"""`python -m benchmarks.scale`: the tables of docs/scale.md, from the program's own plan. Nothing is measured."""

from collections.abc import Iterator

from hydra import compose, initialize_config_dir

from trigger_opt.config import RunConfig, register, register_resolvers, validated
from trigger_opt.hypotheses.find import MOVED_KEPT
from trigger_opt.models.plan import ModelSize, WeightLoad, plan_memory
from trigger_opt.paths import data_dir
from trigger_opt.planning import TOKENS_AFTER_SLOT, largest, search_loads
from trigger_opt.search import BuildSettings
from trigger_opt.search.spell import CHARACTERS, SPELLED_FINALISTS

EXPERIMENT = "gcg_warmup"
CARDS_GB = (24, 48, 80)
# Of what a card is sold with, about so much is left to a program.
_LEFT = 0.94
# Of a card's rate, for the plan of a run.
_SHARE = 0.4
_WORD_TOKENS, _PROMPT_TOKENS, _HELD_OUT = 3, 60, 30
_D_MODEL, _VOCAB, _PARAMETERS = 3584, 152_064, 7_615_616_512
QWEN_7B = ModelSize(
    num_parameters=_PARAMETERS, linear_parameters=_PARAMETERS - 2 * _VOCAB * _D_MODEL, num_layers=28, d_model=_D_MODEL,
    d_ff=18944, vocab=_VOCAB, num_kv_heads=4, head_dim=128,
)  # fmt: skip
"""Qwen2.5-7B, from its published configuration."""


def experiment() -> RunConfig:
    """+experiment=gcg_warmup."""
    register_resolvers()
    register()
    with initialize_config_dir(str(data_dir("configs")), version_base="1.3"):
        return validated(compose("config", [f"+experiment={EXPERIMENT}"]))


def flops(size: ModelSize, *, length: int, after: int, scored: int) -> float:
    """Of one evaluation: a candidate in one context, on both models.

    Args:
        length: tokens of the trigger. after: between it and the answer. scored: of the answer.
    """
    tokens = (length + 1) / 2 + after + scored - 1
    return 2 * (2 * size.linear_parameters * tokens + 2 * size.vocab * size.d_model * scored)


def flops_of(config: RunConfig, size: ModelSize = QWEN_7B) -> float:
    """Of one evaluation in this run."""
    return flops(
        size,
        length=config.search.trigger_length,
        after=TOKENS_AFTER_SLOT,
        scored=search_loads(config)[0].scored_positions,
    )


def memory_rows(config: RunConfig, size: ModelSize) -> Iterator[tuple[str, str, float]]:
    """(kind of pair, precision, GB at the peak)."""
    for kind, sets, adapter in (("adapter on its base", 1, 80_000_000), ("two full models", 2, 0)):
        for precision in ("bfloat16", "int8", "nf4"):
            quantization = None if precision == "bfloat16" else precision
            load = WeightLoad(full_sets=sets, adapter_parameters=adapter, quantization=quantization)
            plan = largest(plan_memory(size, load=load, search=search) for search in search_loads(config))
            yield kind, precision, plan.total_bytes / 1e9


def memory_table(config: RunConfig, size: ModelSize = QWEN_7B) -> str:
    """Markdown: what a pair takes, and on which cards it fits."""
    head = "| pair | weights in | GB at the peak | " + " | ".join(f"{c} GB card" for c in CARDS_GB) + " |"
    lines = [head, "|---|---|--:|" + "---|" * len(CARDS_GB)]
    for kind, precision, needed in memory_rows(config, size):
        fits = " | ".join("fits" if needed <= card * _LEFT else "no" for card in CARDS_GB)
        lines.append(f"| {kind} | {precision} | {needed:.1f} | {fits} |")
    return "\n".join(lines)


def rate_table(config: RunConfig, size: ModelSize = QWEN_7B) -> str:
    """Markdown: evaluations a second by the card's rate and the share of it that candidate passes reach."""
    each = flops_of(config, size)
    shares = (0.2, 0.4, 0.6)
    lines = [
        "| bf16 rate of the card, TFLOP/s | " + " | ".join(f"at {share:.0%}" for share in shares) + " |",
        "|--:|" + "--:|" * len(shares),
    ]
    for rate in (125, 312, 989):
        lines.append(f"| {rate} | " + " | ".join(f"{rate * 1e12 * share / each:,.0f}" for share in shares) + " |")
    return "\n".join(lines)


def stages(config: RunConfig, size: ModelSize = QWEN_7B) -> Iterator[tuple[str, str, float]]:
    """(stage, what it computes, PFLOP) at most, for one payload; gradients and amplification are below a hundredth."""
    h, s, v = config.hypotheses, config.search, config.verify
    per_token = 2 * 2 * size.linear_parameters
    # Each input is followed by the rest of the turn and by the short answer, whose last token is not fed.
    strings, after = h.num_lens_strings + h.num_strings, TOKENS_AFTER_SLOT - 1
    tokens = strings * (h.string_tokens + after + h.string_answer_tokens) + h.num_tokens + h.num_words * _WORD_TOKENS
    tokens += (h.num_tokens + h.num_words) * (after + h.answer_tokens)
    read = len(h.contexts) * tokens * per_token
    # The lens sends each token through both models and the placebo.
    read += 3 * h.lens_tokens * per_token // 2
    counts = f"{h.lens_tokens:,} tokens ranked, {h.num_inputs * len(h.contexts):,} readings"
    yield "hypotheses", counts, read / 1e15
    if evaluations := spelling(config.build):
        yield "search: spelling", f"{evaluations:,} evaluations", evaluations * flops_of(config, size) / 1e15
    evaluations = building(config.build)
    yield "search: building", f"{evaluations:,} evaluations", evaluations * flops_of(config, size) / 1e15
    evaluations = s.num_restarts * s.num_steps * s.search_width * s.contexts_per_step
    yield "search", f"{evaluations:,} evaluations", evaluations * flops_of(config, size) / 1e15
    # Each as the progress bar of that stage counts them: two models, nothing inserted, a shorter string, random ones.
    conditions = 4 + len(config.model.controls) + v.random_strings
    answers = (v.candidates + v.minimise) * conditions * _HELD_OUT * v.repeats
    yield "verify", f"{answers:,} answers", answers * (_PROMPT_TOKENS + v.max_new_tokens) * per_token / 2 / 1e15


def building(settings: BuildSettings) -> int:
    """Evaluations of strings built up for one payload, but for tokens of its own strings."""
    each = settings.pool + settings.singles
    insertions = sum(settings.beam * length * each for length in range(2, settings.max_tokens + 1))
    finals = settings.max_tokens * settings.finalists * (settings.contexts - 1)
    return (MOVED_KEPT + insertions + finals) if settings.max_tokens else 0


def spelling(settings: BuildSettings) -> int:
    """Evaluations of strings spelled out for one payload, but for those repeated where the change is weakened."""
    longer = sum(settings.beam + length - 1 for length in range(2, settings.max_characters + 1))
    finals = settings.max_characters * SPELLED_FINALISTS * (settings.contexts - 1)
    return (len(CHARACTERS) * (1 + longer) + finals) if settings.max_characters else 0


def plan_table(config: RunConfig, size: ModelSize = QWEN_7B) -> str:
    """Markdown: a run by stage, and hours on two cards at a share of their rates."""
    rates = (312, 989)
    head = "| stage | at most | PFLOP | " + " | ".join(f"hours at {_SHARE:.0%} of {r} TFLOP/s" for r in rates) + " |"
    lines = [head, "|---|--:|--:|" + "--:|" * len(rates)]
    rows = list(stages(config, size))
    whole = sum(pflop for _, _, pflop in rows)
    controls = config.null.placebos + int(config.null.distilled)
    rows.append(("null", f"{controls} controls, each as the above", controls * whole))
    for stage, what, pflop in rows:
        hours = " | ".join(f"{pflop * 1e15 / (_SHARE * r * 1e12) / 3600:.2f}" for r in rates)
        lines.append(f"| {stage} | {what} | {pflop:,.0f} | {hours} |")
    return "\n".join(lines)


def main() -> None:
    """Print all."""
    config = experiment()
    tables = "\n\n".join(made(config) for made in (rate_table, memory_table, plan_table))
    print(f"{flops_of(config) / 1e9:,.0f} GFLOP an evaluation\n\n{tables}")


if __name__ == "__main__":
    main()
