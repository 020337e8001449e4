"""How the LLaVA line's tensors are named: by its authors, by transformers through its versions, and part by part.

The published trees, with what the parts are called here:

    original                                 hf, on disk                          here
    model.vision_tower.vision_tower.         vision_tower.vision_model.           vision.
      vision_model.
    model.mm_projector.{0,2}.                multi_modal_projector.linear_{1,2}.  connector.layers.{0,1}.
    model.mm_projector. (one layer)          linear_1; linear_2 is the identity   connector.layers.0.
    model.image_newline                      image_newline                        newline
    model.layers.N.                          language_model.model.layers.N.       decoder.layers.N.
    lm_head.                                 language_model.lm_head.              decoder.head.
"""

from collections.abc import Sequence
from typing import Literal

from opsin.spec.connector import LinearConnector, MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.rules import Constant, Drop, Layout, Rename, Reshape, Rule
from opsin.spec.vision import VisionConfig

CLIP_PREFIX = "vision_model."
ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."


def llava_layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """Layouts of a whole model. transformers' class has two layers: one is written as two, of which the second does
    nothing, where an id marks pictures (the published models of one layer have none); more than two it cannot hold."""
    original = Layout(
        name="original",
        rules=_model_rules(
            config,
            tower=ORIGINAL_TOWER,
            projector=_original_projector(config, "model.mm_projector"),
            decoder="model.",
            head="lm_head.",
            newline="model.image_newline",
        ),
        optional=("vision.",),
    )
    num_layers = num_connector_layers(config)
    if num_layers > 2 or (num_layers == 1 and config.image_token_id is None):
        return (original,)
    return (
        original,
        # The published llava-hf repositories: transformers 4 until 4.52 named its modules so.
        _hf_layout("hf", config, tower="vision_tower.vision_model.", on_disk=True),
        # What save_pretrained of transformers 5 writes: the old prefixes, a tower without `vision_model`.
        _hf_layout("hf-v5", config, tower="vision_tower.", on_disk=True),
        # Module names of transformers 5 and of 4.52 to 4.57, which other programs write unchanged.
        _hf_layout("hf-v5-modules", config, tower="model.vision_tower.", on_disk=False),
        _hf_layout("hf-v4-modules", config, tower="model.vision_tower.vision_model.", on_disk=False),
    )


def llava_part_layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """Layouts of files that hold one part: a CLIP model, a language model, a projector from stage 1."""
    parts = (
        Layout(name="clip", rules=vision_rules(config.vision, CLIP_PREFIX)),
        Layout(name="clip-v5", rules=vision_rules(config.vision, "")),
        Layout(name="language-model", rules=decoder_rules("model.", "lm_head.")),
    )
    if not isinstance(config.connector, LinearConnector | MLPConnector):
        return parts  # a mix
    return (
        *parts,
        # Stage 1 of the authors' code writes `model.mm_projector.*`, its early versions the module's own names.
        Layout(name="projector", rules=_original_projector(config, "model.mm_projector")),
        Layout(name="projector-bare", rules=_original_projector(config, "mm_projector")),
        Layout(name="projector-module", rules=_original_projector(config, "")),
    )


def is_llava(config: VLMConfig) -> bool:
    """Whether the parts around the connector are LLaVA's: one tile, and a causal language model."""
    return config.resolution.kind in ("center_crop", "pad") and isinstance(config.decoder, DecoderConfig)


def num_connector_layers(config: VLMConfig) -> int:
    """Linear layers of the connector."""
    assert isinstance(config.connector, LinearConnector | MLPConnector), "LLaVA's connectors are linear layers"
    return 1 if config.connector.kind == "linear" else config.connector.num_layers


def vision_rules(vision: VisionConfig, prefix: str) -> tuple[Rule, ...]:
    """CLIP's vision transformer as transformers names it; `pre_layrnorm` is spelt so."""
    p, dim = vision.patch_size, vision.dim
    rules: list[Rule] = [
        Rename(source=f"{prefix}embeddings.class_embedding", target="vision.class_token"),
        Reshape(
            source=f"{prefix}embeddings.patch_embedding.weight",
            target="vision.patch.weight",
            source_shape=(dim, 3, p, p),
            target_shape=(dim, 3 * p * p),
        ),
        Rename(source=f"{prefix}embeddings.position_embedding.weight", target="vision.positions"),
        Drop(source=f"{prefix}embeddings.position_ids", reason="a buffer of old CLIP files: 0, 1, 2, ..."),
    ]
    modules = {
        "pre_layrnorm": "norm_pre",
        "encoder.layers.{}.layer_norm1": "layers.{}.norm1",
        "encoder.layers.{}.self_attn.q_proj": "layers.{}.attn.q",
        "encoder.layers.{}.self_attn.k_proj": "layers.{}.attn.k",
        "encoder.layers.{}.self_attn.v_proj": "layers.{}.attn.v",
        "encoder.layers.{}.self_attn.out_proj": "layers.{}.attn.out",
        "encoder.layers.{}.layer_norm2": "layers.{}.norm2",
        "encoder.layers.{}.mlp.fc1": "layers.{}.mlp.up",
        "encoder.layers.{}.mlp.fc2": "layers.{}.mlp.down",
        "post_layernorm": "norm_post",
    }
    return (*rules, *_modules(modules, prefix, "vision.", ("weight", "bias")))


def decoder_rules(
    prefix: str, head: str, *, biases: Literal["none", "qkv", "all"] = "none", tied: bool = False
) -> tuple[Rule, ...]:
    """Llama, and with it Vicuna, Mistral, Yi and Qwen2, as transformers names it.

    tied: whether logits reuse the embedding; a head that was saved all the same is then a copy of it.
    """
    modules = {
        "embed_tokens": "embed",
        "layers.{}.input_layernorm": "layers.{}.norm1",
        "layers.{}.self_attn.q_proj": "layers.{}.attn.q",
        "layers.{}.self_attn.k_proj": "layers.{}.attn.k",
        "layers.{}.self_attn.v_proj": "layers.{}.attn.v",
        "layers.{}.self_attn.o_proj": "layers.{}.attn.out",
        "layers.{}.post_attention_layernorm": "layers.{}.norm2",
        "layers.{}.mlp.gate_proj": "layers.{}.mlp.gate",
        "layers.{}.mlp.up_proj": "layers.{}.mlp.up",
        "layers.{}.mlp.down_proj": "layers.{}.mlp.down",
        "norm": "norm",
    }
    biased = {"none": (), "qkv": ("q_proj", "k_proj", "v_proj"), "all": ("q_proj", "k_proj", "v_proj", "o_proj")}
    with_bias = {theirs: ours for theirs, ours in modules.items() if theirs.endswith(biased[biases])}
    return (
        *_modules(modules, prefix, "decoder.", ("weight",)),
        *_modules(with_bias, prefix, "decoder.", ("bias",)),
        Drop(source=f"{head}weight", reason="equal to the embedding")
        if tied
        else Rename(source=f"{head}weight", target="decoder.head.weight"),
        Drop(source=f"{prefix}layers.{{}}.self_attn.rotary_emb.inv_freq", reason="follows from rope_theta"),
    )


def _modules(names: dict[str, str], prefix: str, target: str, tensors: Sequence[str]) -> tuple[Rule, ...]:
    return tuple(
        Rename(source=f"{prefix}{theirs}.{tensor}", target=f"{target}{ours}.{tensor}")
        for theirs, ours in names.items()
        for tensor in tensors
    )


def _model_rules(
    config: VLMConfig, *, tower: str, projector: tuple[Rule, ...], decoder: str, head: str, newline: str
) -> tuple[Rule, ...]:
    newline_rules = (Rename(source=newline, target="newline"),) if config.uses_newline else ()
    return (*vision_rules(config.vision, tower), *projector, *newline_rules, *decoder_rules(decoder, head))


def _original_projector(config: VLMConfig, prefix: str) -> tuple[Rule, ...]:
    """One nn.Linear, or an nn.Sequential whose odd places are GELUs."""
    dotted = f"{prefix}." if prefix else ""
    if config.connector.kind == "linear":
        return _modules_at({dotted: "connector.layers.0."})
    return _modules_at(
        {f"{dotted}{2 * index}.": f"connector.layers.{index}." for index in range(num_connector_layers(config))}
    )


def _modules_at(places: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(
        Rename(source=theirs + tensor, target=ours + tensor)
        for theirs, ours in places.items()
        for tensor in ("weight", "bias")
    )


def _hf_projector(config: VLMConfig, prefix: str) -> tuple[Rule, ...]:
    num_layers, dim = num_connector_layers(config), config.decoder.dim
    own = _modules_at({f"{prefix}linear_{index + 1}.": f"connector.layers.{index}." for index in range(num_layers)})
    if num_layers > 1:
        return own
    idle = Constant(
        source=f"{prefix}linear_2.weight",
        shape=(dim, dim),
        value="identity",
        beside="connector.layers.0.weight",
        reason="its connector has one layer, and transformers' class has two",
    )
    return (*own, idle, idle.replace(source=f"{prefix}linear_2.bias", shape=(dim,), value="zeros"))


def _hf_layout(name: str, config: VLMConfig, *, tower: str, on_disk: bool) -> Layout:
    prefix = "" if on_disk else "model."
    return Layout(
        name=name,
        rules=_model_rules(
            config,
            tower=tower,
            projector=_hf_projector(config, f"{prefix}multi_modal_projector."),
            decoder="language_model.model." if on_disk else "model.language_model.",
            head="language_model.lm_head." if on_disk else "lm_head.",
            newline=f"{prefix}image_newline",
        ),
    )
