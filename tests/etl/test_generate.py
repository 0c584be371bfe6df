import gzip
import itertools
import json
import resource
from collections import Counter, defaultdict

import pytest

from etl import generate


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    generate.main([str(folder), "--users", "400", "--items", "480", "--seed", "3"])
    return folder


def rows(folder):
    for file in sorted(folder.glob("events-*.jsonl.gz")):
        for line in gzip.decompress(file.read_bytes()).decode().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                yield None


def test_same_seed_same_bytes(shop, tmp_path):
    generate.main([str(tmp_path / "a"), "--users", "400", "--items", "480", "--seed", "3"])
    generate.main([str(tmp_path / "b"), "--users", "400", "--items", "480", "--seed", "4"])
    for file in shop.iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "b" / file.name).read_bytes() != file.read_bytes()


def test_a_full_folder_is_not_touched(shop):
    before = {f.name: f.stat().st_mtime_ns for f in shop.iterdir()}
    with pytest.raises(ValueError, match="--force"):
        generate.main([str(shop)])
    assert {f.name: f.stat().st_mtime_ns for f in shop.iterdir()} == before


def test_a_disk_without_room_is_one_message_and_leaves_nothing(tmp_path, capsys):
    """A limit on the size of files stands for a full disk: the system refuses the same calls."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"log cannot be written: File too large; .*name another folder"):
            generate.main([str(tmp_path / "log"), "--users", "400", "--items", "480"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "log").iterdir())


def test_the_log_is_a_log(shop):
    log = list(rows(shop))
    items = [json.loads(line) for line in (shop / "items.jsonl").open()]
    assert len(items) == len({i["item_id"] for i in items}) == 480
    assert 12 < len(log) / 400 < 18
    broken = sum(r is None for r in log)
    no_id = sum(r is not None and not (r["user_id"] and r["item_id"]) for r in log)
    good = [r for r in log if r and r["user_id"] and r["item_id"]]
    early = sum(r["timestamp"] < 1e10 for r in good)
    late = sum(r["timestamp"] > 4e12 for r in good)
    assert min(broken, no_id, early, late) >= 1
    assert broken + no_id + early + late < 0.01 * len(log)
    assert Counter(json.dumps(r) for r in good).most_common(1)[0][1] > 1  # some are sent twice
    kinds = Counter(r["event"] for r in good)
    assert kinds["view"] > kinds["cart"] > kinds["purchase"] > 0
    assert any("&amp;" in i["description"] for i in items)


def test_what_comes_next_can_be_known(shop):
    """After a device come its accessories: far more often than chance is the next item of the same family."""
    brand = {}
    for line in (shop / "items.jsonl").open():
        item = json.loads(line)
        title = item["title"].split(" for ")[-1].split()
        brand[item["item_id"]] = title[0] + title[1]
    visits = defaultdict(list)
    for r in rows(shop):
        if r and r["user_id"] and r["item_id"] and r["event"] == "view" and 1e12 < r["timestamp"] < 2e12:
            visits[r["user_id"]].append((r["timestamp"], r["item_id"]))
    same = total = 0
    for events in visits.values():
        events.sort()
        for (_, a), (_, b) in itertools.pairwise(events):
            same, total = same + (a != b and brand[a] == brand[b]), total + 1
    assert same / total > 0.1  # a family has 5 of 480 items
