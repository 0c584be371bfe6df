"""Telling words of literal texts."""

import numpy as np

from gid.words import telling_words, words_of_nodes


def test_telling_words_are_frequent_here_and_rare_elsewhere():
    texts = ["red shoe Running", "red SHOE", "shoe laces red", "blue phone case", "phone case", "red phone"]
    words = telling_words(texts, np.array([0, 0, 0, 1, 1, 1]), 3)
    assert words[0][0] == "shoe"
    assert set(words[1][:2]) == {"phone", "case"}
    assert "red" not in words[1]
    assert words[2] == []
    assert telling_words(["", ""], np.array([0, 1]), 2) == [[], []]


def test_words_of_some_nodes_of_the_tree():
    gids = np.array([[0, 0], [0, 1], [0, 1], [1, 0], [1, 1], [1, 1], [2, 2]])
    texts = ["red shoe", "red boot", "red boot", "phone", "phone case", "phone case", ""]
    table = {"row": np.array([6, 5, 4, 3, 2, 1, 0]), "text": texts[::-1], "num_train": np.ones(7, int)}
    words = words_of_nodes(gids, table, [(0,), (1, 1), (0, 1), (1,), (7,)])
    assert words[0,][0] == "red"
    assert words[1,][0] == "phone"
    assert words[0, 1][0] == "boot"
    assert words[1, 1][0] == "case"
    assert words[7,] == []
    assert words_of_nodes(gids, table, []) == {}
