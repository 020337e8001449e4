"""`opsin merge`: a model and its adapter to one model."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    base: Annotated[str, typer.Argument(help="What the adapter was trained on: folder, preset or repository.")],
    adapter: Annotated[str, typer.Argument(help="Folder or repository of the adapter, in PEFT's layout.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    to: Annotated[
        str, typer.Option("--to", help="Names of its tensors: opsin, or a published layout such as hf or original.")
    ] = "opsin",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16; auto keeps the base's.")] = "auto",
) -> None:
    """Add an adapter to the weights of its model and write the result, which then needs neither.

    The sum is made in float32 and rounded once to the model's dtype. An adapter need not be merged to be used here:
    `opsin chat ADAPTER` finds the base that the adapter names, and so does everything else that takes a model.

    Examples:

        opsin merge llava-hf/llava-1.5-7b-hf runs/lora/tune merged

        opsin merge llava-hf/llava-1.5-7b-hf runs/lora/tune merged-hf --to hf
    """
    from opsin import weights
    from opsin.weights.adapted import merge_adapter
    from opsin.weights.exporter import check_target
    from opsin.weights.hub import locate

    check_target(out)
    model = merge_adapter(weights.load(base, dtype=dtype), locate(adapter))
    if to == "opsin":
        tokenizer = model.tokenizer if model.has_tokenizer else None
        weights.save_native(out, model.vlm, model.config, tokenizer, generation=model.generation)
    else:
        weights.export(out, model, layout=to)
    print(f"merged: opsin chat {out} --image PICTURE")
