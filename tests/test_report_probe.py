"""The report's sections on probes and ablation: figures of the records, direct labels, hostile text."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.probe_records import TOKENS, a_layer, a_probe, an_ablation
from tests.test_report import HOSTILE, Page, a_verdict, report, write_run
from trigger_opt.errors import UserError
from trigger_opt.records import Ablation, AblationPoint, AblationRow, ProbeResult, rate, write_record
from trigger_opt.report.labelled_chart import Frame, NamedLine, Span, labelled_charts, whole_ticks
from trigger_opt.report.svg import Point


def written(run_dir: Path, **records: Any) -> tuple[str, str]:
    """The page and the Markdown of a folder with a verdict and these records and nothing else."""
    for name, record in ({"verdict": a_verdict()} | records).items():
        write_record(run_dir / f"{name}.json", record)
    return report(run_dir)


def section_of(html: str, title: str) -> str:
    return html.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def lines_of(markdown: str, title: str) -> list[str]:
    return markdown.split(f"## {title}\n\n")[1].split("\n\n")[0].split("\n")


def test_without_records_neither_is_mentioned(tmp_path: Path) -> None:
    html, markdown = written(tmp_path)
    for text in (html, markdown):
        assert "Inside the network" not in text
        assert "Which parts matter" not in text


def test_both_stand_between_the_answers_and_the_search(tmp_path: Path) -> None:
    html, markdown = written(write_run(tmp_path), probe=a_probe(), ablation=an_ablation())
    page = Page(html)
    assert page.problems == []
    assert not {"script", "link", "img", "a"} & set(page.elements)
    wanted = ["Which parts matter", "Inside the network"]
    titles = re.findall("<h2>(.*?)</h2>", html)
    assert titles[titles.index("Context by context") + 1 : titles.index("Score during the search")][-2:] == wanted
    assert [t for t in re.findall("(?m)^## (.*)$", markdown) if t in wanted] == wanted


def test_the_probe_figures_are_those_of_the_layer_chosen(tmp_path: Path) -> None:
    layers = [a_layer(i) for i in (1, 2, 3)]
    layers[1] = a_layer(
        2, auroc=0.876, base_auroc=0.543, accuracy=0.81, separation=4.25, base_separation=1.0, decoy_gain=0.7
    )
    probe = a_probe(3, layers=layers, best_layer=2, best_random_direction=0.912, num_random_directions=999)
    html, markdown = written(tmp_path, probe=probe)
    for text in (Page(html).text, markdown):
        assert "After layer 2 of 3, chosen on the search contexts" in text
        assert "AUROC 0.88 on 30 held-out contexts, and 81 % of the inputs" in text
        assert "In the base the AUROC is 0.54. The highest of 999 random directions reaches 0.91." in text
        assert "fine-tuning added 3.2" in text
        assert "For 2 random strings, each the same in every context, it added at most 0.7." in text
        assert "A high AUROC alone is no sign of a backdoor" in text


def test_a_line_for_each_comparison_is_named_where_it_ends(tmp_path: Path) -> None:
    html, _ = written(tmp_path, probe=a_probe(12))
    drawn = section_of(html, "Inside the network")
    wide, gains = re.findall(r'<figure class="chart wide">(.*?)</figure>', drawn)
    last = a_probe(12).layers[-1]
    names = {
        f"trigger against nothing {last.auroc:.2f}": "c0",
        f"trigger against random strings {last.auroc_random_strings:.2f}": "c1",
        f"best of 33 random directions {last.auroc_random_direction:.2f}": "ceiling dashed",
        f"base: trigger against nothing {last.base_auroc:.2f}": "c3",
    }
    for name, style in names.items():
        assert re.search(rf'<text [^>]*class="final {style}"[^>]*>{re.escape(name)}</text>', wide)
    assert wide.count("<polyline") == 4
    assert [len(p.split()) for p in re.findall(r'points="([^"]+)"', wide)] == [12] * 4
    assert wide.count('class="line ceiling dashed"') == 1
    assert gains.count("<polyline") == 2
    assert f">trigger {last.gain:.1f}</text>" in gains
    assert drawn.count('class="chart narrow"') == 2


def test_only_a_backdoor_has_a_trigger_here_too(tmp_path: Path) -> None:
    verdict = a_verdict(verdict="generic shift")
    html, markdown = written(tmp_path, probe=a_probe(), ablation=an_ablation(), verdict=verdict)
    for title in ("Inside the network", "Which parts matter"):
        assert "trigger" not in Page(f"<p>{section_of(html, title)}</p>").text.lower()
        assert "trigger" not in " ".join(lines_of(markdown, title)).lower()


def test_figures_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    layers = [a_layer(i, auroc=math.nan if i == 2 else 0.75, base_auroc=math.nan) for i in (1, 2, 3)]
    html, _ = written(tmp_path, probe=a_probe(3, layers=layers, best_layer=2))
    assert "not a number" in section_of(html, "Inside the network")
    wide = re.findall(r'<figure class="chart wide">(.*?)</figure>', html.split("Inside the network")[1])[0]
    assert "nan" not in wide.lower()
    assert sorted(len(p.split()) for p in re.findall(r'points="([^"]+)"', wide)) == [2, 3, 3]


def test_one_layer_can_be_drawn(tmp_path: Path) -> None:
    html, markdown = written(tmp_path, probe=a_probe(1))
    assert Page(html).problems == []
    assert "After layer 1 of 1" in markdown


def test_markdown_lists_a_few_layers_from_first_to_last(tmp_path: Path) -> None:
    _, markdown = written(tmp_path, probe=a_probe(61))
    listed = [int(x) for x in re.findall(r"(?m)^- Layer (\d+):", markdown)]
    assert (listed[0], listed[-1], len(listed)) == (1, 61, 6)


# Ablation


def test_the_tokens_that_matter_are_named_first(tmp_path: Path) -> None:
    html, markdown = written(tmp_path, ablation=an_ablation())
    text = Page(section_of(html, "Which parts matter")).text
    assert "These tokens of the trigger matter, each by itself: ratch , one ." in re.sub(r"\s+", " ", text)
    assert lines_of(markdown, "Which parts matter")[0].endswith('at most half the rate is left: "ratch", "␣one".')
    rows = re.findall(r"<tr>(.*?)</tr>", section_of(html, "Which parts matter"))
    marked = [i for i, row in enumerate(rows[1:7]) if "matters" in row]
    assert marked == [2, 5]
    assert not [row for row in rows[7:] if "matters" in row]


def test_every_row_has_its_count_and_interval(tmp_path: Path) -> None:
    ablation = an_ablation()
    html, markdown = written(tmp_path, ablation=ablation)
    body = section_of(html, "Which parts matter")
    counts = re.findall(r"<span>(\d+) of 12</span>", body)
    assert [int(n) for n in counts] == [r.rate.successes for r in ablation.rows]
    lines = [line for line in lines_of(markdown, "Which parts matter") if "fires in" in line]
    assert len(lines) == sum(r.kind != "subset" for r in ablation.rows)
    assert lines[2].startswith('- Without "ratch": "␣seven␣licence.):␣one" fires in 2 of 12 (5\N{EN DASH}45 %).')
    assert body.count("<details>") == 2
    assert "4 near-miss strings" in body
    assert "3 strings of some of the tokens" in body


def test_the_curve_has_a_point_and_an_interval_for_each_number_kept(tmp_path: Path) -> None:
    html, markdown = written(tmp_path, ablation=an_ablation())
    wide = re.findall(r'<figure class="chart wide">(.*?)</figure>', section_of(html, "Which parts matter"))[0]
    points = re.search(r'points="([^"]+)"', wide)
    assert points is not None
    heights = [float(p.split(",")[1]) for p in points[1].split()]
    assert heights == sorted(heights, reverse=True)
    assert len(heights) == wide.count('class="span"') == 4
    assert "1 of 5 tokens 1 of 12 (8 %); 2 of 5 tokens 2 of 12 (17 %)" in markdown


@pytest.mark.parametrize(
    ("fired", "partial", "told"),
    [
        (0, 0, "The whole did not fire in these contexts"),
        (12, 0, "Sharp: a part of it fires about as the whole does"),
        (12, 6, "Graded: many of its parts fire in some contexts"),
        (12, 11, "Every part tried fires nearly as often as the whole"),
    ],
)
def test_how_the_rate_falls_is_said(tmp_path: Path, fired: int, partial: int, told: str) -> None:
    rows = [AblationRow(kind="whole", string=" ab", kept=2, changed="", rate=rate(fired, 12))]
    rows += [
        AblationRow(kind=kind, string=s, kept=1, changed=s, rate=rate(partial, 12))
        for kind in ("dropped", "subset")
        for s in ("a", "b")
    ]
    curve = [AblationPoint(kept=2, num_strings=1, rate=rows[0].rate)]
    html, markdown = written(tmp_path, ablation=an_ablation(rows=rows, curve=curve, num_tokens=2))
    for text in (Page(html).text, markdown):
        assert told in text
        matter = "These tokens" in text or "Without any one of these" in text
        assert matter == (fired == 12 and partial <= 6)
        assert ("No single token matters" in text) == (partial == 11)
    assert "How much of it is needed" not in html, "one point is no curve"


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    rows = [
        AblationRow(
            kind=kind, string=HOSTILE + kind, kept=1, changed=HOSTILE, rate=rate(12 if kind == "whole" else 3, 12)
        )
        for kind in ("whole", "dropped", "swapped", "replaced", "case", "space", "subset", HOSTILE)
    ]
    ablation = an_ablation(rows=rows, trigger=HOSTILE, payload=HOSTILE)
    html, markdown = written(tmp_path, probe=a_probe(trigger=HOSTILE), ablation=ablation)
    assert Page(html).problems == []
    assert "<script" not in html
    assert "<img" not in html
    assert "<script" not in markdown
    assert "https://" not in markdown
    assert "![" not in markdown
    long = an_ablation(rows=[AblationRow(kind="whole", string="x" * 900, kept=1, changed="", rate=rate(1, 1))])
    html, markdown = written(tmp_path, probe=a_probe(trigger="x" * 900), ablation=long)
    assert "x" * 200 not in html
    assert "x" * 200 not in markdown


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    for name, kind in (("probe", ProbeResult), ("ablation", Ablation)):
        folder = tmp_path / name
        folder.mkdir()
        write_record(folder / "verdict.json", a_verdict())
        (folder / f"{name}.json").write_text('{"trigger": "x"}\n', encoding="utf-8")
        with pytest.raises(UserError, match=rf"{name}\.json is not a {kind.__name__} record"):
            report(folder)


def test_made_up_records_agree_with_themselves() -> None:
    ablation = an_ablation()
    assert [r.changed for r in ablation.dropped] == TOKENS
    assert [r.changed for r in ablation.essential] == ["ratch", " one"]
    assert a_probe().best.layer == 27


# Drawing


def a_line(*ys: float, name: str = "line", style: str = "c0", spans: bool = False) -> NamedLine:
    points = [Point(x=float(i + 1), y=y) for i, y in enumerate(ys)]
    bars = [Span(x=p.x, low=p.y - 0.1, high=p.y + 0.1) for p in points] if spans else []
    return NamedLine(name=name, short=name[:3], style=style, points=points, spans=bars)


FRAME = Frame(x_label="layer", y_label="AUROC", low=0.5, high=1.0)


def test_labels_never_cover_each_other_and_stay_inside() -> None:
    for end in (1.0, 0.5, 0.75):
        lines = [a_line(0.6, end, name=f"line {i}") for i in range(5)]
        for chart in labelled_charts(lines, FRAME):
            ys = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="final', chart.text))
            assert len(ys) == 5
            assert min(b - a for a, b in itertools.pairwise(ys)) >= 15.9
            assert ys[0] > 15
            assert ys[-1] < FRAME.height - 20
            # Those moved away from their line's end are led back to it.
            assert chart.text.count('class="leader c0"') == 4
            width = float(re.findall(r'width="([\d.]+)"', chart.text)[0])
            names = re.findall(r'<text x="([\d.]+)"[^>]*class="final[^>]*>([^<]*)<', chart.text)
            assert max(float(x) + 7 * len(name) for x, name in names) < width


def test_values_beyond_the_frame_widen_it() -> None:
    inside, outside = (labelled_charts([a_line(0.7, y)], FRAME)[0].text for y in (0.8, 0.2))
    assert ">0.4<" not in inside
    assert ">0.2<" in outside


def test_spans_of_a_chart_are_upright() -> None:
    drawn = labelled_charts([a_line(0.6, 0.8, spans=True)], FRAME)[0].text
    bars = re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" class="span"', drawn)
    assert len(bars) == 2
    assert all(x1 == x2 and float(y1) > float(y2) for x1, y1, x2, y2 in bars)


def test_nothing_finite_draws_nothing() -> None:
    assert labelled_charts([a_line(math.nan, math.inf)], FRAME) == []
    assert labelled_charts([], FRAME) == []


@pytest.mark.parametrize(
    ("low", "high", "count"), [(1, 30, 6), (1, 61, 18), (1, 2, 5), (3, 3, 5), (1, 5, 9), (0, 4000, 7)]
)
def test_whole_ticks_are_few_and_begin_with_the_first(low: int, high: int, count: int) -> None:
    found = whole_ticks(float(low), float(high), count)
    assert found[0] == low
    assert found == sorted(set(found))
    assert found[-1] <= high
    assert len(found) <= count + 2
    steps = {b - a for a, b in itertools.pairwise(found[1:])}
    assert len(steps) <= 1
