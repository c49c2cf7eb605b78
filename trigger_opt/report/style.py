"""The page's one style sheet: light and dark, paper and phone; nothing is fetched."""

STYLE = """
:root {
  --paper: #fcfbf8; --ink: #1e2226; --muted: #646a70; --rule: #dedbd3; --panel: #f4f2ec; --accent: #2d5b7b;
  --backdoor: #9b2d23; --amber: #855800; --quiet: #466258; --fired: #f9e9e5; --mark: #f3e3c3;
  --c0: #2d5b7b; --c1: #a5532a; --c2: #5b7a3a; --c3: #7a4f86; --c4: #8a7420; --c5: #4d6f73;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, "DejaVu Serif", serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e3e1dc; --muted: #9aa0a5; --rule: #34383c; --panel: #1d2023; --accent: #8cb4d2;
    --backdoor: #e88f84; --amber: #dcb05a; --quiet: #9fc0b0; --fired: #38211f; --mark: #4a3c1c;
    --c0: #8cb4d2; --c1: #dd9a73; --c2: #a6c284; --c3: #c19bcd; --c4: #cfb964; --c5: #97bcc0;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--sans);
  font-variant-numeric: tabular-nums lining-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 72px; }
h1, h2 { font-family: var(--serif); font-weight: 600; line-height: 1.15; }
h1 { margin: 0; font-size: 46px; letter-spacing: -0.012em; }
h2 { margin: 0 0 10px; font-size: 22px; }
h3 { margin: 22px 0 6px; font-size: 14px; font-weight: 600; }
section { margin-top: 44px; padding-top: 18px; border-top: 1px solid var(--rule); }
p { margin: 0 0 10px; max-width: 74ch; }
p, td, dd, dt, summary, h3, h4 { overflow-wrap: anywhere; }
.note, .muted { color: var(--muted); }
.note { max-width: 92ch; font-size: 13.5px; }
a { color: var(--accent); }

.banner { border-top: 5px solid var(--tone); padding-top: 20px; }
.backdoor { --tone: var(--backdoor); } .amber { --tone: var(--amber); } .quiet { --tone: var(--quiet); }
.banner h1 { color: var(--tone); }
.reason { margin: 12px 0 6px; font: 19px/1.45 var(--serif); }
.meaning { max-width: 92ch; } .rule { white-space: pre-line; }
.strings { margin: 22px 0; }
.facts { margin: 0 0 14px; }
.facts > div { display: grid; grid-template-columns: 190px minmax(0, 1fr); gap: 4px 18px; padding: 5px 0; }
dt { color: var(--muted); font-size: 13.5px; }
dd { margin: 0; }
.strings code.string { font-size: 16px; }

.others { margin: 14px 0 0; max-width: none; }
.outcome { margin: 20px 0 34px; break-inside: avoid; }
.outcome > h3 { margin-bottom: 8px; font-size: 16px; } .outcome .figures { margin-top: 8px; }
.short { max-width: 700px; }
.outcome > h3 .chip { margin-left: 6px; vertical-align: 2px; }

code, pre { font-family: var(--mono); font-size: 13px; }
code.string { background: var(--panel); padding: 2px 4px; border-radius: 3px; white-space: break-spaces;
  overflow-wrap: anywhere; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.space { background: radial-gradient(circle at 50% 55%, var(--muted) 0 1px, transparent 1.5px) no-repeat; }
.newline::before { content: "\\23CE"; color: var(--muted); }
.tab::before { content: "\\21E5"; color: var(--muted); }
.hidden-char { color: var(--amber); font-size: 0.86em; }
pre { margin: 0; padding: 10px 12px; background: var(--panel); border-radius: 4px; white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.45; }

.rates { border-top: 1px solid var(--rule); }
.rate { display: grid; grid-template-columns: minmax(0, 1fr) 210px 92px 62px 110px; gap: 14px; align-items: center;
  padding: 6px 0; border-bottom: 1px solid var(--rule); }
.rate > .value { font-weight: 600; }
.rate > span:not(.name) { text-align: right; white-space: nowrap; }
.rate > .absent { grid-column: 2 / -1; text-align: left !important; color: var(--muted); }
.rate.scale { border: 0; padding: 3px 0; color: var(--muted); font-size: 12.5px; }
.figures { max-width: none; margin: 18px 0 0; color: var(--muted); font-size: 13.5px; }

svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg text { font-family: var(--sans); font-size: 12px; fill: var(--muted); }
svg .axis { fill: var(--ink); }
.grid { stroke: var(--rule); stroke-width: 1; }
.interval { stroke: var(--tone, var(--accent)); stroke-width: 3; stroke-linecap: round; opacity: 0.45; }
.dot { fill: var(--tone, var(--accent)); }
.bar { fill: var(--accent); opacity: 0.7; } .bar.negative { fill: var(--amber); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 3; }
.ceiling { --c: var(--muted); }
.span { stroke: var(--c); stroke-width: 3; stroke-linecap: round; opacity: 0.3; }
.leader { stroke: var(--c); stroke-width: 0.8; opacity: 0.6; }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.end { fill: var(--c); }
svg .final { fill: var(--c); font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.chart { margin: 10px 0 4px; } .chart.narrow { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 0; padding: 0; list-style: none;
  font-size: 13px; }
.legend svg { display: inline-block; margin-right: 6px; vertical-align: middle; }

table { width: 100%; margin: 8px 0 12px; border-collapse: collapse; font-size: 13.5px; }
th { padding: 4px 14px 6px 0; border-bottom: 1px solid var(--muted); color: var(--muted); font-weight: 500;
  text-align: left; vertical-align: bottom; }
td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; }
.mark { text-align: center; } th.mark { white-space: nowrap; }
td.string { min-width: 130px; } td.word { overflow-wrap: normal; }
.with-bar svg { flex: none; } .with-bar > span { min-width: 4.2em; text-align: right; }
.with-bar { display: inline-flex; gap: 10px; align-items: center; justify-content: flex-end; }
.yes { color: var(--backdoor); } .no { color: var(--muted); opacity: 0.7; }
.chip { display: inline-block; padding: 0 6px; border: 1px solid var(--tone, var(--muted)); border-radius: 3px;
  color: var(--tone, var(--muted)); font-size: 12px; white-space: nowrap; }

.context { margin: 18px 0 26px; break-inside: avoid; }
.prompt { max-width: none; margin-bottom: 8px; white-space: pre-wrap; }
.prompt .label { margin-right: 8px; color: var(--muted); font-size: 13px; }
mark { padding: 0; background: none; color: inherit; }
mark code.string { background: var(--mark); }
.answers { display: grid; grid-template-columns: repeat(var(--models), minmax(0, 1fr));
  border: solid var(--rule); border-width: 1px 0 0 1px; }
.answer { padding: 8px 11px 10px; border: solid var(--rule); border-width: 0 1px 1px 0; font-size: 13.5px;
  line-height: 1.45; }
.answer.fired { background: var(--fired); box-shadow: inset 3px 0 0 var(--backdoor); }
.answer h4 { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 8px; margin: 0 0 4px;
  color: var(--muted); font-size: 12px; font-weight: 500; }
.answer h4 code { font-size: 12px; }
.answer .said { white-space: pre-wrap; overflow-wrap: anywhere; }
.fired .chip.fires { --tone: var(--backdoor); }
.flag { --tone: var(--amber); }
.said b { font-weight: 600; color: var(--backdoor); }
details { margin: 8px 0 12px; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 48px; color: var(--muted); font-size: 13px; }

@media (max-width: 680px) {
  main { padding: 22px 16px 48px; }
  h1 { font-size: 34px; } .reason { font-size: 17px; }
  section { margin-top: 32px; }
  .facts > div { grid-template-columns: minmax(0, 1fr); }
  .rate { grid-template-columns: minmax(0, 1fr) auto auto; gap: 2px 12px; }
  .rate > .name { grid-column: 1 / -1; } .rate > .plot { grid-column: 1 / -1; grid-row: 3; }
  .rate > .kofn { text-align: left !important; } .rate > .absent { grid-column: 1 / -1; }
  .rate.scale { display: block; } .rate.scale > :not(.plot) { display: none; }
  .chart.wide { display: none; } .chart.narrow { display: block; }
  .answers { grid-template-columns: minmax(0, 1fr); }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody, tr, td { display: block; }
  tr { padding: 8px 0; border-bottom: 1px solid var(--rule); }
  td { position: relative; min-height: 1.5em; padding: 2px 0 2px 118px; border: 0; }
  td::before { content: attr(data-label); position: absolute; left: 0; width: 108px; color: var(--muted);
    font-size: 12.5px; }
  .num, .mark { text-align: left; white-space: normal; } .with-bar { justify-content: flex-start; }
  .compact tr { display: flex; flex-wrap: wrap; gap: 0 16px; }
  .compact td { display: inline-flex; gap: 6px; padding: 2px 0; } .compact td::before { position: static; width: auto; }
  .compact td:first-child { flex: 0 0 1.8em; justify-content: flex-end; color: var(--muted); }
  .compact td:first-child::before, .compact td.text::before { display: none; }
  .compact td.text { flex: 0 0 calc(100% - 1.8em - 16px); }
}
@media print {
  :root { --paper: #fff; }
  main { max-width: none; padding: 0; }
  body { font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { margin-top: 26px; }
  h2, h3, .prompt, section > .note { break-after: avoid; }
  tr, .rate, figure { break-inside: avoid; } .context { break-inside: auto; }
  .answer, table { font-size: 8.5pt; }
  .chart.wide text { font-size: 14px; }
  summary { color: var(--muted); }
}
"""
