"""Runs: the stages of a recipe one after the other, in a folder that a stopped or crashed run goes on from.

OUTPUT/run.yaml         the whole config, defaults included
       log.jsonl        one line per optimizer step, and one per evaluation
       left_out.jsonl   one line per sample that the run went on without, if any
       checkpoints/     the newest states of the run
       best/STAGE/      the model as it was at the best evaluation of that stage, where there are any; beside it
                        STAGE.safetensors, what was trained of it, of a stage that ends with its best weights
       STAGE/           the model as it was at the end of that stage, ready for `opsin chat`; of a stage with
                        adapters, these and where their base is
       base/            the model that the first stage's adapters belong to, where no name leads to it
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from opsin.data.source import Fingerprinted, Source
from opsin.errors import ConfigError, TrainError
from opsin.generate.ready import choose_device
from opsin.nn.quantize import Bits
from opsin.nn.vision import VisionTower
from opsin.nn.vlm import VLM
from opsin.spec.recipe import RunConfig, Stage
from opsin.text.tokenizer import Tokenizer
from opsin.train.adapters import add_adapters
from opsin.train.checkpoint import CheckpointStore, Saved
from opsin.train.evaluate import EvaluationRow, prepare_judge
from opsin.train.feature_cache import with_cache
from opsin.train.folder import claimed, open_folder
from opsin.train.log import Reporter, RowLog, Silence
from opsin.train.loop import Precision, Row, StageLoop
from opsin.train.objectives import Objective, next_token
from opsin.train.parallel import World, local, open_world, skeleton, whole_state
from opsin.train.prepare import PreparedStage, check_kind, check_names, describe_trainable, prepare_stage, start_model
from opsin.train.stage_models import StageModels, put_module
from opsin.train.stop import StopRequest
from opsin.train.trackers import Trackers, check_installed
from opsin.weights import Model, RetrievalModel


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    status: Literal["finished", "stopped"]
    model: Model | RetrievalModel
    folder: Path
    """The model of the stage that was finished last; the run's own folder before that."""
    steps: int
    """Optimizer steps of the run so far, all stages together."""


def train_stage(
    module: nn.Module,
    stage: Stage,
    source: Source,
    *,
    tokenizer: Tokenizer | None = None,
    objective: Objective = next_token,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    workers: int = 1,
    activations: Literal["keep", "recompute"] = "keep",
    bits: Bits | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train one stage in memory: no folder, no checkpoints. Returns what each step did.

    Adapters of a stage with `lora` stay on the module: `weights.save_adapter` and `nn.lora.merge` take it from there.
    bits: what its frozen linear layers are quantised to.
    module: a VLM, or anything that `objective` knows. source: gives conversations, which need a tokenizer, or Encoded.
    Under torchrun all processes train together, and each ends with its part of the module (`parallel.whole_state`).
    """
    if stage.evaluate is not None:
        raise ConfigError(f"stage {stage.name!r} asks for evaluations, which `run` makes; train_stage keeps no folder")
    prepared = prepare_stage(
        stage,
        module=module,
        model=module.config if isinstance(module, VLM) else None,
        tokenizer=tokenizer,
        seed=seed,
        source=source,
    )
    rows = []
    with open_world(torch.device(choose_device(str(device)))) as world:
        add_adapters(module, prepared, bits=bits)
        objective = with_cache(objective, module, prepared, precision)
        loop = _loop(module, prepared, objective, world, precision=precision, workers=workers, activations=activations)
        for row in loop.rows():
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def run(
    config: RunConfig,
    *,
    model: Model | RetrievalModel | None = None,
    sources: Mapping[str, Source] | None = None,
    held_out: Mapping[str, Source] | None = None,
    objectives: Mapping[str, Objective] | None = None,
    on_row: Callable[[Row], None] | None = None,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Train all stages, or what is left of them when `config.output` holds an unfinished run of the same config.

    A run that goes on gives the same bits as one that was never interrupted. Under torchrun all processes train
    together.
    model: what to start from, trained in place; by default what `config.model` and `config.init` say.
    sources, held_out, objectives: by stage name, instead of the stage's `data`, of `evaluate.data` and of `next_token`.
    on_row: called after each step. reporter: where progress is shown. stop: asks to stop after the current step.
    """
    sources, held_out, objectives = sources or {}, held_out or {}, objectives or {}
    with open_world(torch.device(choose_device(config.device))) as world:
        with world.agreed():
            check_names(config, sources, "sources")
            check_names(config, held_out, "held-out samples")
            check_names(config, objectives, "objectives")
            check_installed(config)
        if reporter is None or not world.is_first:
            reporter = Silence()
        stop = stop or StopRequest()
        with claimed(Path(config.output), world):
            return _Run(world, config, model, sources, held_out, objectives, on_row, reporter, stop).train()


class _Run:
    """One call of `run`."""

    def __init__(
        self,
        world: World,
        config: RunConfig,
        model: Model | RetrievalModel | None,
        sources: Mapping[str, Source],
        held_out: Mapping[str, Source],
        objectives: Mapping[str, Objective],
        on_row: Callable[[Row], None] | None,
        reporter: Reporter,
        stop: StopRequest,
    ) -> None:
        self.world = world
        self.config, self.objectives, self.on_row, self.reporter, self.stop = config, objectives, on_row, reporter, stop
        self.output = Path(config.output)
        self.store = CheckpointStore(self.output / "checkpoints", keep=config.checkpoint.keep)
        self.saved = open_folder(config, self.store, world)
        self.models = StageModels(config, has_name=model is None and config.init == "model")
        with world.agreed():
            self.model = model or start_model(config)
            check_kind(config, self.model)
            self.prepared = [
                prepare_stage(
                    stage,
                    module=self.model.module,
                    model=self.model.config,
                    tokenizer=self.model.tokenizer,
                    seed=config.seed,
                    source=sources.get(stage.name),
                )
                for stage in config.stages
            ]
            self.judges = [prepare_judge(one, self.model, held_out.get(one.stage.name)) for one in self.prepared]
        state = self.saved.state if self.saved else {"log_bytes": 0, "left_out_bytes": 0}
        with world.agreed():
            self.log = self._log("log.jsonl", state["log_bytes"])
            self.left_out = self._log("left_out.jsonl", state["left_out_bytes"])
            told = config if world.is_first else config.replace(trackers=())
            self.trackers = Trackers(told, self.log, say=reporter.say)
        for prepared in self.prepared:
            ledger = prepared.feed.ledger
            ledger.restore(entry for entry in self.left_out.read() if entry["stage"] == prepared.stage.name)
            ledger.on_entry = self.left_out.write
        self.ever_trained: set[str] = set()
        """Tensors that earlier stages changed: what a checkpoint has to hold besides those that train."""

    def train(self) -> RunResult:
        """All stages from where the run stands."""
        folder = self.output
        first, steps = (self.saved.state["stage"], self.saved.step - self.saved.state["step"]) if self.saved else (0, 0)
        try:
            for number, prepared in enumerate(self.prepared):
                folder = self.output / prepared.stage.name
                if number >= first:
                    loop = self._train_stage(number, prepared, steps_before=steps)
                    steps += loop.step
                    if loop.step < loop.num_steps:
                        last = self.output / self.prepared[number - 1].stage.name if number else self.output
                        return RunResult("stopped", self.model, last, steps)
                self.ever_trained.update(prepared.trainable.merged)
            return RunResult("finished", self.model, folder, steps)
        finally:
            self.reporter.end()
            self.log.close()
            self.left_out.close()
            self.trackers.close()

    def _train_stage(self, number: int, prepared: PreparedStage, *, steps_before: int) -> StageLoop:
        """Train one stage to its end, or until a stop is asked for."""
        stage = prepared.stage
        objective = self.objectives.get(stage.name, prepared.objective)
        with self.world.agreed():
            if self.world.is_first:
                self.models.begin(number, self.model)
            add_adapters(self.model.module, prepared, bits=self.config.quantize)
            objective = with_cache(objective, self.model.module, prepared, self.config.precision)
        empty = skeleton(self.model.module) if self.world.size > 1 else None
        loop = _loop(
            self.model.module,
            prepared,
            objective,
            self.world,
            precision=self.config.precision,
            workers=self.config.workers,
            activations=self.config.activations,
            compiled=self.config.compile,
        )
        if self.saved is not None and self.saved.state["stage"] == number:
            self._restore(number, loop, self.saved)
        self._announce(number, prepared, loop)
        for row in loop.rows():
            self.log.write(row)
            self.reporter.row(row)
            if self.on_row is not None:
                self.on_row(row)
            self.trackers.row(row, self._judge(number, loop, empty))
            last = loop.step == loop.num_steps
            (stop,) = self.world.any(self.stop.made)
            if last or stop or loop.step % self.config.checkpoint.every == 0:
                self._save(number, loop, steps_before)
            if stop and not last:
                break
        if empty is not None:
            put_module(self.model, self._whole(empty))
        if loop.step < loop.num_steps:
            return loop
        self.reporter.end()
        self._tell_changes(stage)
        with self.world.agreed():
            if (judge := self.judges[number]) is not None:
                self.models.finish(number, self.model, step=judge.best_step, say=self.reporter.say)
        with self.world.agreed():
            if self.world.is_first:
                self.models.save(number, self.model, prepared.trainable)
        self.models.end(self.model)
        self.models.tell(number, say=self.reporter.say)
        return loop

    def _judge(self, number: int, loop: StageLoop, empty: nn.Module | None) -> EvaluationRow | None:
        judge = self.judges[number]
        if judge is None:
            return None

        def keep() -> None:
            model = copy(self.model)
            put_module(model, self._whole(empty))
            with self.world.agreed():
                if self.world.is_first:
                    self.models.save_best(number, model, self.prepared[number].trainable)

        return judge.after_step(loop, self.log, keep=keep, say=self.reporter.say)

    def _whole(self, empty: nn.Module | None) -> nn.Module:
        """What trains; where processes hold parts of it, a whole one made of them and of an empty one."""
        if empty is None:
            return self.model.module
        whole = skeleton(empty)
        whole.load_state_dict(whole_state(self.model.module), assign=True)
        return whole.eval()

    def _announce(self, number: int, prepared: PreparedStage, loop: StageLoop) -> None:
        say, stage = self.reporter.say, prepared.stage
        for broken in self.store.broken:
            say(f"passed over a damaged checkpoint: {broken}")
        self.store.broken = []
        if loop.step:
            say(f"going on with stage {stage.name!r} after step {loop.step} of {loop.num_steps}")
        for line in describe_trainable(self.model.module, prepared.trainable):
            say(line)
        if self.world.size > 1:
            say(f"{self.world.size} processes on {self.world.device.type} train together, each with its part")
        self.reporter.begin(
            stage.name,
            number=number + 1,
            num_stages=len(self.prepared),
            num_steps=loop.num_steps,
            done=loop.step,
        )

    def _tell_changes(self, stage: Stage) -> None:
        """Say how many samples of a stage were not trained on as they are."""
        rows = [row for row in self.log.read() if row["stage"] == stage.name and "evaluation" not in row]
        total = sum(row["samples"] for row in rows)
        if shortened := sum(row["shortened"] for row in rows):
            self.reporter.say(f"{shortened:,} of {total:,} samples were too long and shortened ({stage.overlong})")
        if left_out := sum(row["left_out"] for row in rows):
            self.reporter.say(f"{left_out:,} samples were left out and replaced by others: {self.left_out.path}")

    def _save(self, number: int, loop: StageLoop, steps_before: int) -> None:
        parameters = dict(self.model.module.named_parameters())
        judge = self.judges[number]
        self.trackers.flush()
        self.store.save(
            steps_before + loop.step,
            tensors={
                "weights": {name: parameters[name] for name in sorted(self.ever_trained | loop.trained.keys())},
                "optimizer": loop.optimizer.state(),
            },
            state={
                "stage": number,
                "step": loop.step,
                "log_bytes": self.log.sync(),
                "left_out_bytes": self.left_out.sync(),
                "data": self._data_facts(number),
                "evaluation": judge and judge.state(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processes": self.world.size,
            },
            world=self.world,
        )

    def _data_facts(self, number: int) -> dict[str, object]:
        """What a stage's data are, to notice whether they change."""
        judge, facts = self.judges[number], _data_facts(self.prepared[number].feed.source)
        return facts if judge is None else {**facts, "held_out": _data_facts(judge.feed.source)}

    def _restore(self, number: int, loop: StageLoop, saved: Saved) -> None:
        """Put weights, optimizer, place in the data and evaluations back to a checkpoint."""
        data = self._data_facts(number)
        if data != saved.state["data"]:
            raise TrainError(
                f"{saved.folder}: the data of stage {loop.stage.name!r} has changed since this run began "
                f"({saved.state['data']} -> {data}). Put it back, or start a new run in another folder."
            )
        parameters = dict(self.model.module.named_parameters())
        tensors = saved.tensors("weights", self.world.rows)
        if wrong := sorted(tensors.keys() ^ (self.ever_trained | loop.trained.keys())):
            raise TrainError(f"{saved.folder} is of a run that trains other tensors, such as {wrong[0]!r}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                local(parameters[name]).copy_(tensor)
        loop.optimizer.load_state(saved.tensors("optimizer", self.world.rows))
        loop.step = saved.state["step"]
        if (judge := self.judges[number]) is not None:
            judge.load_state(saved.state["evaluation"], loop)
        now = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processes": self.world.size}
        for what, value in now.items():
            if (before := saved.state.get(what, 1)) != value:
                self.reporter.say(f"{what} was {before} and is {value}: results may differ in the last bits")

    def _log(self, name: str, keep_bytes: int) -> RowLog:
        """A log that the first process keeps; the others read in it where it stands."""
        return RowLog(self.output / name, keep_bytes=keep_bytes, writes=self.world.is_first)


def _loop(
    module: nn.Module,
    prepared: PreparedStage,
    objective: Objective,
    world: World,
    *,
    precision: Precision,
    workers: int,
    activations: Literal["keep", "recompute"],
    compiled: bool = False,
) -> StageLoop:
    if isinstance(tower := getattr(module, "vision", None), VisionTower):
        tower.drop_path = prepared.stage.drop_path
    return StageLoop(
        module,
        prepared.feed,
        trainable=prepared.trainable,
        objective=objective,
        precision=precision,
        workers=workers,
        activations=activations,
        compiled=compiled,
        world=world,
    )


def _data_facts(source: Source) -> dict[str, object]:
    fingerprint = source.fingerprint if isinstance(source, Fingerprinted) else ""
    return {"samples": len(source), "fingerprint": fingerprint}
