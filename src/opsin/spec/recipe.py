"""A training run as one value: what is trained in which stage, on which data, and how."""

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from opsin.spec.base import Spec
from opsin.spec.chat import ChatFormat
from opsin.spec.lora import Lora
from opsin.spec.resolution import ResolutionConfig

PARTS = ("vision", "connector", "newline", "decoder")
"""Parts of a model that a recipe can name; every tensor's name begins with its part."""

RANDOM = "random"
"""Source of a part that starts from random weights."""

BASE = "base"
"""Folder of a run with the model that adapters belong to."""
BEST = "best"
"""Folder of a run with the model of each stage's best evaluation."""


class DataFile(Spec):
    """Conversations, in any shape and container that `docs/data.md` lists."""

    path: str
    """A file, a folder, or several shards: `shard-{000..010}.tar`, `*.parquet`. `#500` behind it is a limit."""
    image_root: str | None = None
    """Folder that relative picture paths start from; the file's own folder when not given."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many records."""
    repeat: float = Field(default=1, gt=0)
    """How often the file is seen per epoch: 2.5 is two passes, and a random half that changes with the epoch."""
    count: int | None = Field(default=None, ge=1)
    """How many samples the published data had. It decides nothing: a dry run counts with it where the file is not
    there."""
    weight: float | None = Field(default=None, gt=0)
    """The file's share of an epoch, relative to the others' weights. The epoch is as long as all files together."""
    format: Literal["auto", "json", "parquet", "tar", "arrow"] = "auto"
    """The container; `auto` tells by the first bytes."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Keys that the file calls otherwise: {caption: title} reads `title` as the caption."""
    prompt: str | None = None
    """What is said beside a picture; {} is the record's own question. For captions, questions and boxes alone."""
    box: Literal["xywh", "xyxy"] = "xywh"
    """The four numbers of a record's `bbox`: left, top, width, height, or left, top, right, bottom."""
    answers: str | None = None
    """VQA v2's file of annotations; found beside that of the questions when it has its published name."""
    split: str | None = None
    """ScienceQA's split; `train` when not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight is not None and self.repeat != 1:
            raise ValueError("has both weight and repeat; either says how often the file is seen")
        return self


class BatchSize(Spec):
    """How many conversations make one optimizer step, and how they go through the model.

    The gradient of a step is the mean over its taught tokens however it is cut into passes: gradient accumulation
    follows from these numbers and changes no result but rounding.
    """

    samples: int = Field(ge=1)
    """Conversations per optimizer step (the global batch)."""
    form: Literal["pack", "pad"] = "pack"
    """`pack`: conversations side by side in one row, none sees another; `pad`: one row each, as long as the longest."""
    micro_samples: int | None = Field(default=None, ge=1)
    """At most so many conversations per pass."""
    micro_tokens: int | None = Field(default=None, ge=1)
    """At most so many tokens per pass, padding included. A longer conversation has a pass for itself."""


class AdamW(Spec):
    """AdamW (arXiv:1711.05101). The defaults are those of every LLaVA stage."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0)
    part_lr: dict[str, float] = Field(default_factory=dict)
    """Learning rates of parts, or of tensors by glob, that differ from `lr`; the first entry that fits counts."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices; never to norms, biases and single vectors."""
    layer_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """Parts whose layers learn the slower the further they are from the output: 0.95 is 0.95 times the rate for the
    last layer, 0.95 times that for the one before, and so on to what stands before the first (arXiv:2106.08254)."""


class Muon(Spec):
    """Muon for hidden matrices (orthogonalised momentum), AdamW for embeddings, head, positions and vectors."""

    kind: Literal["muon"] = "muon"
    lr: float = Field(gt=0)
    part_lr: dict[str, float] = Field(default_factory=dict)
    """As in AdamW, for the matrices."""
    momentum: float = 0.95
    weight_decay: float = 0.0
    scale: Literal["original", "match_rms_adamw"] = "original"
    """How a step follows the matrix's shape: times sqrt(max(1, rows / columns)), or about as long as AdamW's."""
    rest: AdamW
    """For everything that is not a hidden matrix."""


OptimConfig = Annotated[AdamW | Muon, Field(discriminator="kind")]


class Schedule(Spec):
    """Learning rate over the steps of a stage, as a factor of each group's own rate."""

    kind: Literal["cosine", "cosine_of_epochs", "constant"] = "cosine"
    """After the warm-up: half a cosine down to `min_lr`, or no change. `cosine_of_epochs`: the cosine counts the epochs
    that are done and moves between two epochs only; the warm-up ends with the first epoch at the latest (LAVIS)."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Part of the steps over which the rate rises from `warmup_start_lr`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same as a number of steps, which then counts instead."""
    min_lr: float = Field(default=0.0, ge=0)
    """Where a cosine ends, given for the optimizer's `lr`; parts with other rates keep their proportion to it."""
    warmup_start_lr: float = Field(default=0.0, ge=0)
    """Where the warm-up begins, likewise."""


Objective = Literal["next_token", "itc_itm_itg"]
Overlong = Literal["error", "drop", "truncate", "trim_turns", "trim_oldest_turns", "shrink_picture"]


class BadSamples(Spec):
    """What becomes of a sample that cannot be used: written as `fail`, `skip`, or `{policy: skip, max_share: 0.01}`."""

    policy: Literal["fail", "skip"] = "fail"
    """`fail`: the run stops and names it. `skip`: another sample takes its place, and `left_out.jsonl` tells of it."""
    max_share: float = Field(default=0.001, gt=0, le=1)
    """Most samples of an epoch that may be skipped, as a share of the data; one is always allowed. One more stops the
    run within the step."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return {"policy": data} if isinstance(data, str) else data


class Evaluation(Spec):
    """How a stage is judged while it trains, on data that it does not train on.

    The model of the best evaluation stays in OUTPUT/best/STAGE.
    """

    data: tuple[DataFile, ...] = ()
    every: int = Field(ge=1)
    """Optimizer steps between two evaluations. The end of the stage is always one."""
    metric: Literal["loss", "exact_match"] = "loss"
    """What decides which is best. `exact_match`: the share of samples whose last answer the model gives word for word,
    always taking the likeliest token; the loss is logged with it."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, for `exact_match`."""
    patience: int | None = Field(default=None, ge=1)
    """The stage ends after so many evaluations in a row without a new best. None: it goes on to its end."""
    finish: Literal["last", "best"] = "last"
    """Which weights the stage ends with. `best`: when it is over it goes back to those of its best evaluation; they are
    what its folder holds and what the next stage begins from."""


class CachedFeatures(Spec):
    """Where the features of a frozen vision tower are kept, so that each tile goes through it once."""

    folder: str
    """Several runs may share one."""
    max_gib: float = Field(default=50, gt=0)
    """Size of the folder beyond which nothing more is kept."""


class Stage(Spec):
    """One stage: what trains, on what, how."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """Also the name of the folder that the model is saved to when the stage ends."""
    trainable: tuple[str, ...] = ()
    """Parts (vision, connector, newline, decoder) or globs over tensor names (`decoder.layers.*.attn.*`)."""
    lora: Lora | None = None
    """Adapters that train besides; the stage's folder then holds them, and what `trainable` names, in PEFT's layout."""
    objective: Objective = "next_token"
    """`next_token`: every taught token from what stands before it. `itc_itm_itg`: pictures and captions compared,
    matched and written (arXiv:2301.12597 section 3.2), by a model that compares and has no language model."""
    data: tuple[DataFile, ...] = ()
    captions: Literal["whole", "split"] = "whole"
    """`split`: each answer is cut in two between words, at random anew in each epoch, and the first part is what the
    user says: how BLIP-2 teaches a model with an encoder (the same, section 3.3)."""
    chat: str | ChatFormat | None = None
    """Chat format for this stage, by name or written out; the model's own when not given."""
    resolution: ResolutionConfig | None = None
    """How pictures are cut in this stage; the model's own when not given."""
    cache_features: CachedFeatures | None = None
    """Keep what the vision tower computes; for stages in which it is frozen."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest conversation, pictures included; the model's own limit when not given."""
    overlong: Overlong = "error"
    """What becomes of a longer conversation; `data.overlong` explains each. A picture is never cut."""
    bad_samples: BadSamples = BadSamples()
    """What becomes of samples that cannot be read, shown or learnt from: `fail`, `skip`, or a limit for skipping."""
    sampler: Literal["shuffle", "modality_length"] = "shuffle"
    """`modality_length`: steps of one kind (with pictures or without) and of similar lengths, as LLaVA groups them."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """How likely the vision tower's last block is left out for a tile, rising evenly from 0 at its first (InternVL)."""
    batch: BatchSize
    optim: OptimConfig
    clip: float | None = Field(default=1.0, gt=0)
    """Longest gradient (2-norm over all trained tensors); a longer one is shortened to it. None: no limit."""
    schedule: Schedule = Schedule()
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the data."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, which count instead of `epochs` where both are given."""

    evaluate: Evaluation | None = None
    """Judge the model while it trains, end early, keep the best."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.trainable and self.lora is None:
            raise ValueError(f"stage {self.name!r} trains nothing: name parts in trainable, or give lora")
        if self.epochs is None and self.steps is None:
            raise ValueError(f"stage {self.name!r} does not say how long it is: give epochs or steps")
        for name in ("min_lr", "warmup_start_lr"):
            if getattr(self.schedule, name) > self.optim.lr:
                raise ValueError(
                    f"stage {self.name!r}: schedule.{name} {getattr(self.schedule, name):g} is above optim.lr "
                    f"{self.optim.lr:g}"
                )
        if self.compares:
            if self.batch.form != "pad":
                raise ValueError(f"stage {self.name!r}: pairs are compared row by row; set batch.form: pad")
            if self.chat is not None or self.captions != "whole":
                raise ValueError(
                    f"stage {self.name!r}: {self.objective} reads captions as they are; leave chat and captions out"
                )
            if self.lora is not None or self.cache_features is not None:
                raise ValueError(f"stage {self.name!r}: lora and cache_features are for models that answer")
        return self

    @property
    def compares(self) -> bool:
        """Whether it trains a model that compares pictures with texts, in place of one that answers."""
        return self.objective == "itc_itm_itg"


class PartSources(Spec):
    """Where the weights of each part come from: a folder, a file, a hub id, or `random`."""

    vision: str = RANDOM
    connector: str = RANDOM
    newline: str = RANDOM
    decoder: str = RANDOM
    qformer: str = RANDOM
    """Of a model that compares (BLIP-2's stage 1): a BERT, or all that another such model has beside its tower."""


class Checkpoints(Spec):
    """When the state of a run is saved."""

    every: int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints. The end of a stage is always one."""
    keep: int = Field(default=2, ge=1)
    """How many are kept, the newest ones."""


class RunConfig(Spec):
    """Everything that decides a run. The same config, data and machine give the same bits."""

    model: str
    """Preset id, folder, or hub id: the description, and with `init: model` the weights too."""
    init: Literal["model", "random"] | PartSources = "model"
    """Weights to start from: the model's own, random ones, or each part from somewhere else."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, where it is not the model's own."""
    output: str
    """Folder that everything is written to."""
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the passes. Weights and optimizer state are float32 either way; `bfloat16` is autocast."""
    quantize: Literal["int8", "int4", "nf4"] | None = None
    """Bits of the frozen linear layers of tower and language model, for a run of one stage that trains adapters."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; otherwise a torch device such as `cpu` or `cuda:1`."""
    activations: Literal["keep", "recompute"] = "keep"
    """`recompute`: what a block computes is forgotten, and computed again when its gradient is due. The same numbers in
    less memory, for about a third more time."""
    compile: bool = False
    """torch.compile on each block: equal but for rounding. Worth its start-up time on a GPU, for long runs."""
    workers: int = Field(default=2, ge=0)
    """Threads that read and prepare samples ahead of the model. They change no result."""
    checkpoint: Checkpoints = Checkpoints()
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines on the screen. The log file has every step."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Programs that are told every step too. W&B and MLflow take project, name and place from their own environment
    variables."""
    stages: tuple[Stage, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("a run needs at least one stage")
        if self.quantize is not None and (len(names) > 1 or self.stages[0].lora is None):
            raise ValueError("quantize is for a run of one stage that trains adapters: give that stage lora")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called {name!r}; each writes a folder of its name")
            if name in {"checkpoints", "run.yaml", "log.jsonl", "left_out.jsonl", "trackers", BASE, BEST}:
                raise ValueError(f"a stage cannot be called {name!r}: the run itself writes there")
        if len({stage.compares for stage in self.stages}) > 1:
            raise ValueError(
                "itc_itm_itg trains a model without a language model, the other stages one with it: make them two "
                "runs, the second of which starts from the first one's folder"
            )
        return self

    @property
    def compares(self) -> bool:
        """Whether it trains a model that compares pictures with texts: all of its stages do, or none."""
        return self.stages[0].compares


MACHINE_KEYS = ("output", "device", "activations", "compile", "workers", "checkpoint", "log_every", "trackers")
"""Settings that may change when a run goes on: they say where and how it is run, not what is computed."""


def matches(name: str, pattern: str) -> bool:
    """Whether a tensor's or layer's name is meant by a part name or a glob."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
