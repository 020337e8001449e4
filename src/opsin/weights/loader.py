"""Loading: a name in, a model out.

    name -> folder -> config.json to VLMConfig -> model on the meta device -> headers -> accounting -> tensors

Nothing is allocated before every key is accounted for. Tensors are then views of the memory-mapped files: pages are
read when they are first used, and written pages are private, so training on a loaded model leaves its files alone. A
tensor that is converted, or that the caller will rearrange, is read into memory of its own, so that no mapped page
stays beside its other form.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from opsin.errors import ConfigError, TokenizerError, WeightError
from opsin.families import Family, chat, family_of
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import QFormerConfig
from opsin.spec.rules import Constant, Layout
from opsin.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from opsin.weights.account import Account, account, choose_layout, raise_problems
from opsin.weights.config import adapter_base, read_config, read_json
from opsin.weights.files import Entry, read_headers
from opsin.weights.grow import as_stored, put
from opsin.weights.hub import locate
from opsin.weights.init import on_meta
from opsin.weights.rules import constant, identity, piece_of

Part = Literal["vision", "connector", "newline", "decoder"]
PARTS = {"vision.": "vision tower", "decoder.": "language model"}
"""Parts that a checkpoint may leave to another one."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass
class Model:
    """A loaded model and what belongs to it."""

    vlm: VLM
    config: VLMConfig
    name: str
    """What it was loaded as: a path, or repository@commit."""
    layout: str = "opsin"
    """How its tensors are named where it came from."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Contents of generation_config.json; empty where there is none."""
    tokenizer_folder: Path | None = None
    """Where the tokenizer's files are."""

    @property
    def module(self) -> VLM:
        """What trains."""
        return self.vlm

    @property
    def family(self) -> Family:
        """The family whose parts it is made of."""
        return family_of(self.config)

    @property
    def has_tokenizer(self) -> bool:
        """Whether `tokenizer` would find one."""
        folder = self.tokenizer_folder
        return "tokenizer" in self.__dict__ or (folder is not None and has_tokenizer(folder))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use. Raises TokenizerError where there is none or it does not fit."""
        if self.tokenizer_folder is None:
            raise TokenizerError(f"{self.name} was made without a tokenizer; name a folder that has one")
        tokenizer = load_tokenizer(self.tokenizer_folder)
        if tokenizer.vocab_size > self.config.decoder.vocab_size:
            raise TokenizerError(
                f"the tokenizer in {self.tokenizer_folder} has {tokenizer.vocab_size} ids, the embedding of "
                f"{self.name} only {self.config.decoder.vocab_size} rows: they belong to different models"
            )
        return tokenizer


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    tower: str | Path | None = None,
    language: str | Path | None = None,
    tokenizer: Path | None = None,
    chat_format: str | None = None,
    unmapped: Collection[torch.dtype] = (),
) -> Model:
    """Load a model in eval mode.

    name: a folder, opsin-mini, a preset's id or a hub repository; one with an adapter gives its base model with the
    adapter merged.
    dtype: what to convert to; None or "auto" keeps the checkpoint's.
    tower, language: folder or repository of the vision tower and of the language model, for checkpoints without one; by
    default the one that their config names.
    tokenizer: folder of the tokenizer, where it is not beside the weights. chat_format: name of the format, where the
    files do not tell (Llama-2 previews of LLaVA in a local folder).
    unmapped: dtypes whose tensors get memory of their own on the CPU, in place of a view of the file: for callers who
    will rearrange them.
    """
    located = locate(name, revision=revision)
    if (base := adapter_base(located)) is not None:
        from opsin.weights.adapted import load_adapted  # which loads the base model with this function

        return load_adapted(
            located,
            base,
            dtype=dtype,
            device=device,
            tower=tower,
            language=language,
            tokenizer=tokenizer,
            chat_format=chat_format,
            unmapped=unmapped,
        )
    config, hub = read_config(located)
    if chat_format is not None:
        config = config.replace(chat=chat(chat_format))
    vlm = on_meta(config)
    family = family_of(config)
    shapes = {key: tuple(value.shape) for key, value in vlm.state_dict().items()}
    twin = located.preset.twin if located.preset else None
    checkpoint = read_headers(
        located.folder, located.label, hint=f"Preset {twin} has the same weights. " if twin else ""
    )
    layouts = family.layouts(config) if hub else (identity(shapes),)
    main = account(checkpoint, choose_layout(layouts, checkpoint), shapes)
    accounts = {located.label: main}
    for part, name in (("vision.", "tower"), ("decoder.", "language")):
        if {"tower": tower, "language": language}[name] is not None and part not in main.absent:
            raise WeightError(f"{located.label} holds its own {PARTS[part]}; {name}= is for checkpoints without one")
    if main.absent:
        if main.problems:
            raise_problems(accounts)  # before anything is downloaded
        sources = {
            "vision.": tower or (located.preset and located.preset.tower_hub) or family.tower(hub),
            "decoder.": language or family.language(hub),
        }
        for prefix in main.absent:
            elsewhere = (*family.layouts(config), *family.part_layouts(config))
            label, found = account_part(sources[prefix], prefix, elsewhere, shapes, located.label)
            accounts[f"{label} ({PARTS[prefix]})"] = found
    raise_problems(accounts)
    kept = main_dtype(main) if dtype in (None, "auto") else named_dtype(dtype)
    state: dict[str, Tensor] = {}
    for each in accounts.values():
        state |= read_tensors(each, dtype=kept, device=device, unmapped=unmapped)
    exact = config.connector.FLOAT32 if isinstance(config.connector, QFormerConfig) else ()
    for name in state:
        if name.startswith(tuple(f"connector.{part}" for part in exact)):
            state[name] = state[name].to(torch.promote_types(state[name].dtype, torch.float32))
    assign(vlm, state)
    return Model(
        vlm=vlm.eval(),
        config=config,
        name=located.label,
        layout=main.layout.name,
        generation=read_json(located.folder / "generation_config.json")
        or (dict(located.preset.generation) if located.preset else {}),
        tokenizer_folder=tokenizer or located.folder,
    )


def load_part(vlm: VLM, part: Part, source: str | Path) -> None:
    """Replace one part's weights by those of a file, folder, preset or repository; the rest stays as it is.

    Reads any model that this model's family reads, our own format, and files of the part alone: a CLIP, a language
    model, a projector as stage 1 writes it. The dtype and device of the part stay. Vocabularies and tables of positions
    may be of another length (`weights.grow`).
    """
    shapes = {key: tuple(value.shape) for key, value in vlm.state_dict().items()}
    prefix = part if part == "newline" else f"{part}."
    if not any(name.startswith(prefix) for name in shapes):
        raise WeightError(f"this model has no part {part!r}")
    family = family_of(vlm.config)
    elsewhere = (*family.layouts(vlm.config), *family.part_layouts(vlm.config))
    label, found = account_part(source, prefix, elsewhere, shapes, str(source), fit=True)
    take(vlm, {label: found})


def take(module: nn.Module, accounts: Mapping[str, Account]) -> None:
    """Copy everything that accounts, by label, have found to the module's own tensors. Raises WeightError."""
    raise_problems(accounts)
    own = module.state_dict()
    with torch.no_grad():
        for found in accounts.values():
            for name, tensor in read_tensors(found, dtype=None, device="cpu").items():
                put(own, name, tensor)


def main_dtype(found: Account) -> torch.dtype:
    """The dtype that most of a checkpoint's numbers have."""
    counts: dict[str, int] = {}
    for _, entry in found.placed.values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    return DTYPES[max(counts, key=lambda each: counts[each])]


def read_tensors(
    found: Account,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    unmapped: Collection[torch.dtype] = (),
) -> dict[str, Tensor]:
    """The placed tensors, by our names and in our shapes.

    On the CPU they are views of the file, except those that are converted or whose dtype is in `unmapped`.
    """
    by_file: dict[Path, list[str]] = {}
    for name, (_, entry) in found.placed.items():
        by_file.setdefault(entry.file, []).append(name)
    on_cpu = torch.device(device).type == "cpu"
    state: dict[str, Tensor] = {}
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as mapped, file.open("rb") as stream:
                for name in names:
                    match, entry = found.placed[name]
                    stored = DTYPES.get(entry.dtype)
                    own = on_cpu and stored is not None and (stored in unmapped or dtype not in (None, stored))
                    tensor = _read(stream, entry) if own else mapped.get_tensor(match.source)
                    state[name] = piece_of(tensor, match).to(device=device, dtype=dtype or tensor.dtype)
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{file}: cannot be read ({error})") from None
    for name, (rule, entry) in found.constants.items():
        _check_constant(name, rule, entry)
    for name, value in found.filled.items():
        kept = dtype or main_dtype(found)
        state[name] = torch.full(found.shapes[name], value, dtype=kept, device=device)
    return state


def _check_constant(name: str, rule: Constant, entry: Entry) -> None:
    """Whether a tensor that the model has not changes nothing. Raises WeightError."""
    try:
        with safe_open(entry.file, framework="pt") as mapped:
            tensor = mapped.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{entry.file}: cannot be read ({error})") from None
    if not torch.equal(tensor, constant(rule, tensor.dtype)):
        value = {"identity": "the identity", "zeros": "all zeros"}[rule.value]
        raise WeightError(
            f"{entry.file}: {name} is not {value}, which is all that this model can have there ({rule.reason})"
        )


def _read(stream: BinaryIO, entry: Entry) -> Tensor:
    """One tensor, in memory of its own."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    stream.seek(entry.start)
    numbers = tensor.flatten().view(torch.uint8).numpy().data
    if (count := stream.readinto(numbers)) != len(numbers):  # type: ignore[attr-defined]
        raise WeightError(f"{entry.file}: ended after {count} of {len(numbers)} bytes of a tensor")
    return tensor


def account_part(
    source: str | Path | None,
    prefix: str,
    layouts: Iterable[Layout],
    shapes: Mapping[str, tuple[int, ...]],
    wanted_by: str,
    *,
    fit: bool = False,
) -> tuple[str, Account]:
    """Label and account of a part that another file, folder or repository holds, in one of `layouts` or our own.

    fit: whether tables may be of another length there.
    """
    if source is None:
        option = "language" if prefix == "decoder." else "tower"
        raise WeightError(
            f"{wanted_by} holds no {PARTS[prefix]}, and its config names none that is known. Name a folder or "
            f"repository that has it ({option}=)"
        )
    located = locate(source)
    try:
        checkpoint = read_headers(located.folder, located.label)
    except WeightError as error:
        purpose = "" if located.label == wanted_by else f"{wanted_by} needs {prefix.rstrip('.')!r} from another place: "
        raise WeightError(f"{purpose}{error}") from None
    layout = choose_layout((identity(shapes), *layouts), checkpoint, part=prefix)
    if fit:
        layout, shapes = as_stored(layout, checkpoint, shapes)
    return located.label, account(checkpoint, layout, shapes, part=prefix)


def assign(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a module on the meta device its tensors, all of them."""
    module.load_state_dict(state, strict=True, assign=True)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"never given storage: {left}"


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of that name. Raises ConfigError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known. Known: auto, float32, bfloat16, float16, float64")
    return DTYPES[dtype]
