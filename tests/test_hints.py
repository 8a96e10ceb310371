"""Hints: whole lines or sentences, never the last, and never one that gives the answer away, however it is told."""
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvideo_r1.core import Sample
from deepvideo_r1.hints import gives_away, make_hint

shares = st.floats(0, 1)

line = st.from_regex(r"[a-z0-9]([a-z0-9 ,<=]{0,12}[a-z0-9])?", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(line, min_size=2, max_size=8), fraction=shares, gap=st.sampled_from(["\n", "\n\n"]))
def test_a_hint_is_whole_lines_without_the_last(lines, fraction, gap):
    hint = make_hint(f"\n{gap.join(lines)}\n", fraction)
    assert hint == gap.join(lines[: min(round(fraction * len(lines)), len(lines) - 1)])


@settings(max_examples=200, deadline=None)
@given(fraction=shares, words=st.lists(
    st.sampled_from(["he", "cuts.", "the", "onion", "Now", "it", "burns!", "why?"]), min_size=1, max_size=12))
def test_a_hint_from_one_line_leaves_its_end_away(words, fraction):
    trace = " ".join(words)
    hint = make_hint(trace, fraction)
    steps = re.split(r"(?<=[.!?]) ", trace)
    steps = steps if len(steps) > 1 else words
    assert trace.startswith(hint) and len(hint) < len(trace)
    assert hint == " ".join(steps[: min(round(fraction * len(steps)), len(steps) - 1)])
    assert make_hint(trace, 0.0) == ""


@settings(max_examples=60, deadline=None)
@given(before=line, after=line, tag=st.sampled_from(["<think>", "</think>", "<answer>", "</answer>"]), fraction=shares)
def test_a_trace_with_tags_gives_no_hint(before, after, tag, fraction):
    with pytest.raises(ValueError, match="without tags"):
        make_hint(f"{before}\n{tag}\n{after}", fraction)


# --- leaks --------------------------------------------------------------------------------------------------------

OPTIONS = ("a red cup", "the blue box", "on the table", "a green ball")
KEPT = ("The hand comes from the left.", "Something is lifted.", "A man looks away.", "I watch the shelf.", "He waits, and then moves.",
        "It takes 2 seconds.", "The lid stays shut.", "Plan 9-B is on the poster.", "Cups are not boxes.")


def ways_to_tell(letter: str, option: str) -> list[str]:
    "Sentences that tell the answer; the letter stands alone, in brackets, with a label, or the option is written out."
    return [f"So it is ({letter}).", f"({letter.lower()}) fits.", f"The answer is {letter}.", f"option {letter.lower()} is what we see",
            f"{letter}. That is it.", f"Answer: {letter}", f"It must be {letter}!", f"I choose **{letter}**.", f"We see {option}.",
            f"It is {option.upper()}, clearly.", f"{option.capitalize()} is what he holds.", f"[{letter}] then", f"{letter}) is right"]


choices = st.sampled_from([(letter, option) for letter, option in zip("ABCD", OPTIONS)])


@settings(max_examples=400, deadline=None)
@given(data=st.data(), choice=choices, before=st.lists(st.sampled_from(KEPT), max_size=4), fraction=shares,
       after=st.lists(st.sampled_from(KEPT), min_size=1, max_size=4), gap=st.sampled_from(["\n", " "]))
def test_nothing_from_the_answer_on_is_shown(data, choice, before, after, gap, fraction):
    letter, option = choice
    telling = data.draw(st.sampled_from(ways_to_tell(letter, option)))
    sample = Sample("q", question="What is it?", options=OPTIONS, answer=letter, kind="choice")
    hint = make_hint(gap.join([*before, telling, *after]), fraction, sample)
    begun = hint.removeprefix(gap.join(before)).strip()  # one sentence alone is cut between words, so it may have begun
    assert hint == "" or (gap.join(before) + gap).startswith(hint + gap) or (gap == " " and telling.startswith(begun) and begun != telling)
    assert telling not in hint and option not in hint.casefold() and not gives_away(hint, sample)


@settings(max_examples=200, deadline=None)
@given(choice=choices, kept=st.lists(st.sampled_from(KEPT), min_size=2, max_size=6), fraction=shares)
def test_what_tells_nothing_is_shown(choice, kept, fraction):
    sample = Sample("q", question="What is it?", options=OPTIONS, answer=choice[0], kind="choice")
    assert make_hint("\n".join(kept), fraction, sample) == make_hint("\n".join(kept), fraction)


@pytest.mark.parametrize("kind, truth, told, kept", [
    ("number", "12", ["So there are 12 of them.", "the answer: 12", "In total 12.0", "Thus 12"],
     ["t3 red 12", "the 12th second", "so there are 112 of them", "the answer is 1.2"]),
    ("number", "1000", ["so 1,000 in all"], ["so 1,000,000 in all"]),
    ("text", "STOP", ["the sign says stop", "\"STOP\" is written there"], ["he stopped", "unstoppable"]),
    ("text", "a cat", ["I see A cat"], ["I see a category"]),
])
def test_numbers_and_words(kind, truth, told, kept):
    sample = Sample("q", question="?", answer=truth, kind=kind)
    assert [gives_away(text, sample) for text in told] == [True] * len(told)
    assert [gives_away(text, sample) for text in kept] == [False] * len(kept)


@pytest.mark.parametrize("text, told", [
    ("from 3.5 to 8 s", True), ("it starts at 3.5", False), ("it ends at 8", False), ("3.50 and 8.0", True), ("[12, 20]", True), ("13.5-18", False)])
def test_intervals(text, told):
    assert gives_away(text, Sample("g", question="when?", spans=((3.5, 8.0), (12.0, 20.0)), kind="grounding")) == told


def test_an_interval_in_a_choice_question_is_no_answer():
    sample = Sample("q", question="?", options=("x-ray", "yes"), answer="B", kind="choice", spans=((1.0, 2.0),))
    assert not gives_away("from 1 to 2", sample) and gives_away("yes", sample)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60), kind=st.sampled_from(["choice", "number", "text", "grounding"]))
def test_any_text_can_be_judged(text, kind):
    sample = Sample("q", question="?", options=("a+b (c", "[d") if kind == "choice" else (), kind=kind,
                    answer={"choice": "A", "number": "7", "text": "x*y"}.get(kind, ""), spans=((1.0, 2.0),) if kind == "grounding" else ())
    assert gives_away(text, sample) in (True, False)


# --- a table of traces --------------------------------------------------------------------------------------------------
# Written as people and models write, before the check was: each with the part of it that is safe to show.

TABLE = [json.loads(line) for line in Path(__file__).with_name("hints.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(row):
    return Sample("q", question=row["question"], kind=row["kind"], options=tuple(row.get("options", ())),
                  answer=row.get("answer", ""), spans=tuple(map(tuple, row.get("spans", ()))))


@pytest.mark.parametrize("row", TABLE, ids=[f"{row['kind']}-{i}" for i, row in enumerate(TABLE)])
def test_the_safe_part_of_each_trace_is_shown_and_nothing_else(row):
    assert make_hint(row["trace"], 1.0, asked(row)).strip() == row["safe"].strip()
    for share in (0.0, 0.25, 0.5, 0.75):
        hint = make_hint(row["trace"], share, asked(row))
        assert row["safe"].startswith(hint) and not gives_away(hint, asked(row))


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60


# Written by people who had not seen the check: sentences, and the first of them that tells the answer.
BLIND = [json.loads(line) for line in Path(__file__).with_name("hints_blind.jsonl").read_text(encoding="utf-8").splitlines()]
CLOSING = {"en": " The clip ends.", "zh": "视频到此结束。", "ja": "動画はここで終わります。", "de": " Das Video endet hier.",
           "es": " El video termina aquí.", "hi": " वीडियो यहाँ समाप्त होता है।", "ar": " ينتهي المقطع هنا."}
ONE_END = "One end of an interval is shown, by design; here the second end follows as a time after it."
MISSES = {65: ONE_END, 69: ONE_END}  # line -> why the check is not what the annotator wrote


def asked_blind(row):
    kind = {"open": "text", "interval": "grounding"}.get(row["task"], row["task"])
    told = dict(spans=(tuple(row["answer"]),)) if kind == "grounding" else dict(options=tuple(row["options"]), answer=row["answer"])
    return Sample("q", question="?", kind=kind, **told)


def blind_rows():
    for line, row in enumerate(BLIND, 1):
        marks = [pytest.mark.xfail(strict=True, reason=MISSES[line])] if line in MISSES else []
        yield pytest.param(row, marks=marks, id=f"{row['task']}-{row['kind']}-{row['language']}-{line}")


@pytest.mark.parametrize("row", list(blind_rows()))
def test_a_trace_written_blind_is_shown_up_to_its_telling_sentence(row):
    safe = "".join(row["sentences"][: row["first_telling"]]).strip()
    assert make_hint(row["trace"], 1.0, asked_blind(row)) == safe
    # The last sentence is never shown, so one more is needed to see that each telling sentence is known as one.
    assert make_hint(row["trace"] + CLOSING[row["language"]], 1.0, asked_blind(row)) == safe


@pytest.mark.parametrize("line", sorted(MISSES))
def test_where_one_end_is_shown_the_other_is_not(line):
    row = BLIND[line - 1]
    hint = make_hint(row["trace"] + CLOSING["en"], 1.0, asked_blind(row))
    assert hint == "".join(row["sentences"][: row["first_telling"] + 1]).strip()


def test_the_blind_table_is_long_enough():
    assert len(BLIND) >= 128 and len(MISSES) <= 2


@pytest.mark.parametrize("kind, answer, options, told, kept", [
    ("choice", "B", ("dogs", "cats", "cows", "pigs"), ["I'd say second.", "the one before C", "la segunda opción", "الخيار الثاني", "the 2nd on the list"],
     ["he second looks up", "vitamin B", "the second man", "one after the other"]),
    ("choice", "B", ("10%", "50%", "70%"), ["it is half full", "fifty percent", "百分之五十"], ["it is full", "five of them"]),
    ("choice", "B", ("yes", "no"), ["So no.", "The answer is no because it stops."], ["There is no sound.", "Is the lamp on?"]),
    ("number", "15", (), ["3 rows of 5", "ten and five more", "of the twenty, five leave"], ["3 rows, 4 lamps", "the 15th second", "1.5"]),
    ("number", "1", (), ["one cat", "only one", "one of them wears it"], ["no one", "the one on the left", "the red one"]),
    ("number", "0", (), ["not a single bird", "none"], ["not ten"]),
    ("number", "5", (), ["पाँच बच्चे", "خمسة أطفال", "五"], ["छह बच्चे", "ستة أطفال"]),
    ("text", "5 km", (), ["five kilometres", "5km", "5 km"], ["five times", "50 km"]),
    ("text", "8:30", (), ["half past eight", "8:30"], ["8 to 30", "eight thirds"]),
    ("text", "25%", (), ["a quarter of it", "25 percent"], ["a half of it"]),
])
def test_ways_to_tell(kind, answer, options, told, kept):
    sample = Sample("q", question="?", kind=kind, options=options, answer=answer)
    assert [text for text in told if not gives_away(text, sample)] == []
    assert [text for text in kept if gives_away(text, sample)] == []


def test_yes_and_no_are_told_by_what_repeats_the_question():
    sample = Sample("q", question="Does the boy catch the bus?", kind="choice", options=("yes", "no"), answer="B")
    assert [gives_away(text, sample) for text in ("He runs.", "He did not catch it.", "The boy missed the bus.", "A dog barks.")] == [
        False, True, True, False]


def test_a_length_gives_the_other_end():
    sample = Sample("q", question="?", kind="grounding", spans=((72.0, 80.0),))
    assert gives_away("It opens at 1:12. It is open eight seconds later.", sample)
    assert not gives_away("It opens at 1:12. It has 8 sides.", sample)


@pytest.mark.parametrize("end", list("。！？｡।॥۔؟։።៕။‼⁉") + [". ", "! ", "? ", "。」", "！”"])
def test_sentences_end_in_any_script(end):
    trace = f"aa{end}bb{end}cc{end}dd"
    assert make_hint(trace, 0.5) == f"aa{end}bb{end}".strip()


@pytest.mark.parametrize("kind", ["choice", "number", "grounding", "text"])
@pytest.mark.parametrize("piece, gap", [("The man walks on.", "\n"), ("He walks on.", " "), ("word", " "), ("他走了。", ""), ("t1 red 0", "\n"),
                                        ("one hundred ", ""), ("a\u0301\u0316", ""), ("1:", ""), ("not b ", "\n"), ("一", ""), ("(", "")])
def test_the_time_of_a_hint_is_linear(kind, piece, gap):
    sample = Sample("q", question="?", options=("opens the door", "sits"), kind="choice", answer="A") if kind == "choice" else Sample(
        "q", question="?", kind=kind, answer="" if kind == "grounding" else "987654", spans=((7e7, 8e7),) if kind == "grounding" else ())
    start = time.process_time()
    make_hint(gap.join([piece] * (40_000 // len(piece + gap))), 1.0, sample)
    assert time.process_time() - start < 5.0  # quadratic time would take minutes
