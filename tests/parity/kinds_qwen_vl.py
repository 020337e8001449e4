"""Qwen-VL against recorded outputs: pixels, the tower with its resampler, whole models, and text.

Everything comes from case.json, the published config file and the tensors; no name of a case says anything.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from opsin import families, weights
from opsin.collate import pad
from opsin.encode import Encoded
from opsin.errors import TokenizerError
from opsin.families.qwen_vl import QWEN_VL
from opsin.media.image import open_image
from opsin.media.prepare import prepare
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.spec.chat import ChatFormat
from opsin.spec.model import VLMConfig
from opsin.text.messages import ImagePart, Message, TextPart, assistant, system, user
from opsin.text.path_slots import path_ids, path_of, split_pictures
from opsin.text.render import ControlSpan, ImageSpan, Span, TextSpan, render
from opsin.text.tokenise import IMAGE, tokenise
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from opsin.text.window import newest_turns
from opsin.verify.cases import Case, one_tile, read_qwen_vl
from opsin.verify.recorded import own_model
from opsin.weights.exporter import to_layout
from parity.case import check_close

Array = NDArray[Any]
CHAT = families.chat("qwen_vl_chat")
GIVEN = CHAT.replace(markup=CHAT.markup.replace(label="", separator=()))
"""For text that holds its own numbers and line breaks."""
TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<imgpad>")
MAKERS = {"system": system, "user": user, "assistant": assistant}


def read_config(case: Case) -> VLMConfig:
    """The config of the case's own file, which may say a part only."""
    return QWEN_VL.from_hub({"model_type": "qwen", **case.json("config.json")})


# ---- pixels and models -----------------------------------------------------------------------------------------------


def run_image_pixels(case: Case) -> None:
    """Pictures as the authors open them, stretched to the square of `visual.image_size`."""
    hub = case.json("config.json")
    size = hub["visual"].get("image_size", 448)
    config = families.preset("qwen-vl").config
    config = config.replace(resolution=config.resolution.replace(tile_size=size))
    outputs = case.tensors("outputs.safetensors")
    checked = set()
    for index, image in enumerate(case.data["images"]):
        picture = open_image(case.folder / image["file"], mode="reference")
        assert picture.size == (image["width"], image["height"])
        ready = prepare(picture, config.plan(picture.size), config.vision)
        side = size // 14
        pixels = ready.patches.reshape(side, side, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, size, size)
        for key in (key for key in outputs if key.startswith(f"{index:02d}.")):
            stride = re.search(r"stride(\d+)", key)
            step = int(stride[1]) if stride else 1
            check_close(pixels[:, ::step, ::step], outputs[key], f"{image['file']} {key}", **case.data["tolerance"])
            checked.add(key)
        assert abs(float(pixels.sum(dtype=np.float64)) - image["sum"]) < 1e-5 * pixels.size
    assert checked == outputs.keys()


def run_vision_features(case: Case) -> None:
    """The tower after its first norm and after its last block, the resampler before and after its last projection."""
    vlm = own_model(case)
    outputs = case.tensors("outputs.safetensors")
    images = case.tensors("inputs.safetensors")["images"].astype(np.float32)
    ready = [one_tile(vlm.config, image) for image in images]
    patches = torch.cat([torch.from_numpy(image.patches) for image in ready])
    grids = torch.cat([torch.from_numpy(image.grids) for image in ready])
    seen: dict[str, torch.Tensor] = {}
    vlm.vision.norm_pre.register_forward_hook(lambda *args: seen.update(first=args[2]))
    vlm.connector.out.register_forward_hook(lambda *args: seen.update(read=args[2]))
    with torch.inference_mode():
        features = vlm.vision(patches, grids)
        rows = vlm.connector(features, grids)
    count = len(images)
    found = {
        "after_ln_pre_first_rows": seen["first"][:, :40],
        "tower_last_rows": features.view(count, -1, features.shape[-1])[:, -40:],
        "resampler_even_rows": seen["read"][:, ::2],
        "features": rows.view(count, -1, rows.shape[-1]),
    }
    atol = case.data["tolerance"]["features_atol"]
    for key, recorded in outputs.items():
        check_close(found[key].numpy(), recorded, key, atol=atol)


def run_model(case: Case) -> None:
    """Features, logits, cached keys, greedy ids with every step's logits, loss and gradients."""
    vlm = weights.load(case.folder).vlm.eval()
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    samples = read_qwen_vl(vlm.config, case, inputs)
    tolerance = case.data["tolerance"]
    logits_close = {"atol": tolerance["logits_atol"], "rtol": tolerance["logits_rtol"]}
    with torch.inference_mode():
        if "image_features" in outputs:
            batch = pad(samples)
            rows = vlm.rows(batch.patches, batch.grids).numpy()
            recorded = outputs["image_features"]
            check_close(rows.reshape(recorded.shape), recorded, "image_features", atol=tolerance["features_atol"])
        _check_inference(vlm, samples, inputs, outputs, logits_close)
    if "loss" in outputs:
        _check_training(vlm, samples, outputs, tolerance)
    known = {"image_features", "logits", "logit_positions", "greedy_ids", "greedy_step_logits", "layer0_key_cache"}
    unknown = {key for key in outputs if key not in known | {"loss"} and not key.startswith("grad.")}
    assert not unknown, f"nobody knows how to check {sorted(unknown)}"


def _check_inference(
    vlm: VLM, samples: list[Encoded], inputs: dict[str, Array], outputs: dict[str, Array], close: dict[str, float]
) -> None:
    """Row by row. The authors pad on the left and count positions from there, and so do the recorded keys."""
    for row, sample in enumerate(samples):
        padding = inputs["input_ids"].shape[1] - sample.num_tokens
        cache = KVCache(vlm.config.decoder, batch_size=1, capacity=sample.num_tokens + 16, dtype=torch.float32)
        batch = pad([sample])
        hidden = vlm.hidden(replace(batch, positions=batch.positions + padding), cache)
        places = outputs["logit_positions"]
        shown = places[places >= padding]
        logits = vlm.logits(hidden[0, torch.from_numpy(shown - padding)]).numpy()
        check_close(logits, outputs["logits"][row][places >= padding], f"logits of row {row}", **close)
        if "layer0_key_cache" in outputs:
            keys = outputs["layer0_key_cache"][row]
            ours = cache.keys[0][0, :, sample.num_tokens - len(keys) : sample.num_tokens].transpose(0, 1).numpy()
            check_close(ours, keys, "layer0_key_cache", **close)
        last = hidden[:, -1]
        for step, recorded in enumerate(outputs["greedy_ids"][row].tolist()):
            logits = vlm.logits(last)
            what = f"row {row} step {step}"
            check_close(logits[0].numpy(), outputs["greedy_step_logits"][row, step], what, **close)
            assert int(logits.argmax()) == recorded, what
            positions = torch.tensor(cache.lengths)[:, None, None] + padding
            last = vlm.hidden(Batch(torch.tensor([[recorded]]), positions, ((0, 0, 1),)), cache)[:, 0]


def _check_training(vlm: VLM, samples: list[Encoded], outputs: dict[str, Array], tolerance: dict[str, float]) -> None:
    """Mean loss over what is taught, and gradients under the published names."""
    vlm.train()
    batch = pad(samples)
    places, targets = batch.targets()
    loss = F.cross_entropy(vlm.logits(vlm.hidden(batch).flatten(0, 1)[places]), targets)
    check_close(loss.detach().reshape(1).numpy(), outputs["loss"].reshape(1), "loss", atol=tolerance["logits_atol"])
    vlm.requires_grad_(True)
    loss = F.cross_entropy(vlm.logits(vlm.hidden(batch).flatten(0, 1)[places]), targets)
    loss.backward()
    tensors = {name: value.grad for name, value in vlm.named_parameters() if value.grad is not None}
    gradients = to_layout(tensors, QWEN_VL.layouts(vlm.config)[0])
    for key in (key for key in outputs if key.startswith("grad.")):
        ours = gradients[key.removeprefix("grad.")].numpy()
        check_close(ours, outputs[key], key, atol=tolerance["logits_atol"], rtol=tolerance["logits_rtol"])


# ---- text ------------------------------------------------------------------------------------------------------------


def tokenizer_of(case: Case) -> Tokenizer:
    """The tokenizer that the case names."""
    match = re.search(r"tokenizers/([\w.-]+)", str(case.data.get("tokenizer_file", "")))
    folder = case.tokenizers / (match[1] if match else "qwen")
    if not folder.is_dir():
        pytest.skip(f"no tokenizer {folder.name!r} in {case.tokenizers}: say where it lies with --tokenizers")
    return _load(folder)


@cache
def _load(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def expand(spans: Sequence[Span], tokenizer: Tokenizer, paths: Sequence[str]) -> tuple[list[int], list[bool]]:
    """Ids and what is taught, with the bytes of paths in the slots."""
    text, pad_id = tokenise(spans, tokenizer), tokenizer.control_id("<imgpad>")
    ids: list[int] = []
    taught: list[bool] = []
    left = list(paths)
    for token_id, supervised in zip(text.ids, text.supervised, strict=True):
        new = path_ids(left.pop(0), pad_id=pad_id) if token_id == IMAGE else [token_id]
        ids += new
        taught += [supervised] * len(new)
    assert not left
    return ids, taught


def with_controls(spans: Sequence[Span], names: Sequence[str]) -> list[Span]:
    """Spans whose texts are read as the authors read them: these control tokens are found in them."""
    pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    read: list[Span] = []
    for span in spans:
        if not isinstance(span, TextSpan):
            read.append(span)
            continue
        for part in filter(None, pattern.split(span.text)):
            supervised = span.supervised
            read.append(ControlSpan(part, supervised) if part in names else replace(span, text=part))
    return read


def message(role: str, text: str, paths: list[str]) -> Message:
    """A message whose text holds `<img>PATH</img>`; paths go to `paths`."""
    texts, found = split_pictures(text)
    parts: list[Any] = [TextPart(texts[0])]
    for after in texts[1:]:
        parts += [ImagePart(len(paths) + (len(parts) - 1) // 2, standing="in_text"), TextPart(after)]
    paths += found
    return Message(role, tuple(part for part in parts if part != TextPart("")))


def run_tokenizer(case: Case) -> None:
    """All control tokens are found in text, as the authors' default has it; ours never are, which is checked too."""
    tokenizer, data = tokenizer_of(case), case.data
    assert dict(tokenizer.controls).items() >= data["special"].items()
    assert tokenizer.vocab_size == data["n_vocab"]
    names = list(tokenizer.controls)
    for row in data["cases"]:
        ids, decoded = _authors_ids(row["text"], tokenizer, names)
        assert ids == row["ids"], row["text"]
        assert len(ids) == row["n"], row["text"]
        assert decoded == row["decoded"], row["text"]
        plain = tokenizer.encode(row["text"], "start").ids
        assert not set(plain) & set(tokenizer.controls.values()), row["text"]
        assert re.sub("|".join(map(re.escape, names)), "", decoded) == row["decoded_skip_special"], row["text"]
    for row in data["limits"]:
        if "error" in row and "..." not in row["text"]:
            with pytest.raises(TokenizerError):
                _authors_ids(row["text"], tokenizer, names)
        elif "ids" in row and "text" in row:
            assert _authors_ids(row["text"], tokenizer, names)[0] == row["ids"]


def _authors_ids(text: str, tokenizer: Tokenizer, names: Sequence[str]) -> tuple[list[int], str]:
    """Ids with every control token found in the text, and what they say."""
    texts, paths = split_pictures(text)
    spans: list[Span] = []
    for number, part in enumerate(texts):
        if number:
            spans += [ControlSpan("<img>", False), ImageSpan(number - 1), ControlSpan("</img>", False)]
        spans += with_controls([TextSpan(part, False, "user")], names)
    ids, _ = expand(spans, tokenizer, paths)
    by_id = {token_id: name for name, token_id in tokenizer.controls.items()}
    said, at, pad_id = "", 0, tokenizer.control_id("<imgpad>")
    plain: list[int] = []
    while at < len(ids):
        token_id = ids[at]
        if token_id in by_id:
            said, plain = said + tokenizer.decode(plain) + by_id[token_id], []
            if by_id[token_id] == "<img>":
                said += path_of(ids[at + 1 : at + 257], pad_id=pad_id)
                at += 256
        else:
            plain.append(token_id)
        at += 1
    return ids, said + tokenizer.decode(plain)


def run_prompt(case: Case) -> None:
    """make_context: the system turn also where it is empty, the newest turns of the history, the question."""
    tokenizer = tokenizer_of(case)
    stops = [[tokenizer.control_id(name)] for name in CHAT.stop_tokens]
    assert all(stop in stops for stop in case.data["stop_words_ids"])
    for row in case.data["cases"]:
        args, paths = row["args"], []
        raw = args.get("chat_format") == "raw"
        chat: ChatFormat = families.chat("qwen_vl_base") if raw else GIVEN
        chat = chat.replace(markup=GIVEN.markup)
        turns = [] if raw else [MAKERS["system"](args["system"])] if args.get("system") else []
        if not raw and not args.get("system"):
            chat = chat.replace(system="", begin=(*chat.system_prefix, *chat.system_suffix))
        for question, answer in row["history"] or []:
            turns += [message("user", question, paths), assistant(answer)]
        turns.append(message("user", row["query"], paths))
        if not raw:
            turns = newest_turns(
                chat, turns, tokenizer, slots_per_picture=256, max_tokens=args.get("max_window_size", 6144)
            )
        shown = [paths[index] for turn in turns for index in turn.images]
        spans = with_controls(render(chat, turns, mode="prompt"), TAGS)
        said, left = "", list(shown)
        for span in spans:
            said += (
                span.text
                if isinstance(span, TextSpan)
                else span.token
                if isinstance(span, ControlSpan)
                else left.pop(0)
            )
        assert said == row["raw_text"]
        assert expand(spans, tokenizer, shown)[0] == row["ids"], row["query"]


def run_labels(case: Case) -> None:
    """finetune.py's preprocess: ids, labels and mask, cut at the end and padded on the right."""
    tokenizer = tokenizer_of(case)
    for run in case.data["runs"]:
        for number, turns in enumerate(case.data["conversations"]):
            paths: list[str] = []
            roles = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
            if roles[turns[0]["from"]] != "user":
                turns = turns[1:]
            messages = [message(roles[turn["from"]], turn["value"], paths) for turn in turns]
            messages.insert(0, MAKERS["system"](case.data["system_message"]))
            spans = with_controls(render(GIVEN, messages, mode="train"), list(tokenizer.controls))
            ids, taught = expand(spans, tokenizer, paths)
            size, end = run["max_len"], tokenizer.control_id("<|endoftext|>")
            labels = [token if is_taught else -100 for token, is_taught in zip(ids, taught, strict=True)]
            padding = max(0, size - len(ids))
            assert (ids + [end] * padding)[:size] == run["input_ids"][number]
            assert (labels + [-100] * padding)[:size] == run["labels"][number]
            mask = [bool(value) for value in run["attention_mask"][number]]
            assert mask == [token != end for token in run["input_ids"][number]]


def run_text_processing(case: Case) -> None:
    """from_list_format, as far as pictures and texts go: boxes are `text.grounding`'s."""
    for row in case.data["from_list"]:
        parts: list[Any] = []
        paths: list[str] = []
        for item in row["list"]:
            if "image" in item:
                parts.append(ImagePart(len(paths)))
                paths.append(item["image"])
            elif "text" in item:
                parts.append(TextPart(item["text"]))
            else:
                boxes = "".join(f"<box>({a},{b}),({c},{d})</box>" for a, b, c, d in item["box"])
                parts.append(TextPart(f"<ref>{item['ref']}</ref>{boxes}"))
        raw = families.chat("qwen_vl_base")
        said, left = "", list(paths)
        for span in render(raw, [Message("user", tuple(parts))], mode="prompt"):
            said += (
                span.text
                if isinstance(span, TextSpan)
                else span.token
                if isinstance(span, ControlSpan)
                else left.pop(0)
            )
        assert said == row["text"]
    for row in case.data["to_list"]:
        texts, paths = split_pictures(row["text"])
        listed = [item["image"] for item in row["list"] if "image" in item]
        assert paths == listed
        if paths:
            assert texts == [item["text"] for item in row["list"] if "text" in item]


RUNNERS: dict[tuple[str, str], Callable[[Case], None]] = {
    ("qwen_vl", "image_pixels"): run_image_pixels,
    ("qwen_vl", "vision_features"): run_vision_features,
    ("qwen_vl", "model"): run_model,
    ("qwen_vl", "tokenizer"): run_tokenizer,
    ("qwen_vl", "prompt"): run_prompt,
    ("qwen_vl", "labels"): run_labels,
    ("qwen_vl", "text_processing"): run_text_processing,
}
