"""The grammar and its judge agree, and reviews are as they should be."""

from itertools import islice

from review_grammar import judge, write_reviews

REVIEWS = list(islice(write_reviews(seed=3), 3000))


def test_the_judge_agrees_with_the_stance_of_every_review_and_stances_are_even_and_often_mixed():
    assert [review for review in REVIEWS if judge(review.text) * review.stance <= 0] == []
    assert 0.45 < sum(review.stance > 0 for review in REVIEWS) / len(REVIEWS) < 0.55
    assert 0.15 < sum(abs(judge(review.text)) < 1 for review in REVIEWS) / len(REVIEWS) < 0.5
