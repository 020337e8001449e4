"""Judging a stage while it trains: what the model does on data held back, which time was best, and when to end."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

from opsin.data.feed import ahead
from opsin.data.order import derive_seed
from opsin.data.passes import passes
from opsin.data.source import Source
from opsin.encode import Encoder
from opsin.errors import ConfigError, DataError
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.spec.recipe import Evaluation
from opsin.text.messages import Conversation
from opsin.train.log import RowLog
from opsin.train.loop import StageLoop, reproducible
from opsin.train.prepare import PreparedStage, prepare_stage, stage_config
from opsin.weights import Model, RetrievalModel

ANSWERS_AT_ONCE = 16


class EvaluationRow(TypedDict):
    """One evaluation: a line of the log, after that of its step."""

    stage: str
    step: int
    evaluation: dict[str, float]
    """`loss`, nats per taught token; `exact_match`, a share, where it is the metric."""
    samples: int
    best: bool
    """Whether none before was as good."""
    seconds: float


class Judge:
    """Evaluates one stage when it is due, and remembers what came out."""

    def __init__(self, evaluation: Evaluation, prepared: PreparedStage, model: Model | RetrievalModel) -> None:
        """prepared: the stage with the held-out data in place of its own."""
        self.evaluation = evaluation
        self.feed = prepared.feed
        self.model = model
        self.best: float | None = None
        self.best_step = 0
        self.without_best = 0
        """Evaluations since the best one."""

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.evaluation.patience is not None and self.without_best >= self.evaluation.patience

    def after_step(
        self, loop: StageLoop, log: RowLog, *, keep: Callable[[], None], say: Callable[[str], None]
    ) -> EvaluationRow | None:
        """Evaluate, where it is time to, and let the stage end where nothing gets better. keep: writes a best model."""
        if loop.step % self.evaluation.every and loop.step < loop.num_steps:
            return None
        row = self.judge(loop)
        if row["best"]:
            keep()
        log.write(row)
        say(self._told(row))
        if self.is_over:
            loop.end()
        return row

    def judge(self, loop: StageLoop) -> EvaluationRow:
        """Evaluate the model as it is. Nothing of the training changes, its random numbers included."""
        started = time.perf_counter()
        with loop.judging(), reproducible(loop.device, derive_seed(self.feed.seed, self.feed.stage.name)):
            scores = {"loss": self._loss(loop)}
            if self.evaluation.metric == "exact_match":
                with loop.world.agreed(), loop.joined():
                    scores["exact_match"] = self._exact_match()
        return EvaluationRow(
            stage=loop.stage.name,
            step=loop.step,
            evaluation=scores,
            samples=len(self.feed.source),
            best=self._compare(scores[self.evaluation.metric], loop.step),
            seconds=time.perf_counter() - started,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "best_step": self.best_step, "without_best": self.without_best}

    def load_state(self, state: Mapping[str, Any], loop: StageLoop) -> None:
        """Take over what `state` gave. A stage that had ended early stays ended."""
        self.best, self.best_step, self.without_best = (state[key] for key in ("best", "best_step", "without_best"))
        if self.is_over:
            loop.end()

    def _told(self, row: EvaluationRow) -> str:
        scores = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in row["evaluation"].items())
        best = (
            "none was a number yet" if self.best is None else f"the best is {self.best:.4f} after step {self.best_step}"
        )
        than = "the best so far" if row["best"] else best
        end = f"; the stage ends, as {self.without_best} evaluations brought nothing better" if self.is_over else ""
        return f"evaluation after step {row['step']}: {scores} ({than}){end}"

    def _compare(self, score: float, step: int) -> bool:
        """Keep count. A number that is not finite is never best."""
        is_better = self.best is None or (score < self.best if self.evaluation.metric == "loss" else score > self.best)
        if math.isfinite(score) and is_better:
            self.best, self.best_step, self.without_best = score, step, 0
            return True
        self.without_best += 1
        return False

    def _loss(self, loop: StageLoop) -> float:
        """Mean over the taught tokens of all held-out samples, in passes like those of training."""
        samples = ahead(
            iter(loop.world.share(range(len(self.feed.source)))),
            lambda index: self.feed.load_or_replace(0, index, 0).sample,
            workers=loop.workers,
            depth=self.feed.stage.batch.samples + loop.workers,
        )
        batch = self.feed.stage.batch
        batch = batch.replace(micro_samples=min(batch.samples, batch.micro_samples or batch.samples))
        total, count = 0.0, 0.0
        for group, pictures in loop.rounds(passes(samples, batch)):
            loss = loop.loss_of(group, pictures)
            total, count = total + float(loss.total), count + loss.count
        total, all_counted = loop.world.sums(total, count)
        return total / all_counted

    def _exact_match(self) -> float:
        """Share of samples whose last answer comes out word for word."""
        assert isinstance(self.model, Model)
        tokenizer = self.model.tokenizer
        encoder = Encoder(stage_config(self.model.config, self.feed.stage), tokenizer)
        sampling = Sampling(max_new_tokens=self.evaluation.max_new_tokens)
        right = 0
        for start in range(0, len(self.feed.source), ANSWERS_AT_ONCE):
            asked = [self._asked(index) for index in range(start, min(start + ANSWERS_AT_ONCE, len(self.feed.source)))]
            prompts = [encoder.encode(question) for question, _ in asked]
            answers = generate(self.model.vlm, prompts, tokenizer, sampling)
            right += sum(
                answer.text.split() == wanted.split() for answer, (_, wanted) in zip(answers, asked, strict=True)
            )
        return right / len(self.feed.source)

    def _asked(self, index: int) -> tuple[Conversation, str]:
        """A sample up to its last answer, and that answer."""
        sample = self.feed.source.sample(index, 0)
        if not isinstance(sample, Conversation) or sample.messages[-1].role != "assistant":
            raise DataError(
                f"evaluation sample {index} of {self.feed.stage.name!r} ends with no answer that exact_match "
                "could compare with; give conversations that do, or metric: loss"
            )
        return replace(sample, messages=sample.messages[:-1]), sample.messages[-1].text


def prepare_judge(prepared: PreparedStage, model: Model | RetrievalModel, source: Source | None) -> Judge | None:
    """What judges a stage; None where it asks for nothing.

    source: held-out samples, used instead of the evaluation's own `data`. Raises ConfigError where there are none.
    """
    stage, evaluation = prepared.stage, prepared.stage.evaluate
    if evaluation is None:
        return None
    if source is None and not evaluation.data:
        raise ConfigError(f"stage {stage.name!r}: evaluate names no data; list files under evaluate.data")
    if evaluation.metric == "exact_match" and not isinstance(model, Model):
        raise ConfigError(f"stage {stage.name!r}: a model that compares gives no answers; set evaluate.metric: loss")
    held_out = prepare_stage(
        stage.replace(name=f"{stage.name}.evaluate", data=evaluation.data, sampler="shuffle"),
        module=model.module,
        model=model.config,
        tokenizer=model.tokenizer,
        seed=prepared.feed.seed,
        source=source,
    )
    return Judge(evaluation, held_out, model)
