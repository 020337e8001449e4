"""What tests of evaluations share: rows in files, and a model whose answers they write themselves."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import toys
from opsin.encode import Encoded
from opsin.evaluate.answering import Said
from opsin.text.messages import Conversation

Writer = Callable[..., Path]


def writer(folder: Path) -> Writer:
    """Writes rows as JSON lines beside pictures a.png (80x60), b.png (60x90) and c.png (40x40)."""
    for number, (name, size) in enumerate({"a": (80, 60), "b": (60, 90), "c": (40, 40)}.items()):
        toys.picture(size, number).save(folder / f"{name}.png")

    def to_file(*rows: Mapping[str, Any], name: str = "rows.jsonl") -> Path:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / name

    return to_file


class Puppet:
    """Gives the answers that a test has written, and keeps what it was asked."""

    def __init__(self, answer: Callable[[Conversation], str], *, stop_after: int | None = None) -> None:
        """stop_after: batches before Ctrl-C is pressed."""
        self._answer, self._stop_after = answer, stop_after
        self.asked: list[Conversation] = []
        self.loaded = 0

    def load(self, name: str, settings: object, **options: object) -> "Puppet":
        self.loaded += 1
        return self

    def prepare(self, conversation: Conversation) -> Encoded:
        return conversation  # type: ignore[return-value]  # nothing looks inside

    def answer(self, prompts: Sequence[Any]) -> list[Said]:
        if self._stop_after is not None:
            if not self._stop_after:
                raise KeyboardInterrupt
            self._stop_after -= 1
        self.asked += prompts
        return [Said(self._answer(each), "stop_token", 3) for each in prompts]
