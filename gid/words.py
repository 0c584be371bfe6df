"""Words that tell what is below a node of the tree."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import scipy.sparse as sp

NUM_WORDS = 8
MAX_TEXTS = 100_000  # items whose words are counted, the most popular ones
WORD = re.compile(r"[^\W\d_]{3,}")


def popular_texts(corpus: Path, most: int = MAX_TEXTS) -> dict:
    """{"row": item_idx - 1, "text", "num_train"} of at most `most` items, the most popular first."""
    table = pads.dataset(corpus / "items.parquet", format="parquet").to_table(columns=["item_idx", "num_train"])
    row, popularity = table["item_idx"].to_numpy() - 1, table["num_train"].to_numpy()
    kept = np.lexsort((row, -popularity))[:most]
    texts = pads.dataset(corpus / "items.parquet", format="parquet").take(kept, columns=["text"])["text"].to_pylist()
    return {"row": row[kept], "text": [text or "" for text in texts], "num_train": popularity[kept]}


def telling_words(texts: list[str], group: np.ndarray, num_groups: int) -> list[list[str]]:
    """Per group the words w of the largest p(w | group) log(p(w | group) / p(w)); p counts texts, not occurrences."""
    vocabulary: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        found = {vocabulary.setdefault(word, len(vocabulary)) for word in set(WORD.findall(text.lower()))}
        rows += [row] * len(found)
        columns += sorted(found)
    if not vocabulary:
        return [[] for _ in range(num_groups)]
    has_word = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(texts), len(vocabulary)))
    member = sp.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))), (num_groups, len(texts)))
    in_group = (member @ has_word).tocsr()
    overall = np.asarray(has_word.mean(axis=0)).ravel()
    words, sizes = np.array(list(vocabulary)), np.bincount(group, minlength=num_groups)
    result = []
    for k in range(num_groups):
        part = in_group[[k]]
        often = part.data >= min(3, 0.5 * sizes[k])  # a word of one text tells of the text
        share = part.data[often] / max(sizes[k], 1)
        score = share * np.log(share / overall[part.indices[often]])
        best = np.lexsort((words[part.indices[often]], -score))[:NUM_WORDS]
        result.append(words[part.indices[often][best[score[best] > 0]]].tolist())
    return result


def words_of_nodes(gids: np.ndarray, table: dict, nodes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], list[str]]:
    """{node: its telling words}; a node is a prefix of codes, of any length.

    Args:
        gids: int (I, l); table: as `popular_texts` returns it.
    """
    gids, words = gids[table["row"]].astype(np.int64), {}
    base = 1 + gids.max(initial=0)
    for level in sorted({len(node) for node in nodes}):
        shown = sorted({node for node in nodes if len(node) == level})
        powers = base ** np.arange(level)[::-1]
        key, item_key = np.array(shown) @ powers, gids[:, :level] @ powers
        place = np.minimum(np.searchsorted(key, item_key), len(key) - 1)
        group = np.where(key[place] == item_key, place, len(shown))  # the last group: below none of them
        words |= dict(zip(shown, telling_words(table["text"], group, len(shown) + 1), strict=False))
    return words
