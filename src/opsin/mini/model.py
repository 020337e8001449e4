"""opsin-mini's description: Qwen2-VL's construction in miniature.

Native resolution (patches of 8 px, 2x2 joined: 16 px a token), a tower turned by row and column, M-RoPE, clips of two
frames a patch. What differs from Qwen2-VL is in numbers only, and each has its reason beside it.
"""

from opsin.demo.scene import Scene
from opsin.families._chats import QWEN2_VL
from opsin.spec.connector import PatchMerger
from opsin.spec.decoder import DecoderConfig, RopeConfig
from opsin.spec.grounding import Grounding
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native, VideoSampling
from opsin.spec.vision import VisionConfig
from opsin.text.tokenizer import Tokenizer

PATCH = 8
TOKEN = 2 * PATCH
"""Side in pixels of what becomes one token."""
TOWER = VisionConfig(
    image_size=12 * PATCH,
    patch_size=PATCH,
    dim=160,
    num_layers=6,
    num_heads=5,
    mlp_dim=480,
    norm_eps=1e-6,
    out_layers=(-1,),
    class_token="none",
    positions="rotary_and_table",
    first_norm=False,
    last_norm=False,
    frames=2,
    patch_block=2,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
RESOLUTION = Native(
    factor=TOKEN,
    min_pixels=48 * 48,
    max_pixels=144 * 144,  # a little more than the largest picture of its training
    video=VideoSampling(fps=2.0, min_frames=4, max_frames=8, min_pixels=48 * 48, max_pixels=96 * 96),
)
CHAT = QWEN2_VL.replace(
    name="opsin_mini",
    system="",  # it would be a tenth of every conversation here
    grounding=Grounding(space="per_1000", largest=999, form="points"),
)
"""Qwen2-VL's chat format; boxes as `<ref>name</ref><box>(left,top),(right,bottom)</box>`."""
CONTROLS = (
    "<unk>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)


def decoder_config(vocab_size: int) -> DecoderConfig:
    """The language model: Qwen2's construction."""
    return DecoderConfig(
        vocab_size=vocab_size,
        dim=192,
        num_layers=6,
        num_heads=6,
        num_kv_heads=6,
        mlp_dim=512,
        norm_eps=1e-6,
        attention_bias="qkv",
        head="own",
        # In Qwen2-VL's order columns read the slowest six of sixteen frequencies, which hardly turn within the ten
        # columns of a picture here; a base small enough for them would leave no slow frequency to find words with,
        # however far they are (tried with 30: after 500 steps 27 % of typed questions were right).
        rope=RopeConfig(theta=10_000.0, sections=(6, 5, 5), order="interleaved"),
        max_positions=2048,
    )


def config(tokenizer: Tokenizer) -> VLMConfig:
    """The whole model."""
    return VLMConfig(
        vision=TOWER,
        connector=PatchMerger(),
        decoder=decoder_config(tokenizer.vocab_size),
        resolution=RESOLUTION,
        chat=CHAT,
        image_token_id=tokenizer.control_id("<|image_pad|>"),
        video_token_id=tokenizer.control_id("<|video_pad|>"),
    )


def shown_size(scene: Scene) -> tuple[int, int]:
    """(width, height) that the model is shown a picture of this size at."""
    return RESOLUTION.resize(scene.size, RESOLUTION.min_pixels, RESOLUTION.max_pixels, "grow")
