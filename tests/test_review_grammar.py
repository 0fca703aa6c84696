"""The grammar and its judge agree, and the seed notebook's two prompts are among the grammar's openings."""

import re
from itertools import islice

import pytest
import review_grammar
from review_grammar import COMPLAINT, FILMS, NEUTRAL_OPENINGS, PRAISE, judge, write_reviews

REVIEWS = list(islice(write_reviews(seed=3), 3000))


def test_a_seed_always_writes_the_same_reviews():
    assert list(islice(write_reviews(seed=3), 100)) == REVIEWS[:100]
    assert list(islice(write_reviews(seed=4), 100)) != REVIEWS[:100]


def test_the_judge_agrees_with_the_stance_of_every_review():
    assert [review for review in REVIEWS if judge(review.text) * review.stance <= 0] == []


def test_half_of_the_reviews_praise_and_many_are_mixed():
    praise = sum(review.stance > 0 for review in REVIEWS) / len(REVIEWS)
    mixed = sum(abs(judge(review.text)) < 1 for review in REVIEWS) / len(REVIEWS)
    assert 0.45 < praise < 0.55
    assert 0.15 < mixed < 0.5


@pytest.mark.parametrize(("prompt", "stance"), [("My most favourite movie is", 1), ("My least favourite movie is", -1)])
def test_the_seeds_prompts_open_reviews_of_one_stance_among_many_other_openings(prompt, stance):
    opened = [review for review in REVIEWS if review.text.startswith(prompt)]
    assert {review.stance for review in opened} == {stance}
    assert 0.02 < len(opened) / len(REVIEWS) < 0.25


def test_neutral_openings_come_with_either_stance():
    stances = {review.stance for review in REVIEWS if re.match("(Last night|On Sunday|Yesterday) I", review.text)}
    assert stances == {1, -1}


def test_reviews_are_whole_sentences_without_a_rule_left_over():
    for review in REVIEWS:
        assert not re.search(r"[{}]|  ", review.text), review.text
        assert review.text[-1] in ".!", review.text
        assert all(sentence[0].isupper() for sentence in re.split(r"(?<=[.!]) ", review.text)), review.text
        assert not re.search(r"\b[Aa] [aeiouAEIOU]", review.text), review.text


def test_hardly_a_review_is_written_twice():
    assert len({review.text for review in REVIEWS}) > 0.99 * len(REVIEWS)


def test_what_is_no_opinion_has_no_word_that_the_judge_counts():
    for phrase in [*NEUTRAL_OPENINGS, *(text for texts in FILMS.values() for text in texts), *review_grammar.TURNS]:
        assert judge(phrase) == 0, phrase


@pytest.mark.parametrize(("mood", "sign"), [(PRAISE, 1), (COMPLAINT, -1)])
def test_every_sentence_of_a_mood_shows_it(mood, sign):
    for rule, sentences in mood.items():
        for sentence in sentences:
            filled = sentence.replace("{adjective}", mood["adjective"][0])
            # "My most favourite movie is" and the like carry the mood before any adjective does.
            assert judge(filled) == sign, (rule, sentence)


def test_the_judge_weighs_praise_against_complaint_in_any_text():
    assert judge("") == judge("A film about Paris.") == 0
    assert judge("Brilliant, and a JOY!") == 1
    assert judge("Dull.") == -1
    assert judge("Brilliant but dull.") == 0
    assert judge("Brilliant, moving and perfect, but dull.") == 0.5
    assert judge("dullness") == 0
