"""Writes a made-up shop's log, to try the pipeline on without anybody's data.

    python etl/generate.py data/demo
    python etl/generate.py data/large --users 200000 --items 50000 --seed 2

    <folder>/items.jsonl           item_id, title, description
    <folder>/events-*.jsonl.gz     user_id, item_id, timestamp (ms), event (view, cart, purchase), by quarter

What is in it to be found. Items belong to families: a device and accessories made for it. Families belong to cells,
a topic in a style. A user has a style and a few home topics, and walks: after a device its accessories, then other
families of the cell; between sessions the taste drifts to a home topic or to one beside it. So recent items say more
than old ones, order matters, users of one style resemble each other, and the text tells topic, style and family.
Popularity is Zipf's within a topic, which makes it a poor guide. Half a percent of the rows is dirty, as in any log.
"""

import argparse
import gzip
import html
import json
import re
import time
from pathlib import Path

import numpy as np

from contract.cli import run
from contract.disk import writing

# topic: devices | accessories
TOPICS = {
    "cycling": "road bike, gravel bike, city bike, cargo bike | helmet, frame lock, pump, bottle cage, rear light",
    "running": "trail shoe, racing flat, treadmill, sports watch | ankle socks, hydration belt, insoles, arm band, cap",
    "camping": "dome tent, camp stove, down quilt, hammock | ground sheet, gas canister, guy ropes, lantern, dry bag",
    "fishing": "fly rod, spinning reel, float tube, fish finder | landing net, lure box, braided line, hooks, waders",
    "climbing": "rope, harness, bouldering pad, belay device | chalk bag, carabiner, brush, finger tape, sling",
    "skiing": "touring ski, snowboard, ski boot, sled | climbing skins, goggles, edge wax, pole strap, boot bag",
    "photography": "mirrorless camera, prime lens, tripod, flash | lens cap, battery grip, memory card, strap, filter",
    "audio": "turntable, headphones, studio monitor, amplifier | stylus, ear pads, isolation feet, cable, dust cover",
    "guitar": "electric guitar, bass, ukulele, effect pedal | strings, capo, gig bag, tuner, slide",
    "piano": "stage piano, synthesizer, organ, accordion | sustain pedal, bench, sheet stand, key cover, headphones",
    "coffee": "espresso machine, hand grinder, moka pot, kettle | tamper, milk jug, paper filter, scale, brush",
    "baking": "stand mixer, bread oven, pasta maker, proofing box | whisk, loaf tin, scraper, piping bag, thermometer",
    "grilling": "kettle grill, smoker, pizza oven, plancha | charcoal chimney, tongs, rotisserie, cover, wood chips",
    "gardening": "lawn mower, greenhouse, hedge trimmer, rain barrel | gloves, seed tray, hose, pruning saw, trellis",
    "woodworking": "table saw, router, bench plane, lathe | saw blade, dust bag, clamp, sanding disc, marking gauge",
    "painting": "field easel, airbrush, watercolour set, plotter | sable brush, palette, ink, canvas, varnish",
    "sewing": "sewing machine, overlocker, loom, steam iron | bobbins, needle set, thread rack, pin cushion, patterns",
    "aquarium": "reef tank, canister filter, pond pump, terrarium | gravel, heater, water test, plant food, net",
    "dogs": "dog bed, travel crate, harness, agility set | leash, chew toy, food bowl, towel, training treats",
    "astronomy": "refractor, star tracker, binoculars, observing chair | eyepiece, finder, dew shield, torch, atlas",
    "gaming": "console, gaming mouse, racing wheel, arcade stick | charging dock, mouse pad, headset, skin, grips",
    "networking": "mesh router, network switch, storage box, antenna | patch cable, rack shelf, caddy, fan, label",
    "toddlers": "stroller, high chair, car seat, play kitchen | rain cover, bib, sun shade, cushion, snack box",
    "fitness": "rowing machine, kettlebell, spin bike, pull-up bar | floor mat, wrist wraps, towel, roller, timer",
}
STYLES = {
    "heritage": "brass, wooden, hand-finished, leather, silent",
    "travel": "folding, lightweight, mini, waterproof, carbon",
}
FAMILY = 5  # a device and four accessories
NUM_SLOTS = FAMILY - 1
EVENTS = ("view", "cart", "purchase")

YEAR_START_MS = 1_704_067_200_000  # 2024-01-01
YEAR_MS = 366 * 86_400_000
QUARTERS = 4

MEAN_VISITS = 13  # of a user; with cart and purchase 15 events
MAX_VISITS = 300
# What a user does next: buy an accessory for the latest device, see another family of the cell, change topic, or
# land anywhere. The first visit of a session changes topic more often.
P_ACCESSORY, P_CELL, P_TOPIC = 0.24, 0.16, 0.2
P_TOPIC_NEW_SESSION = 0.5
P_SESSION_ENDS = 0.3
P_OWN_STYLE = 0.75
DIRTY_SHARE = 0.005


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; must be empty or new")
    parser.add_argument("--users", type=int, default=3000, help="number of users (default: %(default)s)")
    parser.add_argument(
        "--items", type=int, default=1200, help="number of items, rounded to whole cells (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of all random choices (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the files of an earlier run")
    args = parser.parse_args(argv)
    if args.users < 1 or args.items < 1 or args.seed < 0:
        raise ValueError(f"--users {args.users} --items {args.items} --seed {args.seed}: must be 1, 1 and 0 at least")
    if args.folder.exists() and not args.folder.is_dir():
        raise ValueError(f"{args.folder} is a file; name a folder")
    if args.folder.exists() and any(args.folder.iterdir()) and not args.force:
        raise ValueError(f"{args.folder} is not empty; name another folder, or pass --force")

    start = time.monotonic()
    rng = np.random.default_rng(args.seed)
    shop = Shop(args.items, rng)
    user, item, ts = walk(shop, args.users, rng)
    user, item, ts, event = with_carts_and_purchases(user, item, ts, rng)
    lines, ts = dirty(*event_lines(user, item, ts, event, shop.num_items, rng), rng)

    with writing(args.folder, "name another folder"):
        args.folder.mkdir(parents=True, exist_ok=True)
        for old in args.folder.glob("events-*.jsonl.gz"):
            old.unlink()
        names = [f"events-2024-q{number + 1}.jsonl.gz" for number in range(QUARTERS)]
        try:
            (args.folder / "items.jsonl").write_text("".join(item_lines(shop, rng)))
            quarter = np.clip((ts - YEAR_START_MS) * QUARTERS // YEAR_MS, 0, QUARTERS - 1)
            for number, name in enumerate(names):
                write_gzip(args.folder / name, lines[quarter == number])
        except OSError:
            for name in ("items.jsonl", *names):
                (args.folder / name).unlink(missing_ok=True)
            raise
    print(
        f"wrote {len(lines):,} events of {args.users:,} users on {shop.num_items:,} items to {args.folder} "
        f"in {time.monotonic() - start:.1f} s"
    )


class Shop:
    """The items, numbered by (cell, family, slot): topic, style and popularity of each family."""

    def __init__(self, num_items: int, rng: np.random.Generator):
        self.num_topics, self.num_styles = len(TOPICS), len(STYLES)
        self.num_cells = self.num_topics * self.num_styles
        self.families_of_cell = max(1, round(num_items / FAMILY / self.num_cells))
        self.num_items = self.num_cells * self.families_of_cell * FAMILY
        # Users meet the families of a cell in an order drawn by Zipf weights: Gumbel noise on the log weights.
        self.family_logit = -0.8 * np.log(np.arange(1, self.families_of_cell + 1))
        weight = rng.permutation(1 / np.arange(1, self.num_topics + 1) ** 0.3)
        self.topic_weight = weight / weight.sum()

    def item(self, topic, style, family, slot):
        return ((topic * self.num_styles + style) * self.families_of_cell + family) * FAMILY + slot


def walk(shop: Shop, num_users: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, ts), sorted by user and time; all users take their n-th step at once."""
    num_visits = np.clip(rng.negative_binomial(1.1, 1.1 / (MEAN_VISITS - 3), num_users) + 3, 3, MAX_VISITS)
    home = rng.choice(shop.num_topics, (num_users, 3), p=shop.topic_weight)
    style_of_user = rng.integers(shop.num_styles, size=num_users)
    topic, style = home[:, 0].copy(), style_of_user.copy()
    family, slot = np.zeros(num_users, np.int64), np.full(num_users, NUM_SLOTS)
    clock = np.zeros(num_users)  # ms since the user's first visit
    users, items, times = [], [], []
    for step in range(num_visits.max()):
        u = np.flatnonzero(num_visits > step)
        n = len(u)
        new_session = (rng.random(n) < P_SESSION_ENDS) | (step == 0)
        minutes = np.where(new_session, rng.exponential(12 * 24 * 60, n), rng.lognormal(1, 1, n))
        clock[u] += 0 if step == 0 else 60_000 * minutes + 1000

        choice = rng.random(n)
        p_topic = np.where(new_session, P_TOPIC_NEW_SESSION, P_TOPIC)
        move = choice < p_topic
        choice = np.where(move, 1, (choice - p_topic) / (1 - p_topic)) * (1 - P_TOPIC)
        accessory = ~move & (choice < P_ACCESSORY) & (slot[u] < NUM_SLOTS)
        stray = ~move & (choice >= P_ACCESSORY + P_CELL)

        beside = (topic[u] + rng.choice([-1, 1], n)) % shop.num_topics
        target = np.where(rng.random(n) < 0.5, beside, home[u, rng.integers(home.shape[1], size=n)])
        topic[u] = np.where(move, target, topic[u])
        other_style = rng.integers(shop.num_styles, size=n)
        style[u] = np.where(move, np.where(rng.random(n) < P_OWN_STYLE, style_of_user[u], other_style), style[u])
        gumbel = rng.gumbel(size=(n, shop.families_of_cell))
        family[u] = np.where(accessory, family[u], np.argmax(shop.family_logit + gumbel, axis=1))
        slot[u] = np.where(accessory, slot[u] + 1, 0)
        # A stray visit is of any item of any topic and leaves the walk where it was.
        stray_item = shop.item(
            rng.choice(shop.num_topics, n, p=shop.topic_weight),
            rng.integers(shop.num_styles, size=n),
            np.argmax(shop.family_logit + rng.gumbel(size=gumbel.shape), axis=1),
            rng.integers(FAMILY, size=n),
        )
        users.append(u)
        items.append(np.where(stray, stray_item, shop.item(topic[u], style[u], family[u], slot[u])))
        times.append(clock[u].copy())
    user, item, since = np.concatenate(users), np.concatenate(items), np.concatenate(times)
    # Long histories are squeezed into the year, short ones begin anywhere in it.
    squeeze = np.minimum(1, 0.95 * YEAR_MS / np.maximum(clock, 1))
    first = rng.random(num_users) * (YEAR_MS - clock * squeeze - 3_600_000)
    order = np.lexsort((since, user))
    ts = YEAR_START_MS + (first[user] + since * squeeze[user]).astype(np.int64)
    return user[order], item[order], ts[order]


def with_carts_and_purchases(user, item, ts, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """(user, item, ts, event): some views are followed by a cart event, some of these by a purchase, in seconds."""
    cart = np.flatnonzero(rng.random(len(user)) < 0.2)
    bought = cart[rng.random(len(cart)) < 0.4]
    rows = np.concatenate([np.arange(len(user)), cart, bought])
    event = np.repeat([0, 1, 2], [len(user), len(cart), len(bought)])
    delay = np.where(event == 0, 0, event * 1000 + rng.integers(900, size=len(rows)))
    ts = ts[rows] + delay
    order = np.lexsort((user[rows], ts))
    return user[rows][order], item[rows][order], ts[order], event[order]


def event_lines(user, item, ts, event, num_items: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """(JSON lines, ts). Ids are drawn, so that they tell nothing of the topic or the style."""
    user_ids, item_ids = id_texts("u", user.max() + 1), id_texts("i", num_items)
    lines = [
        f'{{"user_id": "{user_ids[u]}", "item_id": "{item_ids[i]}", "timestamp": {t}, "event": "{EVENTS[e]}"}}\n'
        for u, i, t, e in zip(user.tolist(), item.tolist(), ts.tolist(), event.tolist(), strict=True)
    ]
    return np.array(lines, dtype=object), ts


def id_texts(prefix: str, num: int) -> list[str]:
    """Ids in no order: a multiplication modulo a prime scatters 1..num."""
    prime = 2_147_483_647
    return [f"{prefix}{n * 48_271 % prime:010d}" for n in range(1, num + 1)]


def dirty(lines: np.ndarray, ts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Spoils copies of some rows and puts each behind its model: (lines, ts)."""
    spoil = [
        lambda line: line[: len(line) // 2] + "\n",  # cut off
        lambda line: line.replace('"item_id": "i', '"item_id": "", "was": "i'),
        lambda line: line.replace('"user_id": "u', '"user_id": null, "was": "u'),
        lambda line: re.sub(r'("timestamp": \d{10})\d{3}', r"\1", line),  # seconds taken for ms: January 1970
        lambda line: line.replace('"timestamp": 17', '"timestamp": 41'),  # in 2100
        lambda line: line,  # sent twice
    ]
    rows = np.sort(rng.choice(len(lines), int(DIRTY_SHARE * len(lines)), replace=False))
    spoilt = [spoil[n % len(spoil)](lines[row]) for n, row in enumerate(rows)]
    return np.insert(lines, rows + 1, spoilt), np.insert(ts, rows + 1, ts[rows])


def item_lines(shop: Shop, rng: np.random.Generator) -> list[str]:
    """items.jsonl. A few texts hold HTML entities, escaped once or twice, as scraped catalogs do."""
    item_ids = id_texts("i", shop.num_items)
    syllables = ["ve", "lo", "ra", "kan", "ti", "so", "mer", "du", "nix", "po", "lar", "be", "qui", "zen", "fa", "ro"]
    lines = []
    for topic, words in enumerate(TOPICS.items()):
        name, (devices, accessories) = words[0], [part.split(", ") for part in words[1].split(" | ")]
        for style, (style_name, adjectives) in enumerate(STYLES.items()):
            adjectives = adjectives.split(", ")
            for family in range(shop.families_of_cell):
                brand = "".join(rng.choice(syllables, 3)).capitalize()
                device = str(rng.choice(devices))
                model = f"{brand} {rng.integers(10, 99)}"
                parts = rng.permutation(accessories)[:NUM_SLOTS]
                for slot in range(FAMILY):
                    adjective = str(rng.choice(adjectives))
                    if slot == 0:
                        title = f"{model} {adjective} {device}"
                        description = f"{style_name} {name}, light & durable"
                    else:
                        title = f"{adjective.capitalize()} {parts[slot - 1]} for {model}"
                        description = f"{style_name} {name}, fits {brand} {device}"
                    for _ in range(int(rng.choice(3, p=[0.9, 0.08, 0.02]))):
                        description = html.escape(description)
                    item_id = item_ids[shop.item(topic, style, family, slot)]
                    lines.append(json.dumps({"item_id": item_id, "title": title, "description": description}) + "\n")
    return [lines[i] for i in rng.permutation(len(lines))]


def write_gzip(file: Path, lines: np.ndarray) -> None:
    with file.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as stream:
        stream.write("".join(lines).encode())


if __name__ == "__main__":
    run(main)
