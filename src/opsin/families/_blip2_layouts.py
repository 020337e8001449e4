"""How BLIP-2's tensors are named: by its authors (LAVIS), by transformers, and part by part.

    LAVIS                                    transformers                             here
    visual_encoder.blocks.N.                 vision_model.encoder.layers.N.           vision.layers.N.
    ln_vision                                vision_model.post_layernorm              connector.norm_features
    query_tokens                             query_tokens                             connector.queries
    Qformer.bert.encoder.layer.N.            qformer.encoder.layer.N.                 connector.qformer.layers.N.
    opt_proj, t5_proj                        language_projection                      connector.proj
    opt_model., t5_model.                    language_model.                          decoder.

Models of stage 1 and of retrieval have the same tensors without `connector.`, and heads. LAVIS writes only what was
trained, so that its files may lack the tower and the language model.
"""

from collections.abc import Iterable, Mapping

from opsin.families._layouts import vision_rules
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import QFormerConfig, RetrieverConfig
from opsin.spec.rules import Drop, Fill, Layout, Rename, Reshape, Rule, Split
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.spec.vision import VisionConfig

K_BIAS = "EVA's keys have no bias, and none could change what attention gives"
BUFFER = "a buffer: 0, 1, 2, ..."
COPY = "equal to the embedding"


def is_clip(vision: VisionConfig) -> bool:
    """Whether a tower is the CLIP one: it alone has a norm before its blocks."""
    return vision.first_norm


def layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """Layouts of a generative model. transformers has a class for the EVA tower only."""
    assert isinstance(config.connector, QFormerConfig)
    language = "t5" if isinstance(config.decoder, Seq2SeqConfig) else "opt"
    original = Layout(
        name="original",
        rules=(
            *lavis_tower_rules(config.vision, "visual_encoder."),
            *lavis_qformer_rules(config.connector, "connector.", with_text=False),
            *_modules({f"{language}_proj": "connector.proj"}),
            *language_rules(config, f"{language}_model."),
        ),
        optional=("vision.", "decoder."),
    )
    if is_clip(config.vision):
        return (original,)
    hf = Layout(
        name="hf",
        rules=(
            *hf_tower_rules(config.vision, "vision_model.", "connector."),
            *hf_qformer_rules(config.connector, "connector.", with_text=False),
            *_modules({"language_projection": "connector.proj"}),
            *language_rules(config, "language_model."),
        ),
    )
    return (original, hf)


def retriever_layouts(config: RetrieverConfig) -> tuple[Layout, ...]:
    """Layouts of a model of stage 1 or of retrieval. transformers keeps neither captions' head nor temperature."""
    original = Layout(
        name="original",
        rules=(
            *lavis_tower_rules(config.vision, "visual_encoder."),
            *lavis_qformer_rules(config.qformer, "", with_text=True),
            *_embeddings("Qformer.bert.embeddings."),
            *_modules({"vision_proj": "vision_proj", "text_proj": "text_proj", "itm_head": "itm_head"}),
            *_lavis_caption_rules(config),
        ),
        optional=("vision.",),
    )
    if is_clip(config.vision) or config.heads == "all":
        return (original,)
    hf = Layout(
        name="hf",
        rules=(
            *hf_tower_rules(config.vision, "vision_model.", ""),
            *hf_qformer_rules(config.qformer, "", with_text=True),
            *_embeddings("embeddings."),
            *_modules({"vision_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}),
        ),
    )
    return (original, hf)


def tower_layouts(vision: VisionConfig) -> tuple[Layout, ...]:
    """Layouts of a file with a tower alone, which has one block more than BLIP-2 runs."""
    lavis = lavis_tower_rules(vision, "")
    if is_clip(vision):
        unread = [f"transformer.resblocks.{vision.num_layers}.{name}" for name in _CLIP_TENSORS]
        clip = vision_rules(vision, "vision_model.")
        kept = [rule for rule in clip if isinstance(rule, Reshape | Drop) or _is_run(rule)]
        last = [
            Drop(source=rule.source.replace("{}", str(vision.num_layers)), reason="not run by BLIP-2")
            for rule in kept
            if isinstance(rule, Rename) and "{}" in rule.source
        ]
        norm = [Drop(source=f"vision_model.post_layernorm.{t}", reason="BLIP-2 has its own norm") for t in _WEIGHT_BIAS]
        return (
            Layout(name="clip-lavis", rules=(*lavis, *_drops([*unread, "ln_post.weight", "ln_post.bias", "proj"]))),
            Layout(name="clip", rules=(*kept, *last, *norm)),
        )
    unread = [f"blocks.{vision.num_layers}.{name}" for name in _EVA_TENSORS]
    unread += [f"{module}.{tensor}" for module in ("norm", "fc_norm", "head") for tensor in _WEIGHT_BIAS]
    # Any BLIP-2 of the same resolution will do: while the tower is frozen, all of them have the same.
    return (
        Layout(name="eva", rules=(*lavis, *_drops(unread))),
        Layout(name="lavis-tower", rules=lavis_tower_rules(vision, "visual_encoder.")),
        Layout(name="hf-tower", rules=hf_tower_rules(vision, "vision_model.", "")[:-2]),
    )


def bert_layouts() -> tuple[Layout, ...]:
    """Layouts of the BERT that stage 1 starts from: the text side, words and the captions' head. Its files call the
    tensors of norms gamma and beta, or weight and bias."""
    stack = _stack("bert.encoder.layer.{}", "qformer.layers.{}", inner="self", with_text=True)
    of_text = [rule for rule in stack if any(part in _to(rule) for part in (".text.", ".attn."))]
    head = "cls.predictions"
    rules = (
        *_embeddings("bert.embeddings."),
        *_modules({"bert.embeddings.LayerNorm": "qformer.norm"}),
        *of_text,
        *_modules({f"{head}.transform.dense": "captions.dense", f"{head}.transform.LayerNorm": "captions.norm"}),
        Rename(source=f"{head}.bias", target="captions.bias"),
    )
    unused = ["bert.embeddings.position_ids", "bert.embeddings.token_type_embeddings.weight"]
    unused += [f"{head}.decoder.weight", f"{head}.decoder.bias"]
    unused += [f"{module}.{t}" for module in ("bert.pooler.dense", "cls.seq_relationship") for t in _WEIGHT_BIAS]
    drops = _drops(unused, "stage 1 does not start from it")
    old = tuple(_old_norm(rule) for rule in rules)
    return Layout(name="bert", rules=(*rules, *drops)), Layout(name="bert-old", rules=(*old, *drops))


def part_layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """Layouts of files with one part: a tower, or a language model."""
    prefixes = ("",) if isinstance(config.decoder, Seq2SeqConfig) else ("", "model.")
    names = {"": "language-model", "model.": "language-model-bare"}
    language = tuple(
        # Old OPT files leave `model.` out.
        Layout(name=names[prefix], rules=language_rules(config, "", cut=prefix))
        for prefix in prefixes
    )
    return (*tower_layouts(config.vision), *language)


def _to(rule: Rule) -> str:
    return rule.target if isinstance(rule, Rename) else ""


def _old_norm(rule: Rule) -> Rule:
    if not isinstance(rule, Rename) or "LayerNorm." not in rule.source:
        return rule
    return rule.replace(source=rule.source.replace(".weight", ".gamma").replace(".bias", ".beta"))


def _is_run(rule: Rule) -> bool:
    return isinstance(rule, Rename) and not rule.target.startswith("vision.norm_post")


# ---- towers ----------------------------------------------------------------------------------------------------------

_WEIGHT_BIAS = ("weight", "bias")
_EVA_TENSORS = (
    *("attn.qkv.weight", "attn.q_bias", "attn.v_bias"),
    *(f"{name}.{tensor}" for name in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for tensor in _WEIGHT_BIAS),
)
_CLIP_TENSORS = (
    *("attn.in_proj_weight", "attn.in_proj_bias"),
    *(f"{n}.{t}" for n in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj") for t in _WEIGHT_BIAS),
)


def lavis_tower_rules(vision: VisionConfig, prefix: str) -> tuple[Rule, ...]:
    """EVA ViT-g or CLIP ViT-L as LAVIS builds them."""
    dim = vision.dim
    targets = tuple(f"vision.layers.{{}}.attn.{name}" for name in "qkv")
    if is_clip(vision):
        at = f"{prefix}transformer.resblocks.{{}}"
        names = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.out"}
        names |= {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
        return (
            Rename(source=f"{prefix}class_embedding", target="vision.class_token"),
            Rename(source=f"{prefix}positional_embedding", target="vision.positions"),
            _kernel(vision, f"{prefix}conv1.weight"),
            *_modules({f"{prefix}ln_pre": "vision.norm_pre"}),
            *_modules({f"{at}.{theirs}": f"vision.layers.{{}}.{ours}" for theirs, ours in names.items()}),
            _split(f"{at}.attn.in_proj_weight", [f"{name}.weight" for name in targets], dim),
            _split(f"{at}.attn.in_proj_bias", [f"{name}.bias" for name in targets], dim),
        )
    at = f"{prefix}blocks.{{}}"
    names = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attn.out", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    return (
        *_tables(vision, f"{prefix}cls_token", f"{prefix}pos_embed"),
        _kernel(vision, f"{prefix}patch_embed.proj.weight"),
        Rename(source=f"{prefix}patch_embed.proj.bias", target="vision.patch.bias"),
        *_modules({f"{at}.{theirs}": f"vision.layers.{{}}.{ours}" for theirs, ours in names.items()}),
        _split(f"{at}.attn.qkv.weight", [f"{name}.weight" for name in targets], dim),
        Rename(source=f"{at}.attn.q_bias", target=f"{targets[0]}.bias"),
        Fill(target=f"{targets[1]}.bias", reason=K_BIAS),
        Rename(source=f"{at}.attn.v_bias", target=f"{targets[2]}.bias"),
    )


def hf_tower_rules(vision: VisionConfig, prefix: str, owner: str) -> tuple[Rule, ...]:
    """EVA ViT-g as transformers names it. owner: of the norm that it counts to the tower."""
    at = f"{prefix}encoder.layers.{{}}"
    targets = [f"vision.layers.{{}}.attn.{name}" for name in "qkv"]
    names = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.projection": "attn.out"}
    names |= {"mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
    return (
        *_tables(vision, f"{prefix}embeddings.class_embedding", f"{prefix}embeddings.position_embedding"),
        _kernel(vision, f"{prefix}embeddings.patch_embedding.weight"),
        Rename(source=f"{prefix}embeddings.patch_embedding.bias", target="vision.patch.bias"),
        *_modules({f"{at}.{theirs}": f"vision.layers.{{}}.{ours}" for theirs, ours in names.items()}),
        *(_split(f"{at}.self_attn.qkv.{t}", [f"{name}.{t}" for name in targets], vision.dim) for t in _WEIGHT_BIAS),
        *_modules({f"{prefix}post_layernorm": f"{owner}norm_features"}),
    )


def _tables(vision: VisionConfig, token: str, positions: str) -> tuple[Rule, ...]:
    count = 1 + vision.side**2
    return (
        Reshape(source=token, target="vision.class_token", source_shape=(1, 1, vision.dim), target_shape=(vision.dim,)),
        Reshape(
            source=positions,
            target="vision.positions",
            source_shape=(1, count, vision.dim),
            target_shape=(count, vision.dim),
        ),
    )


def _kernel(vision: VisionConfig, source: str) -> Rule:
    p, dim = vision.patch_size, vision.dim
    return Reshape(
        source=source, target="vision.patch.weight", source_shape=(dim, 3, p, p), target_shape=(dim, 3 * p * p)
    )


def _split(source: str, targets: list[str], dim: int) -> Rule:
    return Split(source=source, targets=tuple(targets), rows=(dim,) * len(targets))


# ---- Q-Former --------------------------------------------------------------------------------------------------------


def lavis_qformer_rules(qformer: QFormerConfig, owner: str, *, with_text: bool) -> tuple[Rule, ...]:
    """Queries, stack and the norm of the features. owner: what holds them here."""
    return (
        _queries(qformer, owner),
        *_modules({"ln_vision": f"{owner}norm_features", "Qformer.bert.embeddings.LayerNorm": f"{owner}qformer.norm"}),
        *_stack("Qformer.bert.encoder.layer.{}", f"{owner}qformer.layers.{{}}", inner="self", with_text=with_text),
        Drop(source="Qformer.bert.embeddings.position_ids", reason=BUFFER),
    )


def hf_qformer_rules(qformer: QFormerConfig, owner: str, *, with_text: bool) -> tuple[Rule, ...]:
    """The same without the norm of the features, which stands with the tower."""
    return (
        _queries(qformer, owner),
        *_modules({"qformer.layernorm": f"{owner}qformer.norm"}),
        *_stack("qformer.encoder.layer.{}", f"{owner}qformer.layers.{{}}", inner="attention", with_text=with_text),
        Drop(source="embeddings.position_ids", reason=BUFFER),
    )


def _queries(qformer: QFormerConfig, owner: str) -> Rule:
    shape = (qformer.num_queries, qformer.dim)
    return Reshape(source="query_tokens", target=f"{owner}queries", source_shape=(1, *shape), target_shape=shape)


def _stack(theirs: str, ours: str, *, inner: str, with_text: bool) -> tuple[Rule, ...]:
    """inner: what the module of queries, keys and values is called."""
    names: dict[str, str] = {}
    for attention, own in (("attention", "attn"), ("crossattention", "cross")):
        names |= {f"{attention}.{inner}.{name}": f"{own}.{name[0]}" for name in ("query", "key", "value")}
        names |= {f"{attention}.output.dense": f"{own}.out", f"{attention}.output.LayerNorm": f"{own}.norm"}
    for suffix, own in (("_query", "query"), ("", "text")) if with_text else (("_query", "query"),):
        names[f"intermediate{suffix}.dense"] = f"{own}.mlp.up"
        names |= {f"output{suffix}.dense": f"{own}.mlp.down", f"output{suffix}.LayerNorm": f"{own}.norm"}
    return _modules({f"{theirs}.{name}": f"{ours}.{own}" for name, own in names.items()})


def _embeddings(prefix: str) -> tuple[Rule, ...]:
    return (
        Rename(source=f"{prefix}word_embeddings.weight", target="words.weight"),
        Rename(source=f"{prefix}position_embeddings.weight", target="positions.weight"),
    )


def _lavis_caption_rules(config: RetrieverConfig) -> tuple[Rule, ...]:
    at = "Qformer.cls.predictions"
    if config.heads == "matching":
        dropped = [f"{at}.{name}" for name in ("bias", "decoder.weight", "decoder.bias")]
        dropped += [f"{at}.transform.{module}.{t}" for module in ("dense", "LayerNorm") for t in _WEIGHT_BIAS]
        return _drops([*dropped, "temp"], "this model only compares")
    return (
        *_modules({f"{at}.transform.dense": "captions.dense", f"{at}.transform.LayerNorm": "captions.norm"}),
        Rename(source=f"{at}.bias", target="captions.bias"),
        Rename(source="temp", target="temperature"),
        Drop(source=f"{at}.decoder.weight", reason=COPY),
        Drop(source=f"{at}.decoder.bias", reason=f"equal to {at}.bias"),
    )


# ---- language models -------------------------------------------------------------------------------------------------


def language_rules(config: VLMConfig, prefix: str, *, cut: str = "") -> tuple[Rule, ...]:
    """OPT or T5 as transformers names them. cut: what the names of an old file lack in front."""
    if isinstance(config.decoder, Seq2SeqConfig):
        return _t5_rules(config.decoder, prefix)
    return _opt_rules(config.decoder, prefix, f"{prefix}{'model.'.removeprefix(cut)}decoder.")


def _opt_rules(decoder: DecoderConfig, prefix: str, at: str) -> tuple[Rule, ...]:
    layer = f"{at}layers.{{}}"
    names = {
        "self_attn_layer_norm": "norm1",
        "self_attn.q_proj": "attn.q",
        "self_attn.k_proj": "attn.k",
        "self_attn.v_proj": "attn.v",
        "self_attn.out_proj": "attn.out",
        "final_layer_norm": "norm2",
        "fc1": "mlp.up",
        "fc2": "mlp.down",
    }
    return (
        Rename(source=f"{at}embed_tokens.weight", target="decoder.embed.weight"),
        Rename(source=f"{at}embed_positions.weight", target="decoder.positions.weight"),
        *_modules({f"{layer}.{theirs}": f"decoder.layers.{{}}.{ours}" for theirs, ours in names.items()}),
        *_modules({f"{at}final_layer_norm": "decoder.norm"}),
        Drop(source=f"{prefix}lm_head.weight", reason=COPY)
        if decoder.head == "tied"
        else Rename(source=f"{prefix}lm_head.weight", target="decoder.head.weight"),
    )


def _t5_rules(decoder: Seq2SeqConfig, prefix: str) -> tuple[Rule, ...]:
    """Every block by its number: the names of its steps have numbers as well, which a template could not keep apart."""
    attention = {name: name for name in "qkv"} | {"o": "out"}
    rules: list[Rule] = [
        Rename(source=f"{prefix}shared.weight", target="decoder.embed.weight"),
        Rename(source=f"{prefix}lm_head.weight", target="decoder.head.weight"),
        *_drops([f"{prefix}{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")], COPY),
    ]
    stacks = (("encoder", "encoder.", decoder.num_encoder_layers), ("decoder", "", decoder.num_layers))
    for stack, own, count in stacks:
        at = f"{prefix}{stack}"
        names = {f"{at}.final_layer_norm": f"{own}norm"}
        names[f"{at}.block.0.layer.0.SelfAttention.relative_attention_bias"] = f"{own}relative.table"
        steps = [("SelfAttention", "attn", "norm1")]
        steps += [("EncDecAttention", "cross", "norm_cross")] if stack == "decoder" else []
        for index in range(count):
            block, ours = f"{at}.block.{index}.layer", f"{own}layers.{index}"
            for number, (theirs, step, norm) in enumerate(steps):
                names |= {f"{block}.{number}.{theirs}.{a}": f"{ours}.{step}.{b}" for a, b in attention.items()}
                names[f"{block}.{number}.layer_norm"] = f"{ours}.{norm}"
            last = f"{block}.{len(steps)}"
            names |= {
                f"{last}.DenseReluDense.wi_0": f"{ours}.mlp.gate",
                f"{last}.DenseReluDense.wi_1": f"{ours}.mlp.up",
            }
            names |= {f"{last}.DenseReluDense.wo": f"{ours}.mlp.down", f"{last}.layer_norm": f"{ours}.norm2"}
        rules += [Rename(source=f"{a}.weight", target=f"decoder.{b}.weight") for a, b in names.items()]
    return tuple(rules)


def _modules(names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(
        Rename(source=f"{theirs}.{tensor}", target=f"{ours}.{tensor}")
        for theirs, ours in names.items()
        for tensor in _WEIGHT_BIAS
    )


def _drops(sources: Iterable[str], reason: str = "not run by BLIP-2") -> tuple[Rule, ...]:
    return tuple(Drop(source=source, reason=reason) for source in sources)
