"""Qwen2-VL against recorded outputs: pixels, sizes, frames, positions, towers, whole models and text.

Everything comes from case.json, the published config files and the tensors; no name of a case says anything.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from opsin import families, weights
from opsin.collate import pack, pad
from opsin.encode import Encoded, Encoder
from opsin.errors import PlanError
from opsin.families.qwen2_vl import QWEN2_VL
from opsin.generate import Sampling, generate
from opsin.media.image import open_image
from opsin.media.prepare import PreparedImage, prepare, prepare_video
from opsin.nn.pixels import Pixels
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native, SmallSides, VideoSampling
from opsin.spec.positions import token_positions
from opsin.text.messages import Conversation, Message, TextPart
from opsin.text.parse import parse
from opsin.text.render import ControlSpan, ImageSpan, Span, render
from opsin.verify.cases import encoded, grids_of, merged, read_qwen2_vl
from opsin.verify.recorded import own_model
from opsin.weights.exporter import to_layout
from parity import kinds_text
from parity.case import Case, check_close, check_equal

Array = NDArray[Any]
PRESET = families.preset("qwen2-vl-2b-instruct")
OPTIONS = {key: key for key in ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")} | {
    "nframes": "num_frames",
    "total_pixels": "max_total_pixels",
}
"""What qwen-vl-utils calls the fields of VideoSampling."""


def read_config(case: Case) -> VLMConfig:
    """The config of the case's own files; the published one where it has none."""
    hub = (
        case.json("config.json") if case.has("config.json") else {"model_type": "qwen2_vl", "tie_word_embeddings": True}
    )
    preprocessor = case.json("preprocessor_config.json") if case.has("preprocessor_config.json") else None
    return QWEN2_VL.from_hub(hub, preprocessor)


# ---- sizes and pixels ------------------------------------------------------------------------------------------------

RULES: dict[str, SmallSides] = {"qwen_vl_utils": "one_block", "transformers_4_45": "refuse"}
"""What the columns of a size table do with sides below one block; all others are transformers 5."""


def run_size_table(case: Case) -> None:
    """Resized size, grid and tokens of every column, or an error where an error is recorded."""
    limits = case.data["pixel_limits"]
    for row in case.data["rows"]:
        for column, recorded in row.items():
            if not isinstance(recorded, dict):
                continue
            # A column without limits of its own is another version of the hub's processor.
            least, most = limits.get(column, limits["hub_processor"])
            native = Native(min_pixels=least, max_pixels=most, small_sides=RULES.get(column, "grow"))
            config = PRESET.config.replace(resolution=native)
            what = f"{row['width']}x{row['height']} {column}"
            try:
                plan = config.plan((row["width"], row["height"]))
            except PlanError:
                assert "error" in recorded or not recorded["tokens"], what
                continue
            assert "error" not in recorded, what
            assert plan.canvases[0].size == (recorded["width"], recorded["height"]), what
            assert list(plan.tiles[0].grid) == recorded["grid_thw"], what
            assert (plan.num_patches, plan.num_slots) == (recorded["patches"], recorded["tokens"]), what


def run_image_pixels(case: Case) -> None:
    """Pictures opened as the authors do, patch by patch; what transformers 5 makes of transparency likewise."""
    config, outputs = read_config(case), case.tensors("outputs.safetensors")
    checked: set[str] = set()
    for index, image in enumerate(case.data["images"]):
        key, file = f"{index:02d}", case.folder / image["file"]
        if f"{key}.grid_thw" not in outputs:
            key = str(index)
        prepared = _prepare(file, config, mode="reference")
        what = f"{case.name} {image['file']}"
        check_equal(prepared.grids, outputs[f"{key}.grid_thw"], f"{what} grid")
        assert prepared.plan.num_slots == image["tokens"], what
        assert list(prepared.patches.shape) == image["shape"], what
        rows = outputs.get(f"{key}.row_index")
        stored = f"{key}.pixel_values" if rows is None else f"{key}.pixel_rows"
        _check_pixels(case, prepared.patches if rows is None else prepared.patches[rows], outputs[stored], what)
        assert abs(float(prepared.patches.sum(dtype=np.float64)) - image["sum"]) < 1e-5 * prepared.patches.size, what
        checked |= {f"{key}.grid_thw", f"{key}.row_index", stored}
        if f"{key}.pixel_values_tf5" in outputs:  # transparent parts on white: what people see
            seen = _prepare(file, config, mode="display").patches
            _check_pixels(case, seen, outputs[f"{key}.pixel_values_tf5"], f"{what} on white")
            checked.add(f"{key}.pixel_values_tf5")
    assert outputs.keys() <= checked, f"{case.name}: nobody knows how to check {sorted(outputs.keys() - checked)}"


def _prepare(file: Path, config: VLMConfig, *, mode: Any) -> PreparedImage:
    picture = open_image(file, mode=mode)
    return prepare(picture, config.plan(picture.size), config.vision)


def _check_pixels(case: Case, ours: Array, recorded: Array, what: str) -> None:
    check_close(ours, recorded, what, atol=case.data["tolerance"]["atol"])


def run_video_pixels(case: Case) -> None:
    """Frames of a clip, resized with torch as the authors do; an odd last frame is repeated."""
    config = read_config(case)
    name = "video_preprocessor_config.json"
    size = case.json(name).get("size", {}) if case.has(name) else {}
    video = VideoSampling(
        rule="transformers",
        min_pixels=size.get("shortest_edge", VideoSampling().min_pixels),
        max_pixels=size.get("longest_edge", VideoSampling().max_pixels),
        max_total_pixels=None,
    )
    config = config.replace(resolution=config.resolution.replace(video=video))
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    for index, clip in enumerate(case.data["clips"]):
        frames = [
            Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in inputs[f"{index}.frames"]
        ]
        plan = config.plan_video(frames[0].size, num_frames=len(frames))
        prepared = prepare_video(frames, plan, config.vision, name=f"clip {index}", kernels=Pixels("torch"))
        what = f"{case.name} clip {index}"
        assert list(plan.tiles[0].grid) == clip["grid"], what
        check_equal(prepared.grids, outputs[f"{index}.video_grid_thw"], f"{what} grid")
        _check_pixels(case, prepared.patches, outputs[f"{index}.pixel_values_videos"], what)


def run_video_frames(case: Case) -> None:
    """Frames by the rule of qwen-vl-utils, their sizes and tokens, and frames by the rule of transformers."""
    for number, row in enumerate(case.data["rows"]):
        assert row["ele"].keys() <= OPTIONS.keys(), f"row {number}: unknown option among {sorted(row['ele'])}"
        asked = {OPTIONS[key]: value for key, value in row["ele"].items()}
        what, total, rate = f"row {number} ({total_of(row)})", row["total_frames"], row["video_fps"]
        video = VideoSampling(**asked)
        config = PRESET.config.replace(resolution=Native(video=video))
        _check_frames(video, total, rate, row.get("index"), row.get("nframes"), what)
        for key in (key for key in row if key.startswith("resized_")):
            height, width = map(int, key.removeprefix("resized_").split("x"))
            plan = config.plan_video((width, height), num_frames=total, rate=rate)
            assert list(plan.canvases[0].size[::-1]) == row[key], f"{what} {key}"
            assert plan.num_slots == row[f"tokens_{height}x{width}"], f"{what} {key}"
        if "max_pixels_per_frame" in row:
            most = video.max_frame_pixels(row["nframes"], multiple=2)
            assert int(most) == int(row["max_pixels_per_frame"]), what
        theirs = row.get("transformers_sample_frames")
        if theirs is not None:  # it was asked for frames per second or a number of frames alone
            plain = {key: value for key, value in asked.items() if key in ("fps", "num_frames")}
            index = theirs if isinstance(theirs, list) else None
            count = len(theirs) if isinstance(theirs, list) else theirs.get("count")
            sampling = VideoSampling(rule="transformers", **plain)
            _check_frames(sampling, total, rate, index, count, f"{what} in transformers")


def total_of(row: dict[str, Any]) -> str:
    return f"{row['total_frames']} frames at {row['video_fps']}, {row['ele']}"


def _check_frames(
    video: VideoSampling, total: int, rate: float, index: list[int] | None, count: int | None, what: str
) -> None:
    """count None: an error is recorded."""
    try:
        chosen = video.choose(total, rate, multiple=2)
    except PlanError:
        assert count is None, what
        return
    assert len(chosen) == count, what
    assert index is None or list(chosen) == index, what


# ---- positions -------------------------------------------------------------------------------------------------------


def run_positions(case: Case) -> None:
    """Positions and deltas of every layout, by the published rule and by that of transformers 5."""
    config = read_config(case)
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    for layout in case.data["layouts"]:
        given = {key.removeprefix(f"{layout}."): array for key, array in inputs.items() if key.startswith(f"{layout}.")}
        recorded = {
            key.removeprefix(f"{layout}."): array for key, array in outputs.items() if key.startswith(f"{layout}.")
        }
        _check_positions(config, given, recorded["position_ids"], recorded["rope_deltas"], layout)
        theirs = config.replace(decoder=with_span(config, "space"))
        differs = "position_ids_tf5" in recorded
        suffix = "_tf5" if differs else ""
        _check_positions(
            theirs,
            given,
            recorded[f"position_ids{suffix}"],
            recorded[f"rope_deltas{suffix}"],
            f"{layout}, transformers 5",
        )


def with_span(config: VLMConfig, span: str) -> Any:
    """The language model with the other rule for what follows a picture."""
    assert config.decoder.rope is not None
    return config.decoder.replace(rope=config.decoder.rope.replace(picture_span=span))


def _check_positions(config: VLMConfig, given: dict[str, Array], wanted: Array, deltas: Array, what: str) -> None:
    taken = {"image": 0, "video": 0}
    for row, valid in enumerate(given["attention_mask"].astype(bool)):
        ids = given["input_ids"][row][valid]
        media = grids_of(config, ids, given, taken)
        rasters = [(start, merged(grid)) for _, start, grid in media]
        positions = token_positions(len(ids), rasters, config.decoder)
        check_equal(positions.T, wanted[:, row][:, valid], f"{what} row {row}")
        assert positions.max() + 1 - len(ids) == deltas[row, 0], f"{what} row {row}: delta"


# ---- models ----------------------------------------------------------------------------------------------------------


def run_vision_features(case: Case) -> None:
    """The tower layer by layer and its merger, packed and picture by picture; frames do not see each other."""
    vlm = own_model(case)
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    patches, grids = torch.from_numpy(inputs["pixel_values"]), torch.from_numpy(inputs["grid_thw"])
    atol = case.data["tolerance"]["features_atol"]
    with torch.inference_mode():
        check_close(vlm.vision.patch(patches).numpy(), outputs["patch_embed"], "patches", atol=atol)
        check_close(vlm.vision(patches, grids).numpy(), outputs["last_hidden_state"], "features", atol=atol)
        rows = vlm.rows(patches, grids).numpy()
        check_close(rows, outputs["merged"], "rows", atol=atol)
        for key in (key for key in outputs if re.fullmatch(r"block_\d+", key)):
            vision = vlm.config.vision.replace(out_layers=(int(key.removeprefix("block_")) + 1,))
            vlm.vision.config = vision
            check_close(vlm.vision(patches, grids).numpy(), outputs[key], key, atol=atol)
        vlm.vision.config = vlm.config.vision
        frames = [(1, h, w) for t, h, w in grids.tolist() for _ in range(t)]
        sizes = [h * w for _, h, w in frames]
        check_equal(np.cumsum([0, *sizes]).astype(np.int32), outputs["cu_seqlens"], "ends of frames")
        alone = [
            vlm.rows(part, torch.tensor([frame])) for part, frame in zip(patches.split(sizes), frames, strict=True)
        ]
        # One frame or many: the same numbers up to the order in which the kernels add.
        check_close(torch.cat(alone).numpy(), rows, "frame by frame", atol=1e-5)
    if "hw_position_ids" in outputs:
        from opsin.nn.positions import patch_places

        places = [patch_places((h, w), block=2, device=patches.device) for _, h, w in frames]
        check_equal(torch.cat(places).numpy(), outputs["hw_position_ids"], "rows and columns")


def run_model(case: Case) -> None:
    """A folder as published: positions, rows, logits, greedy ids, loss and gradients; also by the other rule."""
    model = weights.load(case.folder)
    inputs = case.tensors("inputs.safetensors")
    check_model(case, model.vlm, inputs, case.tensors("outputs.safetensors"))
    if case.has("outputs_transformers5.safetensors"):
        config = model.config.replace(decoder=with_span(model.config, "space"))
        other = VLM(config).eval()
        other.load_state_dict(model.vlm.state_dict())
        check_model(case, other, inputs, case.tensors("outputs_transformers5.safetensors"))


def check_model(case: Case, vlm: VLM, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
    samples = read_qwen2_vl(vlm.config, inputs)
    logits_close = case.allowed("logits")
    valid = inputs["attention_mask"].astype(bool)
    for row, sample in enumerate(samples):
        check_equal(sample.positions.T, outputs["position_ids"][:, row][:, valid[row]], f"{case.name} positions")
        assert sample.positions.max() + 1 - sample.num_tokens == outputs["rope_deltas"][row, 0]
    with torch.inference_mode():
        _check_rows(case, vlm, samples, outputs)
        for name, batch in (("padded", pad(samples)), ("packed", pack(samples))):
            hidden = vlm.hidden(batch)
            for row, (place, start, stop) in enumerate(batch.documents):
                logits = vlm.logits(hidden[place, start:stop]).numpy()
                check_close(logits, outputs["logits"][row][valid[row]], f"{case.name} {name} logits", **logits_close)
    _check_greedy(vlm, samples, outputs["greedy_ids"])
    if "greedy_step_logits" in outputs:
        _check_steps(case, vlm, samples, outputs, logits_close)
    if "loss" in outputs:
        _check_loss(case, vlm, samples, outputs)


def _check_rows(case: Case, vlm: VLM, samples: Sequence[Encoded], outputs: dict[str, Array]) -> None:
    """What fills the slots: all pictures of the batch in one list, all videos in another."""
    for key, is_video in (("image_embeds", False), ("video_embeds", True)):
        shown = [image for sample in samples for image in sample.images if bool(image.plan.frames) == is_video]
        if key not in outputs:
            continue
        patches = torch.from_numpy(np.concatenate([image.patches for image in shown]))
        rows = vlm.rows(patches, torch.from_numpy(np.concatenate([image.grids for image in shown])))
        check_close(rows.numpy(), outputs[key], f"{case.name} {key}", atol=case.data["tolerance"]["features_atol"])


def _check_greedy(vlm: VLM, samples: Sequence[Encoded], recorded: Array) -> None:
    """The decoder that users call, all rows at once and each alone."""
    sampling = Sampling(max_new_tokens=recorded.shape[1])
    together = generate(vlm, samples, None, sampling)
    alone = [generate(vlm, [sample], None, sampling)[0] for sample in samples]
    for answers in (together, alone):
        assert [list(answer.ids) for answer in answers] == recorded.tolist()


def _check_steps(
    case: Case, vlm: VLM, samples: Sequence[Encoded], outputs: dict[str, Array], close: dict[str, float]
) -> None:
    """The logits behind every greedy choice: one forward pass over prompt and answer, positions going on by one."""
    for row, sample in enumerate(samples):
        answer = outputs["greedy_ids"][row]
        following = sample.positions.max() + 1 + np.arange(len(answer))
        positions = np.concatenate([sample.positions, following[:, None].repeat(sample.positions.shape[1], axis=1)])
        ids = np.concatenate([sample.ids, answer])
        whole = encoded(ids, sample.slots, sample.images, positions=positions)
        with torch.inference_mode():
            hidden = vlm.hidden(pad([whole]))[0, sample.num_tokens - 1 : -1]
            steps = vlm.logits(hidden).numpy()
        check_close(steps, outputs["greedy_step_logits"][row], f"{case.name} steps of row {row}", **close)


def _check_loss(case: Case, vlm: VLM, samples: Sequence[Encoded], outputs: dict[str, Array]) -> None:
    """Mean loss over taught tokens, and its gradient with respect to the published tensors."""
    batch = pad(samples)
    places, targets = batch.targets()
    vlm.zero_grad()
    loss = F.cross_entropy(vlm.logits(vlm.hidden(batch).flatten(0, 1)[places]), targets)
    close = case.allowed("logits")
    check_close(loss.detach().reshape(1).numpy(), outputs["loss"].reshape(1), "loss", **close)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in vlm.named_parameters() if parameter.grad is not None}
    recorded = {key.removeprefix("grad."): array for key, array in outputs.items() if key.startswith("grad.")}
    layouts = QWEN2_VL.layouts(vlm.config)
    written = next(
        (named for layout in layouts if recorded.keys() <= (named := to_layout(gradients, layout)).keys()), None
    )
    assert written is not None, f"no layout has all of {sorted(recorded)}"
    for name, array in recorded.items():
        check_close(written[name].numpy(), array, f"gradient of {name}", **close)


# ---- text ------------------------------------------------------------------------------------------------------------


def run_prompt(case: Case) -> None:
    """Prompts of the chat template: the text, and the ids with each picture's slots."""
    tokenizer = kinds_text.tokenizer_of(case, None)
    for number, row in enumerate(case.data["rows"]):
        arguments, what = row.get("template_args", {}), f"row {number}"
        chat = families.chat("qwen2_vl_numbered" if arguments.get("add_vision_id") else "qwen2_vl")
        pictures = [str(case.folder / name) for name in row.get("images") or []]
        record: dict[str, Any] = {"messages": row["messages"]}
        if pictures:
            record["images"] = pictures
        conversation = parse(record, where=what)
        asks = bool(arguments.get("add_generation_prompt"))
        spans = render(chat, conversation.messages, mode="prompt" if asks else "train")
        config = PRESET.config.replace(chat=chat)
        assert _written(spans) == row["text"], what
        encoder = Encoder(config, tokenizer, image_mode="reference")
        encoded = encoder.encode(conversation, mode="prompt" if asks else "train")
        assert encoded.ids.tolist() == row["input_ids"], what
        grids = [image.grids[0].tolist() for image in encoded.images if not image.plan.frames]
        assert grids == (row.get("image_grid_thw") or []), what


def _written(spans: Sequence[Span]) -> str:
    texts = []
    for span in spans:
        if isinstance(span, ImageSpan):
            texts.append(f"<|{span.kind}_pad|>")
        else:
            texts.append(span.token if isinstance(span, ControlSpan) else span.text)
    return "".join(texts)


def run_labels(case: Case) -> None:
    """Training ids and labels, picture slots included, and their right-padded batch."""
    tokenizer = kinds_text.tokenizer_of(case, None)
    config = PRESET.config
    rows = []
    for number, (record, recorded) in enumerate(zip(case.data["data"], case.data["samples"], strict=True)):
        what = f"sample {number}"
        conversation = parse(record, where=what)
        grids = recorded.get("image_grid_thw") or []
        # The pictures themselves are not recorded: any of the resized size has the same slots.
        patch = config.vision.patch_size
        images = tuple(Image.new("RGB", (w * patch, h * patch)) for _, h, w in grids)
        conversation = Conversation(trimmed(conversation).messages, images, conversation.id)
        encoded = Encoder(config, tokenizer).encode(conversation, mode="train")
        assert encoded.ids.tolist() == recorded["input_ids"], what
        labels = np.where(encoded.supervised, encoded.ids, -100)
        assert labels.tolist() == recorded["labels"], what
        assert [image.grids[0].tolist() for image in encoded.images] == grids, what
        rows.append(encoded)
    if "batch" in case.data:
        batch, recorded = pad(rows), case.data["batch"]
        mask = np.zeros(batch.ids.shape, np.int64)
        for row, length in enumerate(batch.lengths):
            mask[row, :length] = 1
        assert mask.tolist() == recorded["attention_mask"]
        for row, valid in enumerate(mask.astype(bool)):
            assert batch.ids[row][valid].tolist() == np.array(recorded["input_ids"][row])[valid].tolist()


def trimmed(conversation: Conversation) -> Conversation:
    """That trainer writes its three tokens in place of `<image>` and one line break on either side."""
    messages = []
    for message in conversation.messages:
        parts = list(message.parts)
        for place, part in enumerate(parts):
            if not isinstance(part, TextPart):
                continue
            text = part.text
            if place and not isinstance(parts[place - 1], TextPart):
                text = text.removeprefix("\n")
            if place + 1 < len(parts) and not isinstance(parts[place + 1], TextPart):
                text = text.removesuffix("\n")
            parts[place] = TextPart(text)
        messages.append(Message(message.role, tuple(part for part in parts if part != TextPart(""))))
    return Conversation(tuple(messages), conversation.images, conversation.id, conversation.videos)


RUNNERS: dict[tuple[str, str], Callable[[Case], None]] = {
    ("qwen2_vl", "size_table"): run_size_table,
    ("qwen2_vl", "image_pixels"): run_image_pixels,
    ("qwen2_vl", "video_pixels"): run_video_pixels,
    ("qwen2_vl", "video_frames"): run_video_frames,
    ("qwen2_vl", "positions"): run_positions,
    ("qwen2_vl", "vision_features"): run_vision_features,
    ("qwen2_vl", "model"): run_model,
    ("qwen2_vl", "prompt"): run_prompt,
    ("qwen2_vl", "labels"): run_labels,
}
