"""Captions cut in two, as BLIP-2 teaches models with an encoder (arXiv:2301.12597 section 3.3)."""

from dataclasses import replace

from opsin.data.order import derive_seed
from opsin.data.source import Fingerprinted, Source
from opsin.encode import Encoded
from opsin.errors import DataError
from opsin.text.messages import Conversation, Message, TextPart


class SplitCaptions:
    """Another source's conversations, whose last answer is cut between two words: the user says what stands before.

    Where it is cut follows from seed, epoch and sample. The answer keeps a word at least; all others may be the user's.
    """

    def __init__(self, source: Source, *, seed: int) -> None:
        self.source, self.seed = source, seed

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, epoch: int) -> Conversation | Encoded:
        """One conversation. Raises DataError for one that does not end with an answer to a single turn."""
        conversation = self.source.sample(index, epoch)
        if not isinstance(conversation, Conversation):
            raise DataError("captions are split in conversations; this source encodes for itself")
        roles = [message.role for message in conversation.messages]
        if roles != ["user", "assistant"]:
            raise DataError(f"{conversation.id or f'sample {index}'}: to be split, a caption is the only answer")
        asked, answer = conversation.messages
        words = answer.text.split()
        if not words:
            raise DataError(f"{conversation.id or f'sample {index}'}: there is no caption to split")
        at = derive_seed(self.seed, "split", epoch, index) % len(words)
        shown = tuple(part for part in asked.parts if not isinstance(part, TextPart))
        prefix = (TextPart(" ".join(words[:at])),) if at else ()
        rest = (TextPart(" ".join(words[at:])),)
        return replace(conversation, messages=(Message("user", (*shown, *prefix)), Message("assistant", rest)))

    @property
    def fingerprint(self) -> str:
        """That of the source."""
        return self.source.fingerprint if isinstance(self.source, Fingerprinted) else ""
