"""The page's style sheet: system fonts, light and dark by the reader's setting, one column on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1c2429; --soft: #59656d; --line: #e2e4e0; --track: #edefec;
  --dense: #8d9aa5; --pruned: #0f766e; --third: #b45309; --lost: #f0cfa4; --good: #0f6b45; --bad: #b42318;
  --heat-sparsity: #0a4754; --heat-error: #772504; --heat-ink: #ffffff; --cell-ink: #000000;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13171a; --card: #1b2125; --ink: #e4e9eb; --soft: #9ba8b0; --line: #2c343a; --track: #262e33;
    --dense: #74838f; --pruned: #45c2b1; --third: #e0a458; --lost: #6b5433; --good: #5ccf9a; --bad: #ff8a7a;
    --heat-sparsity: #46a9b8; --heat-error: #e0855c; --heat-ink: #000000; --cell-ink: #ffffff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 16px 56px; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 4px; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 4px; font-weight: 650; }
h3 { font-size: .95rem; margin: 0 0 6px; font-weight: 600; }
p { margin: 0 0 10px; max-width: 75ch; }
a { color: inherit; }
.soft { color: var(--soft); }
.small { font-size: .85rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 20px; margin-top: 16px; }
nav { margin-top: 14px; display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .9rem; }
nav a { color: var(--soft); text-underline-offset: 3px; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-top: 20px; }
.headline div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.headline dt { color: var(--soft); font-size: .85rem; }
.headline dd { margin: 2px 0 0; font-size: 1.5rem; line-height: 1.25; font-weight: 600; }
.headline dd small { display: block; font-size: .85rem; font-weight: 400; color: var(--soft); }
dl { margin: 0; }
.wide { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 24px 32px; }
.wide > * { min-width: 0; }
.scroll { overflow-x: auto; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: 6px; }
figcaption .small { font-weight: 400; }
table { border-collapse: collapse; width: 100%; }
th { font-weight: 400; text-align: left; }
caption { text-align: left; font-weight: 600; font-size: .95rem; padding-bottom: 6px; }
.plain th, .plain td { padding: 5px 12px 5px 0; border-top: 1px solid var(--line); vertical-align: top; }
.plain td { text-align: right; }
.plain thead th { color: var(--soft); font-size: .85rem; border-top: 0; }
.plain thead th + th { text-align: right; }

.bars .group { padding: 12px 0 2px; font-weight: 600; }
.bars .group span { font-weight: 400; color: var(--soft); }
.bars tr > * { padding: 2px 0; }
.bars .who { width: 4.2em; color: var(--soft); }
.bars .value { white-space: nowrap; text-align: right; padding-left: 12px; width: 1%; }
.track { position: relative; display: block; height: 16px; background: var(--track); border-radius: 3px; }
.fill { position: absolute; inset: 0 auto 0 0; border-radius: 3px; min-width: 2px; background: var(--pruned); }
.fill.dense { background: var(--dense); }
.fill.third { background: var(--third); }
.range { position: absolute; top: 3px; bottom: 3px; border: solid var(--ink); border-width: 0 1.5px; min-width: 3px; }
.range::after { content: ""; position: absolute; inset: calc(50% - .75px) 0 auto; border-top: 1.5px solid var(--ink); }
.stages .track { height: 8px; margin-top: 4px; }
.stages { table-layout: fixed; }
.stages col:first-child { width: 24%; }
.stages th { overflow-wrap: anywhere; }
.stages td, .stages thead th { padding-left: 12px; }
.stages th, .stages td { padding-top: 7px; padding-bottom: 7px; border-top: 1px solid var(--line); }
.stages thead tr > * { border-top: 0; color: var(--soft); font-size: .85rem; }

.heat { border-collapse: separate; border-spacing: 2px; table-layout: fixed; font-size: .72rem; margin: 0 -2px; }
.heat th { color: var(--soft); font-size: .75rem; vertical-align: bottom; }
.heat thead th { text-align: center; overflow-wrap: break-word; line-height: 1.2; padding-bottom: 3px; }
.heat tbody th { text-align: right; padding-right: 4px; width: 2.2em; }
.heat col.name { width: 2.4em; }
.heat td {
  height: 20px; text-align: center; border-radius: 3px; padding: 0; white-space: nowrap; overflow: hidden;
  color: var(--cell-ink);
  background: color-mix(in oklab, var(--hue) calc(var(--v) * 100%), var(--track));
}
.heat td.hi { color: var(--heat-ink); }
.heat td.none { background: none; }
.sparsity { --hue: var(--heat-sparsity); } .error { --hue: var(--heat-error); }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 8px; font-size: .8rem; color: var(--soft); }
.legend { margin: 0 0 8px; }
.ramp { width: 120px; height: 10px; border-radius: 3px; }
.ramp { background: linear-gradient(to right in oklab, var(--track), var(--hue)); }
.key { width: 18px; border-top: 2.5px solid var(--pruned); }
.key.s1 { border-color: var(--third); border-top-style: dashed; }
.key.s2 { border-color: var(--dense); } .key.s3 { border-color: var(--bad); border-top-style: dotted; }

.chart { display: grid; grid-template-columns: auto 1fr; gap: 4px 8px; margin-top: 14px; }
.chart { font-size: .75rem; color: var(--soft); }
.chart .y { position: relative; min-width: 3.4em; }
.chart .y span { position: absolute; right: 0; transform: translateY(50%); white-space: nowrap; }
.chart .x { grid-column: 2; display: flex; justify-content: space-between; }
.chart svg { display: block; width: 100%; height: 190px; overflow: visible; }
.chart .grid { stroke: var(--line); }
.chart line, .chart polyline { vector-effect: non-scaling-stroke; fill: none; stroke-width: 1; }
.chart polyline { stroke: var(--pruned); stroke-width: 2; stroke-linejoin: round; }
.chart .s1 { stroke: var(--third); stroke-dasharray: 5 3; }
.chart .s2 { stroke: var(--dense); } .chart .s3 { stroke: var(--bad); stroke-dasharray: 2 3; }
.chart .hit { fill: transparent; } .chart .hit:hover { fill: var(--line); fill-opacity: .55; }
.chart .kept { fill: var(--pruned); } .chart .removed { fill: var(--lost); }
.chart .mean { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 4; }
.plot { position: relative; } .plot svg { border-left: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.dot { position: absolute; width: 11px; height: 11px; margin: 0 0 -5px -5px; border-radius: 50%; }
.dot { background: var(--pruned); }
.dot.soft { background: var(--dense); }
.dot span { position: absolute; white-space: nowrap; color: var(--ink); }
.dot .right { left: 15px; } .dot .left { right: 15px; }
.chart.low svg { height: 130px; }
.chart .at { position: relative; height: 1.4em; }
.chart .at span { position: absolute; transform: translateX(-50%); }
.box { width: 12px; height: 12px; border-radius: 3px; background: var(--pruned); }
.box.removed { background: var(--lost); }
.key.mean { border-top: 1.5px dashed var(--ink); }

.sample { border-top: 1px solid var(--line); padding: 12px 0 4px; }
.sample .prompt { font-weight: 600; }
.sample .said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0 8px; }
.shown { display: flex; flex-wrap: wrap; gap: 16px; }
.shown img { max-width: 100%; image-rendering: pixelated; border-radius: 4px; }
.sample .who { color: var(--soft); font-size: .85rem; }
pre {
  margin: 0; padding: 12px 14px; background: var(--track); border-radius: 8px; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
ul { margin: 0; padding-left: 1.2em; } li { overflow-wrap: anywhere; }
details > summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin-top: 10px; }
@media (max-width: 520px) {
  main { padding: 20px 10px 40px; } section { padding: 16px 12px; } h1 { font-size: 1.35rem; }
  .headline { grid-template-columns: 1fr 1fr; } .headline dd { font-size: 1.25rem; }
  .stages { font-size: .85rem; } .stages col:first-child { width: 28%; }
  .heat { font-size: .66rem; border-spacing: 1px; } .heat th { font-size: .66rem; }
  .plain { font-size: .8rem; } .plain th, .plain td { padding-right: 8px; }
}
@media print { body { background: none; } section { break-inside: avoid-page; } nav { display: none; } }
"""
