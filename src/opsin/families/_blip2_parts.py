"""What BLIP-2 is put together from: towers, language models, chat formats, and how its answers were searched for."""

from opsin.spec.chat import AssistantTurn, ChatFormat, Control, ImageMarkup, Text, UserTurn
from opsin.spec.decoder import DecoderConfig
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.spec.vision import VisionConfig

EVA_VIT_G = VisionConfig(
    image_size=224,
    patch_size=14,
    dim=1408,
    num_layers=39,
    num_heads=16,
    mlp_dim=6144,
    activation="gelu",
    norm_eps=1e-6,
    out_layers=(-1,),
    class_token="keep",
    positions="learned_bicubic",
    first_norm=False,
    last_norm=False,
    patch_bias=True,
)
"""EVA-CLIP ViT-g/14 without the last of its 40 blocks (LAVIS eva_vit.py, create_eva_vit_g; HF Blip2VisionConfig)."""

CLIP_VIT_L = VisionConfig(
    image_size=224,
    patch_size=14,
    dim=1024,
    num_layers=23,
    num_heads=16,
    mlp_dim=4096,
    out_layers=(-1,),
    class_token="keep",
    positions="learned_bicubic_corners",
    last_norm=False,
)
"""CLIP ViT-L/14 without the last of its 24 blocks (LAVIS clip_vit.py, create_clip_vit_L)."""

OPT_2_7B = DecoderConfig(
    vocab_size=50_272, dim=2560, num_layers=32, num_heads=32, num_kv_heads=32, mlp_dim=10_240, norm="layer",
    attention_bias="all", mlp="relu", head="tied", rope=None, max_positions=2048,
)  # fmt: skip
"""facebook/opt-2.7b, config.json (arXiv:2205.01068)."""

OPT_6_7B = OPT_2_7B.replace(dim=4096, num_heads=32, num_kv_heads=32, mlp_dim=16_384)
"""facebook/opt-6.7b, config.json."""

FLAN_T5_XL = Seq2SeqConfig(
    vocab_size=32_128, dim=2048, num_encoder_layers=24, num_layers=24, num_heads=32, head_dim=64, mlp_dim=5120
)
"""google/flan-t5-xl, config.json (arXiv:2210.11416), run with the exact GELU as BLIP-2 does."""

FLAN_T5_XXL = FLAN_T5_XL.replace(dim=4096, num_heads=64, mlp_dim=10_240)
"""google/flan-t5-xxl, config.json."""

OPT_IMAGE_TOKEN, OPT_ROWS = 50_265, 50_304
"""`<image>` of the converted OPT models, the first row that was added, and their rows with it, a multiple of 64."""
T5_IMAGE_TOKEN = 32_100
"""`<image>` of the converted FlanT5 models, among the rows that T5 never used."""

LANGUAGE_MODELS: dict[str, DecoderConfig | Seq2SeqConfig] = {
    "facebook/opt-2.7b": OPT_2_7B,
    "facebook/opt-6.7b": OPT_6_7B,
    "google/flan-t5-xl": FLAN_T5_XL,
    "google/flan-t5-xxl": FLAN_T5_XXL,
}
"""What LAVIS' `opt_model` and `t5_model` name."""

IMAGE_TOKENS = {
    name: T5_IMAGE_TOKEN if isinstance(model, Seq2SeqConfig) else OPT_IMAGE_TOKEN
    for name, model in LANGUAGE_MODELS.items()
}
"""A row that no text of theirs uses: what the converted models mark pictures with."""

TOWERS = {"eva_clip_g": EVA_VIT_G, "clip_L": CLIP_VIT_L}
"""What LAVIS' `vit_model` names; the first where it names none."""

FIRST = ImageMarkup(placement="first")
START = Control(token="</s>")
"""OPT's begin-of-sequence token has the name that other models end with."""
END = Control(token="</s>", supervised=True)


def _taught(text: str) -> Text:
    return Text(text=text, supervised=True)


def _dialogue(answer: str) -> tuple[UserTurn, AssistantTurn]:
    """`Question: {question} Answer: {answer}. Question: ...`"""
    user = UserTurn(lead=(Text(text="Question: "),), suffix=(Text(text=f" {answer}:"),))
    return user, AssistantTurn(lead=(_taught(" "),))


_OPT_TURNS, _T5_TURNS = _dialogue("Answer"), _dialogue("Short answer")

BLIP2_OPT = ChatFormat(
    name="blip2_opt",
    begin=(START,),
    system_suffix=(Text(text=" "),),
    between=(Text(text=". "),),
    user=_OPT_TURNS[0],
    assistant=_OPT_TURNS[1],
    end=(_taught("\n"),),
    markup=FIRST,
    stop_tokens=("</s>",),
    stop_strings=("\n",),
)
"""Questions (paper section 4.1); a picture without a question is described. A newline, not `</s>`, ends an answer."""

BLIP2_OPT_PROMPT = BLIP2_OPT.replace(
    name="blip2_opt_prompt", between=(Text(text=" "),), user=UserTurn(), assistant=AssistantTurn(lead=(_taught(" "),))
)
"""What the user writes is the beginning of what the model writes: `a photo of` for captions."""

BLIP2_OPT_CAPTION = BLIP2_OPT.replace(
    name="blip2_opt_caption",
    begin=(START.replace(supervised=True),),
    user=UserTurn(text="discard"),
    assistant=AssistantTurn(),
)
"""Stage 2: the picture and its caption. Without a prompt `</s>` itself is taught, at the last of the picture's rows."""

BLIP2_OPT_PHOTO = BLIP2_OPT_PROMPT.replace(
    name="blip2_opt_photo", user=UserTurn(text="discard", suffix=(Text(text="a photo of"),))
)
"""COCO's captions: whatever the user says, what the model goes on with is `a photo of` (caption_coco_ft.yaml)."""

BLIP2_T5 = ChatFormat(
    name="blip2_t5",
    system_suffix=(Text(text=" "),),
    between=(Text(text=". "),),
    user=_T5_TURNS[0],
    assistant=_T5_TURNS[1],
    encoder_end=(START,),
    decoder_start="<pad>",
    end=(END,),
    markup=FIRST,
    stop_tokens=("</s>",),
)
"""Questions to FlanT5: the encoder reads picture and questions, the decoder writes the last answer."""

BLIP2_T5_PROMPT = BLIP2_T5.replace(
    name="blip2_t5_prompt", between=(Text(text=" "),), user=UserTurn(), assistant=AssistantTurn(lead=(_taught(" "),))
)
"""What the user writes is all that the encoder reads beside the picture: `a photo of`, or the first half of a caption
in stage 2, of which the answer is the other half."""

BLIP2_T5_PHOTO = BLIP2_T5_PROMPT.replace(name="blip2_t5_photo", user=BLIP2_OPT_PHOTO.user)

BLIP2_CHATS = (
    BLIP2_OPT,
    BLIP2_OPT_PROMPT,
    BLIP2_OPT_CAPTION,
    BLIP2_OPT_PHOTO,
    BLIP2_T5,
    BLIP2_T5_PROMPT,
    BLIP2_T5_PHOTO,
)

CAPTION_SEARCH = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 1, "length_penalty": 1.0}
"""LAVIS Blip2OPT.generate and Blip2T5.generate."""
COCO_SEARCH = {**CAPTION_SEARCH, "min_new_tokens": 8}
"""LAVIS projects/blip2/train/caption_coco_ft.yaml."""
OPT_ANSWER_SEARCH = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1, "length_penalty": 0.0}
"""LAVIS Blip2OPT.predict_answers; the paper has length penalty -1."""
T5_ANSWER_SEARCH = {**OPT_ANSWER_SEARCH, "length_penalty": -1.0}
"""LAVIS Blip2T5.predict_answers."""
