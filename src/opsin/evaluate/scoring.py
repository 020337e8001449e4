"""From outputs to scored examples: parse, score, and the baseline of always giving the commonest answer."""

from collections.abc import Callable, Mapping, Sequence

from opsin.evaluate.controls import commonest, partners, showing
from opsin.evaluate.examples import Example
from opsin.evaluate.figures import Scored
from opsin.evaluate.metrics import METRICS, Metric, Score
from opsin.evaluate.parsers import Parser, make_parser
from opsin.evaluate.tasks import Task
from opsin.media.image import ImageMode
from opsin.spec.grounding import Grounding

SHUFFLE_SEED = 0


class Scorer:
    """Scores one task's outputs."""

    def __init__(self, task: Task, *, grounding: Grounding | None, image_mode: ImageMode) -> None:
        """grounding: how the model's family writes boxes, for the parser `first-box:model`. Raises ConfigError."""
        self.task, self.examples = task, task.light
        self._judges: dict[str, tuple[Metric, Parser, Score]] = {}
        for name in task.settings.metrics:
            parser = make_parser(task.settings.parser_of(name), grounding=grounding, image_mode=image_mode)
            judged = [each for each in self.examples if task.settings.metric_of(each.group) == name]
            self._judges[name] = METRICS[name], parser, METRICS[name].prepare(judged, parser, image_mode)

    @property
    def parsers(self) -> dict[str, str]:
        """The name of the parser that each metric reads outputs with."""
        return {name: parser.name for name, (_, parser, _) in self._judges.items()}

    def score(self, control: str, outputs: Mapping[str, str]) -> list[Scored]:
        """All examples. control: how they were shown; empty for as they are. outputs: what was said, by key."""
        shown = shown_examples(self.examples, control)
        return [
            self._scored(example, seen, outputs[example.key])
            for example, seen in zip(self.examples, shown, strict=True)
        ]

    def majority(self) -> list[Scored]:
        """Examples answered with the commonest right answer of their group; those with open answers are left out."""
        by_group: dict[str, list[Example]] = {}
        for example in self.examples:
            if self._judge(example.group)[0].closed:
                by_group.setdefault(example.group, []).append(example)
        said = {}
        for group, members in by_group.items():
            text = self._judge(group)[1].text
            said[group] = commonest(tuple(map(text, each.reference)) for each in members)
        return [
            self._scored(example, example, said[group]) for group, members in by_group.items() for example in members
        ]

    def _judge(self, group: str) -> tuple[Metric, Parser, Score]:
        return self._judges[self.task.settings.metric_of(group)]

    def _scored(self, example: Example, seen: Example, output: str) -> Scored:
        metric, parser, score = self._judge(example.group)
        parsed = parser.read(output, example, seen)
        return Scored(example.key, example.cluster, example.group, metric.name, parsed, score(parsed, example))


def shown_examples(examples: Sequence[Example], control: str) -> Sequence[Example]:
    """The examples as a control shows them; without their texts' bytes where `examples` lacks them."""
    show = showing_under(examples, control)
    return [show(index, lambda place: examples[place]) for index in range(len(examples))]


Loader = Callable[[int], Example]


def showing_under(light: Sequence[Example], control: str) -> Callable[[int, Loader], Example]:
    """How each example is shown under a control: a function of its number and of what loads whole examples."""
    if control == "shuffled":
        partner = partners(light, seed=SHUFFLE_SEED)
        return lambda index, load: showing(light[index], load(partner[index]))
    if control == "text-only":
        return lambda index, load: light[index].without_pictures()
    return lambda index, load: load(index)
