"""POPE (arXiv:2305.10355): does a model see things that are not there? Yes/no questions about objects.

Figures: F1 (the headline), accuracy, precision and recall of "yes", and the share of "yes" among all answers, over all
questions and for each of its sets (random, popular, adversarial: `group`).

Traps. Two parsers are in use, and give different figures to the same outputs, so both have a name here:

    yes-no-llava   LLaVA's eval_pope.py: of the text before the first full stop, commas taken out, "no" where one of the
                   words No, no, not stands in it, else "yes". Every answer is one of the two: "I cannot tell" is "yes".
    yes-no-exact   lmms-eval: the whole text, stripped, in lower case, is "yes" or "no". "Yes." is neither: wrong, and
                   in no count of precision and recall. (A missed "yes" leaves recall untouched then, so look at
                   `unparsed`. lmms-eval's yes ratio counts the right answers; here it is the model's.)
"""

import numpy as np
from numpy.typing import NDArray

YES, NO = "yes", "no"


def yes_no_llava(text: str) -> str:
    """`yes` or `no`, by the rule of LLaVA's eval_pope.py."""
    found = text.partition(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & set(found) else YES


def yes_no_exact(text: str) -> str | None:
    """`yes`, `no`, or None for anything else."""
    text = text.strip().lower()
    return text if text in (YES, NO) else None


SUMS = ("true_yes", "false_yes", "true_no", "false_no", "unparsed", "count")


def counts(parsed: str | None, truth: str) -> tuple[float, ...]:
    """One question as numbers to be added up, in the order of `SUMS`."""
    says_yes, says_no = parsed == YES, parsed == NO
    is_yes = truth == YES
    cells = (says_yes and is_yes, says_yes and not is_yes, says_no and not is_yes, says_no and is_yes, parsed is None)
    return (*map(float, cells), 1.0)


def pope_figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """sums: (..., 6), of any number of questions -> each figure (...,); 0 where it would divide by 0."""
    true_yes, false_yes, true_no, false_no, unparsed, count = np.moveaxis(sums, -1, 0)
    precision = ratio(true_yes, true_yes + false_yes)
    recall = ratio(true_yes, true_yes + false_no)
    return {
        "F1": ratio(2 * precision * recall, precision + recall),
        "accuracy": ratio(true_yes + true_no, count),
        "precision": precision,
        "recall": recall,
        "yes ratio": ratio(true_yes + false_yes, count),
        "unparsed": ratio(unparsed, count),
    }


def ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """above / below, 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)
