"""The report: what the page says, that it needs nothing else, and that it is the same for the same dict."""

import copy
import datetime
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from etl import report

REPORT = {
    "name": "shop <i>",
    "time_unit": "ms",
    "filters": [
        {"what": "rows read", "removed": 0, "left": 2000},
        {"what": "bad rows", "removed": 5, "left": 1995},
        {"what": "repeats & $x$", "removed": 995, "left": 1000},
    ],
    "k_core": [{"round": 1, "num_users": 101, "num_items": 51, "num_events": 1001}],
    "quarantine": {
        "log": {"no <b>user</b>": {"num": 5, "example": "<script>alert(1)</script>"}},
        "catalog": {"no item id": {"num": 7, "example": '{"item_id": null}'}},
    },
    "events_by_type": {"view": 750, "<buy>": 250},
    "events_per_user": [[4, 60], [8, 39], [64, 1]],
    "events_per_item": [[0, 10], [16, 40]],
    "activity": [["2024-01-30", 300, 0, 0], ["2024-02-02", 500, 100, 100]],
    "split": {
        "method": "leave_one_out",
        "num_train": 800,
        "num_valid": 100,
        "num_test": 100,
        "num_users": 100,
        "num_items": 50,
        "num_cold_items": 10,
        "num_cold_users": 0,
        "first_valid_ts": 1_706_832_000_000,
        "first_test_ts": None,
        "leak_check": "passed",
    },
    "shards": {
        "train": [
            {"file": "train-00000.tar", "num_users": 51, "num_events": 500},
            {"file": "train-00001.tar", "num_users": 49, "num_events": 300},
        ],
        "valid": [],
    },
    "content": {"num_items_without_text": 3, "vocab_size": 900, "tokens_per_item": [[2, 47]]},
}
SECTIONS = {
    "k_core": "k-core",
    "quarantine": "Quarantine",
    "events_by_type": "Events by type",
    "activity": "Activity over time",
    "shards": "Shards",
    "content": "Content",
}


class Rows(HTMLParser):
    """The rows of the tables, the texts of the headings and the ids."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.headings, self.ids, self.tag = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.tag in ("td", "th", "code", "span") and self.rows:
            self.rows[-1][-1] += data.strip()
        elif self.tag in ("h1", "h2") and data.strip():
            self.headings.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return report.page(REPORT)


def test_the_same_report_gives_the_same_files(tmp_path, page):
    report.write_report(copy.deepcopy(REPORT), tmp_path)
    assert (tmp_path / "report.html").read_text() == page
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == REPORT
    assert list(json.loads(text)) == list(REPORT)
    assert text.startswith('{\n "name"')


def test_the_tables_hold_the_numbers(page):
    rows = Rows(page).rows
    for row in (
        ["rows read", "", "", "2,000", "100.0%"],
        ["bad rows", "5", "0.25%", "1,995", "99.75%"],
        ["repeats & $x$", "995", "49.8%", "1,000", "50.0%"],
        ["1", "101", "51", "1,001"],
        ["no <b>user</b>", "5", "<script>alert(1)</script>"],
        ["no item id", "7", '{"item_id": null}'],
        ["view", "750", "75.0%"],
        ["<buy>", "250", "25.0%"],
        ["train", "800", "80.0%"],
        ["method", "leave one out"],
        ["first valid event", "2024-02-02 00:00:00 UTC"],
        ["cold items, without a train event", "10 of 50 (20.0%)"],
        ["leak check", "passed"],
        ["train", "2", "100", "49 to 51", "800", "300 to 500"],
    ):
        assert row in rows


def test_the_summary_is_told(page):
    assert "Of 2,000 rows, 1,000 events (50.0%) of 100 users on 50 items" in page
    assert "10.0 events per user, 20.0 per item" in page
    assert "“repeats &amp; $x$”: 995" in page
    assert "<b>5</b><span>rows in quarantine</span>" in page
    assert "Median 4 to 7 events, largest 64 to 127." in page
    assert "Median 16 to 31 events, largest 16 to 31." in page


def test_what_the_log_says_is_text_and_never_markup(page):
    for markup in ("<script", "<buy>", "<b>user", "shop <i>"):
        assert markup not in page


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"<(link|script|img|iframe)|src=|@import|url\((?!#)", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    ids = Rows(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        ElementTree.fromstring(figure)
        assert not re.search(r"#00000\d", figure)  # all colours are the page's


@pytest.mark.parametrize("part", SECTIONS)
@pytest.mark.parametrize("gone", ["missing", "empty"])
def test_a_part_that_is_not_there_has_no_section(page, part, gone):
    assert SECTIONS[part] in Rows(page).headings
    rest = {key: value for key, value in REPORT.items() if key != part}
    shown = report.page(rest if gone == "missing" else rest | {part: type(REPORT[part])()})
    assert Rows(shown).headings == [name for name in Rows(page).headings if name != SECTIONS[part]]


def test_the_least_report_is_a_page():
    shown = report.page({key: REPORT[key] for key in ("name", "filters", "split")})
    assert Rows(shown).headings == ["Corpus of shop <i>", "What each filter removed", "Split"]
    assert "quarantine" not in shown
    assert "median" not in shown.lower()


def test_positions_are_not_shown_as_times():
    assert "1970" not in report.page(REPORT | {"time_unit": "order", "split": REPORT["split"] | {"first_valid_ts": 3}})


def test_texts_that_cannot_be_decoded_are_told(page):
    damaged = REPORT | {"content": REPORT["content"] | {"num_items_damaged": 1234}}
    assert "1,234 rows of the catalog hold text that cannot be decoded" in report.page(damaged)
    assert "decoded" not in page


def test_days_become_weeks_and_months():
    def days(num: int) -> list[list]:
        first = datetime.date(2024, 1, 1)  # a Monday
        return [[str(first + datetime.timedelta(n)), 1, n % 2, 0] for n in range(num)]

    date = datetime.date
    assert report.by_period(REPORT["activity"]) == (
        "day",
        {date(2024, 1, 30): [300, 0, 0], date(2024, 2, 2): [500, 100, 100]},
    )
    unit, weeks = report.by_period(days(131))
    assert unit == "week"
    assert list(weeks)[:2] == [date(2024, 1, 1), date(2024, 1, 8)]
    assert list(weeks.values())[:2] == [[7, 3, 0], [7, 4, 0]]
    unit, months = report.by_period(days(1000))
    assert unit == "month"
    assert list(months.items())[1] == (date(2024, 2, 1), [29, 15, 0])
    assert sum(month[0] for month in months.values()) == 1000


def test_the_bars_of_a_histogram_leave_room_for_empty_bins():
    axes = Figure().add_subplot()
    report.draw_histogram(axes, [[0, 9], [1, 5], [8, 2]], "items", "events")
    assert [bar.get_height() for bar in axes.patches] == [9, 5, 0, 0, 2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "4", "8"]


def test_the_waterfall_goes_down_by_what_is_removed():
    axes = Figure().add_subplot()
    report.draw_filters(axes, REPORT["filters"])
    left, removed = ([(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers)
    assert left == [(0, 2000), (0, 1995), (0, 1000)]
    assert removed == [(2000, 0), (1995, 5), (1000, 995)]
    assert [text.get_text() for text in axes.texts] == ["\N{MINUS SIGN}5", "\N{MINUS SIGN}995"]


def test_shares_do_not_hide_the_few():
    assert [report.share(part, 100_000) for part in (0, 1, 990, 50_000, 99_999, 100_000)] == [
        "0.0%",
        "< 0.01%",
        "0.99%",
        "50.0%",
        "> 99.99%",
        "100.0%",
    ]
