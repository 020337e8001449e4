"""`opsin export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class To(StrEnum):
    """Whose layout."""

    hf = "hf"
    original = "original"


def export(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's output, a stage of it, or any model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not hold anything yet.")],
    to: Annotated[
        To, typer.Option("--to", help="hf: transformers, vLLM, SGLang; original: the authors' code.")
    ] = To.hf,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as it is), float32, bfloat16 or float16.")] = "auto",
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer.")] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Largest weight file, in GB.")] = 5.0,
) -> None:
    """Write a model in a published layout: weights, tokenizer, processor, chat template, generation, model card.

    Of a run's folder the last stage is taken. The result is read back bit by bit, loaded in a fresh process, and its
    logits compared, before the folder appears under its name. Exit code 0: verified; 2: it cannot be written there or
    in that layout, or is not what it should be.

    Examples:

        opsin export runs/mine exported

        opsin export runs/mine/align exported --to original

        opsin export opsin-demo exported --dtype bfloat16
    """
    from rich.console import Console

    from opsin import weights
    from opsin.cli._options import readable_bytes
    from opsin.verify.reload import reread
    from opsin.weights.card import find_model, write_card
    from opsin.weights.exporter import check_target, with_image_token

    console = Console(soft_wrap=True, highlight=False, markup=False)
    check_target(out)
    name, trained = find_model(model)
    loaded = weights.load(name, dtype=dtype, tokenizer=tokenizer)
    if to is To.hf and loaded.config.image_token_id is None:
        loaded = with_image_token(loaded)
        console.print(f"one id more, {loaded.config.image_token_id}, marks pictures: transformers needs one")
    errors: list[float] = []
    report = weights.export(
        out,
        loaded,
        layout=to.value,
        shard_bytes=int(shard_size * 1e9),
        card=write_card(loaded, out.resolve().name, to.value, trained),
        check=lambda folder: errors.append(reread(folder, loaded)),
    )
    console.print(f"{name} -> {out}, layout {report.layout}")
    console.print(f"{report.num_tensors} tensors, {readable_bytes(report.num_bytes)}, read back equal to the bit")
    for change in report.changed:
        console.print(f"the layout has no words for {change}")
    if not loaded.has_tokenizer:
        console.print("there is no tokenizer; name its folder with --tokenizer to have it beside the weights")
    console.print(f"verified: logits in a fresh process are the model's, largest error {errors[0]:.3g}")
    if to is To.hf:
        console.print(f"compare with transformers, rung by rung: opsin verify {out}")
