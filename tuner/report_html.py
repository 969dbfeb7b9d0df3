"""The report as one page that needs no network: HTML, its style and SVG drawn here, light and dark."""

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape

from fp8gemm.render import digits, duration

from .report import Chapter, Report, Tuned

TABLE_ROWS = 40  # of a problem's plans, the fastest; its strip has all of them
HUES = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")  # read on both grounds

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1c1c1a; --soft: #6b6b66; --line: #dddcd6;
        --win: #0f9d58; --default: #d97706; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #161615; --card: #1f1f1d; --ink: #ecebe6; --soft: #9c9b94; --line: #3a3a36;
          --win: #34d399; --default: #fbbf24; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 62rem; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .2rem; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; font-weight: 600; }
p, figcaption, .soft { color: var(--soft); margin: .2rem 0; } code { font: 13px ui-monospace, monospace; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem 1rem; }
.fact b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
figure, .problem { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem;
                   margin: .8rem 0; }
.problem { padding: .6rem 1rem; } .problem > div { display: flex; flex-wrap: wrap; gap: 0 1.2rem; }
.problem b { min-width: 9.5rem; } svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--line); }
svg .roof { stroke: var(--ink); stroke-width: 1.6; fill: none; } svg .label { fill: var(--ink); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: .6rem; }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin-right: .35rem; }
details { margin-top: .3rem; } summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin-top: .4rem; }
th, td { text-align: right; padding: .1rem .8rem .1rem 0; } th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; } tr.win td { color: var(--win); font-weight: 600; }
tr.default td { color: var(--default); } .scroll { overflow-x: auto; }
.win { color: var(--win); } .default { color: var(--default); }
"""


def page(report: Report) -> str:
    """The whole page."""
    body = "".join(_chapter(chapter) for chapter in report.chapters)
    if not report.chapters:
        body = "<p>No plans yet: <code>fp8gemm tune --preset deepseek-v3</code> measures some.</p>"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fp8gemm: tuned plans</title><style>{STYLE}</style></head><body>
<h1>fp8gemm: tuned plans</h1>
<p>version {escape(report.version)}, from <code>{escape(report.store)}</code>, {written}</p>
{body}</body></html>
"""


def _chapter(chapter: Chapter) -> str:
    best = max((t.gain for t in chapter.tuned if t.gain), default=None)
    facts = [
        (str(len(chapter.tuned)), "problems tuned"),
        (str(sum(len(t.plans) + sum(t.left_out.values()) for t in chapter.tuned)), "plans tried"),
        (f"{chapter.gain:.3f}x" if chapter.gain else "-", "tuned over default, geometric mean"),
        (f"{best:.2f}x" if best else "-", "the most"),
    ]
    cards = "".join(f'<div class="fact"><b>{value}</b><span class="soft">{text}</span></div>' for value, text in facts)
    kind = "cores" if chapter.is_cpu else "SMs"
    families = "".join(_family(name, members) for name, members in _families(chapter.tuned))
    return f"""<h2>{escape(chapter.device)}</h2><p>{chapter.sms} {kind}</p><div class="facts">{cards}</div>
{_roofline(chapter)}
<h3>How the plans of each problem compared</h3>
<p>Each mark is one plan, further right is slower. <span class="win">●</span> the winner, <span class="default">◆</span>
the default; every one of them gave the right result, and those of one line took turns.</p>
{families}"""


def _families(tuned: Iterable[Tuned]) -> list[tuple[str, list[Tuned]]]:
    """Problems of one weight, or one set of them."""
    found: dict[str, list[Tuned]] = {}
    for t in tuned:
        p = t.task.problem
        groups = f"{p.groups} x " if p.kind else ""
        limit = "" if t.task.num_sms == t.task.sms else f" on {t.task.num_sms}"
        found.setdefault(f"{groups}{p.n} x {p.k}{limit}", []).append(t)
    return list(found.items())


# ---- the roofline ---------------------------------------------------------------------------------------------------


class Scale:
    """A logarithmic axis from values to places."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> Iterator[float]:
        """1, 2, 5 of each decade, or powers of ten where that would be many."""
        steps = (1, 2, 5) if self.high / self.low < 1000 else (1,)
        for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for step in steps:
                if self.low <= step * 10.0**power <= self.high * 1.0001:
                    yield step * 10.0**power


def _text(x: float, y: float, text: str, anchor: str = "start", name: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{name}">{escape(text)}</text>'


def _roofline(chapter: Chapter) -> str:
    roofs, tuned = chapter.roofs, chapter.tuned
    unit, scale = ("GFLOP/s", 1e9) if chapter.is_cpu else ("TFLOP/s", 1e12)
    ridge = roofs.flops_per_second / roofs.bytes_per_second
    intensities = [t.intensity for t in tuned] + [ridge]
    rates = [t.flops_per_second for t in tuned] + [roofs.flops_per_second]
    x = Scale(min(intensities) / 1.6, max(intensities) * 1.6, 60, 850)
    y = Scale(min(rates) / 2, max(rates) * 1.7, 410, 20)
    parts = [f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="20" y2="410"/>' for t in x.ticks()]
    parts += [f'<line class="axis" x1="60" x2="850" y1="{y(t):.1f}" y2="{y(t):.1f}"/>' for t in y.ticks()]
    parts += [_text(x(t), 428, f"{t:g}", "middle") for t in x.ticks()]
    parts += [_text(54, y(t) + 4, f"{t / scale:g}", "end") for t in y.ticks()]
    parts += [_text(455, 450, "FLOP per byte of A, B and D", "middle", "label"), _text(4, 14, unit, "start", "label")]
    parts.append(_roof(x, y, chapter))
    families = _families(tuned)
    for i, (_, members) in enumerate(families):
        parts.append(_series(x, y, members, HUES[i % len(HUES)]))
    legend = "".join(
        f'<span><i style="background:{HUES[i % len(HUES)]}"></i>{escape(name)}</span>'
        for i, (name, _) in enumerate(families)
    )
    words = (
        "The lines: the best of these problems, for want of known roofs."
        if roofs.measured
        else (
            f"The roofs: {digits(roofs.flops_per_second / scale)} {unit} ({roofs.compute_source}); "
            f"{digits(roofs.bytes_per_second / 1e12)} TB/s ({roofs.memory_source})."
        )
    )
    return f"""<figure><svg viewBox="0 0 860 460" role="img" aria-label="Roofline of the tuned problems">
{"".join(parts)}</svg><div class="legend">{legend}</div>
<figcaption>Filled: the tuned plan; hollow: the default. {escape(words)} A, B and D count once each.</figcaption>
</figure>"""


def _roof(x: Scale, y: Scale, chapter: Chapter) -> str:
    """Memory's slope up to the ridge, then the tensor cores' ceiling."""
    flops, rate = chapter.roofs.flops_per_second, chapter.roofs.bytes_per_second
    ridge = flops / rate
    low = max(x.low, y.low / rate)  # where the slope enters the picture
    dashed = ' stroke-dasharray="5 4"' if chapter.roofs.measured else ""
    points = [(low, low * rate), (ridge, flops), (x.high, flops)]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    name = "GB/s" if chapter.is_cpu else "TB/s"
    memory = f"{digits(rate / (1e9 if chapter.is_cpu else 1e12))} {name}"
    middle = math.sqrt(low * ridge)
    labels = _text(x(middle) - 8, y(middle * rate) - 8, memory, "end", "label")
    compute = f"{digits(flops / (1e9 if chapter.is_cpu else 1e12))} {'GFLOP/s' if chapter.is_cpu else 'TFLOP/s'}"
    return (
        f'<polyline class="roof"{dashed} points="{path}"/>{labels}{_text(848, y(flops) - 7, compute, "end", "label")}'
    )


def _series(x: Scale, y: Scale, members: Sequence[Tuned], hue: str) -> str:
    """One weight: its problems from few rows to many."""
    ordered = sorted(members, key=lambda t: t.intensity)
    path = " ".join(f"{x(t.intensity):.1f},{y(t.flops_per_second):.1f}" for t in ordered)
    parts = [f'<polyline points="{path}" fill="none" stroke="{hue}" stroke-opacity=".45"/>']
    for t in ordered:
        place = x(t.intensity)
        if t.default_seconds:
            rate = t.task.problem.flops / t.default_seconds
            parts.append(f'<circle cx="{place:.1f}" cy="{y(rate):.1f}" r="4.5" fill="none" stroke="{hue}"/>')
        words = f"{t.task.name}: {duration(t.seconds)}, {t.plan}"
        parts.append(
            f'<circle cx="{place:.1f}" cy="{y(t.flops_per_second):.1f}" r="3.6" fill="{hue}">'
            f"<title>{escape(words)}</title></circle>"
        )
    return "".join(parts)


# ---- the plans of a problem -----------------------------------------------------------------------------------------


def _family(name: str, members: Sequence[Tuned]) -> str:
    cards = "".join(_problem(t) for t in sorted(members, key=lambda t: (t.task.problem.kind, t.task.problem.m)))
    return f"<h3>N x K = {escape(name)}</h3>{cards}"


def _problem(tuned: Tuned) -> str:
    gain = f"{tuned.gain - 1:+.1%} over the default" if tuned.gain else "no default measured"
    frugal = ""
    if tuned.frugal and tuned.frugal_seconds:
        frugal = f"<span class='soft'>fewer SMs: {escape(tuned.frugal)}, {duration(tuned.frugal_seconds)}</span>"
    return f"""<div class="problem"><div><b>{escape(tuned.task.name)}</b><span>{duration(tuned.seconds)}</span>
<span>{escape(gain)}</span><span class="soft">{escape(tuned.plan)}</span>{frugal}</div>{_strip(tuned)}
<details><summary>{len(tuned.plans)} plans</summary><div class="scroll">{_table(tuned)}</div></details></div>"""


def _strip(tuned: Tuned) -> str:
    """The plans' times on one line, as multiples of the winner's."""
    if not tuned.plans:
        return "<p>imported: its measurements are on another machine</p>"
    low = min(plan.seconds for plan in tuned.plans) / tuned.seconds
    x = Scale(min(low, 1.0) / 1.01, max(1.5, tuned.plans[-1].seconds / tuned.seconds) * 1.02, 12, 848)
    parts = ['<line class="axis" x1="12" x2="848" y1="16" y2="16"/>']
    for tick in (1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0):
        if tick <= x.high:
            parts.append(f'<line class="axis" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="12" y2="20"/>')
            parts.append(_text(x(tick), 38, f"{tick:g}x", "middle"))
    for plan in sorted(tuned.plans, key=lambda plan: (plan.is_winner, plan.is_default)):
        place, title = x(plan.seconds / tuned.seconds), f"<title>{escape(plan.plan)}: {duration(plan.seconds)}</title>"
        if plan.is_default:
            diamond = f"M{place:.1f} 7 l8 9 l-8 9 l-8 -9 z"
            parts.append(f'<path d="{diamond}" fill="none" stroke="var(--default)" stroke-width="2">{title}</path>')
        fill, radius = ("var(--win)", 5.5) if plan.is_winner else ("var(--soft)", 3.5)
        opacity = 1 if plan.is_winner else 0.55
        circle = f'<circle cx="{place:.1f}" cy="16" r="{radius}" fill="{fill}" fill-opacity="{opacity}">'
        parts.append(f"{circle}{title}</circle>")
    return f'<svg viewBox="0 0 860 42" role="img" aria-label="times of the plans">{"".join(parts)}</svg>'


def _table(tuned: Tuned) -> str:
    shown = [p for i, p in enumerate(tuned.plans) if i < TABLE_ROWS or p.is_winner or p.is_default]
    rows = []
    for plan in shown:
        name = "win" if plan.is_winner else "default" if plan.is_default else ""
        notes = ", ".join([*(["winner"] if plan.is_winner else []), *(["default"] if plan.is_default else [])])
        cells = (
            duration(plan.seconds),
            f"± {plan.spread / plan.seconds:.1%}",
            f"{plan.seconds / tuned.seconds:.3f}x",
            notes,
        )
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr class="{name}"><td>{escape(plan.plan)}</td>{row}</tr>')
    if len(shown) < len(tuned.plans):
        rows.append(f'<tr><td colspan="5">{len(tuned.plans) - len(shown)} more: slower</td></tr>')
    for verdict, count in tuned.left_out.items():
        rows.append(f'<tr><td colspan="5">{count} more: {escape(verdict)}</td></tr>')
    heads = "".join(f"<th>{head}</th>" for head in ("plan", "time", "", "of the winner's", ""))
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"
