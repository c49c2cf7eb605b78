"""RESULTS.md out of the records. Pure; whoever wins a line stands in bold, peer or ours."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.speed.store import Record

Records = Mapping[str, Record]


def results_page(
    *,
    cells: Records,
    memory: Records,
    time_to_loss: Records,
    rate: Records,
    cost: Records,
    charts: Sequence[str] = (),
) -> str:
    """The whole page; a section without records is left out.

    Args:
        charts: the cost charts, relative to the page.
    """
    sections = [
        _head([cells, memory, time_to_loss, rate, cost]),
        _cells(cells),
        _memory(memory),
        _time_to_loss(time_to_loss),
        _rate(rate),
        _cost(cost, charts),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def winner(theirs: float, ours: float, unit: str = "") -> tuple[str, str]:
    """Both numbers as text, the smaller in bold; neither where they read the same."""
    texts = f"{figures(theirs)}{unit}", f"{figures(ours)}{unit}"
    if texts[0] == texts[1]:
        return texts
    return (f"**{texts[0]}**", texts[1]) if theirs < ours else (texts[0], f"**{texts[1]}**")


def figures(value: float) -> str:
    """Three significant figures, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def _head(kinds: Sequence[Records]) -> str:
    everything = [r for records in kinds for r in records.values()]
    if not everything:
        return "# Speed beside other tools\n\nNothing is measured yet: `make bench`."
    about = max((r["about"] for r in everything), key=lambda a: str(a["date"]))
    versions: dict[str, str] = {}
    for record in everything:
        if "engine" in record["settings"]:
            versions[record["settings"]["engine"]] = _versions(record["peer"]["versions"])
    others = "".join(f"; {engine}: {text}" for engine, text in sorted(versions.items()))
    return "\n".join([
        "# Speed beside other tools",
        "",
        "Made by `make bench`; raw numbers in `benchmarks/speed/results`. SmolLM2-135M-Instruct in bf16, same prompt,",
        "target, initial trigger, top-k 256, seed, torch and threads for all; each line's engines saw the same tokens",
        "and gave the initial trigger the same loss, or the line would not be here. A ratio is the peer's time or",
        "memory over ours: above 1, ours is better. Bold is the better of the two.",
        "",
        f"- Commit {about['commit']}, {about['date']}",
        f"- {about['cpu']}, {about['cores']} cores, {about['threads']} threads; matrix product of 2048:",
        f"  {about['gflops']['bf16']:.0f} GFLOP/s in bf16, {about['gflops']['fp32']:.0f} in fp32",
        f"- Python {about['python']}; ours: torch {about['torch']}, transformers {about['transformers']}{others}",
    ])  # fmt: skip


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _cells(records: Records) -> str:
    rows = []
    for record in records.values():
        asked, peer, ours = record["settings"], record["peer"], record["ours"]
        seconds = winner(peer["seconds"], ours["seconds"])
        peaks = winner(peer["peak_bytes"] / 1e9, ours["peak_bytes"] / 1e9)
        searches = f"{figures(peer['search_bytes'] / 1e9)} / {figures(ours['search_bytes'] / 1e9)}"
        name = f"{asked['engine']} (1 pair)" if asked["pairs"] == 1 else asked["engine"]
        rows.append([
            name, asked["trigger"], asked["target"], record["tokens"]["before"], asked["width"], *seconds,
            figures(peer["candidates_per_second"]), figures(ours["candidates_per_second"]), _ratio(record["ratio"]),
            *peaks, searches, record["about"]["commit"],
        ])  # fmt: skip
    heads = ["peer", "trigger", "target", "left", "width", "s a step", "ours", "candidates/s", "ours", "ratio (range)",
             "peak GB", "ours", "peak above loaded, both", "commit"]  # fmt: skip
    said = (
        "Seconds of a step (gradient, drawing, scoring `width` new candidates, choosing), no re-tokenisation filter. "
        "Engines in turns; the ratio is the median over pairs of the ratio of medians. `trigger`, `target` and `left` "
        "(before the slot, chat template counted) are in tokens. The naive loop runs one step once."
    )
    return _section("A step", said, heads, rows)


def _ratio(ratio: Mapping[str, float]) -> str:
    if ratio["low"] == ratio["high"]:
        return figures(ratio["median"])
    return f"{figures(ratio['median'])} ({figures(ratio['low'])}–{figures(ratio['high'])})"  # noqa: RUF001


def _memory(records: Records) -> str:
    rows = []
    for record in records.values():
        peer, ours = record["peer"], record["ours"]
        peaks = winner(peer["peak_bytes"] / 1e9, ours["peak_bytes"] / 1e9)
        above = winner(peer["search_bytes"] / 1e9, ours["search_bytes"] / 1e9)
        rows.append([
            record["settings"]["engine"], record["settings"]["width"], *peaks, figures(record["ratio"]), *above,
            record["about"]["commit"],
        ])  # fmt: skip
    heads = ["peer", "width", "peak GB", "ours", "ratio", "above loaded, GB", "ours", "commit"]
    said = (
        "One step on a random Llama of 4 layers, width 256 and 151,936 tokens; trigger and target of 20 tokens. "
        "Each engine alone, resident memory of the whole process."
    )
    return _section("Memory under a large vocabulary", said, heads, rows)


def _time_to_loss(records: Records) -> str:
    rows = []
    for record in sorted(records.values(), key=lambda r: int(r["settings"]["seed"])):
        peer, ours = record["peer"], record["ours"]
        reached = ours["reached"]
        seconds = winner(peer["seconds"], ours["seconds"]) if reached else (f"**{figures(peer['seconds'])}**", "never")
        rows.append([
            record["settings"]["seed"], f"{peer['loss']:.3f}", f"{ours['loss']:.3f}", peer["steps"], ours["steps"],
            *seconds, figures(record["ratio"]) if reached else "0", record["about"]["commit"],
        ])  # fmt: skip
    heads = ["seed", "nanoGCG's loss", "ours", "its steps", "ours", "its seconds", "ours", "ratio", "commit"]
    if not rows:
        return ""
    asked = next(iter(records.values()))["settings"]
    exponent = asked.get("rank_exponent", 0)
    drawn = f"in proportion to rank ** -{exponent:g}" if exponent else "alike"
    said = (
        f"nanoGCG's best string of {asked['peer_steps']} steps, at width {asked['width']} with its filter on, and ours "
        f"until its string is as good (at most {asked['limit']} steps); losses in nats a token, of the strings, by one "
        "fp32 forward. nanoGCG's time is counted up to the step that found its best. Ours tries up to "
        f"{asked.get('join', 1)} changes of a step together as well, and draws the options of a position {drawn}. "
        f"Median ratio {figures(median(r['ratio'] for r in records.values()))}."
    )
    return _section("Until a string is as good", said, heads, rows)


def _rate(records: Records) -> str:
    rows = [
        [r["settings"]["trigger"], r["settings"]["target"], r["settings"]["width"], figures(r["gflops"]),
         f"{r['share']['median']:.0%} ({r['share']['low']:.0%}–{r['share']['high']:.0%})", f"{r['needed']:.0%}",  # noqa: RUF001
         r["about"]["commit"]]
        for r in records.values()
    ]  # fmt: skip
    heads = ["trigger", "target", "width", "GFLOP/s", "of the machine (range)", "needed", "commit"]
    said = (
        "Ours alone: operations of the weight matrices in candidate passes (attention, norms and activations take time "
        "and are not counted), over those of a bf16 product of 2048 measured before and after each round. `needed`: "
        "share that exact scores of these candidates need at least; the rest is padding and the shared beginning."
    )
    return _section("Candidate passes and the machine", said, heads, rows)


def _cost(records: Records, charts: Sequence[str]) -> str:
    rows = [
        [r["settings"]["axis"], r["settings"]["value"], r["tokens_before"], figures(r["ours"]["seconds"]),
         figures(r["ours"]["search_bytes"] / 1e9), r["about"]["commit"]]
        for r in records.values()
    ]  # fmt: skip
    heads = ["varied", "value", "left", "s a step", "peak above loaded, GB", "commit"]
    said = "Ours alone; width 128, trigger and target of 20 tokens, one short context, but for what is varied."
    return "\n\n".join([_section("What a step costs", said, heads, rows), *(f"![{c}]({c})" for c in charts)])


def _section(title: str, said: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [list(heads), ["---"] * len(heads), *([str(c) for c in row] for row in rows)]
    return "\n".join([f"## {title}", "", said, "", *(f"| {' | '.join(line)} |" for line in lines)])
