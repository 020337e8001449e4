"""Loading and writing models that compare pictures with texts (BLIP-2's stage 1 and retrieval)."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from opsin.errors import OpsinError, TokenizerError, UnknownNameError, WeightError
from opsin.families import FAMILIES, HubConfig, Retrieval, retrieval_for_hub, retriever_preset
from opsin.nn.retriever import Retriever
from opsin.spec.qformer import RetrieverConfig
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from opsin.weights.account import account, choose_layout, raise_problems
from opsin.weights.config import NATIVE, read_json
from opsin.weights.exporter import (
    ExportReport,
    changed_settings,
    pick_layout,
    to_layout,
    verify_tensors,
    write_published,
)
from opsin.weights.files import read_headers
from opsin.weights.grow import as_stored
from opsin.weights.hub import Located, locate
from opsin.weights.init import initialise
from opsin.weights.loader import PARTS, account_part, assign, main_dtype, named_dtype, read_tensors, take
from opsin.weights.rules import Renamer
from opsin.weights.shipped import is_here


@dataclass
class RetrievalModel:
    """A loaded model and what belongs to it."""

    retriever: Retriever
    config: RetrieverConfig
    name: str
    """What it was loaded as: a path, or repository@commit."""
    layout: str = "original"
    """How its tensors are named where it came from."""
    tokenizer_folder: Path | None = None
    """Where the tokenizer's files are."""

    @property
    def module(self) -> Retriever:
        """What trains: the same as of a `Model`."""
        return self.retriever

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use. Raises TokenizerError where there is none or it does not fit."""
        if self.tokenizer_folder is None:
            raise TokenizerError(f"{self.name} was made without a tokenizer; name a folder that has one")
        tokenizer = load_tokenizer(self.tokenizer_folder)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise TokenizerError(
                f"the tokenizer in {self.tokenizer_folder} has {tokenizer.vocab_size} ids, {self.name} has only "
                f"{self.config.vocab_size} rows of words: they belong to different models"
            )
        return tokenizer


def on_meta(config: RetrieverConfig) -> Retriever:
    """The model without storage: names and shapes only."""
    with torch.device("meta"):
        return Retriever(config)


def build_retriever(
    config: RetrieverConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Retriever:
    """A model with random weights; see `weights.init`."""
    retriever = on_meta(config).to(dtype).to_empty(device=device)
    initialise(retriever, seed=seed)
    return retriever


def load_retriever(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    tower: str | Path | None = None,
    tokenizer: Path | None = None,
) -> RetrievalModel:
    """Load a model in eval mode.

    name: a folder, the id of a published model or a hub repository. dtype: what to convert to; None or "auto" keeps the
    checkpoint's. tower: folder, file or repository of the vision tower, for checkpoints of LAVIS, which lack it.
    tokenizer: folder of the tokenizer, where it is not beside the weights.
    """
    located = _locate(name, revision)
    config, hub, family = read_folder(located)
    retriever = on_meta(config)
    shapes = {key: tuple(value.shape) for key, value in retriever.state_dict().items()}
    checkpoint = read_headers(located.folder, located.label)
    main = account(checkpoint, choose_layout(family.layouts(config), checkpoint), shapes)
    accounts = {located.label: main}
    if tower is not None and not main.absent:
        raise WeightError(f"{located.label} holds its own vision tower; tower= is for checkpoints without one")
    if main.absent and not main.problems:
        source = tower or family.tower(hub)
        layouts = (*family.layouts(config), *family.tower_layouts(config.vision))
        for prefix in main.absent:
            label, found = account_part(source, prefix, layouts, shapes, located.label)
            accounts[f"{label} ({PARTS[prefix]})"] = found
    raise_problems(accounts)
    kept = main_dtype(main) if dtype in (None, "auto") else named_dtype(dtype)
    state: dict[str, torch.Tensor] = {}
    for each in accounts.values():
        state |= read_tensors(each, dtype=kept, device=device)
    assign(retriever, state)
    return RetrievalModel(
        retriever=retriever.eval(),
        config=config,
        name=located.label,
        layout=main.layout.name,
        tokenizer_folder=tokenizer or located.folder,
    )


def load_retriever_part(retriever: Retriever, part: str, source: str | Path) -> None:
    """Replace the weights of `vision` (the tower) or `qformer` (all the rest) by those of a file, folder or repository.

    qformer: a model that compares, or a BERT (google-bert/bert-base-uncased) as stage 1 starts from one: the queries'
    feed-forwards are copies of the text's, what looks at pictures and what a BERT has not stays random.
    """
    config = retriever.config
    family = next(each.retrieval for each in FAMILIES if each.retrieval is not None)
    shapes = {name: tuple(tensor.shape) for name, tensor in retriever.state_dict().items()}
    if part == "vision":
        layouts = (*family.layouts(config), *family.tower_layouts(config.vision))
        label, found = account_part(source, "vision.", layouts, shapes, str(source), fit=True)
        take(retriever, {label: found})
        return
    located = locate(source)
    checkpoint = read_headers(located.folder, located.label)
    layout = choose_layout((*family.layouts(config), *family.text_layouts), checkpoint)
    is_text = layout in family.text_layouts
    layout, shapes = as_stored(layout, checkpoint, shapes)
    if is_text:
        renamer = Renamer(layout)
        shapes = {name: shape for name, shape in shapes.items() if renamer.from_target(name) is not None}
    found = account(checkpoint, layout, shapes)
    found.placed = {name: place for name, place in found.placed.items() if not name.startswith("vision.")}
    take(retriever, {located.label: found})
    if is_text:
        own = retriever.state_dict()
        for name, tensor in own.items():
            if ".query." in name:
                tensor.copy_(own[name.replace(".query.", ".text.")])


def export_retriever(
    folder: str | Path,
    retriever: Retriever,
    *,
    layout: str = "original",
    tokenizer: Tokenizer | None = None,
) -> ExportReport:
    """Write a model under published names and check it. layout: `original` for LAVIS, `hf` for transformers.

    Raises ConfigError when the layout cannot hold the model, and WeightError when the folder is not empty or what was
    written does not read back equal.
    """
    config = retriever.config
    family = next(each.retrieval for each in FAMILIES if each.retrieval is not None)
    files = family.write(config, layout)
    rules = pick_layout(family.layouts(config), layout)
    state = {name: tensor.detach() for name, tensor in retriever.state_dict().items()}

    def verify(staging: Path) -> tuple[str, ...]:
        read, *_ = read_folder(Located(staging, str(staging)))
        verify_tensors(staging, family.layouts(read), state)
        return changed_settings(config, read)

    return write_published(Path(folder), rules, to_layout(state, rules), files, tokenizer=tokenizer, verify=verify)


def describe_retriever(name: str) -> RetrieverConfig:
    """The config of a model that compares: a folder, a repository, or a published id. No weights are read."""
    if is_here(name) or "/" in name:
        return read_folder(locate(name))[0]
    return retriever_preset(name).config


def read_folder(located: Located) -> tuple[RetrieverConfig, HubConfig, Retrieval]:
    """The config of a folder in a published layout, its config.json, and what reads it."""
    if (located.folder / NATIVE).is_file():
        raise WeightError(
            f"{located.label} answers questions about pictures and was not trained to compare them with texts: ask it "
            "with `opsin chat`, and compare with a model such as blip2-itm-vit-g"
        )
    hub = read_json(located.folder / "config.json")
    if hub is None:
        raise WeightError(f"{located.label} has no config.json: it is not a model's folder")
    preprocessor = read_json(located.folder / "preprocessor_config.json")
    if preprocessor is None:
        preprocessor = (read_json(located.folder / "processor_config.json") or {}).get("image_processor")
    try:
        family = retrieval_for_hub(hub)
        return family.read(hub, preprocessor), hub, family
    except OpsinError as error:
        raise type(error)(f"{located.label}: {error}") from None


def _locate(name: str | Path, revision: str | None) -> Located:
    """A folder or repository; the id of a published model leads to its repository."""
    if isinstance(name, str) and not is_here(name) and "/" not in name:
        known = retriever_preset(name)  # names the nearest ids where there is none
        if not known.hub:
            raise WeightError(f"{name!r} cannot be downloaded. {known.access}")
        name = known.hub[0]
    try:
        return locate(name, revision=revision)
    except UnknownNameError as error:
        raise WeightError(str(error)) from None
