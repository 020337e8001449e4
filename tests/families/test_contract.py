"""What every family must pass, on its tiny preset, and five unusual mixes of their parts.

The promises of docs/ARCHITECTURE.md, one test each.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mixes
import toys
from opsin import families, weights
from opsin.collate import pack, pad
from opsin.encode import Encoded, Encoder
from opsin.families import FAMILIES, Family, family_of
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.text.messages import Conversation, assistant, user
from opsin.text.tokenizer import Tokenizer
from opsin.train.objectives import next_token
from opsin.train.trainable import choose, idle_tensors, set_trainable

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("OPSIN_UPDATE_GOLDEN") == "1"
# Other batch shapes make the matrix kernels add in another order: float32 noise on numbers of size about 1.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@dataclass(frozen=True)
class Subject:
    """One tiny model, a family's or a mix, ready to use."""

    name: str
    family: Family
    vlm: VLM
    tokenizer: Tokenizer
    encoder: Encoder

    def conversations(self) -> list[Conversation]:
        """Two pictures in two turns; one picture; text alone."""
        return [
            Conversation(
                (
                    user("What is this?", images=[0]),
                    assistant("A red ball."),
                    user("And this?", images=[1]),
                    assistant("Two cubes, I think: one left, one right."),
                ),
                (toys.picture((60, 35), 1), toys.picture((31, 77), 2)),
                id="two pictures",
            ),
            Conversation(
                (user("Colour?", images=[0]), assistant("Blue.")), (toys.picture((42, 42), 3),), id="one picture"
            ),
            Conversation((user("Say 'no'."), assistant("no")), id="text"),
        ]

    def encoded(self) -> list[Encoded]:
        return [self.encoder.encode(conversation, mode="train") for conversation in self.conversations()]


CONFIGS = {family.name: family.tiny.config for family in FAMILIES} | mixes.MIXES


@pytest.fixture(scope="module", params=CONFIGS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    config = CONFIGS[request.param]
    tokenizer = toys.byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    vlm = weights.build(config, seed=1).eval()
    return Subject(request.param, family_of(config), vlm, tokenizer, Encoder(config, tokenizer))


def test_planned_slots_are_the_rows_that_the_model_gives(subject: Subject) -> None:
    """Thousands of sizes share few tilings: every plan is checked, and the model is run once for each tiling."""
    config = subject.vlm.config
    random = np.random.default_rng(0)
    sizes = {tuple(int(x) for x in np.exp(random.uniform(0, 7.3, 2)) + 1) for _ in range(3000)}
    rows_of_tiling: dict[tuple[tuple[int, int, int], ...], int] = {}
    for width, height in sizes:
        if max(width, height) > 40 * min(width, height):
            continue
        plan = config.plan((width, height))
        grids = tuple(tile.grid for tile in plan.tiles)
        if grids not in rows_of_tiling:
            patches = torch.zeros(plan.num_patches, config.vision.patch_dim)
            with torch.no_grad():
                rows_of_tiling[grids] = len(subject.vlm.rows(patches, torch.tensor(grids)))
        assert plan.num_rows == rows_of_tiling[grids]
        assert plan.num_slots == len(plan.layout.order) > 0
        resampled = plan.layout.resample.grid_out if plan.layout.resample else (0, 0)
        assert plan.layout.order.max() < plan.num_rows + resampled[0] * resampled[1]


def test_what_is_taught_is_what_the_golden_text_shows(subject: Subject) -> None:
    """Taught text stands in [brackets], a picture is {its slots}."""
    shown = "\n\n".join(colours(sample, subject.tokenizer) for sample in subject.encoded())
    check_golden(GOLDEN / f"{subject.name}-taught.txt", shown)


def test_prompt_ids_are_a_prefix_of_training_ids(subject: Subject) -> None:
    for conversation in subject.conversations():
        asked = Conversation(conversation.messages[:-1], conversation.images, id=conversation.id)
        prompt, training = subject.encoder.encode(asked), subject.encoder.encode(conversation, mode="train")
        count = prompt.num_tokens
        assert training.ids[:count].tolist() == prompt.ids.tolist()
        assert training.slots.tolist() == prompt.slots.tolist()
        assert training.supervised[count], "the first token after the prompt is the first that is taught of the answer"


@torch.no_grad()
def test_a_batched_row_equals_the_single_one(subject: Subject) -> None:
    samples = subject.encoded()
    hidden = subject.vlm.hidden(pad(samples))
    for row, sample in enumerate(samples):
        alone = subject.vlm.hidden(pad([sample]))[0]
        torch.testing.assert_close(hidden[row, : sample.num_tokens], alone, **TOLERANCE)


@torch.no_grad()
def test_cached_equals_uncached_at_every_step(subject: Subject) -> None:
    """Each answer fed token by token after its prompt, all rows together, against one full forward."""
    samples = subject.encoded()
    vlm, steps = subject.vlm, 3
    full = [vlm.hidden(pad([sample]))[0] for sample in samples]
    prompts = [shortened(sample, sample.num_tokens - steps) for sample in samples]
    cache = KVCache(vlm.config.decoder, batch_size=len(samples), capacity=16, dtype=torch.float32)
    vlm.hidden(pad(prompts), cache)
    for step in range(steps):
        places = [prompt.num_tokens + step for prompt in prompts]
        batch = Batch(
            ids=torch.tensor([[int(s.ids[place])] for s, place in zip(samples, places, strict=True)]),
            positions=torch.from_numpy(
                np.stack([s.positions[place : place + 1] for s, place in zip(samples, places, strict=True)])
            ),
            documents=tuple((row, 0, 1) for row in range(len(samples))),
        )
        hidden = vlm.hidden(batch, cache)
        for row, place in enumerate(places):
            torch.testing.assert_close(hidden[row, 0], full[row][place], **TOLERANCE)


def test_packed_equals_separate_and_nothing_crosses_documents(subject: Subject) -> None:
    samples, vlm = subject.encoded(), subject.vlm
    batch = pack(samples)
    with torch.no_grad():
        separate = torch.cat([vlm.hidden(pad([sample]))[0] for sample in samples])
        torch.testing.assert_close(vlm.hidden(batch)[0], separate, **TOLERANCE)
    embedded = vlm.embed(batch).detach().requires_grad_()
    _, start, stop = batch.documents[1]
    vlm.decoder(embedded, positions=batch.positions, mask=batch.mask)[0, start:stop].square().sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad[0, :start] == 0).all()
    assert (embedded.grad[0, stop:] == 0).all()
    assert (embedded.grad[0, start:stop] != 0).any()


def test_packed_padded_and_separate_samples_have_one_loss_and_one_gradient(subject: Subject) -> None:
    """Positions on three axes included: packed Qwen2-VL counts each conversation and picture from its own beginning."""
    samples, vlm = subject.encoded(), weights.build(subject.vlm.config, seed=2)

    def gradient(batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
        vlm.zero_grad(set_to_none=True)
        done = [next_token(vlm, batch) for batch in batches]
        count = sum(loss.count for loss in done)
        total = sum(loss.total for loss in done) / count
        total.backward()
        return float(total.detach()), {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}

    loss, expected = gradient([pad([sample]) for sample in samples])
    for batches in ([pack(samples)], [pad(samples)], [pack(samples[::-1])]):
        other_loss, other = gradient(batches)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other.keys() == expected.keys()
        for name, wanted in expected.items():
            assert float((other[name] - wanted).norm()) <= 2e-5 * float(wanted.norm()) + 1e-6, name


def test_export_and_import_are_the_identity_on_every_key(subject: Subject, tmp_path: Path) -> None:
    """Out to every layout that the family writes and back, bit for bit; and the native layout likewise."""
    before = subject.vlm.state_dict()
    weights.save_native(tmp_path / "native", subject.vlm, subject.vlm.config, subject.tokenizer)
    model = weights.load(str(tmp_path / "native"))
    assert model.config == subject.vlm.config
    same_tensors(model.vlm.state_dict(), before)
    for layout in ("original", "hf", "hf-v5"):
        if layout not in {known.name for known in subject.family.layouts(subject.vlm.config)}:
            continue
        weights.export(tmp_path / layout, model, layout=layout)
        same_tensors(weights.load(str(tmp_path / layout)).vlm.state_dict(), before)


@pytest.mark.parametrize("with_vision", [False, True])
def test_gradient_reaches_exactly_the_names_that_trainable_names(subject: Subject, with_vision: bool) -> None:
    config = subject.vlm.config
    vlm = weights.build(config, seed=2)
    parts = [name for name, _ in vlm.named_children() if with_vision or name != "vision"]
    parts += ["newline"] if config.uses_newline else []
    trained = set_trainable(vlm, choose(vlm, parts, idle=idle_tensors(vlm, config)))
    batch = pack(subject.encoded())
    places, targets = batch.targets()
    F.cross_entropy(vlm.logits(vlm.hidden(batch).flatten(0, 1)[places]), targets).backward()
    reached = {name for name, parameter in vlm.named_parameters() if parameter.grad is not None}
    assert reached == set(trained)
    unused = {name for name, _ in vlm.named_parameters()} - reached
    assert all(name.startswith("vision.") or name == "connector.positions" for name in unused)


def test_a_tiny_model_overfits_three_conversations(subject: Subject) -> None:
    vlm = weights.build(subject.vlm.config, seed=3)
    batch = pack(subject.encoded())
    places, targets = batch.targets()
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(120):
        loss = F.cross_entropy(vlm.logits(vlm.hidden(batch).flatten(0, 1)[places]), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_resolved_configs_are_those_that_were_committed(family: Family) -> None:
    """A changed default shows up here, in review, and not in somebody's numbers."""
    presets = (*family.presets, family.tiny)
    resolved = {preset.id: preset.model_dump(mode="json", exclude={"config": {"chat"}}) for preset in presets}
    check_golden(GOLDEN / f"{family.name}-presets.json", json.dumps(resolved, indent=1, sort_keys=True))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_boxes_of_the_figure_name_code_that_exists(family: Family) -> None:
    """`path:Name` in a family's file and page points at a definition."""
    file = ROOT / "src/opsin/families" / f"{family.name}.py"
    page = ROOT / "docs/families" / f"{family.name}.md"
    anchors = re.findall(r"\b([\w/]+\.py):(\w+(?:\.\w+)?)", file.read_text() + page.read_text())
    assert anchors
    for path, name in anchors:
        place = next((base / path for base in (ROOT / "src/opsin", ROOT) if (base / path).exists()), None)
        assert place is not None, f"{path} does not exist"
        text = place.read_text()
        for part in name.split("."):
            assert re.search(rf"^\s*(?:def|class)\s+{part}\b|^{part}\b", text, re.MULTILINE), f"{path}: no {part}"


def test_families_have_different_names_and_presets() -> None:
    ids = [preset.id for preset in families.all_presets()]
    assert len(set(ids)) == len(ids)
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def colours(sample: Encoded, tokenizer: Tokenizer) -> str:
    """The conversation as text, taught tokens in [brackets], pictures as {slots}."""
    controls = {token_id: token for token, token_id in tokenizer.controls.items()}
    slots = set(sample.slots.tolist())
    runs: list[tuple[str, list[int]]] = []
    for place, token_id in enumerate(sample.ids.tolist()):
        kind = "slot" if place in slots else "taught" if sample.supervised[place] else "plain"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(token_id)

    def text(ids: list[int]) -> str:
        parts, rest = [], []
        for token_id in [*ids, None]:
            if token_id is not None and token_id not in controls:
                rest.append(token_id)
                continue
            parts.append(tokenizer.decode(rest))
            rest = []
            if token_id is not None:
                parts.append(controls[token_id])
        return "".join(parts)

    show = {"slot": lambda ids: f"{{{len(ids)}}}", "taught": lambda ids: f"[{text(ids)}]", "plain": text}
    return "".join(show[kind](ids) for kind, ids in runs)


def shortened(sample: Encoded, count: int) -> Encoded:
    """The first `count` tokens."""
    assert sample.slots.max(initial=-1) < count
    return Encoded(
        ids=sample.ids[:count],
        supervised=sample.supervised[:count],
        positions=sample.positions[:count],
        slots=sample.slots,
        slot_rows=sample.slot_rows,
        images=sample.images,
        token_spans=sample.token_spans[:count],
        spans=sample.spans,
        name=sample.name,
    )


def same_tensors(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


def check_golden(path: Path, text: str) -> None:
    """Compare with the committed file. OPSIN_UPDATE_GOLDEN=1 rewrites it, for a change that is meant."""
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    assert path.read_text() == text + "\n"
