"""`opsin show`: what a model consists of, and how it sees a picture."""

from pathlib import Path
from typing import Annotated

import typer

from opsin import families
from opsin.cli._options import MODE_HELP, Mode, describe_model, picture_size, readable_bytes
from opsin.errors import UnknownNameError
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.plan import ImagePlan
from opsin.spec.qformer import QFormerConfig, RetrieverConfig
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.weights.shipped import is_shipped


def show(
    model: Annotated[
        str, typer.Argument(help="A preset's id, opsin-mini, a model's folder, or a preset's repository.")
    ],
    image: Annotated[str | None, typer.Option("--image", "-i", help="A picture, or a size such as 640x480.")] = None,
    depth: Annotated[int, typer.Option("--depth", "-d", min=1, help="Levels of the tree.")] = 2,
    mode: Annotated[Mode, typer.Option("--mode", help=MODE_HELP)] = Mode.display,
) -> None:
    """What a model consists of: its parts with shapes and parameter counts, and its memory.

    With --image also what becomes of a picture on its way to the language model. Nothing is loaded: weights of any size
    are shapes only.

    Examples:

        opsin show llava-1.5-7b

        opsin show llava-next-vicuna-7b --image photo.jpg --depth 4

        opsin show ./my-model

        opsin show blip2-itm-vit-g
    """
    from rich.console import Console

    from opsin.inspect.tree import count_parameters, nest, parameter_tree
    from opsin.weights import init, retrieval

    config = _retriever(model) or describe_model(model)[0]
    plan = None
    if image is not None:
        from opsin.media.image import check_plan

        plan = config.plan(picture_size(image, mode))
        check_plan(plan, name=image)
    module = retrieval.on_meta(config) if isinstance(config, RetrieverConfig) else init.on_meta(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    console = Console()
    console.print(parameter_tree(model, shapes, notes=_notes(config), depth=depth))
    total = count_parameters(nest(shapes))
    memory = ", ".join(
        f"{readable_bytes(total * size)} in {dtype}" for dtype, size in (("bfloat16", 2), ("float32", 4))
    )
    if isinstance(config, RetrieverConfig):
        console.print(f"\nmemory  {memory}")
        console.print(f"texts   {config.max_tokens} tokens; compares and does not answer: `opsin match`")
    else:
        cache = readable_bytes(config.decoder.kv_bytes_per_token())
        console.print(f"\nmemory  {memory}; {cache} of keys and values per token in half precision")
        console.print(f"context {config.decoder.max_positions} tokens; chat format {config.chat.name}")
    if image is not None and plan is not None:
        is_retriever = isinstance(config, RetrieverConfig)
        ends = "outputs of the queries" if is_retriever else f"rows of the connector -> {plan.num_slots} tokens"
        console.print("\n".join(describe_picture(Path(image).name, plan, ends)))


def _retriever(name: str) -> RetrieverConfig | None:
    """The model that compares pictures with texts of that id, repository or folder; None where it is another kind."""
    if is_shipped(name):
        return None
    folder = Path(name).expanduser()
    if not folder.exists():
        try:
            return families.retriever_preset(name).config
        except UnknownNameError:
            return None
    from opsin.weights.config import read_json
    from opsin.weights.hub import Located
    from opsin.weights.retrieval import read_folder

    hub = read_json(folder / "config.json") if folder.is_dir() else None
    compares = hub is not None and any(each.retrieval and each.retrieval.matches(hub) for each in families.FAMILIES)
    return read_folder(Located(folder, str(folder)))[0] if compares else None


def _notes(config: VLMConfig | RetrieverConfig) -> dict[str, str]:
    """What shapes do not tell."""
    vision, resolution = config.vision, config.resolution
    unused = vision.num_layers - vision.num_used_layers
    tiles = "pictures of any size" if resolution.kind == "native" else f"{resolution.tile_size} px tiles"
    notes = {
        "vision": f"ViT: {tiles}, {vision.patch_size} px patches, {vision.num_heads} heads (nn/vision.py)",
        "vision.layers": f"the last {unused} not run" if unused else "",
    }
    if isinstance(config, RetrieverConfig):
        return notes | _retriever_notes(config)
    connector = config.connector
    file = "nn/qformer.py" if connector.kind == "qformer" else "nn/connectors.py"
    notes |= {
        "connector": f"{connector.kind} ({file})",
        "newline": "ends each line of tiles (nn/layout.py)",
    }
    if isinstance(connector, QFormerConfig):
        notes |= _crossing("connector.qformer", connector)
    return notes | _decoder_notes(config.decoder)


def _decoder_notes(decoder: DecoderConfig | Seq2SeqConfig) -> dict[str, str]:
    if isinstance(decoder, Seq2SeqConfig):
        return {
            "decoder": f"encoder-decoder: {decoder.num_heads} heads, relative positions (nn/seq2seq.py)",
            "decoder.encoder": "reads the picture and the prompt",
            "decoder.layers": "write the answer, and look at what the encoder read",
        }
    groups = "" if decoder.num_kv_heads == decoder.num_heads else f", {decoder.num_kv_heads} for keys and values"
    places = f"rope theta {decoder.rope.theta:,.0f}" if decoder.rope else "learned positions"
    return {"decoder": f"{decoder.num_heads} heads{groups}, {places} (nn/decoder.py)"}


def _retriever_notes(config: RetrieverConfig) -> dict[str, str]:
    return {
        "norm_features": "trained with the queries",
        "words": "of texts",
        "positions": "of texts",
        "qformer": f"{config.qformer.num_heads} heads; shared by queries and texts, a feed-forward for each "
        "(nn/qformer.py)",
        "vision_proj": "contrast, of each query",
        "text_proj": "contrast, of a text's first token",
        "itm_head": "matching: no, yes",
        "captions": "logits of captions, over `words` (nn/retriever.py)",
        "temperature": "divides contrast in training",
        **_crossing("qformer", config.qformer),
    }


def _crossing(place: str, config: QFormerConfig) -> dict[str, str]:
    """Which layers of a Q-Former see the picture."""
    layers = range(0, config.num_layers, config.cross_every)
    return {f"{place}.layers.{index}": "queries look at the picture" for index in layers}


def describe_picture(name: str, plan: ImagePlan, ends: str) -> list[str]:
    """What becomes of a picture, step by step. ends: what its rows are."""
    lines = [f"\npicture {name}, {plan.size[0]}x{plan.size[1]} px"]
    for number, canvas in enumerate(plan.canvases):
        tiles = [tile for tile in plan.tiles if tile.canvas == number]
        padded = "" if canvas.padded == plan.size else f"padded to {canvas.padded[0]}x{canvas.padded[1]}, "
        around = "" if canvas.resized == canvas.size else f" on a canvas of {canvas.size[0]}x{canvas.size[1]}"
        _, rows, columns = tiles[0].grid
        lines.append(
            f"        {padded}resized to {canvas.resized[0]}x{canvas.resized[1]}{around}: "
            f"{len(tiles)} tile{'s' * (len(tiles) > 1)} of {columns}x{rows} patches"
        )
    line_ends = int((plan.layout.order < 0).sum())
    lines.append(
        f"        {plan.num_patches} patches -> {plan.num_rows} {ends}"
        + (f", {line_ends} of them line ends" if line_ends else "")
    )
    return lines
