import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.environments.rewards import exact_match, f1, format_reward, normalise

pytestmark = pytest.mark.pure

texts = st.text(alphabet="ab the.,X ", max_size=20)


def test_normalisation_drops_case_punctuation_articles_and_white_space() -> None:
    assert normalise("  The U.S.\tDollar, an  Example!") == "us dollar example"


def test_an_article_inside_a_word_stays() -> None:
    assert normalise("Athens, Thebes, Ana") == "athens thebes ana"


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("Sa\u0303o Tome\u0301", "São Tomé"),
        ("Rubik’s “cube”", 'Rubik\'s "cube"'),
        ("1914–1918", "1914-1918"),
        ("Jean\u2011Paul", "Jean-Paul"),
        ("wait…", "wait..."),
        ("New\u00a0York\u200b", "New York"),
        ("O\u02bcNeil\u200e", "O'Neil"),
        ("Hawai\u02bbi", "Hawai\u2018i"),
        ("\uff11\uff19\uff18\uff17\u3002", "1987"),  # fullwidth digits, and a full stop of Japanese
        ("\u300cTokyo\u300d", "Tokyo"),
        ("The \ufb01sh", "fish"),
        ("?", "?"),
        (" … ", "…"),
    ],
)
def test_spellings_of_one_answer_are_equal(said: str, gold: str) -> None:
    assert exact_match(said, [gold]) == f1(said, [gold]) == 1.0


@pytest.mark.parametrize(
    ("said", "gold"), [("!", "?"), ("", "?"), ("a", "?"), ("\u200b", "a"), ("Sao", "São"), ("10²", "102"), ("½", "12")]
)
def test_other_answers_stay_others(said: str, gold: str) -> None:
    assert exact_match(said, [gold]) == 0.0


def test_marks_without_end_are_compared_in_linear_time() -> None:
    text = "\u0301\u0327" * 200_000
    began = time.monotonic()
    assert exact_match("a" + text, ["b" + text]) == 0.0
    assert time.monotonic() - began < 1.0


def test_exact_match_takes_any_gold_answer() -> None:
    assert exact_match("the Kabul.", ["Herat", "kabul"]) == 1.0
    assert exact_match("Kabul city", ["Herat", "kabul"]) == 0.0
    assert exact_match("Kabul", []) == 0.0


def test_f1_counts_common_tokens_as_a_multiset() -> None:
    assert f1("new new delhi", ["New Delhi"]) == 2 * 2 / 5
    assert f1("Paris", ["New Delhi"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "targets", "score"),
    [
        ("yes no", ["yes"], 0.0),
        ("yes it does", ["yes"], 0.0),
        ("no", ["yes"], 0.0),
        ("Yes.", ["yes"], 1.0),
        ("yes", ["Yes, Prime Minister"], 0.0),
        ("noanswer", ["no answer"], 0.0),
        ("no", ["no man", "the no"], 1.0),
        ("nobody", ["nobody knows"], 2 / 3),
    ],
)
def test_yes_and_no_are_right_or_wrong_as_a_whole(answer: str, targets: list[str], score: float) -> None:  # HotpotQA's
    assert f1(answer, targets) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reward", "judged", "answered", "kept", "total"),
    [
        ("em", 1.0, True, True, 1.0),
        ("em", 1.0, True, False, 0.8),
        ("em", 0.0, True, True, 0.2),
        ("em", 0.0, True, False, 0.1),
        ("em", 0.0, False, False, 0.0),
        ("f1", 0.5, True, True, 0.5),
        ("f1", 0.5, True, False, 0.3),
        ("f1", 0.1, True, False, -0.1),
        ("f1", 0.0, True, True, 0.2),
        ("f1", 0.0, True, False, 0.0),
        ("f1", 0.0, False, False, 0.0),
    ],
)
def test_the_shape_tree_grpo_is_that_of_its_code(reward: str, judged: float, answered: bool, kept: bool, total: float) -> None:
    shape = format_reward("tree_grpo", judged, answered=answered, well_formed=kept, reward=reward, penalty=9.0)
    assert judged + shape == pytest.approx(total)


def test_the_shape_penalty_takes_off_once_and_adds_nothing() -> None:
    for judged, answered, kept in product((0.0, 0.5, 1.0), (True, False), (True, False)):
        shape = format_reward("penalty", judged, answered=answered, well_formed=kept, reward="em", penalty=0.3)
        assert shape == (0.0 if kept else -0.3)


def test_a_judgement_is_linear_in_answer_and_gold_answers() -> None:
    said, targets = " ".join(map(str, range(20_000))), [str(number) for number in range(20_000)]
    began = time.process_time()
    assert f1(said, targets) == pytest.approx(2 / 20_001)
    assert exact_match(said, targets) == 0.0
    assert time.process_time() - began < 2.0


@given(texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_one_more_gold_answer_never_lowers_f1(answer: str, targets: list[str], more: str) -> None:
    assert f1(answer, [*targets, more]) >= f1(answer, targets)
    assert f1(answer, [more, *targets]) == f1(answer, [*targets, more])


@given(texts, texts)
def test_f1_is_symmetric_and_exact_match_is_its_maximum(answer: str, target: str) -> None:
    assert f1(answer, [target]) == f1(target, [answer])
    assert exact_match(answer, [target]) <= f1(answer, [target]) <= 1.0


@given(st.lists(st.sampled_from("bcdef"), min_size=1, max_size=5), st.integers(min_value=0, max_value=4))
def test_f1_grows_with_every_right_token(gold: list[str], said: int) -> None:
    target = " ".join(gold)
    scores = [f1(" ".join(gold[:length]), [target]) for length in range(min(said, len(gold)) + 1)]
    assert scores == sorted(scores)
