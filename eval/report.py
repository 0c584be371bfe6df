"""report.html of an evaluation, one page that needs nothing else: numbers, figures, and ten users with the reasons.

It names no user. What it holds does not grow with the data: ten users, some slices, a point per cutoff.
"""

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as pads
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from contract.artifacts import Artifact
from contract.pages import INK, MUTED, SERIES, Html, figure, table, whole_page
from contract.schema import NO_TIME, read_gids
from eval.explain import NUM_SHOWN, Event, Person, Recommended
from eval.slices import duration
from eval.table import Results, columns, half_width
from gid.words import popular_texts, words_of_nodes

MAX_TITLE, MAX_REASON = 90, 48  # characters of an item's text
NUM_TEXTS = 20_000  # items whose words tell what is below a node, the most popular ones
NUM_NODE_WORDS = 4

KINDS = {
    "history": "By the length of the history",
    "activity": "The long tail of the users",
    "recency": "By the time since the last event",
    "popularity": "By the popularity of the target",
    "event": "By the event type of the target",
}

STYLE = """\
body { max-width: 1160px; }
th, td { padding-right: 16px; }
td small, .path, .because, .when { color: var(--muted); font-size: 12.5px; }
td small { display: block; white-space: nowrap; line-height: 1.2; }
td b { font-weight: 650; }
.when { white-space: nowrap; }
.wide td:first-child { min-width: 190px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 4px 0; font-size: 13.5px; }
.legend span::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 6px; background: var(--dot); }
h3 + svg, .legend + svg { margin-top: 2px; }
details { border-bottom: 1px solid var(--line); padding: 8px 0; }
summary { cursor: pointer; font-weight: 600; }
summary span { font-weight: 400; color: var(--muted); }
details ol { margin: 6px 0 14px; padding-left: 26px; font-size: 14px; }
.hit { color: var(--good); font-weight: 650; } .miss { color: var(--muted); }
.code { display: inline-block; min-width: 20px; padding: 0 4px; border-radius: 4px; background: var(--panel);
  color: var(--ink); text-align: center; font-variant-numeric: tabular-nums; }
.up { color: var(--good); } .down { color: var(--removed); }
.figure svg { min-width: 620px; }
.recommended td:nth-child(2), .recommended td:nth-child(4) { min-width: 260px; }
@media (max-width: 700px) {
  .recommended tr { display: grid; grid-template-columns: 28px 1fr 52px; }
  .recommended tr > :nth-child(4) { grid-column: 2 / -1; }
  .recommended td { border: 0; padding: 3px 0; } .recommended th { border: 0; padding: 3px 0; }
  .recommended tr > :first-child { padding-right: 8px; }
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; font-size: 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Names:
    """What the page calls things."""

    items: dict[int, str]  # by item_idx: the text, or the raw id where there is none
    events: list[str]  # types, 1 and following
    paths: dict[int, tuple[int, ...]]  # GIDs by item_idx
    nodes: dict[tuple[int, ...], list[str]]  # words by prefix
    has_time: bool


def read_names(corpus: Artifact, gid: Artifact, people: list[Person]) -> Names:
    """Of the items and nodes that are shown, and no others."""
    shown = sorted(
        {item.item_idx for one in people for item in one.recommended}
        | {event.item_idx for one in people for event in one.history}
        | {event.item_idx for one in people for event, _ in one.targets}
    )
    items = pads.dataset(corpus.path / "items.parquet", format="parquet").to_table(
        columns=["item_idx", "item_id", "text"], filter=pads.field("item_idx").isin(shown)
    )
    titles = {row["item_idx"]: _title(row["text"] or "", row["item_id"]) for row in items.to_pylist()}
    gids = read_gids(gid.path)
    paths = {item.item_idx: tuple(gids[item.item_idx].tolist()) for one in people for item in one.recommended}
    nodes = {path[:level] for path in paths.values() for level in range(1, len(path))}
    words = words_of_nodes(gids[1:], popular_texts(corpus.path, NUM_TEXTS), nodes)
    return Names(titles, corpus.manifest["events"], paths, words, corpus.manifest["time_unit"] != "order")


def _title(text: str, item_id: str) -> str:
    return _short(" ".join(text.split()) or item_id, MAX_TITLE)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def write_report(file: Path, results: Results, people: list[Person], names: Names) -> None:
    file.write_text(page(results, people, names), encoding="utf-8")


def page(results: Results, people: list[Person], names: Names) -> str:
    sections = {
        "Models": models(results),
        "Recall by length of the list": curve(results),
        "Slices": slices(results),
        f"{len(people)} users": users(people, names),
        "Protocol": protocol(results),
    }
    title = f"Evaluation of {results.name}"
    parts = [f"<h1>{html.escape(title)}</h1>", summary(results)]
    parts += [f"<h2>{name}</h2>\n{text}" for name, text in sections.items() if text]
    return whole_page(title, "\n".join(parts), STYLE)


# --- the sections: HTML, or nothing ---


def summary(results: Results) -> str:
    ours = next(iter(results.models))
    shown = _main(results)
    cards = {f"{name} of {ours}": f"{results.models[ours][name]['mean']:.4f}" for name in shown}
    cards |= {"users": f"{results.num_users:,}", "models": str(len(results.models))}
    told = [html.escape(f"{results.protocol.get('data', '')}.")] if "data" in results.protocol else []
    for name in shown:
        if name in results.lead:
            lead = results.lead[name]
            verdict = "above" if lead["low"] > 0 else "below" if lead["high"] < 0 else "not distinguishable from"
            told.append(
                f"By {name}, {html.escape(ours)} is <b>{verdict}</b> the best other model, "
                f"{html.escape(lead['over'])}: {lead['mean']:+.4f} ({lead['low']:+.4f} to {lead['high']:+.4f})."
            )
    boxes = "".join(f"<div><b>{value}</b><span>{html.escape(name)}</span></div>" for name, value in cards.items())
    return f'<p>{" ".join(told)}</p>\n<div class="counts">{boxes}</div>'


def models(results: Results) -> str:
    names = columns(results)
    best = {name: max(round(of[name]["mean"], 4) for of in results.models.values()) for name in names}
    rows = [
        [model, *(_estimate(of[name], round(of[name]["mean"], 4) == best[name] > 0) for name in names)]
        for model, of in results.models.items()
    ]
    if results.lead:
        rows.append(["lead", *(_estimate(results.lead[name], False, "+") for name in names)])
    note = (
        "95% intervals, bootstrap over users. Bold: best. Lead: the first model minus the best other, paired by user."
    )
    drawn = (
        figure(lambda axes, name=name: draw_models(axes, results, name), f"{name} of each model", (5, _height(results)))
        for name in _main(results)
    )
    return (
        table(("", *names), rows, "l" + "r" * len(names))
        + f'<p class="note">{note}</p><div class="pair">{"".join(f"<div>{svg}</div>" for svg in drawn)}</div>'
        + beyond(results)
    )


def beyond(results: Results) -> str:
    """What is recommended, right or wrong."""
    first = next(iter(results.models.values()))
    names = [name for name in first if name.startswith(("coverage", "arp"))]
    if not names:
        return ""
    rows = [
        [model, *(f"{of[n]['mean']:.1%}" if n.startswith("coverage") else f"{of[n]['mean']:,.1f}" for n in names)]
        for model, of in results.models.items()
    ]
    note = (
        "coverage: the share of the catalog that is recommended to somebody. arp: how many train events an item that "
        f"is recommended has, on average over users. Targets: {results.protocol.get('targets', 'unknown')}."
    )
    heads = ("", *names)
    return (
        "<h3>Coverage and popularity of what is recommended</h3>"
        + table(heads, rows, "l" + "r" * len(names))
        + f'<p class="note">{html.escape(note)}</p>'
    )


def curve(results: Results) -> str:
    if not results.curves:
        return ""
    return (
        '<p class="note">Mean over the users of the share of their targets in the first k recommendations.</p>'
        + legend(results)
        + _wide(lambda axes: draw_curves(axes, results), "recall at each k", 3.4)
    )


def slices(results: Results) -> str:
    parts = []
    for kind in dict.fromkeys(one["kind"] for one in results.slices):
        of_kind = [one for one in results.slices if one["kind"] == kind]
        recall, ndcg = next(iter(of_kind[0]["models"].values()))
        height = 0.7 + 0.36 * len(of_kind)
        parts.append(
            f"<h3>{KINDS[kind]}</h3>"
            + _wide(lambda axes, of=of_kind, n=recall: draw_slices(axes, of, n), f"{recall} by {kind}", height)
            + _slice_table(of_kind, recall)
            + f"<details><summary>{ndcg}</summary>{_slice_table(of_kind, ndcg)}</details>"
        )
    if not parts:
        return ""
    ours = html.escape(next(iter(results.models)))
    note = (
        '<p class="note">A slice of users counts them with all their targets; a slice of targets takes these alone as '
        f"relevant, over the users who have any. In the figures ◆ is {ours} with its interval (95%), ● are the others; "
        f"in brackets the number of users. The lead is {ours} minus the best other model of the slice.</p>"
    )
    return note + legend(results) + "\n".join(parts)


def users(people: list[Person], names: Names) -> str:
    if not people:
        return ""
    num_hits = sum(any(item.is_target for item in one.recommended) for one in people)
    note = (
        f'<p class="note">Drawn at random by the seed, from the users with a target among their first {NUM_SHOWN} '
        f"recommendations ({num_hits}) and from those without ({len(people) - num_hits}), so that both are seen: the "
        "share of hits here says nothing of the model. The path of an item is its GID, with words that are more "
        "frequent below a node than elsewhere. Because: the items of the history whose absence changes the score "
        "most, and what each adds to it, one left out at a time.</p>"
    )
    return note + "\n".join(person(number, one, names) for number, one in enumerate(people, 1))


def protocol(results: Results) -> str:
    facts = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>" for key, text in results.protocol.items()
    )
    return f"<dl>{facts}</dl>"


# --- parts of the sections ---


def person(number: int, one: Person, names: Names) -> str:
    ranks = [rank for rank, item in enumerate(one.recommended, 1) if item.is_target]
    outcome = f'<span class="hit">hit at {ranks[0]}</span>' if ranks else '<span class="miss">no hit</span>'
    history = "".join(f"<li>{_event(event, one, names)}</li>" for event in one.history)
    chosen = "".join(
        f"<li>{_event(event, one, names)} "
        + (f'<span class="hit">✓ at {rank}</span>' if rank else '<span class="miss">✗ not recommended</span>')
        + "</li>"
        for event, rank in one.targets
    )
    unseen = one.num_known - len(one.history)
    heading = "What the model saw" + (f", without {unseen:,} other events" if unseen else "")
    rows = [_recommended(rank, item, one, names) for rank, item in enumerate(one.recommended, 1)]
    return (
        f"<details{' open' if number <= 2 else ''}><summary>User {number} "
        f"<span>{one.num_known:,} events known,</span> {outcome}</summary>"
        f'<div class="pair"><div><h3>{heading}</h3><ol>{history}</ol></div>'
        f"<div><h3>What came next</h3><ol>{chosen}</ol></div></div>"
        f'<div class="recommended">{table(("", "recommended", "score", "because"), rows, "rlrl")}</div></details>'
    )


def _event(event: Event, one: Person, names: Names) -> str:
    """The title, and in small what was done and how long before the first target."""
    facts = [names.events[event.event - 1]] if event.event and len(names.events) > 1 else []
    first_target = one.targets[0][0].ts
    if names.has_time and NO_TIME not in (event.ts, first_target) and event.ts < first_target:
        facts.append(f"{duration(first_target - event.ts)} before")
    small = f" <span class=when>{html.escape(', '.join(facts))}</span>" if facts else ""
    return html.escape(names.items[event.item_idx]) + small


def _recommended(rank: int, item: Recommended, one: Person, names: Names) -> list[str]:
    title = html.escape(names.items[item.item_idx])
    hit = '<span class="hit">✓ </span>' if item.is_target else ""
    reasons = "<br>".join(
        f'<span class="{"up" if change > 0 else "down"}">{change:+.2f}</span> '
        f"{html.escape(_short(names.items[one.history[place].item_idx], MAX_REASON))}"
        for place, change in item.reasons
    )
    cell = Html(f"{hit}{title}<div class=path>{_path(names.paths[item.item_idx], names)}</div>")
    return [str(rank), cell, f"{item.score:.2f}", Html(f"<span class=because>{reasons}</span>")]


def _path(path: tuple[int, ...], names: Names) -> str:
    steps = []
    for level, code in enumerate(path, 1):
        words = ", ".join(names.nodes.get(path[:level], [])[:NUM_NODE_WORDS])
        steps.append(f'<span class="code">{code}</span> {html.escape(words)}'.rstrip())
    return " → ".join(steps)


def _slice_table(of_kind: list[dict], name: str) -> str:
    rows = []
    for one in of_kind:
        values = [of[name] for of in one["models"].values()]
        best = max(round(value["mean"], 4) for value in values)
        cells = [_estimate(value, round(value["mean"], 4) == best > 0) for value in values]
        lead = _estimate(one["lead"][name], False, "+") if one["lead"] else ""
        rows.append([one["what"], f"{one['num_users']:,}", f"{one['num_targets']:,}", *cells, lead])
    heads = (name, "users", "targets", *of_kind[0]["models"], "lead")
    return f'<div class="wide">{table(heads, rows, "l" + "r" * (len(heads) - 1))}</div>'


def _estimate(estimate: dict, is_best: bool, sign: str = "") -> Html:
    mean = f"{estimate['mean']:{sign}.4f}"
    return Html(f"{f'<b>{mean}</b>' if is_best else mean} <small>±{half_width(estimate):.4f}</small>")


def legend(results: Results) -> str:
    colours = _colours(results.models)
    spans = (f'<span style="--dot: var(--s{SERIES.index(colours[m]) + 1})">{html.escape(m)}</span>' for m in colours)
    return f'<div class="legend">{"".join(spans)}</div>'


def _main(results: Results) -> list[str]:
    """recall and ndcg at 10, or at the largest cutoff when that is not among them."""
    first = next(iter(results.models.values()))
    found = []
    for family in ("recall", "ndcg"):
        names = [name for name in first if name.startswith(family)]
        found += [f"{family}@10" if f"{family}@10" in names else names[-1]] if names else []
    return found


def _colours(names: Iterable[str]) -> dict[str, str]:
    """The first model and its parts have the first three colours, the others the rest in turn."""
    ours, *others = names
    parts = [name for name in others if name.startswith(ours)]
    rest = [name for name in others if not name.startswith(ours)]
    colours = {name: SERIES[min(i, 2)] for i, name in enumerate([ours, *parts])}
    colours |= {name: SERIES[3 + i % (len(SERIES) - 3)] for i, name in enumerate(rest)}
    return {name: colours[name] for name in (ours, *others)}


# --- figures ---


def _wide(draw: Callable[[Axes], None], label: str, height: float) -> str:
    """A figure of the page's width, that a narrow screen scrolls. `height`: inches of 10 in width."""
    return f'<div class="scroll figure">{figure(draw, label, (10, height))}</div>'


def _height(results: Results) -> float:
    return 0.8 + 0.34 * len(results.models)


def draw_models(axes: Axes, results: Results, name: str) -> None:
    """A row per model: the mean, its interval, the number."""
    colours = _colours(results.models)
    for place, (model, of) in enumerate(results.models.items()):
        mean, low, high = (of[name][key] for key in ("mean", "low", "high"))
        axes.plot([low, high], [place, place], color=colours[model], linewidth=2.5, solid_capstyle="round")
        axes.plot(mean, place, "o", color=colours[model], markersize=7)
        axes.annotate(f"{mean:.4f}", (high, place), (8, 0), textcoords="offset points", va="center", color=MUTED)
    axes.set_yticks(range(len(results.models)), list(results.models))
    _rows(axes, name)
    axes.margins(x=0.16, y=0.1)


def draw_curves(axes: Axes, results: Results) -> None:
    colours = _colours(results.models)
    for model, recall in results.curves.items():
        ours = model == next(iter(results.models))
        axes.plot(range(1, 1 + len(recall)), recall, color=colours[model], linewidth=2.6 if ours else 1.5)
    axes.set_xlabel("k")
    axes.set_ylabel("recall@k")
    axes.set_xlim(1, max(2, len(recall)))
    axes.set_ylim(0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_slices(axes: Axes, of_kind: list[dict], name: str) -> None:
    """A row per slice: the first model with its interval, the others as dots."""
    colours = _colours(of_kind[0]["models"])
    for place, one in enumerate(of_kind):
        (ours, of), *others = one["models"].items()
        for model, other in others:
            axes.plot(other[name]["mean"], place, "o", color=colours[model], markersize=5.5, clip_on=False)
        axes.plot([of[name]["low"], of[name]["high"]], [place, place], color=colours[ours], linewidth=2, zorder=1)
        axes.plot(of[name]["mean"], place, "D", color=colours[ours], markersize=7, clip_on=False)
    axes.set_yticks(range(len(of_kind)), [f"{one['name'].replace('_', ' ')} ({one['num_users']:,})" for one in of_kind])
    _rows(axes, name)
    axes.set_xlim(0)
    axes.margins(y=0.18)


def _rows(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="x", color=MUTED, alpha=0.18, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.invert_yaxis()
