"""FLOPs and kept activations of one pass through a model, from sizes alone; `tape` says what is counted.

The functions follow the modules of `nn` line by line. They read shapes and what trains, so a module may lie on the meta
device. `tests/train/test_flops.py` compares them with what torch counts when the same pass is really run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opsin.encode import Encoded
from opsin.nn.connectors import MergedRows, MLPRows, PixelShuffleRows, ResampledRows
from opsin.nn.qformer import QFormer, QFormerRows
from opsin.nn.retriever import Retriever
from opsin.nn.seq2seq import Seq2Seq
from opsin.nn.vision import VisionTower
from opsin.nn.vlm import VLM
from opsin.spec.plan import Grid
from opsin.train.tape import FLOAT32, Tape, Value, Work, of_parameter


@dataclass(frozen=True, slots=True)
class SampleShape:
    """What of a sample decides its work."""

    num_tokens: int
    """Picture slots included."""
    num_image_tokens: int = 0
    num_supervised: int = 0
    """Tokens whose logits are computed."""
    grids: tuple[Grid, ...] = ()
    """Patches (t, h, w) of each tile."""
    encoder_length: int = 0
    """How many of the tokens an encoder reads."""

    @classmethod
    def of(cls, sample: Encoded) -> "SampleShape":
        """That of a sample which is there."""
        return cls(
            num_tokens=sample.num_tokens,
            num_image_tokens=sample.num_image_tokens,
            num_supervised=int(sample.supervised[1:].sum()),  # nothing stands before the first
            grids=tuple(tile.grid for image in sample.images for tile in image.plan.tiles),
            encoder_length=sample.encoder_length,
        )


def pass_work(module: VLM | Retriever, samples: Sequence[SampleShape], *, pack: bool, half: bool) -> Work:
    """One pass, forwards and backwards, with what `requires_grad` says of the module's tensors.

    pack: conversations side by side; else a row each, as long as the longest. half: products in half precision.
    """
    tape = Tape(half=half)
    if isinstance(module, Retriever):
        _stage1(tape, module, samples)
    else:
        _next_token(tape, module, samples, pack=pack)
    return tape.work


def _next_token(tape: Tape, vlm: VLM, samples: Sequence[SampleShape], *, pack: bool) -> None:
    """`objectives.next_token`."""
    lengths = [sample.num_tokens for sample in samples]
    if not pack:
        lengths = [max(lengths)] * len(lengths)
    x = Value(sum(lengths), vlm.config.decoder.dim, vlm.decoder.embed.weight.requires_grad)
    grids = [grid for sample in samples for grid in sample.grids]
    if grids:
        rows = _connector(tape, vlm.connector, _tower(tape, vlm.vision, grids), grids)
        x = tape.add(tape.add(x, rows), of_parameter(vlm.newline))
    tape.part = "decoder"
    if isinstance(vlm.decoder, Seq2Seq):
        x = _seq2seq(tape, vlm.decoder, x, samples)
    else:
        x = _decoder(tape, vlm.decoder, x, lengths, pack, wanted=sum(sample.num_supervised for sample in samples))
    tape.part = "head"
    head = vlm.decoder.head if vlm.decoder.head is not None else vlm.decoder.embed
    taught = Value(sum(sample.num_supervised for sample in samples), x.width, x.grad)
    tape.product(2 * taught.rows * head.weight.numel(), x.grad, head.weight.requires_grad)
    tape.work.ahead = FLOAT32 * (x.grad * taught.rows * taught.width + head.weight.requires_grad * head.weight.numel())


# ---- tower and connectors --------------------------------------------------------------------------------------------


def _tower(tape: Tape, tower: VisionTower, grids: Sequence[Grid]) -> Value:
    """`nn.vision.VisionTower`: every frame of a tile is a picture of its own, which sees itself."""
    tape.part = "vision"
    config = tower.config
    frames = [h * w for t, h, w in grids for _ in range(t)]
    x = tape.linear(Value(sum(frames), config.patch_dim), tower.patch)
    lengths = [length + config.has_class_token for length in frames]
    x = tape.add(tape.add(x, of_parameter(tower.positions)), of_parameter(tower.class_token))
    x = tape.norm(Value(sum(lengths), config.dim, x.grad), tower.norm_pre)
    states = {0: x}
    keeps, apart = 2 if config.activation == "quick_gelu" else 1, len(set(grids)) > 1
    run = partial(_tower_layer, tape, pairs=_squares(lengths), apart=apart, keeps=keeps)
    for index, layer in enumerate(tower.layers[: config.num_used_layers], start=1):
        states[index] = x = tape.block(x, partial(run, layer))
    out = sum(lengths) if config.class_token == "keep" else sum(frames)
    return Value(out, config.out_dim, any(states[index].grad for index in config.out_indices))


def _tower_layer(tape: Tape, layer: Any, x: Value, *, pairs: int, apart: bool, keeps: int) -> Value:
    y = _attention(tape, layer.attn, tape.norm(x, layer.norm1), pairs=pairs, apart=apart)
    x = tape.add(x, tape.scale(y, layer.scale1))
    return tape.add(x, tape.scale(tape.mlp(tape.norm(x, layer.norm2), layer.mlp, keeps=keeps), layer.scale2))


def _attention(tape: Tape, attn: Any, x: Value, *, pairs: int, apart: bool, wanted: int | None = None) -> Value:
    q, k, v = tape.linear(x, attn.q), tape.linear(x, attn.k), tape.linear(x, attn.v)
    q, k = tape.norm(q, attn.norm_q), tape.norm(k, attn.norm_k)
    return tape.linear(_picked(tape.attention(q, k, v, pairs=pairs, apart=apart), wanted), attn.out)


def _picked(x: Value, wanted: int | None) -> Value:
    """`nn.attention.pick`."""
    return x if wanted is None else replace(x, rows=wanted)


def _connector(tape: Tape, connector: Any, features: Value, grids: Sequence[Grid]) -> Value:
    """`nn.connectors`: features of the tower to rows."""
    tape.part = "connector"
    match connector:
        case MLPRows():
            return _projection(tape, connector, features)
        case PixelShuffleRows():
            joined = Value(features.rows // 4, 4 * features.width, features.grad)
            return _projection(tape, connector, tape.norm(joined, connector.norm))
        case MergedRows():
            normed = tape.norm(features, connector.norm)
            return _projection(tape, connector, Value(normed.rows // 4, 4 * normed.width, normed.grad))
        case ResampledRows():
            return _resampler(tape, connector, features, len(grids))
        case QFormerRows():
            return _qformer_rows(tape, connector, features, len(grids))
        case _:
            raise AssertionError(f"no costs are known of {type(connector).__name__}")


def _projection(tape: Tape, mlp: Any, x: Value) -> Value:
    x = tape.linear(x, mlp.layers[0])
    for layer in mlp.layers[1:]:
        x = tape.linear(tape.elementwise(x), layer)
    return x


def _resampler(tape: Tape, connector: ResampledRows, features: Value, num_tiles: int) -> Value:
    x = tape.linear(features, connector.kv) if list(connector.kv.parameters()) else features
    x = tape.norm(x, connector.norm_kv)
    positions, count = of_parameter(connector.positions), len(connector.queries)
    q = tape.norm(of_parameter(connector.queries, rows=count), connector.norm_q)
    q = tape.linear(tape.add(q, positions), connector.q)  # once for all tiles
    k, v = tape.linear(tape.add(x, positions), connector.k), tape.linear(x, connector.v)
    q = Value(num_tiles * count, q.width, q.grad, half=True)
    read = tape.linear(tape.attention(q, k, v, pairs=count * features.rows), connector.out)
    return tape.matmul(tape.norm(read, connector.norm_post), connector.proj)


# ---- Q-Former --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """What goes through a Q-Former together."""

    queries: int = 0
    """Rows of queries, over all tiles."""
    text: int = 0
    """Rows of text, padding included."""
    pairs: int = 0
    """Of self-attention: queries times keys, what stands in the past included."""
    features: Value | None = None
    cross_pairs: int = 0
    past: bool = False
    """Whether a gradient flows into keys that stand before, from an earlier call."""


def _qformer_rows(tape: Tape, connector: QFormerRows, features: Value, num_tiles: int) -> Value:
    features = tape.norm(features, connector.norm_features)
    count = len(connector.queries)
    tokens = _Tokens(
        queries=num_tiles * count,
        pairs=num_tiles * count**2,
        features=features,
        cross_pairs=count * features.rows,
    )
    x = of_parameter(connector.queries, rows=tokens.queries)
    return tape.linear(_qformer(tape, connector.qformer, x, tokens), connector.proj)


def _qformer(tape: Tape, stack: QFormer, x: Value, tokens: _Tokens) -> Value:
    """`nn.qformer.QFormer`."""
    x = tape.dropout(tape.norm(x, stack.norm), stack.dropout.p)
    for layer in stack.layers:
        x = tape.block(x, partial(_qformer_layer, tape, layer, tokens))
    return x


def _qformer_layer(tape: Tape, layer: Any, tokens: _Tokens, x: Value) -> Value:
    k, v = tape.linear(x, layer.attn.k), tape.linear(x, layer.attn.v)
    k.grad, v.grad = k.grad or tokens.past, v.grad or tokens.past
    x = _look(tape, layer.attn, x, k, v, tokens.pairs)
    grad = False
    if tokens.queries:
        y = Value(tokens.queries, x.width, x.grad)
        if layer.cross is not None:
            assert tokens.features is not None
            k, v = tape.linear(tokens.features, layer.cross.k), tape.linear(tokens.features, layer.cross.v)
            y = _look(tape, layer.cross, y, k, v, tokens.cross_pairs)
        grad |= _bert_mlp(tape, layer.query, y).grad
    if tokens.text:
        grad |= _bert_mlp(tape, layer.text, Value(tokens.text, x.width, x.grad)).grad
    return Value(x.rows, x.width, grad)


def _look(tape: Tape, attn: Any, x: Value, k: Value, v: Value, pairs: int) -> Value:
    read = tape.linear(tape.attention(tape.linear(x, attn.q), k, v, pairs=pairs), attn.out)
    return tape.norm(tape.add(x, tape.dropout(read, attn.dropout.p)), attn.norm)


def _bert_mlp(tape: Tape, step: Any, x: Value) -> Value:
    return tape.norm(tape.add(x, tape.dropout(tape.mlp(x, step.mlp), step.dropout.p)), step.norm)


def _stage1(tape: Tape, model: Retriever, samples: Sequence[SampleShape]) -> None:
    """`stage1.stage1_losses` in one process."""
    count, width = len(samples), max(sample.num_tokens for sample in samples)
    features = tape.norm(_tower(tape, model.vision, [g for s in samples for g in s.grids]), model.norm_features)
    tape.part = "connector"
    num_queries = len(model.queries)
    queries, text = count * num_queries, count * width
    seen = _qformer(
        tape,
        model.qformer,
        of_parameter(model.queries, rows=queries),
        _Tokens(queries, 0, count * num_queries**2, features, num_queries * features.rows),
    )
    embedded = Value(text, seen.width, model.words.weight.requires_grad or model.positions.weight.requires_grad)
    read = _qformer(tape, model.qformer, embedded, _Tokens(0, text, count * width**2))
    for states, projection in ((seen, model.vision_proj), (Value(count, read.width, read.grad), model.text_proj)):
        vectors = tape.linear(states, projection)
        # Each with all of the other side, which carry no gradient.
        tape.product(2 * count * queries * vectors.width, vectors.grad, False)
    three = Value(3 * features.rows, features.width, features.grad)  # right pairs, wrong pictures, wrong texts
    tokens = _Tokens(3 * queries, 3 * text, 3 * count * (num_queries + width) ** 2, three, num_queries * three.rows)
    both = Value(tokens.queries + tokens.text, seen.width, embedded.grad or model.queries.requires_grad)
    states = _qformer(tape, model.qformer, both, tokens)
    tape.linear(Value(tokens.queries, states.width, states.grad), model.itm_head)
    tokens = _Tokens(0, text, count * width * (num_queries + width), past=seen.grad)
    states = _qformer(tape, model.qformer, embedded, tokens)
    tape.part = "head"
    assert model.captions is not None
    y = tape.norm(tape.elementwise(tape.linear(states, model.captions.dense)), model.captions.norm)
    logits = tape.matmul(y, model.words.weight, model.captions.bias)
    if logits.grad:
        tape.keep(Value(logits.rows, logits.width))  # their log-softmax, in float32


# ---- language models -------------------------------------------------------------------------------------------------


def _decoder(tape: Tape, decoder: Any, x: Value, lengths: Sequence[int], pack: bool, *, wanted: int) -> Value:
    """`nn.decoder.Decoder`."""
    run = partial(_decoder_layer, tape, pairs=_squares(lengths), apart=pack and len(lengths) > 1)
    if decoder.positions is not None:
        x = tape.add(x, of_parameter(decoder.positions.weight))
    elif x.grad or any(parameter.requires_grad for parameter in decoder.layers.parameters()):
        tape.keep(Value(x.rows, 2 * decoder.config.head_width))  # cosines and sines, for all layers
    for layer in decoder.layers[:-1]:
        x = tape.block(x, partial(run, layer))
    return tape.norm(tape.block(x, partial(run, decoder.layers[-1], wanted=wanted)), decoder.norm)


def _decoder_layer(tape: Tape, layer: Any, x: Value, *, pairs: int, apart: bool, wanted: int | None = None) -> Value:
    y = _attention(tape, layer.attn, tape.norm(x, layer.norm1), pairs=pairs, apart=apart, wanted=wanted)
    x = tape.add(_picked(x, wanted), y)
    y = tape.norm(x, layer.norm2)
    return tape.add(x, tape.gated(y, layer.mlp) if hasattr(layer.mlp, "gate") else tape.mlp(y, layer.mlp, keeps=0))


def _seq2seq(tape: Tape, model: Seq2Seq, x: Value, samples: Sequence[SampleShape]) -> Value:
    """`nn.seq2seq.Seq2Seq`: samples are pulled apart into rows of their own, each side as long as its longest."""
    longest = max(sample.encoder_length for sample in samples)
    answer = max(sample.num_tokens - sample.encoder_length for sample in samples)
    count = len(samples)
    read = Value(count * longest, x.width, x.grad)
    for layer in model.encoder.layers:
        read = tape.block(read, partial(_t5_encoder_layer, tape, layer, count * longest**2))
    read = tape.norm(read, model.encoder.norm)
    written = Value(count * answer, x.width, x.grad)
    pairs, across = count * answer**2, count * answer * longest
    for layer in model.layers:  # no blocks that could be computed again alone: they share what they see of the encoder
        written = _t5_decoder_layer(tape, layer, read, pairs, across, written)
    return tape.norm(written, model.norm)


def _t5_encoder_layer(tape: Tape, layer: Any, pairs: int, x: Value) -> Value:
    y = tape.norm(x, layer.norm1)
    x = tape.add(x, _t5_look(tape, layer.attn, y, y, pairs))
    return tape.add(x, tape.gated(tape.norm(x, layer.norm2), layer.mlp))


def _t5_decoder_layer(tape: Tape, layer: Any, read: Value, pairs: int, across: int, x: Value) -> Value:
    y = tape.norm(x, layer.norm1)
    x = tape.add(x, _t5_look(tape, layer.attn, y, y, pairs))
    x = tape.add(x, _t5_look(tape, layer.cross, tape.norm(x, layer.norm_cross), read, across))
    return tape.add(x, tape.gated(tape.norm(x, layer.norm2), layer.mlp))


def _t5_look(tape: Tape, attn: Any, x: Value, memory: Value, pairs: int) -> Value:
    q, k, v = tape.linear(x, attn.q), tape.linear(memory, attn.k), tape.linear(memory, attn.v)
    return tape.linear(tape.attention(q, k, v, pairs=pairs), attn.out)


def _squares(lengths: Sequence[int]) -> int:
    """Pairs of tokens where each of so many sequences sees itself alone."""
    return sum(length * length for length in lengths)
