"""Answers in the shapes of OpenAI's protocol. What is not of the protocol stands under `opsin`."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from opsin.generate.decode import Answer, Finish
from opsin.serve.service import Prepared
from opsin.spec.model import VLMConfig
from opsin.text.grounding import read, spell
from opsin.text.tokenizer import Tokenizer

FINISH: dict[Finish, str] = {"stop_token": "stop", "stop_string": "stop", "length": "length"}


class Reply:
    """Writes the answers to one request."""

    def __init__(self, prepared: Prepared, *, name: str, config: VLMConfig, tokenizer: Tokenizer) -> None:
        """name: what clients call the model."""
        self.prepared = prepared
        self._config = config
        self._tokenizer = tokenizer
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The complete answer."""
        choices = [
            {
                "index": answer.sequence,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": FINISH[answer.finish],
                **self._boxes(answer),
            }
            for answer in sorted(answers, key=lambda each: each.sequence)
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self.usage(answers), "opsin": self._extra()}

    def opening(self) -> dict[str, Any]:
        """The first chunk of a streamed answer: who speaks, in all choices, and what was done to the pictures."""
        number = self.prepared.request.sampling.num_sequences
        choices = [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            for index in range(number)
        ]
        return {**self._chunk(choices), "opsin": self._extra()}

    def piece(self, sequence: int, text: str) -> dict[str, Any]:
        """A chunk with some text."""
        return self._chunk([{"index": sequence, "delta": {"content": text}, "finish_reason": None}])

    def end(self, answer: Answer) -> dict[str, Any]:
        """The last chunk of one choice."""
        choice = {"index": answer.sequence, "delta": {}, "finish_reason": FINISH[answer.finish]}
        return self._chunk([{**choice, **self._boxes(answer)}])

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk behind all choices, where it is asked for."""
        return {**self._chunk([]), "usage": self.usage(answers)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.prepared.request.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **usage}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Tokens of the prompt, once, and of all answers; and how each picture was shown."""
        prompt = self.prepared.prompt
        new = sum(answer.usage.new_tokens for answer in answers)
        shown = [
            {
                "kind": "video" if image.plan.frames else "image",
                "size": image.plan.size,
                "shown_at": [canvas.size for canvas in image.plan.canvases],
                "tiles": image.plan.num_tiles,
                "tokens": image.plan.num_slots,
                **({"frames": len(image.plan.frames)} if image.plan.frames else {}),
            }
            for image in prompt.images
        ]
        return {
            "prompt_tokens": prompt.num_tokens,
            "completion_tokens": new,
            "total_tokens": prompt.num_tokens + new,
            "prompt_tokens_details": {
                "cached_tokens": 0,
                "text_tokens": prompt.num_tokens - prompt.num_image_tokens,
                "image_tokens": prompt.num_image_tokens,
            },
            "image_details": shown,
        }

    def _extra(self) -> dict[str, Any]:
        """What was really done: settings that count, and notes on pictures and on what does not count."""
        sampling, request = self.prepared.request.sampling, self.prepared.request
        return {
            "sampling": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "repetition_penalty": sampling.repetition_penalty,
                "seed": sampling.seed,
                "max_tokens": sampling.max_new_tokens,
            },
            "notes": [*request.notes, *self.prepared.prompt.notes],
        }

    def _boxes(self, answer: Answer) -> dict[str, Any]:
        """Boxes that the answer names, in pixels of the last picture as it is shown upright (see `Chat.boxes`)."""
        grounding = self._config.chat.grounding
        pictures = [image.plan for image in self.prepared.prompt.images if not image.plan.frames]
        if grounding is None or not pictures:
            return {}
        found = read(spell(answer.ids, self._tokenizer, grounding), grounding, pictures[-1].size)
        if not found.boxes and not found.unread:
            return {}
        boxes = [{"label": box.label, "box": box.sides, "image": len(pictures)} for box in found.boxes]
        return {"opsin": {"boxes": boxes, "unread": found.unread}}
