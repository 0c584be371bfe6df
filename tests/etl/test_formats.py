"""Rows in the layouts of public releases, some of them broken."""

import dataclasses
import json

import pyarrow as pa
import pytest

from contract.settings import Config, Data, Etl
from etl import readers


def reasons(table):
    return [row.reason for row in table]


def test_colarec_release(read):
    files = {
        "train_time_inter.csv": "user_id,item_id,time\n1,10,1396396800\n1,11,\n",
        "valid_inter.csv": "user_id,item_id\n1,12\n",
        "test_inter.csv": "user_id,item_id\n1,13\n",
        "corpus_512.json": json.dumps({"10": {"cid": [1], "content": "title A"}, "99": {"content": "cold"}}, indent=1),
    }
    events, items = read(files, "colarec", split="given")
    # In the order of the paths: test, train, valid.
    assert [(e.item_id, e.split, e.ts, e.reason) for e in events] == [
        ("13", 2, None, None),
        ("10", 0, 1_396_396_800_000, None),
        ("11", 0, None, "no timestamp"),
        ("12", 1, None, None),
    ]
    assert [(i.item_id, i.text) for i in items] == [("10", "title A"), ("99", "cold")]
    _, items = read({"corpus_512.json": files["corpus_512.json"][:40]}, "colarec", split="given")
    assert reasons(items) == ["not one JSON object"]


def test_colarec_without_its_split(spark, read, tmp_path):
    test_colarec_release(read)
    data = Data(format="colarec", path=str(tmp_path))
    config = Config(data=data, etl=dataclasses.replace(Etl(), split="random"))
    events = readers.read_events(spark, config, readers.input_files(data)).collect()
    assert [e.split for e in events] == [None] * 4


def test_otto_sessions(read):
    lines = [
        '{"session":0,"events":[{"aid":1517085,"ts":1659304800025,"type":"clicks"},'
        '{"aid":1649869,"ts":1659369893840,"type":"carts"},{"aid":305831,"ts":1659370027105,"type":"orders"}]}',
        '{"session":1,"events":[{"aid":5,"ts":1659304900000,"type":"clicks"},{"ts":1659304900001,"type":"clicks"},'
        '{"aid":6,"ts":"late","type":"clicks"},{"aid":7,"ts":1659304900003},null,'
        '{"aid":8,"ts":1659304900004,"type":"carts"}]}',
        '{"session":2,"events":[]}',
        '{"session":3,"events":[{"aid":5,"ts":16593',
        '{"session":4,"events":[5]}',
        '{"session":null,"events":[{"aid":5,"ts":1659304900000,"type":"clicks"}]}',
    ]
    events, items = read({"train.jsonl.gz": "\n".join(lines)}, "otto", interactions="train.jsonl.gz")
    assert [(e.user_id, e.item_id, e.ts, e.event) for e in events if e.reason is None] == [
        ("0", "1517085", 1_659_304_800_025, "clicks"),
        ("0", "1649869", 1_659_369_893_840, "carts"),
        ("0", "305831", 1_659_370_027_105, "orders"),
        ("1", "5", 1_659_304_900_000, "clicks"),
        ("1", "8", 1_659_304_900_004, "carts"),
    ]
    assert [(e.reason, e.raw) for e in events if e.reason] == [
        ("no item id", '{"session":"1","event":{"ts":"1659304900001","type":"clicks"}}'),
        ("timestamp not in unit 'ms'", '{"session":"1","event":{"aid":"6","ts":"late","type":"clicks"}}'),
        ("no event type", '{"session":"1","event":{"aid":"7","ts":"1659304900003"}}'),
        ("no readable event", '{"session":"1"}'),
        ("no readable event", lines[2]),
        ("not one JSON object", lines[3]),
        ("no readable event", lines[4]),
        ("no user id", '{"event":{"aid":"5","ts":"1659304900000","type":"clicks"}}'),
    ]
    assert len({e.order for e in events}) == len(events)
    assert items == []


def test_amazon_2014(read):
    reviews = [
        '{"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", "reviewerName": "J. McDonald", "helpful": [2, 3], '
        '"reviewText": "Great {purchase}, \\"though\\"!", "overall": 5.0, "unixReviewTime": 1252800000, '
        '"reviewTime": "09 13, 2009"}',
        '{"reviewerID": "A2SUAM1J3GNN3B", "asin": "0000013714", "overall": 5.0}',
    ]
    metadata = [
        "{'asin': '0000013714', 'title': \"Blood and Roses: One Family's Struggle\", 'price': 5.98, 'related': "
        "{'also_bought': ['0061430765']}, 'salesRank': {'Books': 326205}, 'brand': 'Dr. Seuss', "
        "'categories': [['Beauty', 'Hair Care', 'Styling Tools'], ['Beauty', 'Make\\xa0up']]}",
        "{'asin': '0005069491', 'title': 'half \\ud83d', 'description': None, 'categories': [['Toys & Games']]}",
        "{'asin': '0000000001', 'title': __import__('os').getcwd()}",
        "['0000000002']",
        "{'title': 'no id'}",
    ]
    events, items = read(
        {
            "reviews_Books_5.json.gz": "\n".join(reviews),
            "meta_Books.json.gz": "\n".join(metadata).encode() + b"\n{'asin': '\xe9'}\n",
        },
        "amazon", interactions="reviews_*", items="meta_*",
    )  # fmt: skip
    assert [(e.user_id, e.item_id, e.ts, e.event) for e in events[:1]] == [
        ("A2SUAM1J3GNN3B", "0000013714", 1_252_800_000_000, None)
    ]
    assert (events[1].reason, events[1].raw) == ("no timestamp", reviews[1])
    assert [(i.item_id, i.text) for i in items if i.reason is None] == [
        ("0000013714", "Blood and Roses: One Family's Struggle\nDr. Seuss\nBeauty Hair Care Styling Tools Make\xa0up"),
        ("0005069491", "half ?\nToys & Games"),
    ]
    assert [(i.reason, i.raw) for i in items if i.reason] == [
        ("not one Python literal of an item", metadata[2]),
        ("not one Python literal of an item", metadata[3]),
        ("no item id", metadata[4]),
        ("item id not in UTF-8", "{'asin': '\ufffd'}"),
    ]


def test_amazon_2018_and_2023_in_one_folder(read):
    review_2018 = (
        '{"overall": 5.0, "verified": true, "reviewTime": "09 1, 2016", "reviewerID": "A3CIUOJXQ5VDQ2", '
        '"asin": "B0000530HU", "style": {"Size:": " 7.0 oz"}, "unixReviewTime": 1472688000}\n'
    )
    review_2023 = (
        '{"rating": 5.0, "title": "Such a lovely scent", "images": [], "asin": "B00YQ6X8EO", "parent_asin": '
        '"B00YQ6X8E0", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588687728923, "helpful_vote": 0}\n'
    )
    ratings_2023 = "user_id,parent_asin,rating,timestamp\nAFKZENTNBQ7A7V7UXW5JJI6UGRYQ,0005946468,5.0,1486016001000\n"
    metadata_2018 = (
        '{"category": ["All Beauty", "Hair"], "tech1": "", "description": ["Loud"], "title": "Loud \'N Clear&trade;", '
        '"also_buy": [], "brand": "idea village", "main_cat": "All Beauty", "asin": "B0000530HU"}\n'
    )
    metadata_2023 = (
        '{"main_category": "All Beauty", "title": "Howard LC0008", "average_rating": 4.8, "features": [], "price": '
        'null, "store": "Howard Products", "categories": ["Care", "Soap"], "parent_asin": "B00YQ6X8E0", '
        '"bought_together": null}\n'
    )
    files = {
        "1/All_Beauty.json": review_2018, "1/All_Beauty.jsonl": review_2023, "1/Books.csv.gz": ratings_2023 + "u,i\n",
        "2/meta_2018.json": metadata_2018 + "{}\n", "2/meta_2023.jsonl": metadata_2023,
        "2/meta_2014.json": "{'asin': 'old', 'title': 'T', 'brand': '', 'categories': [['C']]}",
    }  # fmt: skip
    events, items = read(files, "amazon", interactions="1", items="2")
    assert [(e.user_id, e.item_id, e.ts, e.reason) for e in events] == [
        ("A3CIUOJXQ5VDQ2", "B0000530HU", 1_472_688_000_000, None),
        ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8E0", 1_588_687_728_923, None),
        ("AFKZENTNBQ7A7V7UXW5JJI6UGRYQ", "0005946468", 1_486_016_001_000, None),
        ("u", "i", None, "not 4 CSV fields"),
    ]
    assert [(i.item_id, i.text, i.reason) for i in items] == [
        ("old", "T\nC", None),
        ("B0000530HU", "Loud 'N Clear&trade;\nidea village\nAll Beauty Hair", None),
        (None, "", "no item id"),
        ("B00YQ6X8E0", "Howard LC0008\nHoward Products\nCare Soap", None),
    ]


def test_foodcom(read):
    interactions = (
        "user_id,recipe_id,date,rating,review\n"
        '38094,40893,2003-02-17,4,"Great with a salad.\nCooked on top of stove, 15 minutes."\n'
        '8937,,2002-12-01,5,"So ""simple"", so delicious!"\n'
        "1,2,yesterday,5,\n"
    )
    recipes = (
        "name,id,minutes,contributor_id,submitted,tags,nutrition,n_steps,steps,description,ingredients,n_ingredients\n"
        "arriba   baked winter squash,137739,55,47892,2005-09-16,\"['60-minutes-or-less', 'mexican']\","
        '"[51.5, 0.0]",2,"[\'mix\', \'bake\']","autumn is my favorite time,\r\nit\'s ""squash"" time",'
        "\"['winter squash', 'olive oil']\",7\n"
        "cut off,31490,30\n"
    )
    events, items = read(
        {"RAW_interactions.csv": interactions, "RAW_recipes.csv": recipes},
        "foodcom", interactions="RAW_interactions.csv", items="RAW_recipes.csv",
    )  # fmt: skip
    assert [(e.user_id, e.item_id, e.ts) for e in events[:1]] == [("38094", "40893", 1_045_440_000_000)]
    assert reasons(events) == [None, "no item id", "timestamp not in unit 'iso'"]
    assert items[0].item_id == "137739"
    assert items[0].text == (
        'arriba   baked winter squash\nautumn is my favorite time,\r\nit\'s "squash" time\n60-minutes-or-less mexican'
    )
    assert [(i.reason, i.raw) for i in items[1:]] == [("not 12 CSV fields", "cut off,31490,30")]


@pytest.mark.parametrize("nested", [False, True])
def test_tencentgr(read, nested):
    event = pa.struct([("item_id", pa.int64()), ("action_type", pa.int64()), ("timestamp", pa.int64())])
    first = [(20_000_000_004, 0, 1_746_421_490), (5, 1, 1_746_501_023), (5, 2, 1_746_501_079)]
    second = [(6, 3, 1_746_501_079), (7, None, 1_746_501_079), (None, 1, 1_746_501_079), (8, 1, None)]
    seqs = [[dict(zip(event.names, e, strict=True)) for e in seq] for seq in (first, second)]
    seq = pa.table({"user_id": [15, 16, 17], "seq": pa.array([*seqs, None], pa.list_(event))})
    features = {"100": [6, 2], "101": [31, None], "99": [7, 8]}
    if nested:  # as in the tables of the Hugging Face release
        features = {
            name: [{"cold_start": 0, "feature_value": None if value is None else str(value)} for value in values]
            for name, values in features.items()
        }
    item_feat = pa.table({"item_id": [20_000_000_004, 5], **features, "110": [[1, 2], []], "note": ["x", "y"]})
    events, items = read(
        {"seq/0.parquet": seq, "item_feat/0.parquet": item_feat, "indexer.pkl": "never opened"},
        "tencentgr", interactions="seq/*.parquet", items="item_feat/*.parquet",
    )  # fmt: skip
    assert [(e.user_id, e.item_id, e.ts, e.event) for e in events[:3]] == [
        ("15", "20000000004", 1_746_421_490_000, "exposure"),
        ("15", "5", 1_746_501_023_000, "click"),
        ("15", "5", 1_746_501_079_000, "conversion"),
    ]
    unknown = "no known action_type"
    assert reasons(events) == [None] * 3 + [unknown, unknown, "no item id", "no timestamp", "no readable event"]
    assert events[3].raw == '{"user_id":16,"event":{"item_id":6,"action_type":3,"timestamp":1746501079}}'
    assert [(i.item_id, i.text) for i in items] == [
        ("20000000004", "99=7\n100=6\n101=31\n110=1 110=2"),
        ("5", "99=8\n100=2"),
    ]


def test_tables_of_another_layout_are_refused(read):
    log = pa.table({"user_id": [1], "seq": [[{"item_id": 1, "action_type": 0, "timestamp": 1}]]})
    with pytest.raises(ValueError, match=r'no column "seq" \(data.format = \'tencentgr\'\); it has: user_id$'):
        read({"seq.parquet": log.drop(["seq"])}, "tencentgr", interactions="seq.parquet")
    with pytest.raises(ValueError, match='no column "100"'):
        read(
            {"seq.parquet": log, "items.parquet": pa.table({"item_id": [1]})},
            "tencentgr", interactions="seq.parquet", items="items.parquet",
        )  # fmt: skip
