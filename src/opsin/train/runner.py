"""Runs: the stages of a recipe one after the other, in a folder that a stopped or crashed run goes on from.

OUTPUT/run.yaml         the whole config, defaults included
       log.jsonl        one line per optimizer step
       checkpoints/     the newest states of the run
       STAGE/           the model as it was at the end of that stage, ready for `opsin chat`
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin import weights
from opsin.data.source import Fingerprinted, Source
from opsin.errors import ConfigError, TrainError
from opsin.nn.vlm import VLM
from opsin.spec.recipe import RunConfig, Stage
from opsin.text.tokenizer import Tokenizer
from opsin.train.checkpoint import CheckpointStore, Saved, opened, sync
from opsin.train.config import differences, to_yaml
from opsin.train.log import Reporter, RowLog, Silence
from opsin.train.loop import Precision, Row, StageLoop
from opsin.train.objectives import Objective, next_token
from opsin.train.parallel import World, local, open_world, skeleton, whole_state
from opsin.train.prepare import PreparedStage, check_names, describe_trainable, prepare_stage, start_model
from opsin.train.stop import StopRequest
from opsin.weights import Model

CONNECTOR_FILE = "connector.safetensors"
"""What a stage that trains nothing but the connector writes besides the model: the next run's `init.connector`."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    status: Literal["finished", "stopped"]
    model: Model
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
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train one stage in memory: no folder, no checkpoints. Returns what each step did.

    module: a VLM, or anything that `objective` knows. source: gives conversations, which need a tokenizer, or Encoded.
    Under torchrun all processes train together, and each ends with its part of the module (`parallel.whole_state`).
    """
    prepared = prepare_stage(
        stage,
        module=module,
        model=module.config if isinstance(module, VLM) else None,
        tokenizer=tokenizer,
        seed=seed,
        source=source,
    )
    with open_world(choose_device(str(device))) as world:
        loop = StageLoop(
            module,
            prepared.feed,
            trainable=prepared.trainable,
            objective=objective,
            precision=precision,
            workers=workers,
            activations=activations,
            world=world,
        )
        rows = []
        for row in loop.rows():
            rows.append(row)
            if on_row is not None:
                on_row(row)
        return rows


def run(
    config: RunConfig,
    *,
    model: Model | None = None,
    sources: Mapping[str, Source] | None = None,
    objectives: Mapping[str, Objective] | None = None,
    on_row: Callable[[Row], None] | None = None,
    reporter: Reporter | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Train all stages, or what is left of them when `config.output` holds an unfinished run of the same config.

    A run that goes on gives the same bits as one that was never interrupted. Under torchrun all processes train
    together.
    model: what to start from, trained in place; by default what `config.model` and `config.init` say.
    sources, objectives: by stage name, instead of the stage's `data` and of `next_token`.
    on_row: called after each step. reporter: where progress is shown. stop: asks to stop after the current step.
    """
    sources, objectives = sources or {}, objectives or {}
    check_names(config, sources, "sources")
    check_names(config, objectives, "objectives")
    with open_world(choose_device(config.device)) as world:
        if reporter is None or not world.is_first:
            reporter = Silence()
        return _Run(world, config, model, sources, objectives, on_row, reporter, stop or StopRequest()).train()


class _Run:
    """One call of `run`."""

    def __init__(
        self,
        world: World,
        config: RunConfig,
        model: Model | None,
        sources: Mapping[str, Source],
        objectives: Mapping[str, Objective],
        on_row: Callable[[Row], None] | None,
        reporter: Reporter,
        stop: StopRequest,
    ) -> None:
        self.world = world
        self.config, self.objectives, self.on_row, self.reporter, self.stop = config, objectives, on_row, reporter, stop
        self.output = Path(config.output)
        self.store = CheckpointStore(self.output / "checkpoints", keep=config.checkpoint.keep)
        self.saved = self._open_folder()
        with world.agreed():
            self.model = model or start_model(config)
            self.prepared = [
                prepare_stage(
                    stage,
                    module=self.model.vlm,
                    model=self.model.config,
                    tokenizer=self.model.tokenizer,
                    seed=config.seed,
                    source=sources.get(stage.name),
                )
                for stage in config.stages
            ]
        # The log is the first process' alone; the others write theirs to nowhere.
        log = self.output / "log.jsonl" if world.is_first else None
        self.log = RowLog(log, keep_bytes=self.saved.state["log_bytes"] if self.saved else 0)
        self.ever_trained: set[str] = set()
        """Tensors that this stage or an earlier one trains: what a checkpoint has to hold."""

    def train(self) -> RunResult:
        """All stages from where the run stands."""
        folder, steps = self.output, 0
        first = self.saved.state["stage"] if self.saved else 0
        try:
            for number, prepared in enumerate(self.prepared):
                self.ever_trained.update(prepared.trainable.names)
                folder = self.output / prepared.stage.name
                if number >= first:
                    done = self._train_stage(number, prepared, steps_before=steps)
                    if done < prepared.feed.num_steps:
                        last = self.output / self.prepared[number - 1].stage.name if number else self.output
                        return RunResult("stopped", self.model, last, steps + done)
                steps += prepared.feed.num_steps
            return RunResult("finished", self.model, folder, steps)
        finally:
            self.reporter.end()
            self.log.close()

    def _train_stage(self, number: int, prepared: PreparedStage, *, steps_before: int) -> int:
        """Train one stage to its end, or until a stop is asked for. Returns how many of its steps are done."""
        stage = prepared.stage
        objective = self.objectives.get(stage.name, next_token)
        empty = skeleton(self.model.vlm) if self.world.size > 1 else None
        loop = StageLoop(
            self.model.vlm,
            prepared.feed,
            trainable=prepared.trainable,
            objective=objective,
            precision=self.config.precision,
            workers=self.config.workers,
            activations=self.config.activations,
            compiled=self.config.compile,
            world=self.world,
        )
        if self.saved is not None and self.saved.state["stage"] == number:
            self._restore(loop, self.saved)
        self._announce(number, prepared, loop)
        saved_at = loop.step
        for row in loop.rows():
            self.log.write(row)
            self.reporter.row(row)
            if self.on_row is not None:
                self.on_row(row)
            last = loop.step == loop.num_steps
            (stop,) = self.world.any(self.stop.made)
            if last or stop or loop.step % self.config.checkpoint.every == 0:
                self._save(number, loop, steps_before)
                saved_at = loop.step
            if stop and not last:
                self._join(empty)
                return saved_at
        self.reporter.end()
        self._join(empty)
        self._save_model(stage, prepared)
        return loop.step

    def _join(self, empty: nn.Module | None) -> None:
        """Make tensors whole again where processes hold parts: to save the stage's model, and to split it anew."""
        if empty is not None:
            empty.load_state_dict(whole_state(self.model.vlm), assign=True)
            assert isinstance(empty, VLM)
            self.model.vlm = empty.eval()

    def _announce(self, number: int, prepared: PreparedStage, loop: StageLoop) -> None:
        say, stage = self.reporter.say, prepared.stage
        for broken in self.store.broken:
            say(f"passed over a damaged checkpoint: {broken}")
        self.store.broken = []
        if loop.step:
            say(f"going on with stage {stage.name!r} after step {loop.step} of {loop.num_steps}")
        for line in describe_trainable(self.model.vlm, prepared.trainable):
            say(line)
        self.reporter.begin(
            stage.name,
            number=number + 1,
            num_stages=len(self.prepared),
            num_steps=loop.num_steps,
            done=loop.step,
        )

    def _save(self, number: int, loop: StageLoop, steps_before: int) -> None:
        parameters = dict(self.model.vlm.named_parameters())
        source = loop.feed.source
        self.store.save(
            steps_before + loop.step,
            tensors={
                "weights": {name: parameters[name] for name in sorted(self.ever_trained)},
                "optimizer": loop.optimizer.state(),
            },
            state={
                "stage": number,
                "step": loop.step,
                "log_bytes": self.log.sync(),
                "data": _data_facts(source),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processes": self.world.size,
            },
            world=self.world,
        )

    def _restore(self, loop: StageLoop, saved: Saved) -> None:
        """Put weights, optimizer and place in the data back to a checkpoint."""
        data = _data_facts(loop.feed.source)
        if data != saved.state["data"]:
            raise TrainError(
                f"{saved.folder}: the data of stage {loop.stage.name!r} has changed since this run began "
                f"({saved.state['data']} -> {data}). Put it back, or start a new run in another folder."
            )
        parameters = dict(self.model.vlm.named_parameters())
        tensors = saved.tensors("weights", self.world.rows)
        if wrong := sorted(tensors.keys() ^ self.ever_trained):
            raise TrainError(f"{saved.folder} is of a run that trains other tensors, such as {wrong[0]!r}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                local(parameters[name]).copy_(tensor)
        loop.optimizer.load_state(saved.tensors("optimizer", self.world.rows))
        loop.step = saved.state["step"]
        now = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processes": self.world.size}
        for what, value in now.items():
            if (before := saved.state.get(what, 1)) != value:
                self.reporter.say(f"{what} was {before} and is {value}: results may differ in the last bits")

    def _save_model(self, stage: Stage, prepared: PreparedStage) -> None:
        folder = self.output / stage.name
        with self.world.agreed():
            if self.world.is_first:
                weights.save_native(folder, self.model.vlm, self.model.config, self.model.tokenizer)
                if all(name.startswith("connector.") for name in prepared.trainable.names):
                    connector = {
                        name: tensor.detach().cpu().contiguous()
                        for name, tensor in self.model.vlm.named_parameters()
                        if name.startswith("connector.")
                    }
                    _write_tensors(folder / CONNECTOR_FILE, connector)
        self.reporter.say(f"stage {stage.name!r} is done; its model is in {folder}")

    def _open_folder(self) -> Saved | None:
        """What the first process finds there: it alone looks, reads and writes."""
        found = ""
        with self.world.agreed():
            if self.world.is_first and (saved := self._open_folder_alone()):
                found = str(saved.folder)
        found = self.world.told(found)
        return opened(Path(found)) if found else None

    def _open_folder_alone(self) -> Saved | None:
        """Make the run's folder, or find where the run in it stands. Raises TrainError for a folder of other things."""
        file = self.output / "run.yaml"
        empty = not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir()))
        if not empty and not file.is_file():
            raise TrainError(f"{self.output} is there and holds no run; name a new folder as output")
        saved = self.store.newest()
        if saved is not None:
            self._refuse_changes(file)
        self.output.mkdir(parents=True, exist_ok=True)
        self.store.remove_unfinished()
        _write_text(file, to_yaml(self.config))
        return saved

    def _refuse_changes(self, file: Path) -> None:
        try:
            before: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise TrainError(f"{file} of the run that is to go on cannot be read: {error}") from None
        changed = differences(before or {}, self.config.model_dump(mode="json"))
        if changed:
            raise ConfigError(
                f"{self.output} holds a run with other settings: {'; '.join(changed)}. Take the settings back to go on "
                "with it, or name another folder as output."
            )


def choose_device(name: str) -> torch.device:
    """The device of a config; `auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is none that torch knows; auto, cpu and cuda are") from None


def _data_facts(source: Source) -> dict[str, object]:
    fingerprint = source.fingerprint if isinstance(source, Fingerprinted) else ""
    return {"samples": len(source), "fingerprint": fingerprint}


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    save_file(dict(tensors), temporary)
    _move(temporary, file)


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _move(temporary, file)


def _move(temporary: Path, file: Path) -> None:
    """Put a finished file in its place, so that there is never half of one."""
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)
