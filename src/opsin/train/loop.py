"""The training loop of one stage: read, forward, backward, check, update. All else hangs on the rows it yields."""

import json
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from opsin.collate import pack, pad, with_blank_picture
from opsin.data.feed import Feed
from opsin.data.order import derive_seed
from opsin.data.passes import passes
from opsin.encode import Encoded
from opsin.errors import TrainError
from opsin.nn.vlm import VLM
from opsin.train.blocks import prepared_blocks
from opsin.train.culprit import Watch, bad_gradients, listed
from opsin.train.objectives import Loss, Objective
from opsin.train.optim import Optimizer, rate_factor
from opsin.train.parallel import Step, TogetherError, World, local
from opsin.train.trainable import GradientCheck, Trainable, set_trainable

Item = TypeVar("Item")
Precision = Literal["float32", "bfloat16"]


class Row(TypedDict):
    """What one optimizer step did: a line of the log."""

    stage: str
    step: int
    """Of the stage, from 1."""
    epoch: float
    """Passes over the data after this step."""
    loss: float
    """Nats per taught token, before the update."""
    grad_norm: float
    """2-norm over all trained tensors, before it is shortened."""
    lr: dict[str, float]
    """Learning rate of each group of tensors."""
    samples: int
    shortened: int
    """Of these, how many were too long and were cut to fit (`overlong`)."""
    left_out: int
    """How many others were bad or too long and were replaced (`left_out.jsonl`)."""
    passes: int
    """How many times the model ran, in each process: the samples of a step are cut into passes (accumulation)."""
    tokens: int
    image_tokens: int
    supervised: int
    """Taught tokens."""
    seconds: float
    data_seconds: float
    """Of these, how long the model waited for samples."""


@dataclass(frozen=True, eq=False, slots=True)
class _Pass:
    """One pass through the model, its gradient already added. Pictures are not kept until the step ends."""

    names: list[str]
    tokens: int
    image_tokens: int
    total: Tensor
    """Sum of the loss over taught tokens."""
    count: int
    """Taught tokens."""


class StageLoop:
    """One stage on one module. `rows()` does the steps; between two of them everything can be saved or stopped."""

    def __init__(
        self,
        module: nn.Module,
        feed: Feed,
        *,
        trainable: Trainable,
        objective: Objective,
        precision: Precision = "float32",
        workers: int = 0,
        activations: Literal["keep", "recompute"] = "keep",
        compiled: bool = False,
        world: World | None = None,
    ) -> None:
        """Moves the module to the world's device, in parts where it has several processes; sets which tensors train."""
        self.module = module
        self.feed = feed
        self.stage = feed.stage
        self.precision = precision
        self.workers = workers
        self.world = world or World()
        self.device = self.world.device
        self._blocks = partial(prepared_blocks, module, recompute=activations == "recompute", compiled=compiled)
        self._under = Step(module, objective)
        self.world.split(self._under, low=torch.bfloat16 if precision == "bfloat16" else None)
        self.trained = set_trainable(module, trainable)
        self.optimizer = Optimizer(self.trained, self.stage.optim)
        self.num_steps = feed.num_steps
        self.step = 0
        """Steps done."""
        self._check_gradients = GradientCheck(module, self.trained)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        return self._under.objective

    @objective.setter
    def objective(self, objective: Objective) -> None:
        self._under.objective = objective

    def rows(self) -> Iterator[Row]:
        """Train from where the stage stands to its end; one row after each update."""
        self.module.train()
        try:
            with self._blocks(), closing(self._stream(workers=self.workers)) as samples:
                stream = _Stopwatch(samples)
                while self.step < self.num_steps:
                    yield self._one_step(stream)
        finally:
            self.module.eval()

    def end(self) -> None:
        """Let the stage end with the step that was made last."""
        self.num_steps = self.step

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Inside, the module does not train. What a pass has joined is in parts again afterwards."""
        self.module.eval()
        with torch.no_grad(), self.joined():
            yield
        self.module.train()

    def joined(self) -> AbstractContextManager[None]:
        """Inside, the module's methods can be called as of a whole one, by all processes at once."""
        return self.world.joined(self._under)

    def _stream(self, *, workers: int) -> Generator[Encoded, None, None]:
        """This process' samples from the step that is due."""
        return self.feed.stream(self.step, workers=workers, share=self.world.share)

    def _one_step(self, stream: "_Stopwatch[Encoded]") -> Row:
        started, waited = time.perf_counter(), stream.seconds
        shortened = self.feed.num_shortened
        with self._randomness():
            done = [self._one_pass(*one) for one in self.rounds(self._groups(stream))]
            left_out = self._settle()
            total, *counts = self.world.sums(
                float(torch.stack([one.total for one in done]).double().sum()),
                sum(one.count for one in done),
                sum(len(one.names) for one in done),
                sum(one.tokens for one in done),
                sum(one.image_tokens for one in done),
                self.feed.num_shortened - shortened,
            )
            count, num_samples, tokens, image_tokens, num_shortened = map(int, counts)
            self._check_gradients(with_pictures=image_tokens > 0)
            loss, norm = self._finish_gradient(done, total, count)
            factor = rate_factor(
                self.stage.schedule,
                self.step,
                self.num_steps,
                lr=self.stage.optim.lr,
                steps_per_epoch=self.feed.steps_per_epoch,
            )
            self.optimizer.step(factor)
        for parameter in self.trained.values():
            parameter.grad = None
        self.step += 1
        return Row(
            stage=self.stage.name,
            step=self.step,
            epoch=self.step / self.feed.steps_per_epoch,
            loss=loss,
            grad_norm=norm,
            lr=self.optimizer.rates(factor),
            samples=num_samples,
            shortened=num_shortened,
            left_out=left_out,
            passes=len(done),
            tokens=tokens,
            image_tokens=image_tokens,
            supervised=count,
            seconds=time.perf_counter() - started,
            data_seconds=stream.seconds - waited,
        )

    def _randomness(self) -> AbstractContextManager[None]:
        """What random numbers and orders of sums follow from: the step's number."""
        others = [self.world.rank] if self.world.rank else []  # each process draws its own
        return reproducible(self.device, derive_seed(self.feed.seed, self.stage.name, "step", self.step, *others))

    def _settle(self) -> int:
        """Tell all processes what each left out of the step, which is over when it was too much. How many there are."""
        found = [json.dumps(entry) for entry in self.feed.found]
        with self.world.agreed():
            everything = [json.loads(entry) for entries in self.world.lists(found) for entry in entries]
            return len(self.feed.settle(self.step, everything))

    def _groups(self, samples: Iterator[Encoded]) -> Iterator[list[Encoded]]:
        """The samples of each of this process' passes of the step that is due."""
        due = self.world.share(self.feed.step_samples(self.step))
        return passes(islice(samples, len(due)), self.stage.batch)

    def rounds(self, groups: Iterator[list[Encoded]]) -> Iterator[tuple[list[Encoded], bool]]:
        """`World.rounds`, with an empty list where this process has no samples left and others have."""
        alone_allowed = not getattr(self.objective, "compares_samples", False)
        return self.world.rounds(groups, alone_allowed=alone_allowed, where=f"stage {self.stage.name!r}")

    def loss_of(self, samples: list[Encoded], pictures: bool) -> Loss:
        """The samples of one pass through the model.

        samples: where there are none, the stage's first runs in their place, for nothing. pictures: whether some
        process has any, so that the tower has to run.
        """
        chosen = samples or [self.feed.load_or_replace(0, *self.feed.step_samples(0)[0]).sample]
        batch = (pack if self.stage.batch.form == "pack" else pad)(chosen)
        if pictures and batch.patches is None and isinstance(self.module, VLM):
            batch = with_blank_picture(batch, self.module.config)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            total, count = self._under(batch.to(self.device))
        return Loss(total, count) if samples else Loss(total * 0, 0)

    def _one_pass(self, samples: list[Encoded], pictures: bool) -> _Pass:
        """Forward and backward. The gradient of the sum over tokens is added to those of the step's other passes."""
        loss = self.loss_of(samples, pictures)
        if not loss.total.requires_grad:
            raise TrainError(f"stage {self.stage.name!r}: the loss depends on no tensor that trains")
        loss.total.backward()
        return _Pass(
            names=[sample.name for sample in samples],
            tokens=sum(sample.num_tokens for sample in samples),
            image_tokens=sum(sample.num_image_tokens for sample in samples),
            total=loss.total.detach(),
            count=loss.count,
        )

    def _finish_gradient(self, done: Sequence[_Pass], total: float, count: int) -> tuple[float, float]:
        """Turn the summed gradient into that of the mean, and shorten it. Returns the mean loss and the norm.

        Only here is it divided, by the taught tokens of the whole step: a mean of the means of passes would give the
        tokens of short passes more weight. Raises TrainError when a number is not finite; nothing is updated then.
        """
        for parameter in self.trained.values():
            if parameter.grad is None:
                # A step without pictures: tower and connector get zeros, as from the authors' empty dummy picture, so
                # that the optimizer's averages grow old at the same rate for all.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        self.world.add_up(gradients)
        loss, norm = total / count, self.world.norm(gradients) / count
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(done, loss, norm)
        clip = self.stage.clip
        shorten = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))  # 1e-6: as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_([local(gradient) for gradient in gradients], shorten / count)
        return loss, norm

    def _not_finite(self, done: Sequence[_Pass], loss: float, norm: float) -> TrainError:
        world = self.world
        tensors = dict.fromkeys(name for each in world.lists(bad_gradients(self.trained)) for name in each)
        watch = self._run_again()
        where = next(filter(None, world.texts(watch.found or "")), "every output and gradient of a module is finite")
        everyone = [name for one in done for name in one.names]
        guilty = [name for one in done if not torch.isfinite(one.total) for name in one.names]
        suspects: list[list[list[str]]] = [world.lists(each) for each in (guilty, watch.samples, everyone)]
        names = next(each for each in suspects if any(each))
        concerned = [f"{listed(each)}{world.named(rank)}" for rank, each in enumerate(names) if each]
        return (TrainError if world.size == 1 else TogetherError)(
            f"stage {self.stage.name!r}, step {self.step + 1}: the loss is {loss:g} and the gradient's norm {norm:g}. "
            f"Nothing was updated. Samples of the passes concerned: {'; '.join(concerned)}. Computed once more: "
            f"{where}."
            + (f" Tensors whose gradient is not finite: {listed(tensors)}." if tensors else "")
            + " Look at these samples, or lower the learning rate."
        )

    def _run_again(self) -> Watch:
        """The failed step's passes, watched: all of them, as processes that share a step have to run as many."""
        for parameter in self.trained.values():
            parameter.grad = None
        watch = Watch(self.module, self.objective)
        places = self.world.share(self.feed.step_samples(self.step))
        samples = (self.feed.load_or_replace(self.step, *place).sample for place in places)
        self.objective = watch.objective
        with self._randomness(), watch.watching():
            for one in self.rounds(self._groups(samples)):
                self._one_pass(*one)
        return watch


@contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, random numbers follow from `seed` and, on a CPU, sums have a fixed order. Outside, nothing changes.

    Randomness that follows from the step's number needs no saving: a resumed run draws what the first one would have
    drawn. The fixed order matters where many slots take the same row, as newlines do: torch's default adds their
    gradients in the order in which threads come.
    """
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            settings.fill_uninitialized_memory = False  # a debugging aid that costs time
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0])
            settings.fill_uninitialized_memory = before[1]


class _Stopwatch(Iterator[Item], Generic[Item]):
    """An iterator that knows how long one waited for it."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self.seconds = 0.0

    def __next__(self) -> Item:
        asked = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - asked
