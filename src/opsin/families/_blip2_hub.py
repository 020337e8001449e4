"""Published `config.json` files of BLIP-2, read: transformers', and LAVIS' model files as JSON.

transformers writes only what differs from the defaults of its classes, which stand below; a missing key means them.
LAVIS describes a model by the `model:` section of a file in configs/models/blip2 and keeps the sizes in its code; where
they differ, the sections `vit`, `bert` and `text_config` say so, which are ours. Keys that would change the numbers are
read or refused, never skipped.
"""

import re
from collections.abc import Mapping
from typing import Any

from opsin.errors import ConfigError
from opsin.families._blip2_parts import BLIP2_OPT, BLIP2_T5, EVA_VIT_G, IMAGE_TOKENS, LANGUAGE_MODELS, TOWERS
from opsin.families._family import HubConfig
from opsin.families._hub import CHAT_KEY, CONFIG, PREPROCESSOR
from opsin.families._keys import refuse_unread
from opsin.spec.chat import ChatFormat
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import QFormerConfig, RetrieverConfig
from opsin.spec.resolution import Squash
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.spec.vision import VisionConfig

VISION: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
"""transformers Blip2VisionConfig."""

QFORMER: dict[str, Any] = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
}
"""transformers Blip2QFormerConfig, and BERT-base."""

OPT: dict[str, Any] = {
    "vocab_size": 50_272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
    "tie_word_embeddings": True,
}
"""transformers OPTConfig."""

T5: dict[str, Any] = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "n_positions": 512,
}
"""transformers T5Config."""

GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh"}
"""`dense_act_fn`; a file that has `feed_forward_proj` alone means gelu_new."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "qkv_bias": (None, True),
    "num_channels": (None, 3),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "do_layer_norm_before": (None, True),
    "activation_function": ("relu",),
    "enable_bias": (None, True),
    "layer_norm_elementwise_affine": (None, True),
    "_remove_final_layer_norm": (None, False),
    "scale_decoder_outputs": (None, False),
    "is_gated_act": (None, True),
    "quantization_config": (None,),
    "drop_path_rate": (None, 0, 0.0),
    "block_norm_eps": (1e-6,),
}
"""Keys that are served at these values only; any other value changes the numbers."""

READ = frozenset(
    {"image_token_index", "image_token_id", "image_text_hidden_size", "vision_config", "qformer_config", "image_size"}
    | {"cross_attention_freq", "embed_dim", "num_query_token", "num_query_tokens", "vit", "vit_model", "max_txt_len"}
    | {"relative_attention_num_buckets", "relative_attention_max_distance", "attention_dropout", "vit_precision"}
    | {"attention_probs_dropout_prob", "cross_attention_frequency", "word_embed_proj_dim", "activation_dropout"}
)
SUSPICIOUS = re.compile(
    r"(vision_|image_|qformer_|attention_|quantization|relative_|activation_|vit|cross_|position_|scale_|drop_path|rope_)"
)
"""What a key that changes the numbers would begin with."""


def is_lavis(hub: HubConfig) -> bool:
    """Whether config.json is LAVIS' `model:` section."""
    return "num_query_token" in hub


def is_blip2(hub: HubConfig) -> bool:
    """Whether config.json describes a BLIP-2, of whichever kind."""
    return is_lavis(hub) or hub.get("model_type") in ("blip-2", "blip_2")


def is_retriever(hub: HubConfig) -> bool:
    """Whether it is one of stage 1 or for retrieval: it has no language model."""
    if is_lavis(hub):
        return not {"opt_model", "t5_model", "text_config"} & hub.keys()
    qformer = hub.get("qformer_config") or {}
    named = any("Retrieval" in str(name) for name in hub.get("architectures") or ())
    return named or bool(qformer.get("use_qformer_text_input"))


def chat_for(hub: HubConfig) -> ChatFormat:
    """The format of questions to the model's language model."""
    text = hub.get("text_config") or {}
    return BLIP2_T5 if "t5_model" in hub or text.get("model_type") == "t5" else BLIP2_OPT


def tower_repository(hub: HubConfig) -> str | None:
    """CLIP's repository, for LAVIS files that name it; EVA ViT-g has none with safetensors."""
    return "openai/clip-vit-large-patch14" if hub.get("vit_model") == "clip_L" else None


def language_repository(hub: HubConfig) -> str | None:
    """The language model's repository, for LAVIS files."""
    return hub.get("opt_model") or hub.get("t5_model")


def read_config(hub: HubConfig, preprocessor: HubConfig | None, chat: ChatFormat) -> VLMConfig:
    """A generative model. Raises ConfigError, also for a model of retrieval, which is read by `read_retriever`."""
    if is_retriever(hub):
        raise ConfigError(
            f"{CONFIG} describes a BLIP-2 that compares pictures with texts and has no language model. Use it with "
            "`opsin match`, or opsin.match.load"
        )
    if CHAT_KEY in hub:
        chat = ChatFormat.parse(hub[CHAT_KEY], where=f"{CONFIG} {CHAT_KEY}")
    vision, qformer = _tower_and_qformer(hub, preprocessor)
    token = hub.get("image_token_id", hub.get("image_token_index"))
    if token is None and is_lavis(hub):
        token = IMAGE_TOKENS.get(str(language_repository(hub)))
    return VLMConfig.parse(
        {
            "vision": vision,
            "connector": qformer,
            "decoder": _language(hub),
            "resolution": _resolution(preprocessor, vision),
            "chat": chat,
            "image_token_id": token,
        },
        where=CONFIG,
    )


def read_retriever(hub: HubConfig, preprocessor: HubConfig | None = None) -> RetrieverConfig:
    """A model of stage 1 or of retrieval. Raises ConfigError."""
    if not is_blip2(hub) or not is_retriever(hub):
        raise ConfigError(f"{CONFIG} does not describe a BLIP-2 that compares pictures with texts")
    vision, qformer = _tower_and_qformer(hub, preprocessor)
    lavis = is_lavis(hub)
    text = {**QFORMER, **((hub.get("bert") if lavis else hub.get("qformer_config")) or {})}
    # LAVIS adds `[DEC]` to BERT's vocabulary; transformers' number counts it.
    rows = (hub.get("tokenizer") or {}).get("vocab_size", text["vocab_size"] + 1) if lavis else text["vocab_size"]
    positions = text["max_position_embeddings"]
    return RetrieverConfig.parse(
        {
            "vision": vision,
            "qformer": qformer,
            "resolution": _resolution(preprocessor, vision),
            "vocab_size": rows,
            "max_positions": positions,
            "max_tokens": min(hub.get("max_txt_len", 32), positions),
            "embed_dim": hub.get("embed_dim" if lavis else "image_text_hidden_size", 256),
            "heads": "all" if lavis and hub.get("heads", "all") == "all" else "matching",
            "image_token_id": hub.get("image_token_id", hub.get("image_token_index")),
        },
        where=CONFIG,
    )


def _tower_and_qformer(hub: HubConfig, preprocessor: HubConfig | None) -> tuple[VisionConfig, QFormerConfig]:
    _refuse(hub, CONFIG)
    read = _lavis_parts if is_lavis(hub) else _hf_parts
    vision, qformer = read(hub)
    statistics = {
        ours: tuple(preprocessor[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if preprocessor is not None and preprocessor.get(theirs) is not None
    }
    return VisionConfig.parse({**dict(vision), **statistics}, where=PREPROCESSOR), qformer


def _hf_parts(hub: HubConfig) -> tuple[VisionConfig, QFormerConfig]:
    tower, stack = hub.get("vision_config") or {}, hub.get("qformer_config") or {}
    where = f"{CONFIG} vision_config"
    _refuse({key: value for key, value in tower.items() if key != "hidden_act"}, where)
    get = {**VISION, **tower}.get
    vision = VisionConfig.parse(
        {
            **dict(EVA_VIT_G),
            "image_size": get("image_size"),
            "patch_size": get("patch_size"),
            "dim": get("hidden_size"),
            "num_layers": get("num_hidden_layers"),
            "num_heads": get("num_attention_heads"),
            "mlp_dim": get("intermediate_size"),
            "activation": get("hidden_act"),
            "norm_eps": get("layer_norm_eps"),
        },
        where=where,
    )
    # transformers counts the norm of the features to the tower, and gives it the tower's eps.
    return vision, _qformer(
        stack,
        f"{CONFIG} qformer_config",
        num_queries=hub.get("num_query_tokens", 32),
        cross_every=stack.get("cross_attention_frequency", QFORMER["cross_attention_frequency"]),
        feature_norm_eps=vision.norm_eps,
    )


def _lavis_parts(hub: HubConfig) -> tuple[VisionConfig, QFormerConfig]:
    name = hub.get("vit_model", "eva_clip_g")
    if name not in TOWERS:
        raise ConfigError(f"{CONFIG}: vit_model {name!r} is not served. Known: {', '.join(TOWERS)}")
    given, base = hub.get("vit") or {}, TOWERS[name]
    _refuse({key: value for key, value in given.items() if key != "block_norm_eps" or name == "eva_clip_g"}, CONFIG)
    dim = given.get("embed_dim", base.dim)
    ratio = given.get("mlp_ratio", 4.3637 if name == "eva_clip_g" else 4)
    vision = VisionConfig.parse(
        {
            **dict(base),
            "image_size": hub.get("image_size", base.image_size),
            "patch_size": given.get("patch_size", base.patch_size),
            "dim": dim,
            "num_layers": given.get("depth", base.num_layers),
            "num_heads": given.get("num_heads", base.num_heads),
            "mlp_dim": given.get("mlp_dim", int(dim * ratio)),
        },
        where=CONFIG,
    )
    return vision, _qformer(
        hub.get("bert") or {},
        f"{CONFIG} bert",
        num_queries=hub["num_query_token"],
        cross_every=hub.get("cross_attention_freq", 2),
        feature_norm_eps=given.get("ln_vision_eps", 1e-5),
    )


def _qformer(stack: HubConfig, where: str, **others: Any) -> QFormerConfig:
    _refuse(stack, where)
    get = {**QFORMER, **stack}.get
    dropout = get("hidden_dropout_prob")
    if get("attention_probs_dropout_prob", dropout) != dropout:
        raise ConfigError(f"{where}: hidden_dropout_prob and attention_probs_dropout_prob differ; one number is served")
    return QFormerConfig.parse(
        {
            "dim": get("hidden_size"),
            "num_layers": get("num_hidden_layers"),
            "num_heads": get("num_attention_heads"),
            "mlp_dim": get("intermediate_size"),
            "norm_eps": get("layer_norm_eps"),
            "dropout": dropout,
            **others,
        },
        where=where,
    )


def _language(hub: HubConfig) -> DecoderConfig | Seq2SeqConfig:
    text, name = hub.get("text_config"), hub.get("opt_model") or hub.get("t5_model")
    if text is None and name is not None:
        if name not in LANGUAGE_MODELS:
            known = ", ".join(LANGUAGE_MODELS)
            raise ConfigError(f"{CONFIG}: language model {name!r} is not known. Known: {known}; or add its text_config")
        return LANGUAGE_MODELS[name]
    text, where = text or {}, f"{CONFIG} text_config"
    _refuse(text, where)
    kind = text.get("model_type", "opt")
    if kind == "opt":
        return _opt(text, where)
    if kind == "t5":
        return _t5(text, where)
    raise ConfigError(f"{where}: a language model of type {kind!r} is not served. Known: opt, t5")


def _opt(text: HubConfig, where: str) -> DecoderConfig:
    get = {**OPT, **text}.get
    if get("word_embed_proj_dim", get("hidden_size")) != get("hidden_size"):
        raise ConfigError(f"{where}: word_embed_proj_dim differs from hidden_size; only OPT-350m has that")
    return DecoderConfig.parse(
        {
            "vocab_size": get("vocab_size"),
            "dim": get("hidden_size"),
            "num_layers": get("num_hidden_layers"),
            "num_heads": get("num_attention_heads"),
            "num_kv_heads": get("num_attention_heads"),
            "mlp_dim": get("ffn_dim"),
            "norm": "layer",
            "attention_bias": "all",
            "mlp": "relu",
            "head": "tied" if get("tie_word_embeddings") else "own",
            "rope": None,
            "max_positions": get("max_position_embeddings"),
        },
        where=where,
    )


def _t5(text: HubConfig, where: str) -> Seq2SeqConfig:
    get = {**T5, **text}.get
    if get("feed_forward_proj") != "gated-gelu":
        raise ConfigError(
            f"{where}: feed_forward_proj {get('feed_forward_proj')!r} is not served; only 'gated-gelu' is"
        )
    # transformers 5 calls every T5 tied and says by another key whether its logits are scaled as a tied head's are.
    if text.get("scale_decoder_outputs", text.get("tie_word_embeddings", True)) is not False:
        raise ConfigError(f"{where}: tie_word_embeddings must be false: FlanT5 has its own head, and scales no logits")
    activation = text.get("dense_act_fn", "gelu_new")
    if activation not in GELUS:
        raise ConfigError(f"{where}: dense_act_fn {activation!r} is not served. Known: {', '.join(GELUS)}")
    return Seq2SeqConfig.parse(
        {
            "vocab_size": get("vocab_size"),
            "dim": get("d_model"),
            "num_encoder_layers": get("num_layers"),
            "num_layers": get("num_layers") if get("num_decoder_layers") is None else get("num_decoder_layers"),
            "num_heads": get("num_heads"),
            "head_dim": get("d_kv"),
            "mlp_dim": get("d_ff"),
            "activation": GELUS[activation],
            "norm_eps": get("layer_norm_epsilon"),
            "num_buckets": get("relative_attention_num_buckets"),
            "max_distance": get("relative_attention_max_distance"),
            "max_positions": get("n_positions"),
        },
        where=where,
    )


def _resolution(preprocessor: HubConfig | None, vision: VisionConfig) -> Squash:
    """The square of preprocessor_config.json; without the file, the tower's."""
    if preprocessor is None:
        return Squash(tile_size=vision.image_size)
    for key, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if preprocessor.get(key, wanted) not in (wanted, None):
            raise ConfigError(f"{PREPROCESSOR}: {key} {preprocessor[key]!r} is not served; it must be {wanted!r}")
    if preprocessor.get("do_center_crop"):
        raise ConfigError(f"{PREPROCESSOR}: do_center_crop is not served: BLIP-2 stretches pictures to a square")
    if abs(preprocessor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ConfigError(f"{PREPROCESSOR}: rescale_factor {preprocessor['rescale_factor']!r} must be 1/255")
    size = preprocessor.get("size", vision.image_size)
    sides = {size.get("height"), size.get("width")} if isinstance(size, Mapping) else {size}
    if len(sides) != 1 or not all(isinstance(side, int) for side in sides):
        raise ConfigError(f"{PREPROCESSOR}: size {size!r} is not served; it must be a square")
    return Squash.parse({"tile_size": sides.pop()}, where=PREPROCESSOR)


def _refuse(hub: HubConfig, where: str) -> None:
    refuse_unread(hub, neutral=NEUTRAL, read=READ, suspicious=SUSPICIOUS, where=where)
