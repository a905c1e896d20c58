from hypothesis import given
from hypothesis import strategies as st

from services.environments.rewards import exact_match, f1, normalise

texts = st.text(alphabet="ab the.,X ", max_size=20)


def test_normalisation_drops_case_punctuation_articles_and_spare_white_space() -> None:
    assert normalise("  The U.S.\tDollar, an  Example!") == "us dollar example"


def test_an_article_inside_a_word_stays() -> None:
    assert normalise("Athens, Thebes, Ana") == "athens thebes ana"


def test_exact_match_takes_any_gold_answer() -> None:
    assert exact_match("the Kabul.", ["Herat", "kabul"]) == 1.0
    assert exact_match("Kabul city", ["Herat", "kabul"]) == 0.0
    assert exact_match("Kabul", []) == 0.0


def test_f1_counts_common_tokens_as_a_multiset() -> None:
    assert f1("new new delhi", ["New Delhi"]) == 2 * 2 / 5
    assert f1("Paris", ["New Delhi"]) == 0.0


def test_yes_and_no_are_ordinary_answers_for_f1() -> None:
    assert f1("yes it does", ["yes"]) == 0.5
    assert f1("no", ["yes"]) == 0.0


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
