"""Qwen-VL's pictures in text: `<img>PATH</img>`, whose path the authors' tokenizer writes into the picture's slots.

A picture has 256 slots. The authors' tokenizer fills them with the bytes of the path, each byte as the id of that
number (id 97 for `a`), and then with `<imgpad>`; their model reads the path back from the ids and opens it. Nothing
here does: pictures are given beside a conversation, all slots hold `<imgpad>`, and rows take their place before any
layer sees the ids. These functions write and read the authors' ids, for other programs and for comparison with theirs.
"""

from collections.abc import Sequence

from opsin.errors import TokenizerError

NUM_SLOTS = 256
BEGIN, END = "<img>", "</img>"


def path_ids(path: str, *, pad_id: int, num_slots: int = NUM_SLOTS) -> list[int]:
    """What stands in the slots of a picture of that path. Raises TokenizerError for a path that does not fit."""
    data = path.encode()
    if len(data) > num_slots:
        raise TokenizerError(
            f"the path {path[:40]!r}... takes {len(data)} bytes, and a picture has {num_slots} slots; use a shorter "
            f"path (the authors' model can read {num_slots - 2} bytes of it)"
        )
    return [*data, *[pad_id] * (num_slots - len(data))]


def path_of(ids: Sequence[int], *, pad_id: int) -> str:
    """The path in the slots of a picture. Raises TokenizerError where they hold anything but bytes and padding."""
    length = ids.index(pad_id) if pad_id in ids else len(ids)
    if any(token_id > 255 for token_id in ids[:length]):
        raise TokenizerError(f"the {len(ids)} slots of a picture hold ids that are no bytes of a path")
    return bytes(ids[:length]).decode("utf-8", "replace")


def split_pictures(text: str) -> tuple[list[str], list[str]]:
    """The texts around the pictures of a text, one more than there are pictures, and the paths between them.

    Raises TokenizerError where `<img>` is not closed. A path is a name only: nothing is opened.
    """
    texts, paths = [], []
    while BEGIN in text:
        before, after = text.split(BEGIN, 1)
        if END not in after:
            raise TokenizerError(
                f"{BEGIN} at character {len(before) + 1} of {text[:40]!r} is not closed; write {END} after the path"
            )
        path, text = after.split(END, 1)
        texts.append(before)
        paths.append(path)
    return [*texts, text], paths
