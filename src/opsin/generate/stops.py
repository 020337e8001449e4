"""The text of an answer while it grows: whole characters only, nothing of a stop string, no white space around it."""

from collections.abc import Sequence
from dataclasses import dataclass

from opsin.errors import GenerationError
from opsin.spec.chat import ChatFormat
from opsin.text.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class Stops:
    """What ends an answer."""

    ids: frozenset[int]
    strings: tuple[str, ...]

    @classmethod
    def of(
        cls, chat: ChatFormat, tokenizer: Tokenizer | None, *, ids: Sequence[int] = (), strings: Sequence[str] = ()
    ) -> "Stops":
        """Those of the chat format, and some more. Without a tokenizer only `ids` remain.

        A stop token that the tokenizer does not have is an error: answers would run on to their last allowed token.
        """
        if tokenizer is None:
            if strings:
                raise GenerationError("stop strings need a tokenizer: without one, answers are ids alone")
            return cls(frozenset(ids), ())
        named = (tokenizer.control_id(token) for token in chat.stop_tokens)
        return cls(frozenset((*named, *ids)), (*chat.stop_strings, *strings))


class AnswerText:
    """Turns ids into text piece by piece. What is handed out is final: joined, the pieces are the answer.

    Held back are half a character, the beginning of what may become a stop string, and white space, which is dropped at
    both ends of the answer (the authors' code strips answers too: formats begin them with a space of their own).
    """

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._stop_strings = stop_strings
        self._held = ""
        self._spaces = ""
        self._begun = False

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that is certain now and was not before, and whether a stop string has ended the answer."""
        if self._stream is None:
            return "", False
        return self._take(self._stream.push(token_id))

    def finish(self) -> str:
        """What was held back, when no more ids come and no stop string ended the answer."""
        if self._stream is None:
            return ""
        text, stopped = self._take(self._stream.finish())
        return text if stopped else text + self._trim(self._held)

    def _take(self, text: str) -> tuple[str, bool]:
        text = self._held + text
        # The one that is complete first, so that it does not matter in which portions the text comes.
        found = [(place + len(stop), place) for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if found:
            return self._trim(text[: min(found)[1]]), True
        certain = len(text) - self._possible_stop(text)
        self._held = text[certain:]
        return self._trim(text[:certain]), False

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        return max(
            (
                length
                for stop in self._stop_strings
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )

    def _trim(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        inner = text.rstrip()
        if not inner:
            self._spaces += text
            return ""
        text, self._spaces = self._spaces + inner, text[len(inner) :]
        return text
