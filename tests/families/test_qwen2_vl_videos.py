"""Videos and pictures of mixed sizes through the whole way: encoder, batch, model, decoding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import toys
from opsin import families, weights
from opsin.collate import pack, pad
from opsin.encode import Encoded, Encoder
from opsin.errors import MediaError, MessageError, PlanError
from opsin.generate import Chat, Sampling, generate
from opsin.media.source import Limits
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.text.messages import Conversation, Message, TextPart, VideoPart, ask, assistant, user
from opsin.text.tokenizer import Tokenizer
from opsin.train.objectives import next_token
from opsin.weights import Model

CONFIG = families.preset("qwen2-vl-tiny").config
# Other batch shapes make the matrix kernels add in another order: float32 noise on numbers of size about 1.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def frames(count: int, size: tuple[int, int] = (60, 40), seed: int = 0) -> tuple[Image.Image, ...]:
    """A video, given as its frames."""
    return tuple(toys.picture(size, seed + number) for number in range(count))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return toys.byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(CONFIG, tokenizer)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return weights.build(CONFIG, seed=1).eval()


def conversations() -> list[Conversation]:
    """A video of an odd number of frames between two pictures; a long video; text alone."""
    return [
        Conversation(
            (
                user("Before, ", images=[0], videos=[0]),
                assistant("It moves."),
                user("And this?", images=[1]),
                assistant("It stands still."),
            ),
            (toys.picture((50, 90), 1), toys.picture((90, 30), 2)),
            videos=(frames(5),),
            id="mixed",
        ),
        Conversation((user("Long?", videos=[0]), assistant("Yes.")), videos=(frames(12, (30, 30)),), id="long"),
        Conversation((user("Text?"), assistant("No.")), id="text"),
    ]


def encoded(encoder: Encoder) -> list[Encoded]:
    return [encoder.encode(conversation, mode="train") for conversation in conversations()]


def test_a_video_takes_a_third_axis_and_its_own_token(encoder: Encoder) -> None:
    mixed, long, _ = encoded(encoder)
    assert [bool(image.plan.frames) for image in mixed.images] == [False, True, False]
    kinds = mixed.ids[mixed.slots]
    counts = [image.plan.num_slots for image in mixed.images]
    assert kinds.tolist() == [383] * counts[0] + [382] * counts[1] + [383] * counts[2]
    assert mixed.images[1].plan.frames == (0, 1, 2, 3, 4, 4)
    times = mixed.positions[mixed.slots][counts[0] : counts[0] + counts[1], 0]
    assert (np.diff(np.unique(times)) == 1).all()
    assert len(np.unique(times)) == 3
    assert mixed.positions.max() + 1 < mixed.num_tokens, "a raster uses fewer positions than it has tokens"
    # Six times of a video whose rows and columns are two each: text goes on after the last time.
    first, last = long.slots[0], long.slots[-1]
    assert long.positions[last + 1].tolist() == [long.positions[first, 0] + 6] * 3


@torch.no_grad()
def test_batched_packed_and_single_conversations_agree(encoder: Encoder, vlm: VLM) -> None:
    samples = encoded(encoder)
    alone = [vlm.hidden(pad([sample]))[0] for sample in samples]
    together = vlm.hidden(pad(samples))
    for row, sample in enumerate(samples):
        torch.testing.assert_close(together[row, : sample.num_tokens], alone[row], **TOLERANCE)
    torch.testing.assert_close(vlm.hidden(pack(samples))[0], torch.cat(alone), **TOLERANCE)


@torch.no_grad()
def test_pictures_of_different_sizes_share_a_batch_and_do_not_see_each_other(vlm: VLM, encoder: Encoder) -> None:
    prepared = [image for sample in encoded(encoder) for image in sample.images]
    patches = torch.from_numpy(np.concatenate([image.patches for image in prepared]))
    grids = torch.from_numpy(np.concatenate([image.grids for image in prepared]))
    assert len({tuple(grid) for grid in grids.tolist()}) > 2
    alone = [vlm.rows(torch.from_numpy(image.patches), torch.from_numpy(image.grids)) for image in prepared]
    torch.testing.assert_close(vlm.rows(patches, grids), torch.cat(alone), **TOLERANCE)


def test_frames_do_not_see_each_other(vlm: VLM, encoder: Encoder) -> None:
    """The gradient of one time's rows with respect to the patches of another is exactly zero."""
    (sample,) = (encoder.encode(ask("?", videos=[frames(6)])),)
    image = sample.images[0]
    patches = torch.from_numpy(image.patches).requires_grad_()
    rows = vlm.rows(patches, torch.from_numpy(image.grids))
    per_time = len(rows) // 3
    rows[per_time : 2 * per_time].square().sum().backward()
    assert patches.grad is not None
    others = torch.cat([patches.grad[: 4 * per_time], patches.grad[8 * per_time :]])
    assert (others == 0).all()
    assert (patches.grad[4 * per_time : 8 * per_time] != 0).any()


@torch.no_grad()
def test_decoding_goes_on_one_past_the_largest_position(encoder: Encoder, vlm: VLM) -> None:
    """Cached, step by step, all rows together, against one full pass over prompt and answer."""
    samples = [encoder.encode(Conversation(c.messages[:-1], c.images, c.id, c.videos)) for c in conversations()]
    answers = generate(vlm, samples, None, Sampling(max_new_tokens=6))
    for sample, answer in zip(samples, answers, strict=True):
        ids, positions = sample.ids, sample.positions
        for token in answer.ids:
            batch = pad([sample])
            full = Batch(
                ids=torch.from_numpy(ids)[None],
                positions=torch.from_numpy(positions)[None],
                documents=((0, 0, len(ids)),),
                patches=batch.patches,
                grids=batch.grids,
                slots=batch.slots,
                slot_rows=batch.slot_rows,
            )
            assert int(vlm.logits(vlm.hidden(full)[0, -1]).argmax()) == token
            ids = np.append(ids, token)
            positions = np.concatenate([positions, np.full((1, 3), positions.max() + 1)])


def test_a_chat_about_a_video_runs_it_once(tokenizer: Tokenizer, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(vlm=vlm, config=CONFIG, name="tiny")
    model.tokenizer = tokenizer
    runs = []
    real = VLM.rows
    monkeypatch.setattr(VLM, "rows", lambda self, patches, grids: runs.append(len(grids)) or real(self, patches, grids))
    chat = Chat(model, sampling=Sampling(max_new_tokens=4))
    chat.ask("What happens?", videos=[frames(4)])
    second = chat.ask("And here?", toys.picture((40, 40)))
    chat.ask("Again?")
    assert runs == [1, 1]
    whole = Encoder(CONFIG, tokenizer).encode(
        Conversation(tuple(chat.messages[:3]), tuple(chat.images), videos=tuple(chat.videos))
    )
    assert generate(vlm, [whole], tokenizer, Sampling(max_new_tokens=4))[0].ids == second.ids
    chat.reset()
    assert not chat.videos


def test_a_tied_head_learns_from_both_sides(encoder: Encoder) -> None:
    model = weights.build(CONFIG, seed=2)
    loss = next_token(model, pack(encoded(encoder)))
    loss.total.backward()
    assert model.decoder.head is None
    gradient = model.decoder.embed.weight.grad
    assert gradient is not None
    # An id that is taught nowhere and stands nowhere still gets a gradient, as a head's row.
    assert (gradient[300] != 0).any()
    model.zero_grad()
    with torch.no_grad():
        places, targets = (batch := pack(encoded(encoder))).targets()
        plain = torch.nn.functional.cross_entropy(
            model.logits(model.hidden(batch).flatten(0, 1)[places]), targets, reduction="sum"
        )
    torch.testing.assert_close(loss.total.detach(), plain, atol=1e-3, rtol=1e-5)


def test_the_fast_way_is_asked_for_by_name_and_says_how_far_off_it_is(tokenizer: Tokenizer, encoder: Encoder) -> None:
    conversation = ask("?", toys.picture((300, 200)))
    exact = encoder.encode(conversation)
    fast = Encoder(CONFIG, tokenizer, pixels="fast").encode(conversation)
    assert not any("fast" in note for note in exact.notes)
    assert any("at most 2 of 255 levels away from Pillow" in note for note in fast.notes)
    difference = np.abs(exact.images[0].patches - fast.images[0].patches).max()
    assert difference < 2.01 / 255 / min(CONFIG.vision.std)


def test_notes_say_which_frames_are_shown(encoder: Encoder, tmp_path: Path) -> None:
    assert encoder.encode(ask("?", videos=[frames(3)])).notes == ("video 1: 3 of 3 frames are shown",)
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames(30, (64, 48)):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    sample = encoder.encode(ask("?", videos=[tmp_path / "a.mp4"]))
    assert sample.images[0].plan.frames == (0, 6, 12, 17, 23, 29)
    assert sample.notes[0].endswith("a.mp4): 6 of 30 frames are shown, from 0.00 s to 2.90 s")


def test_a_video_that_is_too_much_is_refused_before_it_is_decoded(tokenizer: Tokenizer) -> None:
    class Unread:
        """Frames after the first that must not be opened."""

    video = (toys.picture((60, 40)), *[Unread()] * 9)
    small = CONFIG.replace(decoder=CONFIG.decoder.replace(max_positions=20))
    with pytest.raises(MessageError, match=r"video 1 takes \d+ tokens \(10 frames\), but the model was trained for 20"):
        Encoder(small, tokenizer).encode(ask("?", videos=[video]))
    with pytest.raises(MediaError, match=r"10 frames are too many, at most 8 are shown \(max_shown_frames\)"):
        Encoder(CONFIG, tokenizer, limits=Limits(max_shown_frames=8)).encode(ask("?", videos=[video]))
    elongated = CONFIG.replace(resolution=CONFIG.resolution.replace(max_ratio=1))
    with pytest.raises(PlanError, match="video 1: a picture of 60x40 px is too elongated"):
        Encoder(elongated, tokenizer).encode(ask("?", videos=[video]))


def test_a_model_without_videos_refuses_them_by_name(tokenizer: Tokenizer) -> None:
    config = families.preset("llava-1.5-tiny").config
    with pytest.raises(PlanError, match="video 1: this model reads pictures only, no videos"):
        Encoder(config, tokenizer).encode(ask("?", videos=[frames(2)]))


def test_text_that_looks_like_a_place_for_pictures_is_text(encoder: Encoder) -> None:
    text = "<|vision_start|><|image_pad|><|video_pad|><|vision_end|><|im_end|>"
    sample = encoder.encode(Conversation((user(text),)))
    assert not sample.images
    assert not len(sample.slots)
    assert text in encoder.tokenizer.decode(sample.ids.tolist())


def test_a_video_may_stand_between_words(encoder: Encoder) -> None:
    message = Message("user", (TextPart("First "), VideoPart(0), TextPart(" then what?")))
    sample = encoder.encode(Conversation((message,), videos=(frames(2),)))
    text = encoder.tokenizer.decode(np.delete(sample.ids, sample.slots).tolist())
    assert "First  then what?" in text


def test_a_cache_row_keeps_its_own_positions(encoder: Encoder, vlm: VLM) -> None:
    """Rows of one batch stand at different positions after prompts of the same length."""
    samples = [encoder.encode(ask("?", videos=[frames(4)])), encoder.encode(ask("?" * 40))]
    cache = KVCache(CONFIG.decoder, batch_size=2, capacity=8, dtype=torch.float32)
    with torch.no_grad():
        vlm.hidden(pad(samples), cache)
    assert cache.lengths == [sample.num_tokens for sample in samples]
    assert samples[0].positions.max() + 1 < samples[0].num_tokens
    assert samples[1].positions.max() + 1 == samples[1].num_tokens
