"""The loss of a step, however its samples are cut into passes and rows."""

import pytest
import torch
import torch.nn.functional as F

from opsin import weights
from opsin.collate import pack, pad
from opsin.encode import Encoded, Encoder
from opsin.errors import DataError, TrainError
from opsin.nn.batch import Batch
from opsin.nn.vlm import VLM
from opsin.spec.recipe import AdamW
from opsin.text.messages import Conversation, user
from opsin.train import objectives
from opsin.train.loop import StageLoop, reproducible
from opsin.train.objectives import Loss, linear_cross_entropy, next_token, next_token_from
from opsin.train.prepare import prepare_stage
from train.toy import DrawnSource, stage, tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def samples(tiny) -> list[Encoded]:
    encoder = Encoder(tiny.config, tiny.tokenizer)
    source = DrawnSource(5)
    return [encoder.encode(source.sample(index, 0), mode="train") for index in range(5)]


def gradients(vlm: VLM, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all batches' taught tokens, and its gradient."""
    vlm.zero_grad(set_to_none=True)
    done = [next_token(vlm, batch) for batch in batches]
    count = sum(loss.count for loss in done)
    total = sum(loss.total for loss in done) / count
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}


# Other shapes make the matrix kernels add in another order: float32 noise on gradients of size up to about 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def test_the_loss_is_the_mean_cross_entropy_over_taught_tokens(tiny, samples):
    batch = pad(samples)
    loss = next_token(tiny.vlm, batch)
    logits = tiny.vlm.logits(tiny.vlm.hidden(batch))[:, :-1]
    labels = batch.ids[:, 1:].masked_fill(~batch.supervised[:, 1:], -100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss.total / loss.count, expected, rtol=1e-6, atol=1e-6)
    assert loss.count == sum(int(sample.supervised[1:].sum()) for sample in samples)


def test_packed_padded_and_separate_samples_have_the_same_gradient(tiny, samples):
    loss, expected = gradients(tiny.vlm, [pad([sample]) for sample in samples])
    for batches in ([pack(samples)], [pad(samples)], [pack(samples[:2]), pad(samples[2:])]):
        other_loss, other = gradients(tiny.vlm, batches)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(other[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "batch",
    [
        {"form": "pad"},
        {"form": "pad", "micro_samples": 1},
        {"form": "pad", "micro_tokens": 80},
        {"form": "pack", "micro_samples": 3},
        {"form": "pack", "micro_tokens": 50},
        {"form": "pack", "micro_tokens": 1},
    ],
    ids=lambda batch: " ".join(map(str, batch.values())),
)
def test_accumulated_passes_update_like_one_big_batch(tiny, tmp_path, batch):
    def updated(cut: dict) -> tuple[dict, dict[str, torch.Tensor]]:
        vlm = weights.build(tiny.config, seed=1)
        one = stage(batch={"samples": 9, **cut}, steps=1, schedule={"kind": "constant", "warmup_ratio": 0})
        prepared = prepare_stage(
            one, module=vlm, model=tiny.config, tokenizer=tiny.tokenizer, seed=0, source=DrawnSource(9)
        )
        loop = StageLoop(vlm, prepared.feed, trainable=prepared.trainable, objective=next_token)
        # Plain gradient steps: AdamW would make a full step of every gradient that is noise around zero.
        loop.optimizer._optimizers = {"adamw": torch.optim.SGD(loop.trained.values(), lr=0.1)}
        loop.optimizer._optimizers["adamw"].param_groups[0]["base_lr"] = 0.1
        (row,) = loop.rows()
        return row, dict(vlm.state_dict())

    expected_row, expected = updated({})
    row, other = updated(batch)
    assert expected_row["passes"] == 1
    assert row["passes"] > 1 or batch == {"form": "pad"}
    assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-6)
    assert row["grad_norm"] == pytest.approx(expected_row["grad_norm"], rel=1e-5)
    for key in ("tokens", "image_tokens", "supervised", "samples"):
        assert row[key] == expected_row[key]
    for name, value in expected.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["nothing", "head", "hidden"])
def test_chunks_of_logits_give_the_gradient_of_all_logits_at_once(monkeypatch, frozen):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(frozen != "head")
    hidden = torch.randn(23, 8, requires_grad=frozen != "hidden")
    targets = torch.randint(0, 50, (23,))
    expected = F.cross_entropy(head(hidden), targets, reduction="sum") * 0.3
    expected.backward()
    wanted = head.weight.grad, hidden.grad
    head.weight.grad = hidden.grad = None
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 200)  # 4 tokens at a time
    loss = linear_cross_entropy(hidden, head, targets) * 0.3
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for got, want in zip((head.weight.grad, hidden.grad), wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_no_tensor_of_all_tokens_times_the_vocabulary_is_made(monkeypatch):
    """The largest tensor that any operation returns is one chunk of logits, or the weight's gradient."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 5000)
    head = torch.nn.Linear(4, 1000, bias=False)
    hidden = torch.randn(300, 4, requires_grad=True)
    with Watch():
        linear_cross_entropy(hidden, head, torch.randint(0, 1000, (300,))).backward()
    assert max(sizes) == 5000


def test_autocast_keeps_softmax_and_loss_in_float32():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 3000, bias=False)
    hidden, targets = torch.randn(40, 16, requires_grad=True), torch.randint(0, 3000, (40,))
    exact = F.cross_entropy(head(hidden), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, head, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.float32
    # bfloat16 keeps 8 bits of a product; a loss summed in bfloat16 would be off by whole units here.
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)


def test_under_autocast_the_head_is_converted_in_blocks(monkeypatch):
    """Chunks of tokens times blocks of the vocabulary give what the whole gives, and no second head is made."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 3000, bias=False)
    hidden, targets = torch.randn(40, 16, requires_grad=True), torch.randint(0, 3000, (40,))
    found, sizes = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16 and not result._is_view():
                sizes.append(result.numel())
            return result

    for blocks in (False, True):
        if blocks:
            monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 15_000)  # 10 tokens at a time, in half precision
            monkeypatch.setattr(objectives, "BLOCK_ELEMENTS", 7_000)  # 437 rows
        sizes.clear()
        with torch.autocast("cpu", torch.bfloat16), Watch():
            loss = linear_cross_entropy(hidden, head, targets)
        loss.backward()
        found.append((loss.detach(), head.weight.grad, hidden.grad))
        head.weight.grad = hidden.grad = None
    assert max(sizes) == 30_000, "a chunk of logits; the whole head has 48,000 numbers"
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=2e-2, atol=2e-3)


def test_rows_that_are_already_known_give_the_same_loss(tiny, samples):
    batch = pack(samples)
    rows = tiny.vlm.rows(batch.patches, batch.grids)
    torch.testing.assert_close(next_token_from(tiny.vlm, batch, rows=rows).total, next_token(tiny.vlm, batch).total)


def loop_of(tiny, source, objective=next_token, **changes) -> StageLoop:
    vlm = weights.build(tiny.config, seed=1)
    prepared = prepare_stage(
        stage(**changes), module=vlm, model=tiny.config, tokenizer=tiny.tokenizer, seed=0, source=source
    )
    return StageLoop(vlm, prepared.feed, trainable=prepared.trainable, objective=objective)


def test_a_sample_with_nothing_to_learn_is_an_error_that_names_it(tiny):
    class OneEmpty(DrawnSource):
        def sample(self, index, epoch):
            empty = Conversation((user("only a question"),), id="the empty one")
            return empty if index == 2 else super().sample(index, epoch)

    with pytest.raises(DataError, match="'the empty one' has no token to learn"):
        list(loop_of(tiny, OneEmpty(4)).rows())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(tiny, bad):
    guilty: list[str] = []

    def objective(vlm: VLM, batch: Batch) -> Loss:
        loss = next_token(vlm, batch)
        return Loss(loss.total * bad, loss.count) if guilty == list(batch.names) else loss

    loop = loop_of(tiny, DrawnSource(8), objective, batch={"samples": 4, "micro_samples": 1}, steps=4)
    guilty.append(loop.feed.load(*loop.feed.step_samples(1)[2]).name)  # the third pass of the second step
    rows = loop.rows()
    next(rows)
    before = {name: value.clone() for name, value in loop.module.state_dict().items()}
    with pytest.raises(TrainError) as raised:
        next(rows)
    assert all(torch.equal(before[name], value) for name, value in loop.module.state_dict().items())
    message = str(raised.value)
    assert "step 2: " in message
    assert f"Samples of the passes concerned: {guilty[0]!r}." in message
    assert "Nothing was updated" in message


def test_a_gradient_that_is_not_finite_names_the_tensor(tiny):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def objective(vlm: VLM, batch: Batch) -> Loss:
        loss = next_token(vlm, batch)
        extra = Explode.apply(vlm.decoder.norm.weight.sum()) * 1.0
        return Loss(loss.total + extra, loss.count)

    loop = loop_of(tiny, DrawnSource(4), objective)
    with pytest.raises(TrainError, match=r"Tensors whose gradient is not finite: 'decoder.norm.weight'\."):
        list(loop.rows())


def test_a_long_gradient_is_shortened_and_a_short_one_is_not(tiny):
    def moved(clip: float | None) -> tuple[float, float]:
        loop = loop_of(tiny, DrawnSource(4), clip=clip, steps=1, schedule={"warmup_ratio": 0})
        lengths = []

        def record(factor):
            lengths.append(float(torch.nn.utils.get_total_norm([p.grad for p in loop.trained.values()])))

        loop.optimizer.step = record
        (row,) = loop.rows()
        return row["grad_norm"], lengths[0]

    norm, used = moved(None)
    assert used == pytest.approx(norm, rel=1e-5)
    assert moved(norm / 3) == pytest.approx((norm, norm / 3), rel=1e-5)
    assert moved(norm * 3) == pytest.approx((norm, norm), rel=1e-5)


def test_gradients_of_a_row_that_fills_many_slots_are_the_same_with_several_threads():
    """torch's own habit is to add them in the order in which threads come; a newline's row has many slots."""
    table, slots = torch.randn(3000, 512, requires_grad=True), torch.randint(0, 5, (4000,))
    downstream = torch.randn(4000, 512)

    def gradient() -> torch.Tensor:
        table.grad = None
        with reproducible(torch.device("cpu"), 0):
            table[slots].backward(downstream)
        return table.grad.clone()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(10))
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()


def test_defaults_are_those_of_the_published_recipes():
    assert AdamW(lr=1e-3).model_dump(exclude={"lr", "kind", "part_lr", "layer_decay"}) == {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
    }
