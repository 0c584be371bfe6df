"""Blocks from literal events and back, and the plain Python that blocks are compared with."""

import itertools
import random
import zlib

import numpy as np
import pyarrow as pa

from etl.blocks import Block

Events = dict[str, list[tuple[int, int, int, int]]]  # user: [(item number, ts, event, split)]


def as_block(users: Events) -> Block:
    rows = np.array([row for rows in users.values() for row in rows], np.int64).reshape(-1, 4)
    item, code = np.unique(rows[:, 0], return_inverse=True)
    return Block(
        pa.array(list(users), pa.string()),
        np.array([zlib.crc32(user.encode()) for user in users], np.int64),
        np.array([len(rows) for rows in users.values()], np.int64),
        item.astype(np.int32),
        code.astype(np.int32),
        rows[:, 1],
        rows[:, 2].astype(np.int8),
        rows[:, 3].astype(np.int8),
    )


def as_events(block: Block) -> Events:
    values = zip(*(v.tolist() for v in (block.item[block.code], block.ts, block.event, block.split)), strict=True)
    return {
        user: [next(values) for _ in range(num)]
        for user, num in zip(block.user_id.to_pylist(), block.num_events.tolist(), strict=True)
    }


def random_users(num_users: int, num_items: int, max_events: int, seed: int, max_ts: int = 1000) -> Events:
    """Users of 1..max_events events on different items, the first items oftenest, times ascending, all of train."""
    rng = random.Random(seed)
    users = {}
    for user in range(num_users):
        items = {min(int(rng.expovariate(4 / num_items)), num_items - 1) for _ in range(rng.randint(1, max_events))}
        times = sorted(rng.randrange(max_ts) for _ in items)
        shuffled = rng.sample(sorted(items), len(items))
        users[f"u{user}"] = [(item, ts, rng.randint(1, 3), 0) for item, ts in zip(shuffled, times, strict=True)]
    return users


def in_parts(users: Events, num_parts: int) -> list[Events]:
    """The users dealt to parts of different sizes, in their order."""
    names = list(users)
    cuts = [len(names) * (k * k) // (num_parts * num_parts) for k in range(num_parts + 1)]
    return [{name: users[name] for name in names[a:b]} for a, b in itertools.pairwise(cuts) if b > a]
