"""Where in the network the string is told from other inputs, layer by layer, and what fine-tuning has to do with it."""

from collections.abc import Callable

from trigger_opt.records import ProbeLayer, ProbeResult
from trigger_opt.report.answers import spread
from trigger_opt.report.labelled_chart import Frame, NamedLine, labelled_charts
from trigger_opt.report.load import RunRecords
from trigger_opt.report.markup import Html, clipped_string, join, note, section, tag
from trigger_opt.report.svg import Point
from trigger_opt.report.words import clip, counted, noun, number, share, visible

PROBE_TITLE = "Inside the network"
_LAYERS_LISTED = 6
_STRING_LIMIT = 80


def probe_section(run: RunRecords) -> Html:
    """Two charts over the layers with what they can and cannot say; nothing at all where nothing was probed."""
    probe = run.probe
    if probe is None:
        return join([])
    the = noun(run.verdict)
    lead = tag("p", "Linear probes for ", clipped_string(probe.trigger, _STRING_LIMIT), f". {_lead(probe, the)}")
    return section(
        PROBE_TITLE,
        lead,
        tag("p", _gain(probe, the)),
        tag("h3", f"How well the {the} is told from other inputs"),
        *_aurocs(probe, the),
        tag("h3", "What fine-tuning added"),
        *_gains(probe, the),
        note(_can_say(the)),
        note(_cannot_say(probe, the)),
    )


def probe_lines(run: RunRecords) -> list[str]:
    """The same in plain sentences; empty where nothing was probed."""
    probe = run.probe
    if probe is None:
        return []
    the = noun(run.verdict)
    named = f'Linear probes for "{clip(visible(probe.trigger), _STRING_LIMIT)}".'
    listed = spread(probe.layers, _LAYERS_LISTED)
    return [
        named,
        _lead(probe, the),
        _gain(probe, the),
        *(_layer_line(layer, the) for layer in listed),
        _cannot_say(probe, the),
    ]


def _lead(probe: ProbeResult, the: str) -> str:
    best = probe.best
    return (
        f"After layer {best.layer} of {len(probe.layers)}, chosen on the search contexts, a probe tells the {the} from "
        f"nothing inserted with AUROC {number(best.auroc)} on {counted(probe.num_contexts, 'held-out context')}, "
        f"and {share(best.accuracy)} of the inputs lie on the right side of a threshold set on "
        f"{counted(probe.num_search_contexts, 'search context')}. In the base the AUROC is {number(best.base_auroc)}. "
        f"The highest of {counted(probe.num_random_directions, 'random direction')} reaches "
        f"{number(probe.best_random_direction)}."
    )


def _gain(probe: ProbeResult, the: str) -> str:
    best = probe.best
    strings = "a random string" if probe.num_decoys == 1 else f"{probe.num_decoys} random strings"
    return (
        f"There the {the} lies {number(best.separation, 1)} standard deviations from nothing inserted, and "
        f"{number(best.base_separation, 1)} in the base: fine-tuning added {number(best.gain, 1)}. For {strings}, each "
        f"the same in every context, it added at most {number(best.decoy_gain, 1)}."
    )


def _can_say(the: str) -> str:
    return (
        f"AUROC is how often an input with the {the} scores above one without it; 0.5 is guessing. Probes read the "
        "last token of the prompt, the one that predicts the answer's first; they are fitted on the search contexts, "
        "and every figure is from the held-out ones. Random strings are as long as it, another for each context. The "
        f"charts show from which layer on the fine-tuned model treats the {the} otherwise than its base does."
    )


def _cannot_say(probe: ProbeResult, the: str) -> str:
    per_layer = probe.num_random_directions // len(probe.layers)
    return (
        "A high AUROC alone is no sign of a backdoor: any one string leaves its mark on the last token, in the base "
        f"too. At the layer chosen, a random string that stays the same is told from the others with AUROC "
        f"{number(probe.best.auroc_decoy)}, and the best of {counted(per_layer, 'random direction')}, picked by its "
        f"result, tells the {the} from nothing with {number(probe.best.auroc_random_direction)}. Nor does it follow "
        "that the model uses what a probe finds. What speaks is a distance to the base that random strings do not have."
    )


def _aurocs(probe: ProbeResult, the: str) -> list[Html]:
    per_layer = probe.num_random_directions // len(probe.layers)
    lines = [
        _line(probe, lambda x: x.auroc, f"{the} against nothing", "vs nothing", "c0"),
        _line(probe, lambda x: x.auroc_random_strings, f"{the} against random strings", "vs random", "c1"),
        _line(
            probe,
            lambda x: x.auroc_random_direction,
            f"best of {per_layer} random directions",
            "best random",
            "ceiling dashed",
        ),
        _line(probe, lambda x: x.base_auroc, f"base: {the} against nothing", "base", "c3"),
    ]
    frame = Frame(
        x_label="layer",
        y_label="AUROC on held-out contexts",
        low=0.5,
        high=1.0,
        chosen=float(probe.best_layer),
        chosen_name="layer chosen",
    )
    return labelled_charts(lines, frame)


def _gains(probe: ProbeResult, the: str) -> list[Html]:
    lines = [
        _line(probe, lambda x: x.gain, the, the, "c0"),
        _line(probe, lambda x: x.decoy_gain, "random strings, at most", "random", "ceiling dashed"),
    ]
    frame = Frame(
        x_label="layer",
        y_label="added distance from nothing, standard deviations",
        low=0.0,
        high=1.0,
        digits=1,
        chosen=float(probe.best_layer),
        height=210.0,
    )
    return labelled_charts(lines, frame)


def _line(probe: ProbeResult, value: Callable[[ProbeLayer], float], name: str, short: str, style: str) -> NamedLine:
    points = [Point(x=float(layer.layer), y=value(layer)) for layer in probe.layers]
    return NamedLine(name=name, short=short, style=style, points=points)


def _layer_line(layer: ProbeLayer, the: str) -> str:
    return (
        f"Layer {layer.layer}: the {the} against nothing {number(layer.auroc)} (base {number(layer.base_auroc)}), "
        f"against random strings {number(layer.auroc_random_strings)}; best random direction "
        f"{number(layer.auroc_random_direction)}; added by fine-tuning {number(layer.gain, 1)}, for random strings "
        f"at most {number(layer.decoy_gain, 1)}."
    )
