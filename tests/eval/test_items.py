"""Names of items: their order, what is said of unknown ones, and candidates."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contract import schema
from eval.items import TITLE_CHARS, choose, indices, nearest, read_names


@pytest.fixture
def names(tmp_path):
    """Four items, in two files and not in order."""
    folder = tmp_path / "items.parquet"
    folder.mkdir()
    rows = {3: ("B00-red", "é" * 200), 1: ("A17", None), 4: ("12345", "a title"), 2: ("B00-blue", "another")}
    for part, some in enumerate(([3, 1], [4, 2])):
        columns = [some, *([rows[i][c] for i in some] for c in (0, 1)), [[3]] * 2, [0] * 2, [0] * 2]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema.ITEMS, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema.ITEMS), folder / f"part-{part}.parquet")
    return read_names(tmp_path)


def test_names_are_found_by_item_idx(names):
    assert names.item_id.to_pylist() == ["", "A17", "B00-blue", "B00-red", "12345"]
    assert names.title.to_pylist() == ["", "", "another", "é" * TITLE_CHARS, "a title"]
    np.testing.assert_array_equal(indices(names, ["12345", "A17", "A17"], "--only"), [4, 1, 1])


def test_an_unknown_id_is_refused_with_the_nearest(names):
    with pytest.raises(ValueError, match="--only: item 'B00-ret' is unknown; did you mean 'B00-red'"):
        indices(names, ["A17", "B00-ret"], "--only")
    with pytest.raises(ValueError, match="item '1234' is unknown, as are 2 others; did you mean '12345'"):
        indices(names, ["1234", "x", "y"], "--only")
    assert nearest(names, "") in names.item_idx


def test_candidates_are_what_only_and_exclude_leave(names, tmp_path):
    assert choose(names, None, None) is None
    file = tmp_path / "ids.txt"
    file.write_text("12345\n\nA17\n")
    np.testing.assert_array_equal(choose(names, str(file), None), [1, 4])
    np.testing.assert_array_equal(choose(names, None, "A17, B00-red"), [2, 4])
    np.testing.assert_array_equal(choose(names, str(file), "A17"), [4])
    with pytest.raises(ValueError, match="leave no item"):
        choose(names, "A17", "A17,12345")
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"--exclude .*ids.txt': there are no item ids"):
        choose(names, None, str(file))
