"""The model that the package carries: its size, its card, and that it looks at pictures."""

import json
from pathlib import Path

import pytest

from opsin.encode import Encoder
from opsin.evaluate.examples import conversation
from opsin.generate.decode import generate
from opsin.generate.ready import load_ready
from opsin.generate.sampling import Sampling
from opsin.mini import ship
from opsin.mini.evaluation import make
from opsin.mini.model import CHAT, TOWER
from opsin.weights.config import describe
from opsin.weights.shipped import FOLDER

ROOT = Path(__file__).parents[2]
SHIPPED = FOLDER


def test_it_is_small_and_what_the_recipe_makes() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 12_000_000
    config = describe("opsin-mini")
    assert (config.vision, config.chat) == (TOWER, CHAT)


def test_its_card_has_the_figures_of_the_evaluation() -> None:
    results = json.loads((ROOT / "docs/opsin_mini/results.json").read_text(encoding="utf-8"))
    assert results["model"] == "opsin-mini"
    assert ship.figures(results) in (SHIPPED / ship.CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["shape", "ink", "value"])
def test_it_looks_at_pictures(task: str) -> None:
    """Twelve held-out questions of tasks that it can do, each answered about its picture."""
    model = load_ready("opsin-mini", device="cpu", dtype="float32")
    examples = [each for each in make(12).examples if each.group == task]
    encoder = Encoder(model.config, model.tokenizer)
    prompts = [encoder.encode(conversation(each, "{}")) for each in examples]
    given = generate(model.vlm, prompts, model.tokenizer, Sampling(max_new_tokens=8))
    right = sum(answer.text == example.reference[0] for answer, example in zip(given, examples, strict=True))
    assert right >= 10
