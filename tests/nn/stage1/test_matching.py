"""Pairs of the matching term: who may be a negative, and how often it is."""

import torch

from laser_fast.nn.stage1.matching import draw_negatives, matching_pairs, same_rows

SIMILARITY = torch.tensor([[9.0, 0.0, 1.0, 2.0], [0.5, 9.0, 0.0, 0.0], [0.0, 3.0, 9.0, 1.0], [1.0, 1.0, 1.0, 9.0]])


def test_negatives_are_drawn_in_proportion_to_the_softmax_of_the_similarity() -> None:
    torch.manual_seed(0)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    counts = torch.zeros(4, 4)
    draws = 3000
    for _ in range(draws):
        rows, drawn = draw_negatives(SIMILARITY, same)
        assert rows.tolist() == [0, 1, 2, 3]
        counts[rows, drawn] += 1
    chance = SIMILARITY.masked_fill(same, -torch.inf).softmax(dim=1)
    spread = (chance * (1 - chance) / draws).sqrt()
    assert bool(((counts / draws - chance).abs() <= 4.5 * spread).all())  # a chance of 0 allows no draw at all


def test_equal_sequences_are_found() -> None:
    values = torch.tensor([1, 2, 1, 1, 2, 3, 0, 1])
    bounds = torch.tensor([0, 2, 3, 5, 5, 6, 7, 8], dtype=torch.int32)  # 12, 1, 12, nothing, 3, 0, 1
    expected = torch.eye(7, dtype=torch.bool)
    for one, other in [(0, 2), (1, 6)]:
        expected[one, other] = expected[other, one] = True
    assert torch.equal(same_rows(values, bounds), expected)
    assert same_rows(values[:0], bounds[:1]).shape == (0, 0)


def test_each_user_and_each_text_gets_one_negative() -> None:
    torch.manual_seed(0)
    same = torch.eye(4, dtype=torch.bool)
    same[1, 2] = same[2, 1] = True
    for _ in range(20):
        users, texts, true = matching_pairs(SIMILARITY, same)
        assert users.tolist() == sorted(users.tolist()) and len(users) == 12
        assert sorted(users[true].tolist()) == [0, 1, 2, 3] and torch.equal(users[true], texts[true])
        assert not bool(same[users[~true], texts[~true]].any())
        assert all(int((users[~true] == row).sum()) >= 1 and int((texts[~true] == row).sum()) >= 1 for row in range(4))


def test_negative_users_of_a_text_follow_its_column() -> None:
    similarity = torch.full((3, 3), -50.0)
    similarity[2, 0] = similarity[0, 1] = similarity[1, 2] = 50.0  # the only likely user of each text
    similarity[0, 2] = similarity[1, 0] = similarity[2, 1] = 0.0
    users, texts, true = matching_pairs(similarity, torch.eye(3, dtype=torch.bool))
    negatives = sorted(zip(users[~true].tolist(), texts[~true].tolist(), strict=True))
    assert negatives == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 0), (2, 0)]


def test_rows_without_a_possible_negative_are_left_out() -> None:
    same = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    rows, drawn = draw_negatives(torch.zeros(3, 3), same)
    assert rows.tolist() == [1, 2] and drawn.tolist() == [2, 1]
    users, texts, true = matching_pairs(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert users.tolist() == texts.tolist() == [0, 1] and bool(true.all())
