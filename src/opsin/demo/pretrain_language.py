"""Pretraining of the language model on text alone: conversations about typed pictures, and their captions.

Vicuna, from which LLaVA starts, can already answer questions about what it reads. So can this model: it has read
pictures typed with words (`labels.typed_picture`), each with a caption or with questions and answers. It has seen no
pixel: what is left for the demo is LLaVA's own step, to show it real pictures through a connector.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.demo.fit import Fit, fit, save_half, spread_blocks_
from opsin.demo.labels import patch_labels, typed_picture
from opsin.demo.scene import Split
from opsin.demo.shipped import CHAT, DECODER_FILE, decoder_config
from opsin.demo.tasks import Sample, text_sample
from opsin.demo.vocabulary import DESCRIBE
from opsin.families._chats import PLAIN
from opsin.nn.decoder import Decoder
from opsin.nn.mask import packed
from opsin.spec.chat import ChatFormat
from opsin.spec.recipe import AdamW, Muon
from opsin.text.messages import ImagePart, Message, TextPart
from opsin.text.render import render
from opsin.text.tokenise import tokenise
from opsin.text.tokenizer import Tokenizer, load_tokenizer

RUN = Fit(
    steps=2600,
    optim=Muon(lr=0.003, weight_decay=0.02, scale="match_rms_adamw", rest=AdamW(lr=0.002, betas=(0.9, 0.98))),
)
BATCH = 16
"""Texts per step."""
QUESTIONS = 10
CAPTION_SHARE = 0.15
"""Texts that are a typed picture and its caption; the others are conversations."""
DROPOUT = 0.1
"""How often a word of a typed picture is missing."""
NOISE = 0.1
"""Size of the noise on typed pictures; embeddings start at 0.5."""


Patches = list[tuple[str, ...]]
"""A typed picture: the words of each patch."""


@dataclass(frozen=True)
class Text:
    """One tokenised text. Where a picture stands, each patch is an entry of `ids`, of the id of no token."""

    ids: list[int]
    taught: list[bool]
    patches: list[list[int]]
    """Ids of the words struck in each patch of the picture, if there is one."""
    first_patch: int
    """Where the picture begins in `ids`."""


class LanguageModel(nn.Module):
    """The decoder, under the name that it has in the whole model."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.decoder = Decoder(decoder_config(vocab_size))
        nn.init.normal_(self.decoder.embed.weight, std=0.5)
        assert self.decoder.head is not None
        nn.init.normal_(self.decoder.head.weight, std=0.02)
        spread_blocks_(self.decoder.layers)

    def hidden(self, texts: list[Text]) -> Tensor:
        """Hidden states (T, D) of texts side by side, none of which sees another."""
        lengths = [len(text.ids) for text in texts]
        ends = np.cumsum(lengths).tolist()
        documents = tuple((0, end - length, end) for length, end in zip(lengths, ends, strict=True))
        positions = torch.cat([torch.arange(length) for length in lengths])
        x = self.decoder.embed(torch.tensor([token for text in texts for token in text.ids]))
        places = [
            start + text.first_patch + patch
            for (_, start, _), text in zip(documents, texts, strict=True)
            for patch in range(len(text.patches))
        ]
        if places:
            x = x.index_copy(0, torch.tensor(places), self._struck([patch for text in texts for patch in text.patches]))
        return self.decoder(x[None], positions=positions[None, :, None], mask=packed(documents))[0]

    def _struck(self, patches: list[list[int]]) -> Tensor:
        """Words struck over each other, (patches, D): the sum of their embeddings and, in training, some noise."""
        words = self.decoder.embed(torch.tensor([word for patch in patches for word in patch]))
        owners = torch.tensor([number for number, patch in enumerate(patches) for _ in patch])
        struck = words.new_zeros(len(patches), words.shape[1]).index_add(0, owners, words)
        return struck + torch.randn_like(struck) * NOISE if self.training else struck


def text(seed: int, index: int, split: Split, tokenizer: Tokenizer) -> Text:
    """Text `index` of a split: a conversation about a typed picture, or the picture and its caption."""
    sample = text_sample(seed, index, split, num_questions=QUESTIONS)
    rng = random.Random(f"text/{seed}/{split}/{index}")
    typed = typed_picture(patch_labels(sample.scene), rng, dropout=DROPOUT)
    if rng.random() < CAPTION_SHARE:
        messages = [_asked(""), _answered(sample.caption)]
        return encode(PLAIN, messages, typed, tokenizer)
    turns = [(question.text, question.answer) for question in sample.questions]
    turns.append((rng.choice(DESCRIBE), sample.caption))
    return encode(CHAT, conversation(turns), typed, tokenizer)


def conversation(turns: list[tuple[str, str]]) -> list[Message]:
    """Questions and answers about one picture, which the first question shows."""
    messages: list[Message] = []
    for number, (question, answer) in enumerate(turns):
        messages += [_asked(question, with_picture=number == 0), _answered(answer)]
    return messages


def _asked(question: str, *, with_picture: bool = True) -> Message:
    return Message("user", (ImagePart(0), TextPart(question)) if with_picture else (TextPart(question),))


def _answered(answer: str) -> Message:
    return Message("assistant", (TextPart(answer),))


def encode(chat: ChatFormat, messages: list[Message], typed: Patches, tokenizer: Tokenizer) -> Text:
    """Render and tokenise, with the typed picture where the messages show one."""
    tokens = tokenise(render(chat, messages, mode="train"), tokenizer)
    [(first, _)] = tokens.images
    patches = [tokenizer.encode("".join(words), "start").ids for words in typed]
    return Text(
        ids=[*tokens.ids[:first], *[0] * len(typed), *tokens.ids[first + 1 :]],
        taught=[*tokens.supervised[:first], *[False] * len(typed), *tokens.supervised[first + 1 :]],
        patches=patches,
        first_patch=first,
    )


def targets(texts: list[Text]) -> tuple[Tensor, Tensor]:
    """Places of the hidden states that are to predict a taught token, and those tokens."""
    taught = torch.tensor([taught for text in texts for taught in text.taught])
    ids = torch.tensor([token for text in texts for token in text.ids])
    places = taught.nonzero()[:, 0]
    return places - 1, ids[places]


def loss(module: nn.Module, texts: list[Text]) -> Tensor:
    """Mean cross-entropy of the taught tokens."""
    assert isinstance(module, LanguageModel)
    places, wanted = targets(texts)
    return F.cross_entropy(module.decoder.logits(module.hidden(texts)[places]).float(), wanted)


@torch.no_grad()
def measure(module: nn.Module, tokenizer: Tokenizer, *, count: int = 300) -> dict[str, float]:
    """Share of right answers per task on typed pictures of the `heldout` split, each question asked alone."""
    assert isinstance(module, LanguageModel)
    right: dict[str, list[bool]] = {}
    for index in range(count):
        sample: Sample = text_sample(1, index, "heldout", num_questions=8)
        typed = typed_picture(patch_labels(sample.scene), random.Random(index))
        texts = [encode(CHAT, conversation([(q.text, q.answer)]), typed, tokenizer) for q in sample.questions]
        logits = module.decoder.logits(module.hidden(texts)).argmax(-1).tolist()
        start = 0
        for question, item in zip(sample.questions, texts, strict=True):
            # Under the right beginning of an answer, greedy choice gives the answer iff it gives each of its tokens.
            good = all(
                logits[start + place - 1] == item.ids[place] for place in range(len(item.ids)) if item.taught[place]
            )
            right.setdefault(question.task, []).append(good)
            start += len(item.ids)
    figures = {task: sum(good) / len(good) for task, good in sorted(right.items())}
    return {"accuracy": sum(figures.values()) / len(figures), **figures}


def run(folder: Path, *, seed: int, settings: Fit = RUN) -> None:
    """Train a language model with the tokenizer in `folder`, and write it and its log there."""
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)

    def texts(step: int) -> list[Text]:
        return [text(seed, index, "train", tokenizer) for index in range(step * BATCH, (step + 1) * BATCH)]

    def save(module: nn.Module) -> None:
        assert isinstance(module, LanguageModel)
        save_half(module.decoder.state_dict(), folder / DECODER_FILE, {"made_by": "opsin.demo.pretrain language"})

    fit(
        LanguageModel(tokenizer.vocab_size),
        settings,
        loss=lambda module, step: loss(module, texts(step)),
        measure=lambda module: measure(module, tokenizer),
        log=folder / "language.jsonl",
        save=save,
    )
