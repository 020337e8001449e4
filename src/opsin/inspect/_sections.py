"""The sections of the report page. Each says first what it shows and why that matters."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opsin.inspect._html import count, data_uri, duration, escape, percent, size_of
from opsin.inspect.curves import loss_svg
from opsin.inspect.overlay import count_slots, draw_slots, draw_tiles, slot_color, slot_layers
from opsin.inspect.parts import Answer, FlowStep, MaskView, PictureView, Report, RunFacts, Scores, StageView, TaskScore
from opsin.inspect.tokens import KINDS, mask_html
from opsin.spec.plan import ImagePlan

_NEAR = 0.05
"""Accuracies no further apart than this count as equal."""

_TASKS_HEAD = (
    '<caption class="hidden">Accuracy per task</caption><thead role="rowgroup"><tr role="row">'
    '<th role="columnheader" scope="col">task</th>'
    '<th role="columnheader" scope="col"><span class="hidden">accuracy as a bar</span></th>'
    '<th role="columnheader" scope="col">accuracy</th><th role="columnheader" scope="col">majority</th>'
    '<th role="columnheader" scope="col">shuffled</th><th role="columnheader" scope="col">questions</th></tr></thead>'
)


def scores_section(report: Report) -> str:
    """Accuracy against the two controls, as one figure and per task."""
    scores = report.scores
    rows = "".join(_task_row(task) for task in sorted(report.tasks, key=lambda task: -task.scores.accuracy))
    table = f'<table class="tasks" role="table">{_TASKS_HEAD}<tbody role="rowgroup">{rows}</tbody></table>'
    return _section(
        "scores",
        "What it can see",
        "Every question here is about a picture that training never showed. <strong>Accuracy</strong> is the share "
        "answered exactly right; the <strong>majority baseline</strong> always gives a task’s commonest answer; the "
        "<strong>shuffled control</strong> asks the same questions about the wrong pictures. Only what stands clear of "
        "both was read from the picture.",
        f'<p class="finding">{_finding(scores)}</p>{_key()}{table if rows else ""}',
    )


def hero(scores: Scores) -> str:
    """The three numbers that matter most."""

    def line(name: str, share: float, style: str) -> str:
        return (
            f'<div class="hero-line {style}"><span class="hero-name">{name}</span>'
            f'<span class="hero-bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'
            f'<span class="hero-number">{percent(share)}</span></div>'
        )

    return (
        '<div class="hero">'
        + line("accuracy", scores.accuracy, "accuracy")
        + line("majority baseline", scores.majority, "majority")
        + line("shuffled control", scores.shuffled, "shuffled")
        + f'<p class="note">{scores.questions:,} held-out questions</p></div>'
    )


def facts(run: RunFacts, stages: tuple[StageView, ...]) -> str:
    """Time, memory, size and machine."""
    items = [("took", duration(run.seconds)), ("peak memory", size_of(run.peak_bytes))]
    if stages:
        items.append(("parameters", count(max(sum(part.total for part in stage.parts) for stage in stages))))
    items.append(("machine", run.machine))
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f'<dl class="facts">{cells}</dl>'


def gallery_section(answers: tuple[Answer, ...]) -> str:
    """Pictures with question, answer and truth."""
    right = sum(answer.verdict == "right" for answer in answers)
    return _section(
        "answers",
        "Its answers",
        f"Unseen pictures, one question each, and the model’s own words: {right} of these {len(answers)} are right. "
        "Look at the wrong ones first. A near miss (a neighbouring colour, one too many) is a different fault from an "
        "answer that has nothing to do with the picture.",
        f'<div class="gallery">{"".join(_card(answer) for answer in answers)}</div>',
    )


def picture_section(view: PictureView | None, steps: tuple[FlowStep, ...]) -> str:
    """From picture to slots: the numbers, the tiles, the slots."""
    flow = "".join(
        f'<li><span class="flow-name">{escape(step.name)}</span><span class="flow-figure">{escape(step.figure)}</span>'
        f'<span class="flow-note">{escape(step.note)}</span></li>'
        for step in steps
    )
    return _section(
        "picture",
        "From picture to slots",
        "A language model reads tokens, so the picture has to become some. The vision tower looks at each "
        "<em>tile</em> and turns its patches into <em>features</em>; the connector turns features into <em>rows</em>, "
        "as wide as the embedding of a word; each row fills one <em>slot</em> among the words. How many there are "
        "follows from the picture’s size alone, before a single pixel is read.",
        (f'<ol class="flow">{flow}</ol>' if flow else "") + (_overlays(view) if view else ""),
    )


def mask_section(view: MaskView) -> str:
    """The coloured loss mask."""
    pieces = view.pieces
    taught = sum(piece.supervised for piece in pieces)
    slots = sum(len(piece.ids) for piece in pieces if piece.kind == "image")
    total = sum(len(piece.ids) for piece in pieces)
    present = Counter(piece.kind for piece in pieces)
    key = "".join(
        f'<span class="token {kind}">{name}</span> '
        for kind, name in KINDS.items()
        if present[kind] and kind != "assistant"
    )
    return _section(
        "mask",
        "What training teaches, token by token",
        "The model reads this whole conversation, but the loss counts only the tokens on green: each of them is to be "
        "predicted from all that stands before it. Were the questions taught as well, the model would learn to ask. "
        "Were the end of an answer not taught, it would never stop.",
        f'<p class="finding">{total:,} tokens: {slots:,} picture slots, {total - slots - taught:,} of text that is '
        f"only read, {taught:,} that are taught.</p>"
        f'<p class="key"><span class="token assistant taught">taught</span> {key}</p>'
        '<input type="checkbox" id="show-ids"><label for="show-ids">show token ids</label>'
        f'<div class="mask"{_label(view.name)}>{mask_html(pieces)}</div>',
    )


def stages_section(stages: tuple[StageView, ...]) -> str:
    """What was trained when, with loss curves."""
    return _section(
        "stages",
        "How it was trained",
        "Training goes in stages, and each moves only some parts. The rest is frozen, so that a part that knows "
        "nothing yet cannot spoil one that does. The loss is the mean surprise per taught token, in nats: a model that "
        "is sure and right has none. Stages differ in what they ask for: compare the shapes of curves, not heights.",
        f'<ol class="stages">{"".join(_stage(stage) for stage in stages)}</ol>',
    )


def chat_section(run: RunFacts) -> str:
    """How to go on."""
    versions = f'<p class="note">{escape(run.versions)}</p>' if run.versions else ""
    return _section(
        "chat",
        "Your turn",
        "The model lies beside this page. Ask it about any picture; it has only ever seen drawings like those above, "
        "so how it fails on others is worth a look too.",
        f"<pre><code>{escape(run.chat_command)}</code></pre>"
        f'<p class="note">Made with <code>{escape(run.command)}</code></p>{versions}',
    )


def _section(name: str, title: str, intro: str, body: str) -> str:
    """intro and body are HTML."""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>'
        f'<p class="intro">{intro}</p>{body}</section>'
    )


def _label(name: str) -> str:
    return f' role="group" aria-label="{escape(name)}"' if name else ""


def _finding(scores: Scores) -> str:
    gap = scores.shuffled - scores.majority
    fall = f"With the pictures shuffled, accuracy goes from {percent(scores.accuracy)} to {percent(scores.shuffled)}"
    if scores.accuracy - scores.shuffled <= _NEAR:
        return f"{fall}, so the pictures hardly matter to the answers: longer training may change that."
    if gap <= _NEAR:
        return f"{fall}, against a baseline of {percent(scores.majority)}: the answers come from the pictures."
    return (
        f"{fall}, {100 * gap:.0f} points above the baseline of {percent(scores.majority)}: that part can be answered "
        "without looking."
    )


def _key() -> str:
    return (
        '<p class="key" aria-hidden="true"><span><i class="swatch fill"></i>accuracy</span> '
        '<span><i class="swatch tick"></i>majority baseline</span> '
        '<span><i class="swatch dot"></i>shuffled control</span></p>'
    )


def _task_row(task: TaskScore) -> str:
    scores = task.scores
    example = f'<span class="example">{escape(task.example)}</span>' if task.example else ""
    numbers = (
        ("accuracy", percent(scores.accuracy)),
        ("majority", percent(scores.majority)),
        ("shuffled", percent(scores.shuffled)),
        ("questions", f"{scores.questions:,}"),
    )
    cells = "".join(f'<td role="cell" data-name="{name}">{value}</td>' for name, value in numbers)
    return (
        f'<tr role="row"><th role="rowheader" scope="row">{escape(task.name)}{example}</th>'
        f'<td role="cell" class="bar"><div aria-hidden="true">'
        f'<i class="fill" style="width:{100 * scores.accuracy:.1f}%"></i>'
        f'<i class="tick" style="left:{100 * scores.majority:.1f}%"></i>'
        f'<i class="dot" style="left:{100 * scores.shuffled:.1f}%"></i></div></td>{cells}</tr>'
    )


def _card(answer: Answer) -> str:
    mark = "✓" if answer.verdict == "right" else "✕"
    picture = _picture(answer.picture, f"Picture for the question: {answer.question}")
    return (
        f'<figure class="card {answer.verdict}">{picture}<figcaption><span class="task">{escape(answer.task)}</span>'
        f'<span class="question">{escape(answer.question)}</span>'
        f'<span class="said"><span class="mark" aria-hidden="true">{mark}</span>'
        f"<strong>{escape(answer.answer) or '(no answer)'}</strong> "
        f'<span class="verdict">{answer.verdict}</span></span>'
        f'<span class="truth">truth: {escape(answer.truth)}</span></figcaption></figure>'
    )


def _picture(picture: Image.Image, text: str, style: str = "") -> str:
    name = f' class="{style}"' if style else ""
    return (
        f'<img{name} src="{data_uri(picture)}" alt="{escape(text)}" width="{picture.width}" height="{picture.height}" '
        'loading="lazy">'
    )


def _overlays(view: PictureView) -> str:
    plan = view.plan
    tiles = draw_tiles(view.picture, plan)
    figures = [_figure(tile, f"{view.name}, cut into tiles", _tile_caption(plan, n)) for n, tile in enumerate(tiles)]
    for drawing, slots in zip(draw_slots(view.picture, plan), slot_layers(plan), strict=True):
        figures.append(_figure(drawing, f"{view.name}, with its token slots", _slot_caption(plan, slots)))
    return f'<div class="overlays">{"".join(figures)}</div>{_ramp(plan.num_slots) if plan.num_slots else ""}'


def _ramp(num_slots: int) -> str:
    colors = ",".join(f"rgb{slot_color(place, 11)}" for place in range(11))
    return (
        f'<p class="ramp"><span>slot 0</span><i style="background:linear-gradient(90deg,{colors})"></i>'
        f"<span>slot {num_slots - 1}</span></p>"
    )


def _figure(picture: Image.Image, text: str, caption: str) -> str:
    return f"<figure>{_picture(picture, text)}<figcaption>{escape(caption)}</figcaption></figure>"


def _tile_caption(plan: ImagePlan, canvas: int) -> str:
    tiles = [tile for tile in plan.tiles if tile.canvas == canvas]
    width, height = plan.canvases[canvas].size
    _, rows, columns = tiles[0].grid
    how_many = "one tile" if len(tiles) == 1 else f"{len(tiles)} tiles"
    return f"Tiles: what the tower sees, {width} × {height} px in {how_many} of {columns} × {rows} patches."


def _slot_caption(plan: ImagePlan, slots: NDArray[np.int64]) -> str:
    counts = count_slots(plan, slots)
    extra = [f"{counts.padding} see only padding"] if counts.padding else []
    extra += [f"{counts.newline} mark the end of a line"] if counts.newline else []
    tail = f" Of these, {' and '.join(extra)}." if extra else ""
    return f"Slots {slots[0]} to {slots[-1]}: the part of the picture that fills each.{tail}"


def _stage(stage: StageView) -> str:
    trainable = sum(part.trainable for part in stage.parts)
    parts = "".join(
        f'<li class="{"trained" if part.trainable else "frozen"}"><span>{escape(part.name)}</span>'
        f"<span>{_amount(part.trainable, part.total)}</span></li>"
        for part in stage.parts
    )
    samples = f", {stage.samples:,} samples" if stage.samples is not None else ""
    return (
        f"<li><h3>{escape(stage.name)}</h3><p>{escape(stage.explanation)}</p>"
        f'<p class="note">{count(trainable)} parameters trained, {duration(stage.seconds)}{samples}</p>'
        f'<ul class="parts">{parts}</ul>{loss_svg(stage.curve) if stage.curve else ""}</li>'
    )


def _amount(trainable: int, total: int) -> str:
    if not trainable:
        return f"{count(total)}, frozen"
    return f"{count(total)}, trained" if trainable == total else f"{count(trainable)} of {count(total)} trained"
