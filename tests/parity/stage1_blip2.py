"""Stage 1 of BLIP-2 against recorded losses, gradients and scores, on as many processes as were recorded."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from opsin import weights
from opsin.families.blip2 import BLIP2
from opsin.generate.beam import Beams
from opsin.generate.captions import caption
from opsin.nn.retriever import Retriever
from opsin.train.stage1 import Negatives, Pairs, Stage1, stage1_losses
from opsin.verify.cases import cut
from opsin.weights.exporter import to_layout
from parity.case import Case, check_close, check_equal

Array = NDArray[Any]
MASKED = {"lm_hidden": 0, "lm_logits": 0, "itm_hidden": 1, "text_hidden": 0}
"""States and logits of texts, compared where there is a token; 1: of the three batches of matching, behind queries."""


def run_stage1_losses(case: Case) -> None:
    """Losses and what leads to them, gradients as data parallelism leaves them, negatives' weights; then the scores."""
    world = case.data["world_size"]
    tensors, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    if world == 1:
        found = [one_process(case.folder, 0, 1, {n: outputs[n] for n in ("neg_image_idx", "neg_text_idx")})]
    else:
        found = several_processes(case, world)
    share = len(tensors["input_ids"]) // world
    checked = set()
    for rank, ours in enumerate(found):
        prefix = f"rank{rank}." if world > 1 else ""
        rows = slice(rank * share, (rank + 1) * share)
        for name, recorded in outputs.items():
            key = name.removeprefix(prefix)
            if (prefix and not name.startswith(prefix)) or key.startswith(("grad.", "eval.", "rank")):
                continue
            checked.add(name)
            if key.startswith("neg_") and key.endswith("_idx"):
                continue
            kind = "loss" if key.startswith("loss") else "logits"
            what, value = f"{case.name} {name}", ours[key].numpy()
            if key in MASKED:
                kept = text_places(key, tensors["attention_mask"].astype(bool), rows, outputs, prefix, value.shape)
                value, recorded = value[kept], recorded[kept]
            check_close(value, recorded, what, **case.allowed(kind))
    gradients = {n for n in outputs if n.startswith("grad.")}
    for name in gradients:
        mean = sum(ours[name].double() for ours in found) / world
        check_close(mean.numpy(), outputs[name], f"{case.name} {name}", **case.allowed("grads"))
    trained = {name for name in found[0] if name.startswith("grad.")}
    assert trained == gradients, f"{case.name}: gradients of {sorted(trained ^ gradients)}"
    checked |= gradients | check_scores(case, tensors, outputs)
    assert outputs.keys() == checked, f"{case.name}: nobody checked {sorted(outputs.keys() - checked)}"


def text_places(
    key: str, valid: Array, rows: slice, outputs: dict[str, Array], prefix: str, shape: tuple[int, ...]
) -> Array:
    """(B, T) bool: the tokens of texts that are compared, and all queries."""
    own = valid[rows]
    if not MASKED[key]:
        return own
    wrong = valid[outputs[f"{prefix}neg_text_idx"]]
    texts = np.concatenate([own, own, wrong])
    queries = np.ones((len(texts), shape[1] - texts.shape[1]), np.bool_)
    return np.concatenate([queries, texts], axis=1)


def one_process(folder: Path, rank: int, world: int, negatives: dict[str, Array]) -> dict[str, torch.Tensor]:
    """Losses, intermediate results and gradients of one process' share, by their recorded names."""
    retriever = weights.load_retriever(folder).retriever.train()
    for parameter in retriever.vision.parameters():
        parameter.requires_grad_(False)
    inputs = load_file(folder / "inputs.safetensors")
    share = len(inputs["input_ids"]) // world
    pairs = read_pairs(retriever, {name: t[rank * share : (rank + 1) * share] for name, t in inputs.items()})
    chosen = Negatives(*(torch.from_numpy(negatives[name]) for name in ("neg_image_idx", "neg_text_idx")))
    result = stage1_losses(retriever, pairs, caption_id=retriever.config.vocab_size - 1, negatives=chosen)
    result.total.backward()
    found = {**named_results(result), **named_gradients(retriever)}
    with torch.no_grad():
        found["image_proj"] = retriever.vision_proj(found["query_hidden"])
        found["text_proj"] = retriever.text_proj(found["text_hidden"][:, 0])
    return found


def named_results(result: Stage1) -> dict[str, torch.Tensor]:
    losses = {"loss_itc": result.contrastive, "loss_itm": result.matching, "loss_lm": result.captions}
    everything = {"loss": result.total, **losses, **result.steps}
    return {name: tensor.detach().contiguous() for name, tensor in everything.items()}


def named_gradients(retriever: Retriever) -> dict[str, torch.Tensor]:
    """Gradients under LAVIS' names and in its shapes; those of frozen tensors are left out."""
    layouts = BLIP2.retrieval.layouts(retriever.config) if BLIP2.retrieval else ()
    layout = next(each for each in layouts if each.name == "original")
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in retriever.named_parameters()}
    named = to_layout(gradients, layout)
    trained = {name for name in named if not name.startswith("visual_encoder.")}
    return {f"grad.{name}": named[name].contiguous() for name in trained}


def read_pairs(retriever: Retriever, inputs: dict[str, torch.Tensor]) -> Pairs:
    """Recorded pixels (B, 3, H, W) and texts."""
    return Pairs(
        *map(torch.from_numpy, cut(inputs["image"].numpy(), retriever.config.vision)),
        inputs["input_ids"],
        inputs["attention_mask"].bool(),
        inputs.get("image_id"),
    )


# ---- several processes -----------------------------------------------------------------------------------------------


def several_processes(case: Case, world: int) -> list[dict[str, torch.Tensor]]:
    """The same on real processes that talk by gloo."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, args=(str(case.folder), world, folder), nprocs=world)
        return [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(world)]


def _process(rank: int, case: str, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        recorded = load_file(Path(case) / "outputs.safetensors")
        negatives = {name: recorded[f"rank{rank}.{name}"].numpy() for name in ("neg_image_idx", "neg_text_idx")}
        save_file(one_process(Path(case), rank, world, negatives), Path(folder) / f"{rank}.safetensors")
    finally:
        dist.destroy_process_group()


# ---- scores ----------------------------------------------------------------------------------------------------------


def check_scores(case: Case, tensors: dict[str, Array], outputs: dict[str, Array]) -> set[str]:
    """Matching, contrast, and captions: greedy ids, and logits of a whole caption over the queries' keys."""
    retriever = weights.load_retriever(case.folder).retriever
    inputs = {name: torch.from_numpy(value) for name, value in tensors.items()}
    pairs = read_pairs(retriever, inputs)
    config = case.json("config.json")["tokenizer"]
    stop, begin = config["sep_token_id"], config["bos_token_id"]
    settings = re.findall(r"generate\(num_beams=(\d+),max_length=(\d+),min_length=(\d+)\)", case.data["ran"])
    width, longest, shortest = (int(number) for number in settings[0])
    allowed = case.allowed("logits")
    with torch.no_grad():
        features = retriever.features(pairs.patches, pairs.grids)
        matching = retriever.match(features, pairs.ids, pairs.valid)
        check_close(matching.numpy(), outputs["eval.itm_logits"], f"{case.name} matching", **allowed)
        seen = retriever.see(features)
        images = retriever.picture_vectors(seen.states)
        texts = retriever.text_vectors(retriever.read(pairs.ids, pairs.valid))
        contrast = torch.einsum("bqd,bd->bq", images, texts).amax(1, keepdim=True)
        check_close(contrast.numpy(), outputs["eval.itc_score"], f"{case.name} contrast", **allowed)
        # Their lengths count `[DEC]`.
        beams = Beams(num_beams=width, max_new_tokens=longest - 1, min_new_tokens=shortest - 1)
        found = caption(retriever, features, caption_id=begin, stop_id=stop, beams=beams)
        ids = torch.full(outputs["eval.greedy_ids"].shape, config["pad_token_id"])
        ids[:, 0] = begin
        for row, hypotheses in enumerate(found):
            written = torch.tensor(hypotheses[0].ids)
            ids[row, 1 : 1 + len(written)] = written
        check_equal(ids.numpy(), outputs["eval.greedy_ids"], f"{case.name} greedy captions")
        states, _ = retriever.read_caption(seen, ids, torch.ones_like(ids, dtype=torch.bool))
        logits = retriever.caption_logits(states)
        check_close(logits.numpy(), outputs["eval.greedy_teacher_logits"], f"{case.name} caption logits", **allowed)
    return {name for name in outputs if name.startswith("eval.")}
