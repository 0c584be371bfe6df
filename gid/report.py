"""What a person wants to see of a tree: balance and cost per level, what its clusters hold, a map of the items."""

import base64
import html
import io
from pathlib import Path

import numpy as np

from contract.settings import Config
from gid.hierarchy import Shape, cluster_sse, leaf_sse, prefix_of
from gid.words import popular_texts, telling_words

NUM_TOP_ITEMS, NUM_CHILDREN = 5, 6
MAX_POINTS = 20_000  # items on the map

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>GIDs of {name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light; --ink: #1c2430; --soft: #66707f; --line: #e3e7ec; --bar: #dfe6ee; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .5rem; }}
p, .soft {{ color: var(--soft); margin: .2rem 0; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }} th {{ font-weight: 600; color: var(--soft); font-size: .85rem; }}
figure {{ margin: 0; text-align: center; }} figure img {{ max-width: 100%; }}
details {{ border-bottom: 1px solid var(--line); }} details div {{ padding: 0 0 .7rem 3.2rem; font-size: .9rem; }}
summary {{ display: grid; grid-template-columns: 2.2rem 9rem 1fr; gap: 1rem; padding: .35rem 0; cursor: pointer;
  align-items: center; }}
summary::-webkit-details-marker {{ display: none; }}
.code {{ color: #fff; border-radius: 4px; text-align: center; font-size: .85rem; font-weight: 600; }}
.bar {{ background: var(--bar); border-radius: 3px; height: 1.1rem; font-size: .75rem; white-space: nowrap;
  padding-left: .3rem; box-sizing: border-box; }}
ul {{ margin: .2rem 0; padding-left: 1.1rem; }}
</style>
<h1>GIDs of {name}</h1>
<p>{summary}</p>
<h2>Levels</h2>
<table><tr><th>prefixes of</th><th>clusters</th><th>items: mean</th><th>largest</th><th>capacity</th>
<th>entropy, bits</th><th>at most</th><th>SSE</th><th>share of all</th></tr>{levels}</table>
<p>Capacity is what the subtree below a prefix can hold. Entropy is that of the prefix of a random item, at most when
all clusters of the level are used alike. SSE is the sum of squared distances to the cluster's mean.</p>
<h2>Map</h2>
<figure><img alt="items in two dimensions, coloured by first code" src="data:image/png;base64,{map}"></figure>
<p>{map_note}</p>
<h2>First codes</h2>
<p>Words that are more frequent in the cluster than elsewhere. Open a cluster for its most popular items and for its
largest children.</p>
{clusters}
</html>
"""


def describe(config: Config, embeddings: np.ndarray, gids: np.ndarray) -> dict:
    """What a reader of the manifest wants to know of the tree; a leaf is a prefix of length l - 1.

    Args:
        embeddings: float (I, d), what was clustered; gids: int (I, l).
    """
    num_items, length = gids.shape
    shape = Shape(config.gid.branching, length, config.gid.headroom)
    sizes = [np.bincount(prefix_of(gids, level)) for level in range(1, length)]
    capacities, node = [], num_items
    for level in range(1, length):
        node = shape.capacity(node, level)
        capacities.append(node)
    shuffled = np.random.default_rng(config.seed).permutation(num_items)
    return {
        "branching": config.gid.branching,
        "length": length,
        "num_leaves": len(sizes[-1]) if sizes else 1,
        "capacity_per_level": capacities,
        "clusters_per_level": [len(s) for s in sizes],
        "largest_cluster_per_level": [int(s.max()) for s in sizes],
        "entropy_per_level": [entropy(s) for s in sizes],
        "sse_per_level": [cluster_sse(embeddings, gids, level) for level in range(length)],
        "leaf_sse": leaf_sse(embeddings, gids),
        "leaf_sse_random": leaf_sse(embeddings, gids[shuffled]),
    }


def entropy(sizes: np.ndarray) -> float:
    """Bits that the cluster of a random item tells."""
    share = sizes[sizes > 0] / sizes.sum()
    return float(-(share * np.log2(share)).sum())


def write_report(file: Path, config: Config, corpus: Path, gids: np.ndarray, x: np.ndarray, counts: dict) -> None:
    """Writes one page that needs nothing else.

    Args:
        corpus: the folder, for texts and popularity; gids: int (I, l); x: float (I, d), what was clustered; counts:
            those of the manifest.
    """
    table = popular_texts(corpus)
    num_points = min(MAX_POINTS, len(gids))
    note = f"The two leading principal axes of what was clustered ({_space(config)}), coloured by first code; "
    note += "all items" if num_points == len(gids) else f"{num_points:,} items drawn at random of {len(gids):,}"
    page = PAGE.format(
        name=html.escape(config.name),
        summary=_summary(config, counts),
        levels=_level_rows(counts),
        map=base64.b64encode(draw_map(gids, x, config.seed)).decode(),
        map_note=note + ".",
        clusters=_cluster_list(gids, table),
    )
    file.write_text(page)


def _space(config: Config) -> str:
    return {"content": "content features", "fused": "CF and content"}.get(config.gid.method, "the CF embeddings")


def _summary(config: Config, counts: dict) -> str:
    text = f"{counts['num_items']:,} items as paths of {counts['length']} codes out of {counts['branching']}; "
    text += f"gid.method = {config.gid.method}, gid.headroom = {config.gid.headroom:g}. The leaves hold "
    text += f"{counts['leaf_sse'] / max(counts['leaf_sse_random'], 1e-30):.0%} of the SSE of random leaves as large."
    if "num_added" in counts:
        text += f" {counts['num_added']:,} items were added, {counts['displaced_share']:.1%} of them displaced."
    return html.escape(text)


def _level_rows(counts: dict) -> str:
    rows = []
    for level, clusters in enumerate(counts["clusters_per_level"], 1):
        most = counts["branching"] ** (counts["length"] - level)
        sse = counts["sse_per_level"][level]
        at_most = np.log2(min(counts["branching"] ** level, counts["num_items"]))
        cells = [
            f"{level} code{'s' * (level > 1)}",
            f"{clusters:,}",
            f"{counts['num_items'] / clusters:,.1f}",
            f"{counts['largest_cluster_per_level'][level - 1]:,}",
            f"{most:,}",
            f"{counts['entropy_per_level'][level - 1]:.2f}",
            f"{at_most:.2f}",
            f"{sse:,.4g}",
            f"{sse / max(counts['sse_per_level'][0], 1e-30):.1%}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(rows)


def draw_map(gids: np.ndarray, x: np.ndarray, seed: int) -> bytes:
    """A PNG of the items on the two leading principal axes, coloured by first code. Equal input, equal bytes."""
    from matplotlib.figure import Figure

    rng = np.random.default_rng(seed)
    shown = np.sort(rng.choice(len(x), min(MAX_POINTS, len(x)), replace=False))
    place = principal_axes(x[shown], 2)
    code = gids[shown, 0]
    figure = Figure(figsize=(9, 6.4), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    order = rng.permutation(len(shown))  # no cluster lies on top of the others
    axes.scatter(*place[order].T, c=[colour(c) for c in code[order]], s=4, alpha=0.6, linewidths=0)
    for c in np.unique(code):
        box = {"boxstyle": "round,pad=0.2", "facecolor": colour(c), "edgecolor": "white", "linewidth": 0.6}
        axes.text(
            *np.median(place[code == c], axis=0), str(c), fontsize=7, color="white", ha="center", va="center", bbox=box
        )
    low, high = np.quantile(place, [0.002, 0.998], axis=0)
    margin = 0.04 * (high - low) + 1e-9
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
    axes.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def colour(code: int) -> str:
    """Neighbouring codes get hues far from each other: steps of the golden angle, in three shades."""
    import colorsys

    red, green, blue = colorsys.hls_to_rgb(code * 0.381966 % 1, (0.42, 0.52, 0.36)[code % 3], 0.62)
    return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def principal_axes(x: np.ndarray, num_axes: int) -> np.ndarray:
    """Coordinates on the leading principal axes, float64 (n, num_axes); the largest entry of an axis is positive."""
    centred = x - x.mean(axis=0, dtype=np.float64)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :num_axes]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] + 1e-300)
    found = np.zeros((len(x), num_axes))
    found[:, : axes.shape[1]] = centred @ axes
    return found


def _cluster_list(gids: np.ndarray, table: dict) -> str:
    first = gids[:, 0].astype(np.int64)
    sizes = np.bincount(first)
    words = telling_words(table["text"], first[table["row"]], len(sizes))
    items_of, children_of = _top_items(first, table), _children(gids, table)
    parts = []
    for code in np.argsort(-sizes, kind="stable"):
        if not sizes[code]:
            continue
        width = max(4, 100 * sizes[code] / sizes.max())
        parts.append(
            f'<details><summary><span class="code" style="background:{colour(int(code))}">{code}</span>'
            f'<span class="bar" style="width:{width:.0f}%">{sizes[code]:,}</span>'
            f"<span>{html.escape(', '.join(words[code]))}</span></summary><div>"
            f"<b>Most popular</b><ul>{items_of.get(code, '')}</ul>{children_of.get(code, '')}</div></details>"
        )
    return "\n".join(parts)


def _top_items(first: np.ndarray, table: dict) -> dict[int, str]:
    """List entries by first code; the table is sorted by popularity."""
    found: dict[int, list[str]] = {}
    for row, text, num_train in zip(table["row"], table["text"], table["num_train"], strict=True):
        entries = found.setdefault(int(first[row]), [])
        if len(entries) < NUM_TOP_ITEMS:
            title = html.escape(text if len(text) <= 110 else text[:107] + "...")
            entries.append(f'<li>{title} <span class="soft">{num_train:,} train interactions</span></li>')
    return {code: "".join(entries) for code, entries in found.items()}


def _children(gids: np.ndarray, table: dict) -> dict[int, str]:
    """The largest second-level clusters by first code, with their words."""
    if gids.shape[1] < 3:
        return {}
    node = prefix_of(gids, 2)
    sizes = np.bincount(node)
    words = telling_words(table["text"], node[table["row"]], len(sizes))
    example = np.unique(node, return_index=True)[1]
    found: dict[int, list[str]] = {}
    for n in np.argsort(-sizes, kind="stable"):
        a, b = gids[example[n], :2].tolist()
        entries = found.setdefault(a, [])
        if len(entries) < NUM_CHILDREN:
            entries.append(f"<li>{a}, {b}: {sizes[n]:,} items; {html.escape(', '.join(words[n]))}</li>")
    return {code: f"<b>Largest children</b><ul>{''.join(entries)}</ul>" for code, entries in found.items()}
