"""`opsin show`: what a model consists of, and how it sees a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from opsin.cli._options import MODE_HELP, Mode, describe_model, picture_size, readable_bytes
from opsin.spec.model import VLMConfig
from opsin.spec.plan import ImagePlan


def show(
    model: Annotated[str, typer.Argument(help="A preset's id, a model's folder, or a hub repository of a preset.")],
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
    """
    from rich.console import Console

    from opsin.inspect.tree import count_parameters, nest, parameter_tree
    from opsin.weights.init import on_meta

    config, _ = describe_model(model)
    plan = None
    if image is not None:
        from opsin.media.image import check_plan

        plan = config.plan(picture_size(image, mode))
        check_plan(plan, name=image)
    shapes = {key: tuple(tensor.shape) for key, tensor in on_meta(config).state_dict().items()}
    console = Console()
    console.print(parameter_tree(model, shapes, notes=_notes(config, shapes), depth=depth))
    total = count_parameters(nest(shapes))
    memory = ", ".join(
        f"{readable_bytes(total * size)} in {dtype}" for dtype, size in (("bfloat16", 2), ("float32", 4))
    )
    cache = readable_bytes(config.decoder.kv_bytes_per_token())
    console.print(f"\nmemory  {memory}; {cache} of keys and values per token in half precision")
    console.print(f"context {config.decoder.max_positions} tokens; chat format {config.chat.name}")
    if image is not None and plan is not None:
        console.print("\n".join(_describe(Path(image).name, plan)))


def _notes(config: VLMConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What shapes do not tell."""
    vision, decoder = config.vision, config.decoder
    unused = vision.num_layers - vision.num_used_layers
    groups = "" if decoder.num_kv_heads == decoder.num_heads else f", {decoder.num_kv_heads} for keys and values"
    places = f"rope theta {decoder.rope.theta:,.0f}" if decoder.rope else "learned positions"
    return {
        "vision": f"ViT: {vision.image_size} px tiles, {vision.patch_size} px patches, {vision.num_heads} heads "
        "(nn/vision.py)",
        "vision.layers": f"the last {unused} not run" if unused else "",
        "connector": f"{config.connector.kind} (nn/connectors.py)",
        "newline": "ends each line of tiles (nn/layout.py)",
        "decoder": f"{decoder.num_heads} heads{groups}, {places} (nn/decoder.py)",
    }


def _describe(name: str, plan: ImagePlan) -> list[str]:
    """What becomes of a picture, step by step."""
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
        f"        {plan.num_patches} patches -> {plan.num_rows} rows of the connector -> {plan.num_slots} tokens"
        + (f", {line_ends} of them line ends" if line_ends else "")
    )
    return lines
