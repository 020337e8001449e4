"""VQA accuracy (VQA v2, OK-VQA, TextVQA, VizWiz): how many of ten people gave the answer.

Definition (Antol et al., arXiv:1505.00468, and the evaluation code of visualqa.org): prediction and answers are
normalised; of the ten answers each is left out once, and the score is the mean over these ten of

    min(equal answers among the other nine / 3, 1)

Traps. An answer that 3 of 10 people gave scores 0.9, not 1: where one of the three is left out, two are left. With
fewer than four answers nothing scores 1, so such rows are refused. visualqa.org's code normalises nothing where all
ten people agree, other harnesses (lmms-eval) always do; here it is always done. Published numbers belong to a prompt
that asks for "a single word or phrase": a model that answers in sentences scores near 0 however right it is.
"""

import re
from collections.abc import Sequence

from opsin.errors import DataError

LEAST_ANSWERS, USUAL_ANSWERS = 4, 10

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""Taken out where one of its kind stands beside a space or digits are grouped (`1,000`), else turned into spaces."""
_GROUPED_DIGITS = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
ARTICLES = ("a", "an", "the")

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
    you'll you're you've
"""


def _with_one_apostrophe_missing(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {written: word for word in _CONTRACTED.split() for written in _with_one_apostrophe_missing(word)}
"""Words with one apostrophe missing, and with it. Equal to visualqa.org's table for what is in lower case."""
CONTRACTIONS["somebody'd"] = "somebodyd"  # the one entry of that table that runs the other way


def normalise(text: str) -> str:
    """Marks out, lower case, number words to digits, no articles, apostrophes put back. `The two dogs.` -> `2 dogs`."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    is_grouped = _GROUPED_DIGITS.search(text) is not None
    plain = text
    for mark in _MARKS:
        joins = is_grouped or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if joins else " ")
    words = [NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A share from 0 to 1. answers: those of all people, ten as published. Raises DataError for fewer than four."""
    return agreement(normalise(prediction), [normalise(answer) for answer in answers])


def agreement(given: str, answers: Sequence[str]) -> float:
    """`vqa_accuracy` of texts that are normalised already."""
    if len(answers) < LEAST_ANSWERS:
        raise DataError(
            f"{len(answers)} answer(s): VQA accuracy compares with those of ten people, and below {LEAST_ANSWERS} no "
            "prediction could score 1",
            kind="answer",
            fix="list them all under 'answers', or use the task exact",
        )
    count = answers.count(given)
    return sum(min((count - (answer == given)) / 3, 1.0) for answer in answers) / len(answers)
