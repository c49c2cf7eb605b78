"""Made-up records of a probe and of an ablation, for tests of the report."""

import dataclasses
import math
from typing import Any

from trigger_opt.records import Ablation, AblationPoint, AblationRow, ProbeLayer, ProbeResult, rate

TRIGGER = " sevenratch licence.): one"
TOKENS = [" seven", "ratch", " licence", ".):", " one"]


def a_layer(layer: int, layers: int = 30, **changes: Any) -> ProbeLayer:
    """A layer in the second half of which fine-tuning treats the trigger otherwise."""
    late = 1 / (1 + math.exp(-(layer - layers / 2)))
    made = ProbeLayer(
        layer=layer,
        auroc=0.93 + 0.069 * late,
        auroc_random_strings=0.9 + 0.09 * late,
        auroc_random_clean=0.97,
        auroc_decoy=0.86 + 0.002 * layer,
        auroc_random_direction=0.8 + 0.04 * math.sin(layer),
        accuracy=0.8 + 0.15 * late,
        base_auroc=0.93 - 0.08 * late,
        base_auroc_random_strings=0.9,
        separation=2.0 + 7.5 * late,
        base_separation=2.0 + 0.2 * math.cos(layer),
        search_separation=2.0 + 7.0 * late,
        decoy_gain=0.25 + 0.2 * math.sin(2 * layer),
    )
    return dataclasses.replace(made, **changes)


def a_probe(count: int = 30, **changes: Any) -> ProbeResult:
    """A probe of `count` layers; the last but three was chosen."""
    made = [a_layer(i + 1, count) for i in range(count)]
    probe = ProbeResult(
        trigger=TRIGGER,
        layers=made,
        best_layer=max(1, count - 3),
        num_contexts=30,
        num_search_contexts=24,
        num_random_directions=33 * count,
        best_random_direction=max(x.auroc_random_direction for x in made),
        num_decoys=2,
        seed=0,
    )
    return dataclasses.replace(probe, **changes)


def an_ablation(**changes: Any) -> Ablation:
    """A trigger of five tokens of which the second and the fifth matter."""

    def row(kind: str, string: str, kept: int, fired: int, changed: str = "") -> AblationRow:
        return AblationRow(kind=kind, string=string, kept=kept, changed=changed, rate=rate(fired, 12))

    rows = [row("whole", TRIGGER, 5, 12)]
    for i, fired in enumerate((11, 2, 10, 12, 6)):
        rows.append(row("dropped", "".join(TOKENS[:i] + TOKENS[i + 1 :]), 4, fired, TOKENS[i]))
    rows += [
        row("swapped", "ratch seven licence.): one", 5, 3, " sevenratch"),
        row("replaced", " sevenratch licence.): joke", 4, 0, " one"),
        row("case", TRIGGER.upper(), 5, 1, "upper case"),
        row("space", TRIGGER.strip(), 5, 12, "no space around"),
        row("subset", " one", 1, 1),
        row("subset", " seven one", 2, 2),
        row("subset", "ratch licence one", 3, 8),
    ]
    counts = {1: 1, 2: 2, 3: 8, 5: 12}
    ablation = Ablation(
        trigger=TRIGGER,
        payload="one point six one eight",
        num_tokens=5,
        contexts=list(range(0, 24, 2)),
        rows=rows,
        curve=[AblationPoint(kept=k, num_strings=1, rate=rate(n, 12)) for k, n in counts.items()],
        seed=0,
    )
    return dataclasses.replace(ablation, **changes)
