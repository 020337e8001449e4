"""How likely given answers are: teacher forcing, all tokens of an answer in one pass.

    question + answer --encode(mode="train")--> hidden (B, T, D) --states before the answer's tokens--> logits
                                                                   --log softmax--> sum of the answer's own

Only the tokens of the answer's text count. What a chat format writes after it (`<|im_end|>`, `</s>`) does not: it would
reward answers that can go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from opsin.collate import pad
from opsin.encode import Encoded, Encoder
from opsin.errors import MessageError
from opsin.nn.vlm import VLM
from opsin.text.messages import Conversation
from opsin.text.render import TextSpan

CHUNK = 256
"""Tokens whose logits exist at once."""


@dataclass(frozen=True)
class Score:
    """One answer."""

    log_probability: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one, given those before it."""
    num_tokens: int


def encode_answer(encoder: Encoder, conversation: Conversation) -> Encoded:
    """A conversation that ends with an answer, with the tokens of that answer's text alone as the taught ones.

    A token is the answer's if it starts in it, or in white space that the format writes between prompt and answer.
    """
    if conversation.messages[-1].role != "assistant":
        raise MessageError("there is no answer to score: the last message is not the assistant's")
    encoded = encoder.encode(conversation, mode="train")
    is_said = [isinstance(span, TextSpan) and span.source == "assistant" for span in encoded.spans]
    asked = [place for place, span in enumerate(encoded.token_spans) if is_said[span]]
    supervised = encoded.supervised.copy()
    supervised[asked[-1] + 1 if asked else 0 :] = False
    return replace(encoded, supervised=supervised)


@torch.inference_mode()
def score(vlm: VLM, answers: Sequence[Encoded]) -> list[Score]:
    """Score the taught tokens of each conversation, side by side; each gets what it would get alone.

    answers: from `encode_answer`. One without taught tokens has log probability 0 and is greedy.
    """
    counts = [each.measure.num_supervised for each in answers]
    if not any(counts):
        return [Score(0.0, True, 0) for _ in answers]
    batch = pad(answers).to(vlm.decoder.embed.weight.device)
    places, targets = batch.targets()
    hidden = vlm.hidden(batch, wanted=places)
    logs, greedy = [], []
    for start in range(0, len(targets), CHUNK):
        logits = vlm.logits(hidden[start : start + CHUNK]).float()
        ids = targets[start : start + CHUNK]
        logs.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].double())
        greedy.append(logits.argmax(-1) == ids)
    parts = zip(torch.cat(logs).split(counts), torch.cat(greedy).split(counts), counts, strict=True)
    return [Score(float(log.sum()), bool(equal.all()), count) for log, equal, count in parts]
