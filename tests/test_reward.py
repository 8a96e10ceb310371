"""Rewards against a table of the mistakes that public reward functions made, and against hostile text."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from deepvideo_r1.answers import parse_spans
from deepvideo_r1.core import Sample
from deepvideo_r1.judges import mean_relative_accuracy, relative_accuracy, sentence_similarity, word_accuracy
from deepvideo_r1.reward import (
    accuracy_reward, format_reward, interval_iou, iou_reward, merge_spans, normalise_text, parse_number,
    parse_response, parse_span, read_block, read_choice, total_reward, union_iou_reward,
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
        with pytest.raises(ValueError, match="allowed are choice, number, text, ocr, free_form, regression, mra"):
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


# --- unions of intervals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicted, spans, expected", [
    ([(1, 3)], [(1, 3)], 1), ([(1, 3)], [(2, 4)], 1 / 3), ([(0, 6)], [(0, 2), (4, 6)], 4 / 6), (None, [(1, 3)], 0),
    ([], [(1, 3)], 0),
    ([(0, 2), (4, 6)], [(4, 6), (0, 2)], 1), ([(0, 2), (1, 3)], [(0, 3)], 1), ([(0, 2)] * 5, [(0, 4)], 0.5),
    ([(0, 1), (2, 3)], [(1, 2)], 0), ([(2, 1)], [(1, 2)], 0), ([(1, 2), (2, 1)], [(1, 2)], 0),
    ([(math.nan, 2)], [(1, 2)], 0),
    ([(0, math.inf)], [(1, 2)], 0), ([(2, 2)], [(2, 2)], 1), ([(2, 2)], [(3, 3)], 0), ([(2, 2)], [(1, 3)], 0),
    ([(1, 3)], [(0, 2), (1, 4)], 0.5), ([(0, 1), (1, 2)], [(0, 2)], 1),
])
def test_iou_of_unions(predicted, spans, expected):
    assert union_iou_reward(predicted, spans) == pytest.approx(expected, abs=1e-12)


steps = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda one: (one[0] / 4,
                                                                                    (one[0] + one[1]) / 4)), max_size=6)


@given(predicted=steps, spans=steps.filter(bool))
def test_iou_of_unions_counts_quarter_seconds(predicted, spans):
    cells = [{i for start, end in one for i in range(round(start * 4), round(end * 4))} for one in (predicted, spans)]
    reward = union_iou_reward(predicted, spans)
    assert 0.0 <= reward <= 1.0 and reward == union_iou_reward(predicted[::-1], spans[::-1])
    if cells[0] | cells[1]:
        assert reward == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))
    if len(predicted) == len(spans) == 1:
        assert reward == pytest.approx(iou_reward(predicted[0], spans))
    merged = merge_spans(predicted)
    assert all(a[1] < b[0] for a, b in zip(merged, merged[1:])) and merge_spans(merged) == merged


@pytest.mark.parametrize("text, expected", [
    ("[(1.0, 3.0)]", [(1, 3)]), ("[(1, 3), (5, 7)]", [(1, 3), (5, 7)]), ("[[1, 3],[5, 7]]", [(1, 3), (5, 7)]),
    ("(1,3)", [(1, 3)]),
    ("1 to 3", [(1, 3)]), ("1s - 3s, 5s - 7s", [(1, 3), (5, 7)]), ("(1, 3) (5, 7)", [(1, 3), (5, 7)]),
    ("（1，3）", [(1, 3)]),
    ("[(5, 7), (1, 3)]", [(5, 7), (1, 3)]), ("[(1, 3), and (5, 7)]", [(1, 3), (5, 7)]), ("[(1, 1)]", [(1, 1)]),
    ("[]", None), ("", None), ("[(3, 1)]", None), ("[(1, 3), (7, 5)]", None), ("[(1, 3)", None), ("(1, 3)]", None),
    ("[(1, 3, 5)]", None),
    ("[(-1, 3)]", None), ("[(nan, 3)]", None), ("[(1, inf)]", None), ("[1, 3, 5, 7]", None), ("[(1, 3),]", None),
    ("[((1, 3))]", None),
    ("[(1, 3), soon]", None), ("from the start", None), ("[(1e3, 2e3)]", None), ("(1, 2), " * 100 + "(1, 2)", None),
])
def test_lists_of_intervals(text, expected):
    assert parse_spans(text) == (expected and tuple((float(a), float(b)) for a, b in expected))


# --- nearly right ----------------------------------------------------------------------------------------------------


def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


words = st.lists(st.sampled_from(["stop", "Stop", "here", "now", "一", "."]), max_size=7)


@given(given=words, truth=words.filter(bool), space=st.sampled_from([" ", "\n", "\t ", "\u3000"]))
def test_word_accuracy_is_one_minus_the_word_error_rate(given, truth, space):
    expected = max(0.0, 1 - edit_distance(truth, given) / len(truth))
    assert word_accuracy(space.join(given), " ".join(truth)) == pytest.approx(expected)
    assert accuracy_reward(say(space.join(given)), " ".join(truth), "ocr") == pytest.approx(expected)


def test_word_accuracy_may_ignore_case():
    assert word_accuracy("STOP here", "stop HERE") == 0.0 and word_accuracy("STOP here", "stop HERE",
                                                                            ignore_case=True) == 1.0


SENTENCES = ["The man cuts two onions, then he washes his hands.", "A man is cutting onions", "He washed his hand!",
             "two dogs run in 2 parks",
             "onions", "the the the", "it's a well-known running race", "onions the cut man"]


@pytest.mark.parametrize("truth", SENTENCES)
def test_open_answers_get_the_mean_of_three_rouge_scores(truth):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for given in SENTENCES:
        expected = 1.0 if given == truth else sum(s.fmeasure for s in scorer.score(truth, given).values()) / 3
        assert sentence_similarity(given, truth) == pytest.approx(expected)


@pytest.mark.parametrize("given, truth, low, high", [
    ("cat", "cat", 1, 1), ("Cats", "cat", 1, 1), ("!!", "!!", 1, 1), ("!!", "??", 0, 0), ("", "cat", 0, 0),
    ("一只猫", "一只猫", 1, 1),
    ("一只黑猫", "一只猫", 0.3, 0.99), ("狗", "一只猫", 0, 0), ("café", "cafe", 0, 0), ("y" * 5000, "y" * 5000, 1, 1),
    ("y" * 5000, "cat", 0, 0),
    ("the cat " * 501, "the cat", 0, 0), ("_" * 9, "cat", 0, 0), ("кошка спит", "кошка спит тут", 0.5, 0.99),
])
def test_open_answers_at_the_edges(given, truth, low, high):
    assert low <= sentence_similarity(given, truth) <= high


def border_free_mra(given, truth):
    error = abs(given - truth) / abs(truth)
    return sum(error <= 1 - threshold for threshold in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)) / 10


@given(given=st.floats(-1e6, 1e6), truth=st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-3))
def test_mean_relative_accuracy_counts_thresholds(given, truth):
    near = mean_relative_accuracy(given, truth)
    assert near >= mean_relative_accuracy(given, truth, strict=True) and 0.0 <= relative_accuracy(given, truth) <= 1.0
    place = abs(given - truth) / abs(truth) * 20
    if abs(place - round(place)) > 1e-6:  # off the border all definitions agree
        assert near == mean_relative_accuracy(given, truth, strict=True) == border_free_mra(given, truth)


@pytest.mark.parametrize("given, truth, within, strictly", [
    (10, 10, 1.0, 1.0), (9.5, 10, 1.0, 0.9), (10.5, 10, 1.0, 0.9), (9, 10, 0.9, 0.8), (0.7, 1, 0.5, 0.4),
    (5, 10, 0.1, 0.0), (15, 10, 0.1, 0.0),
    (4.99, 10, 0.0, 0.0), (-9.5, -10, 1.0, 0.9), (-10, 10, 0.0, 0.0), (0, 0, 1.0, 1.0), (1e-9, 0, 0.0, 0.0),
    (0, 5, 0.0, 0.0),
    (math.nan, 5, 0.0, 0.0), (math.inf, 5, 0.0, 0.0), (-math.inf, 5, 0.0, 0.0), (None, 5, 0.0, 0.0),
    (1e300, 5, 0.0, 0.0), (5e-324, 5e-324, 1.0, 1.0),
])
def test_mean_relative_accuracy_on_the_border(given, truth, within, strictly):
    assert mean_relative_accuracy(given, truth) == within
    assert mean_relative_accuracy(given, truth, strict=True) == strictly


# --- the traps -------------------------------------------------------------------------------------------------------
# Each row is something that a public reward function or extractor does, and what ours does instead.

TRAPS = [
    # Video-R1: the first of two answers counts; a newline at the end costs the format; a second pair inside passes
    ("first answer wins", lambda: accuracy_reward("<answer>A</answer><answer>B</answer>", "A"), 0.0),
    ("newline at the end", lambda: format_reward(say("A") + "\n"), 1.0),
    ("space at the start", lambda: format_reward(" " + say("A")), 1.0),
    ("text between the blocks", lambda: format_reward("<think>a</think> hence <answer>A</answer>"), 0.0),
    ("a second pair inside", lambda: format_reward(say(say("A"))), 0.0),
    # Video-R1, multiple choice: exact equality of strings
    ("a dot after the letter", lambda: accuracy_reward(say("A."), "A"), 1.0),
    ("letter and text", lambda: accuracy_reward(say("A. an onion"), "A", options=OPTIONS), 1.0),
    ("nothing equals nothing", lambda: accuracy_reward(say(""), "A"), 0.0),
    # evaluation scripts: letters A to E only
    ("the tenth option", lambda: accuracy_reward(say("J"), "J", options=tuple("klmnopqrst")), 1.0),
    ("the tenth option in brackets", lambda: accuracy_reward(say("(j)"), "J"), 1.0),
    # Video-R1, numerical: both or neither must have a dot or a comma
    ("42 and 42.0", lambda: accuracy_reward(say("42.0"), "42", "number"), 1.0),
    ("1,000 and 1000", lambda: accuracy_reward(say("1,000"), "1000", "number"), 1.0),
    ("50% and 0.5", lambda: accuracy_reward(say("50%"), "0.5", "number"), 1.0),
    ("0.5 and 50%", lambda: accuracy_reward(say("0.5"), "50%", "number"), 1.0),
    ("50% and 50", lambda: accuracy_reward(say("50%"), "50", "number"), 1.0),
    ("5000% and 50%", lambda: accuracy_reward(say("5000%"), "50%", "number"), 0.0),
    ("rounded to two decimals", lambda: accuracy_reward(say("3.142"), "3.1416", "number", decimals=2), 1.0),
    ("not rounded unless asked", lambda: accuracy_reward(say("3.142"), "3.1416", "number"), 0.0),
    # Video-R1, OCR: white space and case
    ("a line break in a transcription", lambda: accuracy_reward(say("stop\nhere"), "stop here", "ocr"), 1.0),
    ("capitals are written on the sign", lambda: accuracy_reward(say("STOP here"), "stop here", "ocr"), 0.5),
    ("many wrong words", lambda: accuracy_reward(say("a b c d e"), "stop", "ocr"), 0.0),
    # Video-R1, free form: one exact word got 2/3; evaluation gave every such answer 0
    ("one exact word", lambda: accuracy_reward(say("cat"), "cat", "free_form"), 1.0),
    # Video-R1, regression: nan got 1, the exact answer 0 got 0, an unreadable one raised
    ("nan", lambda: accuracy_reward(say("nan"), "4", "regression"), 0.0),
    ("inf", lambda: accuracy_reward(say("inf"), "4", "regression"), 0.0),
    ("truth 0, exact", lambda: accuracy_reward(say("0.0"), "0", "regression"), 1.0),
    ("truth 0, near", lambda: accuracy_reward(say("0.1"), "0", "regression"), 0.0),
    ("unreadable number", lambda: accuracy_reward(say("about four"), "4", "regression"), 0.0),
    ("truth 0 in mean relative accuracy", lambda: accuracy_reward(say("0"), "0", "mra"), 1.0),
    # Video-R1: the first row's problem type for the whole batch
    ("every row by its own kind",
     lambda: [total_reward(say("10"), s)[1].get("accuracy") for s in (FAR, NUMBER, CHOICE)], [1.0, 0.0, 0.0]),
    # SEED-Bench-R1: first characters are compared
    ("Answer: C where A is right", lambda: accuracy_reward(say("Answer: C"), "A"), 0.0),
    ("(A) where A is right", lambda: accuracy_reward(say("(A)"), "A"), 1.0),
    ("a small letter", lambda: accuracy_reward(say("a"), "A"), 1.0),
    ("an empty block", lambda: accuracy_reward("<answer></answer>", "A"), 0.0),
    ("no block", lambda: accuracy_reward("A", "A"), 0.0),
    ("text after the form", lambda: format_reward(say("A") + " or B"), 0.0),
    # VideoChat-R1: a capital inside a word; no letter on both sides; the interval of the sample before
    ("a capital inside a word", lambda: accuracy_reward(say("Dogs play"), "D"), 0.0),
    ("The answer is D", lambda: accuracy_reward(say("The answer is D"), "D"), 1.0),
    ("no letter on either side", lambda: accuracy_reward(say("none"), "A"), 0.0),
    ("square brackets", lambda: total_reward(respond("B", "[[2, 4], [8, 10]]"), WHY)[1]["iou"], 1.0),
    ("negative bounds", lambda: total_reward(respond("B", "[(-2, 4)]"), WHY)[1],
     dict(format=0.0, accuracy=1.0, iou=0.0)),
    ("no interval", lambda: total_reward(respond("B", "[]"), WHY)[1], dict(format=0.0, accuracy=1.0, iou=0.0)),
    ("broken after good", lambda: [total_reward(respond("B", g), WHY)[1]["iou"] for g in ("[(2, 4), (8, 10)]",
                                                                                          "[(2, ")], [1.0, 0.0]),
    ("one interval twice", lambda: total_reward(respond("B", "[(2, 4), (2, 4)]"), WHY)[1]["iou"], 0.5),
    # EasyR1: the pattern of the answer does not cross lines; without a tag the whole reply is graded
    ("an answer on its own line", lambda: accuracy_reward(say("\nA\n"), "A"), 1.0),
    ("the whole reply", lambda: accuracy_reward("I think A, because it is A", "A"), 0.0),
    ("the whole reply, when asked", lambda: accuracy_reward("A", "A", require_tags=False), 1.0),
    # training code of SEED-Bench-R1: options that repeat
    ("two right options", lambda: [accuracy_reward(say(x), "A", options=("x", "y", "x")) for x in "ABC"],
     [1.0, 0.0, 1.0]),
    ("options without text", lambda: accuracy_reward(say("B"), "A", options=("", "")), 0.0),
]


@pytest.mark.parametrize("compute, expected", [pytest.param(*trap[1:], id=trap[0]) for trap in TRAPS])
def test_traps(compute, expected):
    assert compute() == expected


@pytest.mark.parametrize("kind", ["ocr", "free_form", "regression", "mra"])
def test_a_truth_that_nobody_can_meet_is_an_error(kind):
    for truth in ("", " ", *(("soon", "nan") if kind in ("regression", "mra") else ())):
        with pytest.raises(ValueError, match=f"is no {kind}"):
            accuracy_reward(say("3"), truth, kind)


# --- a table of answers ------------------------------------------------------------------------------------------------
# Written from what people and models write, before the readers were: each line one question, with right and wrong answers.

TABLE = [json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("row", TABLE, ids=[f"{row['kind']}-{row['answer']}-{i}" for i, row in enumerate(TABLE)])
def test_every_answer_of_the_table_has_its_score(row):
    judge = lambda text: accuracy_reward(say(text), row["answer"], row["kind"], options=tuple(row["options"]))
    assert [text for text in row["right"] if judge(text) != 1.0] == []
    assert [text for text in row["wrong"] if judge(text) != 0.0] == []


def test_the_table_is_long_enough():
    assert sum(len(row["right"]) + len(row["wrong"]) for row in TABLE) >= 500


# Written by people who had not seen the readers: each line one answer, with the letter that a careful reader takes from it, or none.
BLIND = [json.loads(line) for line in Path(__file__).with_name("answers_blind.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("row", BLIND, ids=[f"{row['kind']}-{i}" for i, row in enumerate(BLIND, 1)])
def test_an_answer_written_blind_gets_its_letter_and_no_other(row):
    options = tuple(row["options"])
    accepted = [letter for letter in "ABCDEF"[: len(options)] if accuracy_reward(say(row["answer"]), letter, options=options) == 1.0]
    assert accepted == ([row["expected"]] if row["expected"] else [])


def test_the_blind_table_is_long_enough():
    assert len(BLIND) >= 297 and sum(row["expected"] is None for row in BLIND) >= 73


COLOURS = ("Red", "Blue", "Green", "Dark blue")
COUNTS = ("2", "3", "4", "5")


@pytest.mark.parametrize("answer, letter, options", [
    ("The answer is B.\n\nWait, the answer is C.", "C", OPTIONS), ("B. Actually, C", "C", OPTIONS), ("So: A", "A", OPTIONS),
    ("A) an onion\nB) a rope\nC) the rope of a boat\nD) a dog\n\nAnswer: B", "B", OPTIONS), ("not a dog but a rope", "B", OPTIONS),
    ("B rather than A", "B", OPTIONS), ("The answer is C. A, B and D are incorrect.", "C", OPTIONS), ("I'd say second.", "B", OPTIONS),
    ("the one before C", "B", OPTIONS), ("The car is dark blue", "D", COLOURS), ("The car is blue.", "B", COLOURS),
    ("There are 3 people", "B", COUNTS), ("综上所述，答案是C。", "C", OPTIONS), ("Ответ: B", "B", OPTIONS), ("정답은 B입니다", "B", OPTIONS),
    ("🅱️", "B", OPTIONS), ("It seems A. No, it is B.", "B", OPTIONS),
])
def test_an_explained_answer_is_what_it_decides_on(answer, letter, options):
    assert [other for other in "ABCD" if accuracy_reward(say(answer), other, options=options)] == [letter]


@pytest.mark.parametrize("answer, options", [*((answer, OPTIONS) for answer in (
    "maybe A, maybe B", "It could be A, but it could also be B.", "A or C, or B", "The answer is A or the answer is B", "So A and C.",
    "I don't think it's A", "The answer is A? I am not sure.", "not A, B", "Not only A, but B", "A but B", "Everything but B", "all but B",
    "It is anything but a rope.", "Any except A", "I would go with A if it were longer", "So is A.", "There is a rope and a dog",
    "There is a dog near a rope", "It's the dog's rope", "A - no\nB - yes", "A) an onion\nB) a rope", "A? B? C?", "A\n\nB", "A, then B",
    "First A, then B.", "A is the wrong answer", "the first two", "the first or second", "not the first one", "Answer: A; B",
    "Answer A\nAnswer B", "1. A 2. B", "If B is false, then A", "Suppose the answer is A.", "the answer is a rope and a dog", "B ❌",
    "option 2", "</think>", "<think>A</think>", "It is not the case that the answer is B.", "The answer is B, or C", "A\nSo the answer is B, C")),
    *((answer, COLOURS) for answer in ("The car is blue and red.", "The car isn't blue", "It is blue-green", "The car is bluish")),
    *((answer, COUNTS) for answer in ("There are 3.5 people", "There are 13 people", "It is 3-4", "It's 3:45", "3 dogs and 2 cats are there")),
    ("The second", ("the third man", "a dog")), ("Yes and no", ("Yes", "No")), ("There is no dog", ("Yes", "No")),
])
def test_an_answer_that_decides_on_nothing_gets_nothing(answer, options):
    assert [letter for letter in "ABCD" if accuracy_reward(say(answer), letter, options=options)] == []


# --- the total -------------------------------------------------------------------------------------------------------

CHOICE = Sample(id="c", question="what ?", options=OPTIONS, answer="B", kind="choice")
NUMBER = Sample(id="n", question="how many ?", answer="1,000", kind="number")
TEXT = Sample(id="t", question="what ?", answer="a rope", kind="text")
WHEN = Sample(id="g", question="when ?", kind="grounding", spans=((2.0, 4.0), (10.0, 12.0)))
SIGN = Sample(id="o", question="what does it say ?", answer="stop here now", kind="text", meta={"judge": "ocr"})
SCENE = Sample(id="f", question="what happens ?", answer="The man cuts two onions.", kind="text",
               meta={"judge": "free_form"})
FAR = Sample(id="r", question="how far ?", answer="10", kind="number", meta={"judge": "regression"})
FAR_TOO = Sample(id="m", question="how far ?", answer="10", kind="number", meta={"judge": "mra"})
WHY = Sample(id="q", question="why ?", options=OPTIONS, answer="B", kind="choice", spans=((2.0, 4.0), (8.0, 10.0)))
HIDDEN = Sample(id="u", question="which ?", options=OPTIONS, answer="@", kind="text", meta={"unlabelled": True})
ALL = [CHOICE, NUMBER, TEXT, WHEN, SIGN, SCENE, FAR, FAR_TOO, WHY, HIDDEN]


def respond(answer, glue):
    return f"<think>because</think>\n<answer>{answer}</answer>\n<glue>{glue}</glue>"


@pytest.mark.parametrize("sample, answer, total, parts", [
    (CHOICE, "a rope", 2.0, dict(format=1.0, accuracy=1.0)), (CHOICE, "A", 1.0, dict(format=1.0, accuracy=0.0)),
    (NUMBER, "1000", 2.0, dict(format=1.0, accuracy=1.0)), (TEXT, "A Rope", 2.0, dict(format=1.0, accuracy=1.0)),
    (WHEN, "10 to 12", 2.0, dict(format=1.0, iou=1.0)), (WHEN, "3 to 4", 1.5, dict(format=1.0, iou=0.5)),
    (WHEN, "no idea", 1.0, dict(format=1.0, iou=0.0)), (SIGN, "stop there now", 1 + 2 / 3,
                                                        dict(format=1.0, accuracy=2 / 3)),
    (SCENE, "the man cuts two onions", 2.0, dict(format=1.0, accuracy=1.0)),
    (FAR, "9", 1.9, dict(format=1.0, accuracy=0.9)), (FAR_TOO, "9", 1.9, dict(format=1.0, accuracy=0.9)),
    (HIDDEN, "A", 1.0, dict(format=1.0)),
])
def test_totals(sample, answer, total, parts):
    reward, found = total_reward(say(answer), sample)
    assert reward == pytest.approx(total) and found == pytest.approx(parts)


@pytest.mark.parametrize("text, format, accuracy, iou", [
    (respond("B", "[(2, 4), (8, 10)]"), 1, 1, 1), (respond("B", "[[8, 10], [2.0, 4.0]]"), 1, 1, 1),
    (" \n" + respond("a rope", "2 to 4") + "\n ", 1, 1, 0.5), (respond("A", "[(2, 10)]"), 1, 0, 0.5),
    (respond("B", "[]"), 0, 1, 0), (respond("B", ""), 0, 1, 0), (respond("B", "soon"), 0, 1, 0),
    (respond("B", "[(4, 2)]"), 0, 1, 0), (respond("B", "[(2, 4), (9)]"), 0, 1, 0), (respond("B", "[(-2, 4)]"), 0, 1, 0),
    (say("B"), 0, 1, 0), (say("B") + " so <glue>[(2, 4)]</glue>", 0, 1, 0.5),
    (respond("B", "[(2, 4)]") + "!", 0, 1, 0.5),
    ("<think>a</think><glue>[(2, 4)]</glue><answer>B</answer>", 0, 1, 0.5),
    (respond("B", "[(2, 4)]") + "<glue>[(8, 10)]</glue>", 0, 1, 0), (respond("", "[(2, 4)]"), 1, 0, 0.5), ("", 0, 0, 0),
])
def test_an_answer_and_its_intervals_on_one_response(text, format, accuracy, iou):
    total, parts = total_reward(text, WHY)
    assert parts == pytest.approx(dict(format=format, accuracy=accuracy,
                                       iou=iou)) and total == pytest.approx(sum(parts.values()))
    assert total_reward(text, WHY, format_weight=0, accuracy_weight=2,
                        iou_weight=3)[0] == pytest.approx(2 * accuracy + 3 * iou)


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
@given(text=hostile, wrap=st.booleans(), sample=st.sampled_from(ALL))
@example(text="İ" * 20, wrap=True, sample=CHOICE)
def test_any_text_gets_a_reward_in_range(text, wrap, sample):
    text = (respond(text, text) if sample is WHY else say(text)) if wrap else text
    total, parts = total_reward(text, sample)
    assert 0.0 <= total <= 3.0 and total == sum(parts.values())
    assert all(type(part) is float and 0.0 <= part <= 1.0 for part in parts.values())
    assert read_choice(text, options=OPTIONS) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    number, span = parse_number(text), parse_span(text)
    assert number is None or math.isfinite(number)
    assert span is None or 0 <= span[0] <= span[1] < math.inf
    assert all(0 <= start <= end < math.inf for start, end in parse_spans(text) or ())
    assert " " * 2 not in normalise_text(text)


SIZE = 400_000


@pytest.mark.parametrize("piece", [
    "<think>", "</think>", "<answer>", "<", "<think></think><answer></answer>", "a ", "a.", "((", " ", "\n", "1",
    "1,", "1 ", "1,000,", "answer ",
    "the answer is ", "a\u0301\u0316", "İ", ".,:;", "- ", "１", "e", "y", "一", "(1, 2), ", "[", "1 to ", "stop ",
])
def test_time_is_linear_in_the_length(piece):
    text = piece * (SIZE // len(piece))
    for sample in ALL:
        total_reward(respond("B", "1 to 2"), sample)  # what is imported late is not counted
        for wrapped in (text, say(text), say("A." + text), say("1" + text), "<think>" + text, text + "</answer>",
                        respond("B", text)):
            start = time.process_time()
            total_reward(wrapped, sample)
            assert time.process_time() - start < 3.0  # quadratic time would take minutes
