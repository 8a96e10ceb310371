"""Rewards against a table of the mistakes that public reward functions made, and against hostile text."""

import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepvideo_r1.core import Sample
from deepvideo_r1.reward import (
    accuracy_reward, format_reward, interval_iou, iou_reward, normalise_text, parse_number, parse_response, parse_span,
    read_block, read_choice, total_reward,
)

OPTIONS = ("an onion", "a rope", "the rope of a boat", "a dog")


def say(answer):
    return f"<think>because</think>\n<answer>{answer}</answer>"


# --- form ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    say("A"), "\n " + say("A") + " \n", "<think></think><answer></answer>",
    "<think>a\nb</think>\r\n\t<answer>1\n2</answer>",
    "<think>x < y > z</think><answer><b></answer>", "<think><Think></think><answer>A</answer>",
])
def test_well_formed(text):
    assert format_reward(text) == 1.0 and parse_response(text).is_well_formed


@pytest.mark.parametrize("text", [
    "", "A", "<answer>A</answer>", "<think>a</think>", "<answer>A</answer><think>a</think>",
    "<think>a</think> so <answer>A</answer>",  # words between
    "so <think>a</think><answer>A</answer>", say("A") + ".", say("A") + "<|im_end|>",  # words around
    say("A") + say("A"), say("A") + "<answer>B</answer>", "<think>a</think>" + say("A"),  # repeated
    "<think><think>a</think></think><answer>A</answer>", "<think>a<answer>A</answer></think>",  # nested
    "<think>a<answer></think>A</answer>", "</think>a<think><answer>A</answer>", "<think>a</think><answer>A",  # broken
    "<THINK>a</THINK><ANSWER>A</ANSWER>", "<think >a</think><answer>A</answer>", "< think>a</think><answer>A</answer>",
])
def test_ill_formed(text):
    assert format_reward(text) == 0.0


def test_the_answer_is_read_even_where_the_form_is_wrong():
    assert accuracy_reward("<answer>A</answer>", "A") == 1.0
    assert accuracy_reward("well <answer>A</answer> yes", "A") == 1.0


def test_two_answers_are_no_answer():
    assert accuracy_reward("<think>a</think><answer>A</answer><answer>B</answer>", "A") == 0.0
    assert accuracy_reward("<think>a</think><answer>A</answer><answer>B</answer>", "B") == 0.0
    assert read_block("<answer>A</answer><answer>A</answer>", "answer") is None


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [
    "B", "b", "B.", "B)", "(B)", "(b)", "[b]", "B:", "Answer: B", "answer b", "The answer is B",
    "the correct answer is (B).",
    "The best option is: b", "Option B", "choice: B", "B. a rope", "(B) a rope", "B: A ROPE.", "B - a rope", "a rope",
    "A  rope.",
    "Answer: a rope", " B \n", "**B**", "`b`", '"B"', "（B）", "B。", "B. a rope, since it is long", "B.a rope",
])
def test_the_second_option(answer):
    assert accuracy_reward(say(answer), "B", options=OPTIONS) == 1.0
    assert all(accuracy_reward(say(answer), letter, options=OPTIONS) == 0.0 for letter in "ACD")


@pytest.mark.parametrize("answer", [
    "", " ", ".", "()", "AB", "A B", "A or B", "A and B", "A, B", "A/B", "A) B)", "A. B. C. D.", "(A)(B)(C)",
    "A. a rope",
    "B. an onion", "Bad", "because", "Dogs", "cab", "a cat", "rope", "I think it is", "none", "answerb", "the answer",
    "optional",
    "e.g. a rope", "1", "B2", "2B", "not B", "Б", "𝐁",
])
def test_no_option(answer):
    for letter in "ABCD":
        assert accuracy_reward(say(answer), letter, options=OPTIONS) == 0.0


@pytest.mark.parametrize("answer, letter, options", [
    ("a", "A", OPTIONS), ("Z", "Z", ()), ("F", "F", tuple("uvwxyz")), ("f.", "F", tuple("uvwxyz")),
    ("one", "A", ("one", "two", "one")), ("one", "C", ("one", "two", "one")),  # an option that occurs twice
    ("B", "B", ("b", "a")),  # a letter is a letter first, even where it is the text of another option
    ("3", "C", ("1", "2", "3")), ("C. 3", "C", ("1", "2", "3")), ("vitamin C", "A", ("vitamin C", "salt")),
    ("A. vitamin C", "A", ("vitamin C", "salt")), ("answer the phone", "B", ("leave", "answer the phone")),
    ("A. an onion", "A", ()), ("B. a dog", "B", ()),
])
def test_options_of_all_kinds(answer, letter, options):
    assert accuracy_reward(say(answer), letter, options=options) == 1.0


def test_the_truth_may_be_spelled_like_an_answer():
    assert accuracy_reward(say("C"), "(C)") == 1.0
    assert accuracy_reward(say("C"), "c") == 1.0


@pytest.mark.parametrize("truth", ["", "AB", "a dog", "1", "A or B", None])
def test_a_truth_that_is_no_letter_is_an_error(truth):
    with pytest.raises(ValueError, match="is no choice"):
        accuracy_reward(say("A"), truth)


def test_empty_does_not_equal_empty():
    assert accuracy_reward(say(""), "A") == 0.0
    for kind in ("choice", "number", "text"):
        with pytest.raises(ValueError):
            accuracy_reward(say(""), "", kind)


def test_tags_are_required_unless_told_otherwise():
    assert accuracy_reward("B", "B") == 0.0
    assert accuracy_reward("B", "B", require_tags=False) == 1.0
    assert accuracy_reward("<answer>A</answer><answer>B</answer>", "B", require_tags=False) == 0.0
    assert accuracy_reward("<answer>B", "B", require_tags=False) == 0.0


# --- numbers and texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, truth, reward", [
    ("42", "42", 1), ("42.0", "42", 1), ("42", "42.00", 1), ("1,000", "1000", 1), ("1000", "1,000", 1),
    ("1,234,567.5", "1234567.5", 1),
    ("-3", "-3", 1), ("−3", "-3", 1), ("+3", "3", 1), ("3.", "3", 1), (".5", "0.5", 1), ("50%", "50", 1), ("50 %",
    "50%", 1),
    ("1e3", "1000", 1), ("Answer: 7", "7", 1), ("The answer is 7.", "7", 1), ("0", "0", 1), ("-0.0", "0", 1),
    ("0.000", "0", 1),
    ("4", "3", 0), ("0.1", "0", 0), ("nan", "3", 0), ("nan", "0", 0), ("inf", "3", 0), ("-inf", "3", 0), ("1e999",
    "3", 0), ("", "3", 0),
    ("three", "3", 0), ("3 apples", "3", 0), ("3 or 4", "3", 0), ("3 4", "3", 0), ("1,00", "100", 0), ("1_000",
    "1000", 0), ("0x10", "16", 0),
    ("10000001", "10000000", 0), ("3.14", "3.1415", 0), ("٣", "3", 0), ("1" + "0" * 400, "3", 0), ("33", "3", 0),
])
def test_numbers(given, truth, reward):
    assert accuracy_reward(say(given), truth, "number") == reward


@pytest.mark.parametrize("truth", ["nan", "inf", "about three", ""])
def test_a_truth_that_is_no_number_is_an_error(truth):
    with pytest.raises(ValueError, match="is no number"):
        accuracy_reward(say("3"), truth, "number")


def test_the_tolerance_of_numbers():
    assert accuracy_reward(say("3.14"), "3.1415", "number", tolerance=1e-2) == 1.0
    assert accuracy_reward(say("0.001"), "0", "number", tolerance=1e-2) == 1.0
    assert accuracy_reward(say("3.2"), "3.1415", "number", tolerance=1e-2) == 0.0


@pytest.mark.parametrize("given, reward", [
    ("the red square", 1), ("The  Red\nsquare", 1), ("  the red square ", 1), ('"the red square"', 1), ("red square",
    0), ("", 0),
    ("the red squares", 0),
])
def test_texts(given, reward):
    assert accuracy_reward(say(given), "The red square", "text") == reward


def test_unknown_kinds_are_refused():
    for kind in ("grounding", "sum", ""):
        with pytest.raises(ValueError, match="allowed are choice, number, text"):
            accuracy_reward(say("3"), "3", kind)


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "1 3", "1.0 to 3.0", "[1, 3]", "(1, 3)", "1s - 3s", "1-3", "1 – 3", "1~3", "from 1 to 3", "From 1s to 3 seconds.",
    "between 1 and 3",
    "1 s, 3 s", "[1.0,3.00]", "1 sec until 3 secs", "1;3",
])
def test_spans_that_are_read(text):
    assert parse_span(text) == (1.0, 3.0)


@pytest.mark.parametrize("text", [
    "", "1", "13", "3 1", "3 to 1", "1 2 3", "-1 3", "1 --3", "nan inf", "inf inf", "1e3 2e3", "0:01 - 0:03",
    "one to three", "1 to", "to 3",
    "step 1 to 3", "1 3 5 7", "1 minute to 3 minutes", "9999999999999 99999999999999",
])
def test_spans_that_are_not(text):
    assert parse_span(text) is None


@pytest.mark.parametrize("span, spans, expected", [
    ((1, 3), [(1, 3)], 1), ((1, 3), [(2, 4)], 1 / 3), ((0, 10), [(2, 4)], 0.2), ((2, 4), [(0, 10)], 0.2), ((0, 1),
    [(2, 3)], 0),
    ((0, 2), [(2, 3)], 0), ((2, 3), [(10, 14), (2, 4)], 0.5), ((0, 14), [(0, 2), (12, 14)], 1 / 7), (None, [(1, 3)], 0),
    ((3, 1), [(1, 3)], 0), ((2, 2), [(1, 3)], 0), ((2, 2), [(2, 2)], 1), ((2, 3), [(2, 2)], 0), ((2, 2), [(3, 3)], 0),
    ((math.nan, 3), [(1, 3)], 0), ((1, math.inf), [(1, 3)], 0), ((-math.inf, math.inf), [(1, 3)], 0), ((-2, 2), [(0,
    2)], 0.5),
])
def test_iou(span, spans, expected):
    reward = iou_reward(span, spans)
    assert isinstance(reward, float) and reward == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("spans", [[], (), (1, 3), [(1, 2, 3)], [(3, 1)], [(math.nan, 1)], [(0, math.inf)]])
def test_true_spans_that_cannot_be_used(spans):
    with pytest.raises(ValueError, match="spans"):
        iou_reward((1, 3), spans)


bounds = st.floats(-1e6, 1e6)


@given(a=st.tuples(bounds, bounds).map(sorted), b=st.tuples(bounds, bounds).map(sorted))
def test_iou_is_a_symmetric_share(a, b):
    assert 0.0 <= interval_iou(a, b) <= 1.0
    assert interval_iou(a, b) == interval_iou(b, a)
    assert interval_iou(a, a) == 1.0
    if interval_iou(a, b) == 1.0:
        assert math.isclose(a[0], b[0], abs_tol=1e-6) and math.isclose(a[1], b[1], abs_tol=1e-6)


# --- the total -------------------------------------------------------------------------------------------------------

CHOICE = Sample(id="c", question="what ?", options=OPTIONS, answer="B", kind="choice")
NUMBER = Sample(id="n", question="how many ?", answer="1,000", kind="number")
TEXT = Sample(id="t", question="what ?", answer="a rope", kind="text")
WHEN = Sample(id="g", question="when ?", kind="grounding", spans=((2.0, 4.0), (10.0, 12.0)))


@pytest.mark.parametrize("sample, answer, total, parts", [
    (CHOICE, "a rope", 2.0, dict(format=1.0, accuracy=1.0)), (CHOICE, "A", 1.0, dict(format=1.0, accuracy=0.0)),
    (NUMBER, "1000", 2.0, dict(format=1.0, accuracy=1.0)), (TEXT, "A Rope", 2.0, dict(format=1.0, accuracy=1.0)),
    (WHEN, "10 to 12", 2.0, dict(format=1.0, iou=1.0)), (WHEN, "3 to 4", 1.5, dict(format=1.0, iou=0.5)),
    (WHEN, "no idea", 1.0, dict(format=1.0, iou=0.0)),
])
def test_totals(sample, answer, total, parts):
    assert total_reward(say(answer), sample) == (total, parts)


def test_weights_change_the_total_and_not_the_parts():
    weights = dict(format_weight=0.5, accuracy_weight=2.0, iou_weight=3.0)
    assert total_reward(say("B"), CHOICE, **weights) == (2.5, dict(format=1.0, accuracy=1.0))
    assert total_reward(say("3 4"), WHEN, **weights) == (2.0, dict(format=1.0, iou=0.5))
    assert total_reward("", WHEN) == (0.0, dict(format=0.0, iou=0.0))


# --- hostile text ----------------------------------------------------------------------------------------------------

pieces = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", "A", "(b)", "answer", "the ", "is", ":", " ", "\n", ".", ",", "1",
    "1,000", "nan",
    "-", "to", "[", "]", "s", "e9", "%", "\u2028", "\x00", "İ", "ß", "٣", "－", "。", "𝟙", "a\u0301",
])
hostile = st.one_of(st.text(max_size=60), st.lists(pieces, max_size=25).map("".join))


@settings(max_examples=400, deadline=None)
@given(text=hostile, wrap=st.booleans(), sample=st.sampled_from([CHOICE, NUMBER, TEXT, WHEN]))
@example(text="İ" * 20, wrap=True, sample=CHOICE)
def test_any_text_gets_a_reward_in_range(text, wrap, sample):
    text = say(text) if wrap else text
    total, parts = total_reward(text, sample)
    assert 0.0 <= total <= 2.0 and total == sum(parts.values())
    assert all(type(part) is float and 0.0 <= part <= 1.0 for part in parts.values())
    assert read_choice(text, options=OPTIONS) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    number, span = parse_number(text), parse_span(text)
    assert number is None or math.isfinite(number)
    assert span is None or 0 <= span[0] <= span[1] < math.inf
    assert " " * 2 not in normalise_text(text)


SIZE = 1_000_000


@pytest.mark.parametrize("piece", [
    "<think>", "</think>", "<answer>", "<", "<think></think><answer></answer>", "a ", "a.", "((", " ", "\n", "1",
    "1,", "1 ", "1,000,", "answer ",
    "the answer is ", "a\u0301\u0316", "İ", ".,:;", "- ", "１", "e",
])
def test_time_is_linear_in_the_length(piece):
    text = piece * (SIZE // len(piece))
    for wrapped in (text, say(text), say("A." + text), say("1" + text), "<think>" + text, text + "</answer>"):
        for sample in (CHOICE, NUMBER, TEXT, WHEN):
            start = time.process_time()
            total_reward(wrapped, sample)
            assert time.process_time() - start < 2.0  # quadratic time would take minutes
