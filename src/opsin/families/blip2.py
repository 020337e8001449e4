"""BLIP-2: bootstrapping language-image pre-training with frozen encoders and LLMs (arXiv:2301.12597), January 2023.

Figures 2 and 3 of the paper, each box with the code that it is here:

     output text                                      image-text      image-text       image-grounded
          ^                                           matching        contrastive      text generation
  +------------------+                                    ^               ^                  ^
  | LLM: OPT         |  nn/decoder.py:Decoder             |               |                  |
  |  or  FlanT5      |  nn/seq2seq.py:Seq2Seq                      (masks: nn/qformer.py:text_mask)
  +------------------+                                    |               |                  |
    ^ 32 rows    ^ text                              nn/retriever.py:Retriever  (heads, words, temperature)
  +------------------+                                    ^                                  ^
  | fully connected  |  nn/qformer.py:QFormerRows         |                                  |
  +------------------+                              +-----------------------------------------------------+
    ^                                               |  Q-Former: ONE stack of 12 layers                    |
  queries' outputs <--------------------------------|    feed-forward (queries) |   feed-forward (text)     |
                                                    |    cross-attention        |                           |
                             nn/qformer.py:QFormer  |      (every 2nd layer)    |                           |
                                                    |    self-attention, shared by queries and text        |
                                                    +-----------------------------------------------------+
                                                        ^ features              ^ 32 queries   ^ input text
  +------------------+   LayerNorm (trained)            |
  | image encoder    |----------------------------------+         nn/vision.py:VisionTower
  | ViT-g or ViT-L   |                                            (the last block is not run; class token kept)
  +------------------+
        ^
     picture, stretched to 224 or 364 px square                   spec/resolution.py:Squash  media/prepare.py:prepare

Stage 1 trains the Q-Former with its text side and no language model; stage 2 trains the same Q-Former without it as the
connector of a frozen one. Sizes: config.json of the Salesforce repositories; LAVIS @506965b, configs/models/blip2.
"""

from opsin.families._blip2_hub import (
    chat_for,
    is_blip2,
    is_retriever,
    language_repository,
    read_config,
    read_retriever,
    tower_repository,
)
from opsin.families._blip2_layouts import (
    bert_layouts,
    layouts,
    part_layouts,
    retriever_layouts,
    tower_layouts,
)
from opsin.families._blip2_parts import (
    BLIP2_OPT,
    BLIP2_OPT_PROMPT,
    BLIP2_T5,
    BLIP2_T5_PROMPT,
    CAPTION_SEARCH,
    CLIP_VIT_L,
    COCO_SEARCH,
    EVA_VIT_G,
    FLAN_T5_XL,
    FLAN_T5_XXL,
    OPT_2_7B,
    OPT_6_7B,
    OPT_IMAGE_TOKEN,
    OPT_ROWS,
    T5_IMAGE_TOKEN,
)
from opsin.families._blip2_write import write_config, write_retriever
from opsin.families._family import Family, Preset, Retrieval, RetrieverPreset
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import QFormerConfig, RetrieverConfig
from opsin.spec.resolution import Squash
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.spec.vision import VisionConfig

LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
CONVERTED = QFormerConfig(feature_norm_eps=EVA_VIT_G.norm_eps)
"""transformers gives the norm of the features the tower's eps."""


def _preset(id: str, language: DecoderConfig | Seq2SeqConfig, parameters: int) -> Preset:
    """A converted model, at 224 px or, tuned for captions of COCO, at 364."""
    is_t5, is_coco = isinstance(language, Seq2SeqConfig), id.endswith("-coco")
    side = 364 if is_coco else 224
    chats = (BLIP2_T5_PROMPT if is_t5 else BLIP2_OPT_PROMPT, BLIP2_T5 if is_t5 else BLIP2_OPT)
    return Preset(
        id=id,
        config=VLMConfig(
            vision=EVA_VIT_G.replace(image_size=side),
            connector=CONVERTED,
            decoder=language if is_t5 else language.replace(vocab_size=OPT_ROWS),
            resolution=Squash(tile_size=side),
            chat=chats[0] if is_coco else chats[1],
            image_token_id=T5_IMAGE_TOKEN if is_t5 else OPT_IMAGE_TOKEN,
        ),
        hub=(f"Salesforce/{id}",),
        parameters=parameters,
        source=f"Salesforce/{id} config.json, preprocessor_config.json",
        generation=COCO_SEARCH if is_coco else CAPTION_SEARCH,
    )


def _access(file: str, arch: str, *others: str) -> str:
    keys = ", ".join((f'"arch": "{arch}"', '"num_query_token": 32', *others))
    return (
        f"Salesforce published it as a pickle alone: {LAVIS}/{file}. Convert its table 'model' to safetensors "
        f"where you trust it, put {{{keys}}} into a config.json beside it, and load that folder"
    )


PRESETS = (
    _preset("blip2-opt-2.7b", OPT_2_7B, 3_744_761_856),
    _preset("blip2-opt-6.7b", OPT_6_7B, 7_752_869_376),
    _preset("blip2-opt-2.7b-coco", OPT_2_7B, 3_745_353_216),
    _preset("blip2-opt-6.7b-coco", OPT_6_7B, 7_753_460_736),
    _preset("blip2-flan-t5-xl", FLAN_T5_XL, 3_942_446_592),
    _preset("blip2-flan-t5-xl-coco", FLAN_T5_XL, 3_943_037_952),
    _preset("blip2-flan-t5-xxl", FLAN_T5_XXL, 12_229_596_672),
    Preset(
        id="blip2-flan-t5-xl-vit-l",
        config=VLMConfig(
            vision=CLIP_VIT_L,
            connector=QFormerConfig(),
            decoder=FLAN_T5_XL,
            resolution=Squash(tile_size=224),
            chat=BLIP2_T5,
            image_token_id=T5_IMAGE_TOKEN,
        ),
        parameters=3_243_538_944,
        source="LAVIS configs/models/blip2/blip2_pretrain_flant5xl_vitL.yaml",
        tower_hub="openai/clip-vit-large-patch14",
        access=_access(
            "blip2_pretrained_flant5xl_vitL.pth",
            "pretrain_flant5xl",
            '"vit_model": "clip_L"',
            '"t5_model": "google/flan-t5-xl"',
        ),
        generation=CAPTION_SEARCH,
    ),
)


def _retriever(vision: VisionConfig, qformer: QFormerConfig, *, converted: bool) -> RetrieverConfig:
    return RetrieverConfig(
        vision=vision,
        qformer=qformer,
        resolution=Squash(tile_size=vision.image_size),
        heads="matching" if converted else "all",
    )


RETRIEVERS = (
    *(
        RetrieverPreset(
            id=f"blip2-itm-vit-g{suffix}",
            config=_retriever(EVA_VIT_G.replace(image_size=side), CONVERTED, converted=True),
            hub=(f"Salesforce/blip2-itm-vit-g{suffix}",),
            parameters=parameters,
            source=f"Salesforce/blip2-itm-vit-g{suffix} (transformers' conversion of LAVIS' {file})",
        )
        for suffix, side, parameters, file in (
            ("", 224, 1_172_032_258, "blip2_pretrained.pth"),
            ("-coco", 364, 1_172_623_618, "blip2_finetune_coco.pth"),
        )
    ),
    *(
        RetrieverPreset(
            id=f"blip2-stage1-{suffix}",
            config=_retriever(vision, QFormerConfig(), converted=False),
            parameters=parameters,
            source=f"LAVIS configs/models/blip2/{yaml}",
            access=_access(file, arch, *others),
        )
        for suffix, vision, parameters, yaml, file, arch, others in (
            ("vit-g", EVA_VIT_G, 1_172_654_910, "blip2_pretrain.yaml", "blip2_pretrained.pth", "pretrain", ()),
            (
                "vit-l",
                CLIP_VIT_L,
                473_747_262,
                "blip2_pretrain_vitL.yaml",
                "blip2_pretrained_vitL.pth",
                "pretrain",
                ('"vit_model": "clip_L"',),
            ),
            (
                "vit-g-coco",
                EVA_VIT_G.replace(image_size=364),
                1_173_246_270,
                "blip2_coco.yaml",
                "blip2_finetune_coco.pth",
                "coco",
                ('"image_size": 364',),
            ),
        )
    ),
)

TINY = Preset(
    id="blip2-tiny",
    config=VLMConfig(
        vision=EVA_VIT_G.replace(image_size=42, dim=32, num_layers=2, num_heads=4, mlp_dim=64),
        connector=CONVERTED.replace(num_queries=6, dim=32, num_layers=3, num_heads=4, mlp_dim=64, dropout=0.0),
        decoder=OPT_2_7B.replace(vocab_size=384, dim=48, num_layers=2, num_heads=4, num_kv_heads=4, mlp_dim=96),
        resolution=Squash(tile_size=42),
        chat=BLIP2_OPT,
        image_token_id=383,
    ),
    parameters=227_248,
    source="made up for tests: 6 slots a picture, OPT",
)

TINY_T5 = TINY.config.replace(
    decoder=FLAN_T5_XL.replace(
        vocab_size=384, dim=48, num_encoder_layers=2, num_layers=3, num_heads=4, head_dim=8, mlp_dim=64
    ),
    chat=BLIP2_T5,
)
"""The same with FlanT5's parts."""

TINY_RETRIEVER = RetrieverConfig(
    vision=TINY.config.vision,
    qformer=QFormerConfig(num_queries=6, dim=32, num_layers=3, num_heads=4, mlp_dim=64, dropout=0.0),
    resolution=Squash(tile_size=42),
    vocab_size=384,
    max_positions=40,
    embed_dim=16,
)
"""Stage 1 at that size."""

BLIP2 = Family(
    name="blip2",
    title="BLIP-2",
    paper="BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models, "
    "arXiv:2301.12597",
    presets=PRESETS,
    tiny=TINY,
    recipes=(
        "blip2/stage1",
        "blip2/stage2-opt",
        "blip2/stage2-flan-t5",
        "blip2/caption-coco",
        "blip2/vqa",
        "blip2/retrieval-coco",
    ),
    matches=is_blip2,
    accepts=lambda config: config.connector.kind == "qformer" and config.resolution.kind == "squash",
    chat_for=chat_for,
    read=read_config,
    write=write_config,
    layouts=layouts,
    part_layouts=part_layouts,
    tower=tower_repository,
    language=language_repository,
    retrieval=Retrieval(
        presets=RETRIEVERS,
        tiny=TINY_RETRIEVER,
        matches=lambda hub: is_blip2(hub) and is_retriever(hub),
        read=read_retriever,
        write=write_retriever,
        layouts=retriever_layouts,
        tower_layouts=tower_layouts,
        tower=tower_repository,
        text_layouts=bert_layouts(),
    ),
)
