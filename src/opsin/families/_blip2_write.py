"""The JSON files that stand beside exported BLIP-2 weights, in LAVIS' layout and in transformers'."""

from typing import Any

from opsin.errors import ConfigError
from opsin.families._blip2_hub import GELUS
from opsin.families._blip2_layouts import is_clip
from opsin.families._blip2_parts import EVA_VIT_G, LANGUAGE_MODELS, TOWERS
from opsin.families._family import HubFiles
from opsin.families._hub import CHAT_KEY, CONFIG, PREPROCESSOR, PROCESSOR
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import QFormerConfig, RetrieverConfig
from opsin.spec.resolution import Squash
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.spec.vision import VisionConfig

NEWLINE_ID = 50_118
"""OPT's id of the newline that ends an answer."""
SIZES = ("image_size", "patch_size", "dim", "num_layers", "num_heads", "mlp_dim")


def write_config(config: VLMConfig, layout: str) -> HubFiles:
    """Files of a generative model in `layout`. Raises ConfigError where that layout cannot describe it."""
    qformer = config.connector
    if not isinstance(qformer, QFormerConfig) or not isinstance(config.resolution, Squash):
        raise ConfigError("BLIP-2 has a Q-Former and stretches pictures to a square; this model differs")
    text = _language(config.decoder)
    if layout == "original":
        hub = _lavis(config.vision, qformer)
        known = next((name for name, model in LANGUAGE_MODELS.items() if model == config.decoder), None)
        kind = "t5" if isinstance(config.decoder, Seq2SeqConfig) else "opt"
        hub |= {"arch": f"blip2_{kind}", f"{kind}_model": known, "image_token_index": config.image_token_id}
    else:
        if config.image_token_id is None:
            raise ConfigError(
                "transformers marks picture slots by a token id, and this model has none (config.image_token_id). "
                "Export with layout 'original', or load it with one"
            )
        hub = {
            "architectures": ["Blip2ForConditionalGeneration"],
            "image_token_index": config.image_token_id,
            "use_decoder_only_language_model": not isinstance(config.decoder, Seq2SeqConfig),
            **_transformers(config.vision, qformer, vocab_size=30_522, max_positions=512, with_text=False),
        }
    hub |= {"text_config": text, CHAT_KEY: config.chat.model_dump(mode="json")}
    files = {CONFIG: hub, PREPROCESSOR: _preprocessor(config.vision, config.resolution)}
    if layout != "original":
        files[PROCESSOR] = {"num_query_tokens": qformer.num_queries, "processor_class": "Blip2Processor"}
    return files


def write_retriever(config: RetrieverConfig, layout: str) -> HubFiles:
    """Files of a model of stage 1 or of retrieval."""
    if layout == "original":
        hub = _lavis(config.vision, config.qformer)
        hub["bert"] |= {"vocab_size": config.vocab_size - 1, "max_position_embeddings": config.max_positions}
        hub |= {"arch": "blip2", "embed_dim": config.embed_dim, "max_txt_len": config.max_tokens}
        hub |= {"heads": config.heads}
    else:
        if config.heads == "all":
            raise ConfigError(
                "transformers keeps neither the head that writes captions nor the temperature. Export with layout "
                "'original', or drop them first (RetrieverConfig.heads 'matching')"
            )
        hub = {
            "architectures": ["Blip2ForImageTextRetrieval"],
            "image_text_hidden_size": config.embed_dim,
            "max_txt_len": config.max_tokens,
            **_transformers(
                config.vision,
                config.qformer,
                vocab_size=config.vocab_size,
                max_positions=config.max_positions,
                with_text=True,
            ),
        }
    if config.image_token_id is not None:
        hub["image_token_index"] = config.image_token_id
    return {CONFIG: hub, PREPROCESSOR: _preprocessor(config.vision, config.resolution)}


def _lavis(vision: VisionConfig, qformer: QFormerConfig) -> dict[str, Any]:
    name = "clip_L" if is_clip(vision) else "eva_clip_g"
    _check_tower(vision, TOWERS[name])
    return {
        "image_size": vision.image_size,
        "vit_model": name,
        "num_query_token": qformer.num_queries,
        "cross_attention_freq": qformer.cross_every,
        "drop_path_rate": 0,
        "vit": {
            "patch_size": vision.patch_size,
            "embed_dim": vision.dim,
            "depth": vision.num_layers,
            "num_heads": vision.num_heads,
            "mlp_dim": vision.mlp_dim,
            "ln_vision_eps": qformer.feature_norm_eps,
        },
        "bert": _bert(qformer),
    }


def _transformers(
    vision: VisionConfig, qformer: QFormerConfig, *, vocab_size: int, max_positions: int, with_text: bool
) -> dict[str, Any]:
    if is_clip(vision):
        raise ConfigError(
            "transformers' BLIP-2 has the EVA tower only; this one is CLIP's. Export with layout 'original'"
        )
    _check_tower(vision, EVA_VIT_G)
    return {
        "model_type": "blip-2",
        "num_query_tokens": qformer.num_queries,
        "qformer_config": {
            "model_type": "blip_2_qformer",
            **_bert(qformer),
            "cross_attention_frequency": qformer.cross_every,
            "encoder_hidden_size": vision.dim,
            "max_position_embeddings": max_positions,
            "use_qformer_text_input": with_text,
            "vocab_size": vocab_size,
        },
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_act": vision.activation,
            "hidden_size": vision.dim,
            "image_size": vision.image_size,
            "intermediate_size": vision.mlp_dim,
            "layer_norm_eps": vision.norm_eps,
            "num_attention_heads": vision.num_heads,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "qkv_bias": True,
        },
    }


def _bert(qformer: QFormerConfig) -> dict[str, Any]:
    return {
        "attention_probs_dropout_prob": qformer.dropout,
        "hidden_act": "gelu",
        "hidden_dropout_prob": qformer.dropout,
        "hidden_size": qformer.dim,
        "intermediate_size": qformer.mlp_dim,
        "layer_norm_eps": qformer.norm_eps,
        "num_attention_heads": qformer.num_heads,
        "num_hidden_layers": qformer.num_layers,
    }


def _check_tower(vision: VisionConfig, published: VisionConfig) -> None:
    own = {name: getattr(vision, name) for name in (*SIZES, "mean", "std")}
    if vision != published.replace(**own):
        raise ConfigError("this vision tower differs from BLIP-2's in more than its sizes")


def _language(decoder: DecoderConfig | Seq2SeqConfig) -> dict[str, Any]:
    if isinstance(decoder, Seq2SeqConfig):
        theirs = {ours: name for name, ours in GELUS.items()}
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "bos_token_id": 1,
            "d_ff": decoder.mlp_dim,
            "d_kv": decoder.head_dim,
            "d_model": decoder.dim,
            "decoder_start_token_id": 0,
            "dense_act_fn": theirs[decoder.activation],
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "is_gated_act": True,
            "layer_norm_epsilon": decoder.norm_eps,
            "n_positions": decoder.max_positions,
            "num_decoder_layers": decoder.num_layers,
            "num_heads": decoder.num_heads,
            "num_layers": decoder.num_encoder_layers,
            "pad_token_id": 0,
            "relative_attention_max_distance": decoder.max_distance,
            "relative_attention_num_buckets": decoder.num_buckets,
            "tie_word_embeddings": False,
            "vocab_size": decoder.vocab_size,
        }
    shape = (decoder.norm, decoder.mlp, decoder.attention_bias, decoder.rope)
    if shape != ("layer", "relu", "all", None) or decoder.num_kv_heads != decoder.num_heads or decoder.norm_eps != 1e-5:
        raise ConfigError("BLIP-2's files describe OPT and T5 as language models; this one is neither")
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        **({"eos_token_id": NEWLINE_ID} if decoder.vocab_size > NEWLINE_ID else {}),
        "ffn_dim": decoder.mlp_dim,
        "hidden_size": decoder.dim,
        "max_position_embeddings": decoder.max_positions,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "tie_word_embeddings": decoder.head == "tied",
        "vocab_size": decoder.vocab_size,
        "word_embed_proj_dim": decoder.dim,
    }


def _preprocessor(vision: VisionConfig, resolution: Squash) -> dict[str, Any]:
    side = resolution.tile_size
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.mean),
        "image_processor_type": "BlipImageProcessor",
        "image_std": list(vision.std),
        "processor_class": "Blip2Processor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
