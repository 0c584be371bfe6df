"""Users of a file, and what is known of users."""

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from eval import known
from tests import tiny


@pytest.fixture
def corpus(tmp_path):
    """(its folder, the users' sequences)."""
    config = tiny.tiny_config(tmp_path / "work")
    return config.work_dir / "corpus", tiny.write_corpus(config)


@pytest.mark.parametrize("suffix", ["txt", "csv", "parquet"])
def test_ids_of_a_file_are_found_and_the_unknown_ones_told(corpus, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(known, "IDS_AT_ONCE", 3)  # several pieces
    file, unknown_file = tmp_path / f"ids.{suffix}", tmp_path / "unknown.txt"
    ids = ["u7", "nobody", "u3", "u60", "u7", "u61", "u 1", "u1"]
    if suffix == "txt":
        file.write_text("\n".join(ids) + "\n\n")
    else:
        table = pa.table({"other": range(len(ids)), "user_id": ids})
        pyarrow.csv.write_csv(table, file) if suffix == "csv" else pq.write_table(table, file)
    asked = known.find_users(corpus[0], 60, file, unknown_file)
    assert asked.user_idx.tolist() == [1, 3, 7, 60]
    assert (asked.num_ids, asked.num_unknown, asked.first_unknown) == (8, 3, ("nobody", "u61", "u 1"))
    assert unknown_file.read_text().splitlines() == ["nobody", "u61", "u 1"]
    file.unlink()
    (tmp_path / "good.txt").write_text("u2\n")
    assert known.find_users(corpus[0], 60, tmp_path / "good.txt", unknown_file).user_idx.tolist() == [2]
    assert not unknown_file.exists()  # that of the run before


def test_files_that_are_no_lists_of_users_are_refused(corpus, tmp_path):
    def find(name: str) -> None:
        known.find_users(corpus[0], 60, tmp_path / name, tmp_path / "unknown.txt")

    with pytest.raises(FileNotFoundError, match="no such file"):
        find("missing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no user ids"):
        find("empty.txt")
    (tmp_path / "others.txt").write_text("anna\nbob\n")
    with pytest.raises(ValueError, match=r"none of the 2 user ids .* 'anna' for one"):
        find("others.txt")
    (tmp_path / "others.txt").write_text("anna" * 100_000)
    with pytest.raises(ValueError, match="'annaanna") as error:
        find("others.txt")
    assert len(str(error.value)) < 500
    (tmp_path / "ids.csv").write_text("id\nu1\n")
    with pytest.raises(ValueError, match="user_id"):
        find("ids.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="cannot be read"):
        find("empty.csv")
    (tmp_path / "ids.parquet").write_text("u1\n")
    with pytest.raises(ValueError, match="cannot be read"):
        find("ids.parquet")
    pq.write_table(pa.table({"user_id": [1.0]}), tmp_path / "floats.parquet")
    with pytest.raises(ValueError, match="user_id is of type double"):
        find("floats.parquet")
    pq.write_table(pa.table({"user_id": [None, "u1"]}), tmp_path / "missing.parquet")
    with pytest.raises(ValueError, match="1 ids are missing"):
        find("missing.parquet")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        find("binary.txt")


def test_histories_hold_all_events_of_the_users_asked_for(corpus):
    folder, sequences = corpus
    # As the ETL writes it: several files, users and their events in order.
    table = pq.read_table(folder / "interactions/part-0.parquet")
    (folder / "interactions/part-0.parquet").unlink()
    middle = int(np.searchsorted(table["user_idx"], 31))
    pq.write_table(table.slice(0, middle), folder / "interactions/part-00000.parquet", row_group_size=50)
    pq.write_table(table.slice(middle), folder / "interactions/part-00001.parquet", row_group_size=50)
    histories = known.Histories(folder)
    for users in ([1, 2, 3], [5, 29, 31, 32, 60], [60], list(range(1, 61))):
        ids, block = histories.read(np.array(users))
        assert ids.to_pylist() == [f"u{user}" for user in users]
        assert block.user_idx.tolist() == users
        for row, user in enumerate(users):
            sequence, events = sequences[user - 1], slice(*block.item_idx.offsets[row : row + 2])
            assert block.item_idx.row(row).tolist() == sequence.tolist()
            assert block.ts[events].tolist() == [3_600_000 * t for t in range(len(sequence))]
            assert block.event[events].tolist() == (1 + sequence % 2).tolist()
        assert not block.is_target.any()


def test_a_user_without_events_is_refused(corpus):
    folder, _ = corpus
    file = folder / "interactions/part-0.parquet"
    table = pq.read_table(file)
    pq.write_table(table.filter(pa.array(table["user_idx"].to_numpy() != 4)), file)
    with pytest.raises(ValueError, match="hold different users"):
        known.Histories(folder).read(np.array([3, 4, 5]))
