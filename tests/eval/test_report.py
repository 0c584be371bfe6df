"""The report: what the page says, that it needs nothing else, that nothing of the data is markup."""

import re
from html.parser import HTMLParser

import pytest

from eval import report
from eval.explain import Event, Person, Recommended
from eval.report import Names
from eval.table import Results

HOUR = 3_600_000
EVIL = "<script>alert('&')</script>"


def estimate(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half}


@pytest.fixture
def results():
    def metrics(scale):
        return {name: estimate(scale * mean) for name, mean in (("recall@10", 0.2), ("ndcg@10", 0.1), ("mrr@10", 0.08))}

    models = {"ColaRec": metrics(1), "ColaRec, dense": metrics(0.9), f"knn {EVIL}": metrics(0.5)}
    leads = {name: estimate(0.1) | {"over": f"knn {EVIL}"} for name in models["ColaRec"]}
    two = {model: {name: of[name] for name in ("recall@10", "ndcg@10")} for model, of in models.items()}
    one = {"kind": "event", "num_users": 7, "num_targets": 1234, "models": two, "lead": leads}
    slices = [one | {"name": "view", "what": "view events"}, one | {"name": "x", "what": f"{EVIL} events"}]
    curves = {name: [0.01 * k for k in range(1, 11)] for name in models}
    return Results(f"shop {EVIL}", {"data": "shop", "split": EVIL}, models, leads, 1234, slices, curves)


@pytest.fixture
def people():
    history = [Event(1, 1, 0), Event(2, 2, 2 * HOUR)]
    shown = [
        Recommended(3, 1.5, True, [(1, 0.75), (0, -0.25)]),
        Recommended(4, 1.25, False, []),
    ]
    hit = Person(5, history, [(Event(3, 2, 4 * HOUR), 1)], shown)
    return [hit, Person(0, [], [(Event(3, 0, -1), 0)], shown[1:])]


@pytest.fixture
def names():
    items = {1: "Red shoe", 2: f"Boot {EVIL}", 3: "Lace", 4: "Sole"}
    return Names(items, ["view", "buy"], {3: (7, 1), 4: (7, 2)}, {(7,): ["shoe", EVIL], (7, 1): []}, True)


def text_of(page: str) -> str:
    class Text(HTMLParser):
        found, quiet = "", False

        def handle_starttag(self, tag, attrs):
            self.quiet = tag == "style"

        def handle_data(self, data):
            self.found += "" if self.quiet else f"{data} "

    parser = Text()
    parser.feed(page)
    return " ".join(parser.found.split())


def test_the_page_says_it(results, people, names):
    page = report.page(results, people, names)
    text = text_of(page)
    assert "ColaRec is above the best other model" in text
    assert "+0.1000 (+0.0900 to +0.1100)" in text
    assert "User 1 5 events known, hit at 1" in text
    assert "User 2 0 events known, no hit" in text
    assert "without 3 other events" in text
    assert "Red shoe view, 4.0 h before" in text
    assert "Lace buy ✓ at 1" in text
    assert "Lace ✗ not recommended" in text
    assert "7 shoe, <script>" in text
    assert "+0.75 Boot" in text
    assert "-0.25 Red shoe" in text
    for heading in ("Models", "Recall by length of the list", "By the event type of the target", "2 users", "Protocol"):
        assert heading in text
    assert "1,234" in text
    assert page.count("<svg") == 4  # recall, ndcg, curves, a kind of slice


def test_nothing_of_the_data_is_markup_and_nothing_is_loaded(results, people, names):
    page = report.page(results, people, names)
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "@import" not in page
    assert page.encode("utf-8").decode("utf-8") == page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page == report.page(results, people, names)


def test_a_lead_that_may_be_nothing_is_said_to_be_none(results, people, names):
    results.lead["recall@10"] |= {"low": -0.1}
    results.lead["ndcg@10"] |= {"low": -0.2, "high": -0.1}
    text = text_of(report.page(results, people, names))
    assert "By recall@10, ColaRec is not distinguishable from the best other model" in text
    assert "By ndcg@10, ColaRec is below the best other model" in text


def test_sections_without_content_are_left_out(results, names):
    alone = Results("shop", {}, {"ColaRec": results.models["ColaRec"]}, {}, 3)
    text = text_of(report.page(alone, [], names))
    assert "Slices" not in text
    assert "users" in text
    assert "Recall by length" not in text
    assert "lead" not in text


def test_items_without_text_are_called_by_their_id():
    assert report._title("  a\n b ", "i1") == "a b"
    assert report._title("", "i1") == "i1"
    assert len(report._title("x" * 500, "i1")) == report.MAX_TITLE
