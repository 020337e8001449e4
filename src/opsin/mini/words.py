"""opsin-mini's tokenizer: whole words for its own sentences, letters and digits for what is to be read, else bytes."""

from pathlib import Path

from opsin.demo.scene import LETTERS
from opsin.demo.vocabulary import vocabulary, write_tokenizer
from opsin.mini.model import CONTROLS
from opsin.mini.samples import sample

PIECES = r"[A-Z](?![a-z])|\d| ?[A-Z][a-z]+| ?[a-z]+| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s"
NUM_SAMPLES = 4000
"""Samples whose text makes the vocabulary; all words occur within the first few hundred."""
KNOWN = "user\nassistant\nsystem\nuser assistant system image image. picture (,) ),("


def write(folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; returns the number of tokens."""
    text = [KNOWN, LETTERS]
    for index in range(NUM_SAMPLES):
        for question in sample(0, index, "train", num_questions=12).questions:
            # What is said stands at a start, and after a space.
            text += [f"{question.text} {question.text}", f"{question.answer} {question.answer}"]
    vocab = vocabulary(text, controls=CONTROLS, pieces=PIECES)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    return write_tokenizer(folder, vocab, controls=CONTROLS, pieces=PIECES, ends=ends)
