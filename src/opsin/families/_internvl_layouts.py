"""How InternVL's tensors are named: by its authors with three kinds of language model, by transformers, part by part.

authors                                  transformers, on disk                    here
vision_model.embeddings.                 vision_tower.embeddings.                 vision.
vision_model.encoder.layers.N.           vision_tower.encoder.layer.N.            vision.layers.N.
mlp1.{0,1,3}.                            multi_modal_projector.                   connector.
language_model.model.layers.N.           language_model.model.layers.N.           decoder.layers.N.
language_model.{output,lm_head}.         language_model.lm_head.                  decoder.head.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from opsin.families._layouts import decoder_rules
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.rules import Drop, Layout, Rename, Reshape, Rule, Split
from opsin.spec.vision import VisionConfig

Names = Literal["internlm2", "phi3", "llama"]
"""Whose names a language model's tensors carry; `llama` are those of Qwen2 too."""

ORIGINAL_MLP = {"norm": "mlp1.0", "layers.0": "mlp1.1", "layers.1": "mlp1.3"}
PROJECTOR = {
    "norm": "multi_modal_projector.layer_norm",
    "layers.0": "multi_modal_projector.linear_1",
    "layers.1": "multi_modal_projector.linear_2",
}


def internvl_layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """Layouts of a whole model. The authors' comes with the names of every language model that could be this one."""
    decoder = causal(config)
    names = possible_names(decoder)
    original = tuple(
        Layout(
            name="original" if kind == names[0] else f"original-{kind}",
            rules=(
                *_original_tower(config.vision, "vision_model."),
                *_connector(ORIGINAL_MLP),
                *_decoder(decoder, kind, "language_model."),
            ),
        )
        for kind in names
    )
    return (
        *original,
        # The files that save_pretrained writes, and the modules as transformers 5 has them in memory.
        _hf("hf", config, projector=PROJECTOR, prefix="", decoder="language_model.model.", head="language_model."),
        _hf(
            "hf-modules",
            config,
            projector={ours: f"model.{theirs}" for ours, theirs in PROJECTOR.items()},
            prefix="model.",
            decoder="model.language_model.",
            head="",
        ),
    )


def internvl_part_layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """Layouts of files that hold one part: an InternViT, a language model."""
    decoder = config.decoder
    kinds = possible_names(decoder) if isinstance(decoder, DecoderConfig) else ()  # a mix may have an encoder
    return (
        Layout(name="tower", rules=_original_tower(config.vision, "")),
        Layout(name="tower-hf", rules=_hf_tower(config.vision, "")),
        *(Layout(name=f"language-model-{kind}", rules=_decoder(causal(config), kind, "")) for kind in kinds),
    )


def causal(config: VLMConfig) -> DecoderConfig:
    """The language model, which is causal in this family."""
    assert isinstance(config.decoder, DecoderConfig), "InternVL's language models are causal"
    return config.decoder


def possible_names(decoder: DecoderConfig) -> tuple[Names, ...]:
    """Whose names such a language model can carry, the likeliest first: they differ in biases and in rotation only."""
    if decoder.attention_bias == "qkv":
        return ("llama",)
    if decoder.attention_bias == "all":
        return ("internlm2", "llama")
    is_long = decoder.rope is not None and decoder.rope.scaling is not None and decoder.rope.scaling.kind == "long"
    return ("phi3", "internlm2", "llama") if is_long else ("internlm2", "phi3", "llama")


# ---- the tower -------------------------------------------------------------------------------------------------------


def _original_tower(vision: VisionConfig, prefix: str) -> tuple[Rule, ...]:
    at, dim = f"{prefix}encoder.layers.{{}}.", vision.dim
    kinds = ("weight", "bias") if vision.qkv_bias == "all" else ("weight",)
    return (
        *_embeddings(
            vision,
            class_token=f"{prefix}embeddings.class_embedding",
            positions=f"{prefix}embeddings.position_embedding",
            patch=f"{prefix}embeddings.patch_embedding",
        ),
        *(
            Split(source=f"{at}attn.qkv.{kind}", targets=_layer_names("attn.{}", "qkv", kind), rows=(dim, dim, dim))
            for kind in kinds
        ),
        *_layers(
            vision,
            at,
            {
                "attn.out": "attn.proj",
                "attn.norm_q": "attn.q_norm",
                "attn.norm_k": "attn.k_norm",
                "norm1": "norm1",
                "norm2": "norm2",
                "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
                "scale1": "ls1",
                "scale2": "ls2",
            },
        ),
    )


def _hf_tower(vision: VisionConfig, prefix: str) -> tuple[Rule, ...]:
    at = f"{prefix}encoder.layer.{{}}."
    return (
        *_embeddings(
            vision,
            class_token=f"{prefix}embeddings.cls_token",
            positions=f"{prefix}embeddings.position_embeddings",
            patch=f"{prefix}embeddings.patch_embeddings.projection",
        ),
        *_layers(
            vision,
            at,
            {
                "attn.q": "attention.q_proj",
                "attn.k": "attention.k_proj",
                "attn.v": "attention.v_proj",
                "attn.out": "attention.projection_layer",
                "attn.norm_q": "attention.q_norm",
                "attn.norm_k": "attention.k_norm",
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "mlp.up": "mlp.fc1",
                "mlp.down": "mlp.fc2",
                "scale1": "lambda_1",
                "scale2": "lambda_2",
            },
        ),
    )


def _embeddings(vision: VisionConfig, *, class_token: str, positions: str, patch: str) -> tuple[Rule, ...]:
    p, dim, num_positions = vision.patch_size, vision.dim, 1 + vision.side**2
    return (
        Reshape(source=class_token, target="vision.class_token", source_shape=(1, 1, dim), target_shape=(dim,)),
        Reshape(
            source=positions,
            target="vision.positions",
            source_shape=(1, num_positions, dim),
            target_shape=(num_positions, dim),
        ),
        Reshape(
            source=f"{patch}.weight",
            target="vision.patch.weight",
            source_shape=(dim, 3, p, p),
            target_shape=(dim, 3 * p * p),
        ),
        Rename(source=f"{patch}.bias", target="vision.patch.bias"),
    )


def _layers(vision: VisionConfig, at: str, modules: Mapping[str, str]) -> tuple[Rule, ...]:
    """Tensors of every block. modules: our names and theirs, of which some exist in some towers only."""
    biased = {"attn.out", "mlp.up", "mlp.down"}
    if vision.qkv_bias == "all":
        biased |= {"attn.q", "attn.k", "attn.v"}
    if vision.norm == "layer":
        biased |= {"norm1", "norm2"}
    rules: list[Rule] = []
    for ours, theirs in modules.items():
        target = f"vision.layers.{{}}.{ours}"
        if ours.startswith("scale"):  # there a parameter of the block itself
            rules.append(Rename(source=f"{at}{theirs}", target=f"{target}.weight"))
        elif vision.qk_norm or not ours.startswith("attn.norm"):
            kinds = ("weight", "bias") if ours in biased else ("weight",)
            rules += [Rename(source=f"{at}{theirs}.{kind}", target=f"{target}.{kind}") for kind in kinds]
    return tuple(rules)


# ---- the language model ----------------------------------------------------------------------------------------------


def _decoder(decoder: DecoderConfig, names: Names, prefix: str) -> tuple[Rule, ...]:
    match names:
        case "internlm2":
            return _internlm2(decoder, f"{prefix}model.", f"{prefix}output.")
        case "phi3":
            return _phi3(decoder, f"{prefix}model.", f"{prefix}lm_head.")
        case "llama":
            return decoder_rules(
                f"{prefix}model.",
                f"{prefix}lm_head.",
                biases=decoder.attention_bias,
                tied=decoder.head == "tied",
            )


def _internlm2(decoder: DecoderConfig, prefix: str, head: str) -> tuple[Rule, ...]:
    """`wqkv` is grouped by key head: its query heads, then the key head, then the value head."""
    e, groups = decoder.head_width, decoder.num_kv_heads
    kinds = ("weight", "bias") if decoder.attention_bias == "all" else ("weight",)
    modules = {
        "tok_embeddings": "embed",
        "layers.{}.attention_norm": "layers.{}.norm1",
        "layers.{}.ffn_norm": "layers.{}.norm2",
        "layers.{}.feed_forward.w1": "layers.{}.mlp.gate",
        "layers.{}.feed_forward.w3": "layers.{}.mlp.up",
        "layers.{}.feed_forward.w2": "layers.{}.mlp.down",
        "norm": "norm",
    }
    return (
        *_renamed(prefix, modules),
        *(
            Split(
                source=f"{prefix}layers.{{}}.attention.wqkv.{kind}",
                targets=_layer_names("attn.{}", "qkv", kind, part="decoder"),
                rows=(decoder.num_heads // groups * e, e, e),
                groups=groups,
            )
            for kind in kinds
        ),
        *(
            Rename(source=f"{prefix}layers.{{}}.attention.wo.{kind}", target=f"decoder.layers.{{}}.attn.out.{kind}")
            for kind in kinds
        ),
        _head(decoder, head),
    )


def _phi3(decoder: DecoderConfig, prefix: str, head: str) -> tuple[Rule, ...]:
    """`qkv_proj` holds all queries, all keys, all values; `gate_up_proj` the gate, then what it gates."""
    e = decoder.head_width
    modules = {
        "embed_tokens": "embed",
        "layers.{}.input_layernorm": "layers.{}.norm1",
        "layers.{}.self_attn.o_proj": "layers.{}.attn.out",
        "layers.{}.post_attention_layernorm": "layers.{}.norm2",
        "layers.{}.mlp.down_proj": "layers.{}.mlp.down",
        "norm": "norm",
    }
    return (
        *_renamed(prefix, modules),
        Split(
            source=f"{prefix}layers.{{}}.self_attn.qkv_proj.weight",
            targets=_layer_names("attn.{}", "qkv", "weight", part="decoder"),
            rows=(decoder.num_heads * e, decoder.num_kv_heads * e, decoder.num_kv_heads * e),
        ),
        Split(
            source=f"{prefix}layers.{{}}.mlp.gate_up_proj.weight",
            targets=_layer_names("mlp.{}", ("gate", "up"), "weight", part="decoder"),
            rows=(decoder.mlp_dim, decoder.mlp_dim),
        ),
        _head(decoder, head),
    )


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _hf(name: str, config: VLMConfig, *, projector: Mapping[str, str], prefix: str, decoder: str, head: str) -> Layout:
    described = causal(config)
    return Layout(
        name=name,
        rules=(
            *_hf_tower(config.vision, f"{prefix}vision_tower."),
            *_connector(projector),
            *decoder_rules(decoder, f"{head}lm_head.", biases=described.attention_bias, tied=described.head == "tied"),
        ),
    )


def _connector(modules: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(
        Rename(source=f"{theirs}.{kind}", target=f"connector.{ours}.{kind}")
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    )


def _renamed(prefix: str, modules: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(
        Rename(source=f"{prefix}{theirs}.weight", target=f"decoder.{ours}.weight") for theirs, ours in modules.items()
    )


def _layer_names(pattern: str, names: Sequence[str], kind: str, *, part: str = "vision") -> tuple[str, ...]:
    return tuple(f"{part}.layers.{{}}.{pattern.format(name)}.{kind}" for name in names)


def _head(decoder: DecoderConfig, head: str) -> Rule:
    if decoder.head == "tied":
        return Drop(source=f"{head}weight", reason="equal to the embedding")
    return Rename(source=f"{head}weight", target="decoder.head.weight")
