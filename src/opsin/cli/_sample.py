"""`opsin data show`: one sample as the model will see it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.text import Text

from opsin.cli._datasets import Dataset
from opsin.cli.show import describe_picture
from opsin.data.check import Rules, open_file
from opsin.data.overlong import fit
from opsin.encode import Encoder
from opsin.errors import DataError
from opsin.inspect.tokens import ids_text, legend_text, mask_pieces, mask_text
from opsin.text.messages import Conversation


def open_sample(dataset: Dataset, index: int) -> Conversation:
    """One record of a set's files, counted through them."""
    place = index
    for file in dataset.files:
        source = open_file(file)
        if place < len(source):
            return source.sample(place, 0)
        place -= len(source)
    raise DataError(f"there is no record {index}: the data has {index - place}, counted from 0")


def sample_text(conversation: Conversation, encoder: Encoder, rules: Rules) -> Iterator[Text]:
    """What to print about it."""
    yield Text(conversation.id, "bold")
    encode = partial(encoder.encode, mode="train")
    encoded = encode(conversation)
    if rules.max_tokens is not None:
        encoded = fit(
            encoded,
            conversation,
            max_tokens=rules.max_tokens,
            overlong=rules.overlong,
            encode=encode,
            smaller=rules.smaller,
        )
    yield Text(
        f"{encoded.num_tokens} tokens, {encoded.num_image_tokens} of pictures, {encoded.num_supervised} taught; "
        f"the limit is {rules.max_tokens}"
    )
    for number, image in enumerate(encoded.images, start=1):
        kind = "video" if image.plan.frames else "picture"
        yield Text(f"{kind} {number}: {image.plan.num_tiles} tiles, {image.plan.num_slots} tokens", "blue")
        name = _name(conversation, number - 1) if kind == "picture" else kind
        yield Text("\n".join(describe_picture(name, image.plan, "rows of the connector")).strip("\n"))
    for note in encoded.notes:
        yield Text(f"note: {note}", "yellow")
    pieces = mask_pieces(encoded, encoder.tokenizer)
    yield Text.assemble("\n", legend_text(), "\n")
    yield mask_text(pieces)
    yield Text("\ntokens with their ids; * is taught\n", "bold")
    yield ids_text(pieces)


def _name(conversation: Conversation, index: int) -> str:
    shown = conversation.images[index] if index < len(conversation.images) else None
    return Path(shown).name if isinstance(shown, str | Path) and len(str(shown)) < 300 else f"picture {index + 1}"
