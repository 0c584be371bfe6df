"""The report of a build: report.json for programs and report.html, one page that needs nothing else, for people.

The same dict gives the same bytes. Parts that the dict does not have, or that are empty, are left out of the page.
"""

import datetime
import html
import itertools
import json
from collections import Counter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.ticker import FuncFormatter, MaxNLocator

from contract import pages
from contract.pages import INK, KEPT, MUTED, REMOVED, Html, code, counted, figure, share, short, table

SPLITS = ("train", "valid", "test")
MAX_BARS = 130  # over time: days if they are so few, else weeks, else months

OF_SPLIT = {"train": pages.TRAIN, "valid": pages.VALID, "test": pages.TEST}


def write_report(report: dict, folder: Path) -> None:
    """Writes report.json and report.html into `folder`.

    `report`, in which all but name, filters and split may be missing or empty:
        name str; time_unit str ('order': times are positions and are not shown)
        filters [{what, removed, left}], as applied; the first is what was read
        k_core [{round, num_users, num_items, num_events}]
        quarantine {"log" or "catalog": {reason: {num, example}}}
        events_by_type {type: num}
        events_per_user, events_per_item [[low, num]]: num have low..2 * low - 1 events; low = 0: none
        activity [[ISO date, num train, num valid, num test]] by day
        split {method, num_train, num_valid, num_test, num_users, num_items, num_cold_items, num_cold_users,
            first_valid_ts and first_test_ts (ms or None), leak_check: what was found}
        shards {split: [{file, num_users, num_events}]}
        content {num_items_without_text, num_items_damaged (rows of the catalog, if any, with text that cannot be
            decoded), vocab_size, tokens_per_item [[low, num]]}
    """
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.html").write_text(page(report), encoding="utf-8")


def page(report: dict) -> str:
    sections = {
        "What each filter removed": filters(report["filters"]),
        "k-core": k_core(report.get("k_core")),
        "Quarantine": quarantine(report.get("quarantine")),
        "Events per user and per item": events_per(report),
        "Events by type": events_by_type(report.get("events_by_type")),
        "Activity over time": activity(report.get("activity")),
        "Split": split(report["split"], report.get("time_unit")),
        "Shards": shards(report.get("shards")),
        "Content": content(report.get("content")),
    }
    title = f"Corpus of {report['name']}"
    parts = [f"<h1>{html.escape(title)}</h1>", summary(report)]
    parts += [f"<h2>{name}</h2>\n{text}" for name, text in sections.items() if text]
    return pages.whole_page(title, "\n".join(parts))


# --- the sections: HTML, or nothing ---


def summary(report: dict) -> str:
    steps, parts = report["filters"], report["split"]
    num_read, num_left = steps[0]["left"], steps[-1]["left"]
    counts = {"rows read": num_read, "events left": num_left, "users": parts["num_users"], "items": parts["num_items"]}
    if log := (report.get("quarantine") or {}).get("log"):
        counts["rows in quarantine"] = sum(found["num"] for found in log.values())
    cards = "".join(f"<div><b>{num:,}</b><span>{name}</span></div>" for name, num in counts.items())
    told = (
        f"Of {num_read:,} rows, {num_left:,} events ({share(num_left, num_read)}) of {parts['num_users']:,} users on "
        f"{parts['num_items']:,} items are in the corpus: {num_left / max(1, parts['num_users']):.1f} events per user, "
        f"{num_left / max(1, parts['num_items']):.1f} per item."
    )
    largest = max(steps[1:], key=lambda step: step["removed"], default=None)
    if largest and largest["removed"]:
        told += f" What removed most is “{html.escape(largest['what'])}”: {largest['removed']:,}."
    told += f" The events are split into {parts['num_train']:,} train, {parts['num_valid']:,} valid and "
    told += f"{parts['num_test']:,} test."
    return f'<p>{told}</p>\n<div class="counts">{cards}</div>'


def filters(steps: list[dict]) -> str:
    num_read = steps[0]["left"]
    rows = [[step["what"], *counted(step["removed"], num_read), *counted(step["left"], num_read)] for step in steps]
    rows[0][1:3] = "", ""
    note = '<p class="note">In this order; shares are of the rows read.</p>'
    return (
        note
        + table(("", "removed", "share", "left", "share"), rows, "lrrrr")
        + figure(lambda axes: draw_filters(axes, steps), "what each filter removed", (10, 0.6 + 0.33 * len(steps)))
    )


def k_core(rounds: list[dict] | None) -> str:
    keys = ("round", "num_users", "num_items", "num_events")
    rows = [[f"{one[key]:,}" for key in keys] for one in rounds or []]
    return table(("round", "users", "items", "events"), rows, "rrrr") if rows else ""


def quarantine(bad: dict[str, dict] | None) -> str:
    text = ""
    for what, reasons in (bad or {}).items():
        if reasons:
            rows = [(reason, f"{found['num']:,}", code(found["example"])) for reason, found in reasons.items()]
            text += f"<h3>{html.escape(what.capitalize())}</h3>" + table(("reason", "rows", "such as"), rows, "lrl")
    return text


def events_per(report: dict) -> str:
    panels = [
        f"<div><h3>Per {owner}</h3>{histogram(report[key], f'{owner}s', 'events')}</div>"
        for owner, key in (("user", "events_per_user"), ("item", "events_per_item"))
        if report.get(key)
    ]
    return f'<div class="pair">{"".join(panels)}</div>' if panels else ""


def events_by_type(num_by_type: dict[str, int] | None) -> str:
    total = sum((num_by_type or {}).values())
    rows = [(name, *counted(num, total)) for name, num in (num_by_type or {}).items()]
    return table(("type", "events", "share"), rows, "lrr") if rows else ""


def activity(days: list[list] | None) -> str:
    if not days:
        return ""
    unit, periods = by_period(days)
    note = f'<p class="note">Events by {unit}, {days[0][0]} to {days[-1][0]}.</p>'
    return note + figure(lambda axes: draw_activity(axes, unit, periods), f"events by {unit} and split", (10, 2.9))


def split(parts: dict, time_unit: str | None) -> str:
    total = sum(parts[f"num_{name}"] for name in SPLITS)
    rows = [(name, *counted(parts[f"num_{name}"], total)) for name in SPLITS]
    facts = [("method", parts["method"].replace("_", " "))]
    facts += [
        (f"first {name} event", utc(parts[f"first_{name}_ts"]))
        for name in ("valid", "test")
        if parts.get(f"first_{name}_ts") is not None and time_unit != "order"
    ]
    for what in ("items", "users"):
        num, of = parts[f"num_cold_{what}"], parts[f"num_{what}"]
        facts.append((f"cold {what}, without a train event", f"{num:,} of {of:,} ({share(num, of)})"))
    facts.append(("leak check", Html(f'<span class="good">{html.escape(parts["leak_check"])}</span>')))
    return (
        f'<div class="pair"><div>{table(("", "events", "share"), rows, "lrr")}</div>'
        f"<div>{table((), facts, 'll')}</div></div>"
    )


def shards(of_split: dict[str, list[dict]] | None) -> str:
    rows = []
    for name, files in (of_split or {}).items():
        if files:
            sizes = [[file[key] for file in files] for key in ("num_users", "num_events")]
            rows.append([name, f"{len(files):,}", *(text for of in sizes for text in (f"{sum(of):,}", extent(of)))])
    head = ("split", "files", "users", "users per file", "events", "events per file")
    return table(head, rows, "lrrrrr") if rows else ""


def extent(nums: list[int]) -> str:
    low, high = min(nums), max(nums)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def content(found: dict | None) -> str:
    if not found:
        return ""
    told = f"{found['num_items_without_text']:,} items have no text; the vocabulary has {found['vocab_size']:,} pieces."
    if damaged := found.get("num_items_damaged"):
        told += (
            f" {damaged:,} rows of the catalog hold text that cannot be decoded, shown as \ufffd: set data.encoding."
        )
    bins = found.get("tokens_per_item")
    panel = f"<div><h3>Tokens per item</h3>{histogram(bins, 'items', 'tokens')}</div>" if bins else ""
    return f'<p>{told}</p><div class="pair">{panel}</div>'


def utc(ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


# --- figures ---


def draw_filters(axes: Axes, steps: list[dict]) -> None:
    """A waterfall from top to bottom: what is left, and beside it what the step took away."""
    names = [step["what"] for step in steps]
    left, removed = ([step[key] for step in steps] for key in ("left", "removed"))
    places = range(len(steps))
    axes.barh(places, left, color=KEPT, height=0.62, label="left")
    axes.barh(places, removed, left=left, color=REMOVED, height=0.62, label="removed")
    for place, step in enumerate(steps):
        if step["removed"]:
            end = (step["left"] + step["removed"], place)
            axes.annotate(
                f"\u2212{step['removed']:,}", end, (6, 0), textcoords="offset points", va="center", color=MUTED
            )
    axes.margins(x=0.12)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def histogram(bins: list[list[int]], owners: str, things: str) -> str:
    """Of [[low, num]] with a sentence on the median and the largest."""
    seen, total = itertools.accumulate(num for _, num in bins), sum(num for _, num in bins)
    median = next((low for (low, _), upto in zip(bins, seen, strict=True) if 2 * upto >= total), 0)
    largest = max((low for low, num in bins if num), default=0)
    note = f'<p class="note">Median {span(median)} {things}, largest {span(largest)}.</p>'
    label = f"{owners} by number of {things}"
    return note + figure(lambda axes: draw_histogram(axes, bins, owners, things), label, (5, 2.6))


def span(low: int) -> str:
    return f"{low:,}" if low < 2 else f"{low:,} to {2 * low - 1:,}"


def draw_histogram(axes: Axes, bins: list[list[int]], owners: str, things: str) -> None:
    """Bars of bins that double: 0, 1, 2, 4, ..; the ticks are where a bin begins."""
    top = max(low for low, _ in bins)
    lows = [0] * (bins[0][0] == 0) + [1 << power for power in range(top.bit_length())]
    num_of = dict(map(tuple, bins))
    axes.bar(range(len(lows)), [num_of.get(low, 0) for low in lows], width=0.92, align="edge", color=KEPT)
    every = 1 + len(lows) // 9
    axes.set_xticks(range(0, len(lows), every), [f"{low:,}" for low in lows[::every]])
    axes.set_xlabel(things)
    axes.set_ylabel(owners)
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def by_period(days: list[list]) -> tuple[str, dict[datetime.date, list[int]]]:
    """('day', 'week' or 'month', {first day of the period: [train, valid, test]}), the unit of at most MAX_BARS bars
    or month."""
    dates = [datetime.date.fromisoformat(day) for day, *_ in days]
    num_days = (max(dates) - min(dates)).days + 1
    unit = "day" if num_days <= MAX_BARS else "week" if num_days <= 7 * MAX_BARS else "month"
    begin = {
        "day": lambda date: date,
        "week": lambda date: date - datetime.timedelta(date.weekday()),
        "month": lambda date: date.replace(day=1),
    }[unit]
    sums = [Counter() for _ in SPLITS]
    for date, (_, *nums) in zip(dates, days, strict=True):
        for of_split, num in zip(sums, nums, strict=True):
            of_split[begin(date)] += num
    return unit, {date: [of_split[date] for of_split in sums] for date in sorted(sums[0])}


def draw_activity(axes: Axes, unit: str, periods: dict[datetime.date, list[int]]) -> None:
    width = {"day": 1, "week": 7, "month": 30}[unit]
    below = [0] * len(periods)
    for name, nums in zip(SPLITS, zip(*periods.values(), strict=True), strict=True):
        axes.bar(list(periods), nums, 0.92 * width, below, align="edge", color=OF_SPLIT[name], label=name)
        below = [sum(pair) for pair in zip(below, nums, strict=True)]
    axes.margins(x=0.01)
    locator = AutoDateLocator(minticks=3)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.set_ylabel(f"events by {unit}")
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
