"""What the messages of a request say and show, made ready for `text.parse`.

Pictures and videos are `data:` URIs; pictures are decoded here to bytes. What a client writes is never opened as a path
or an address, because no text of its reaches the readers of files.
"""

from collections.abc import Mapping
from typing import Any

from opsin.errors import MediaError, nearest
from opsin.media.source import read, shorten, sniff
from opsin.serve.errors import RequestError
from opsin.serve.settings import Settings

FORMATS = ("JPEG", "PNG", "WebP", "GIF")
"""Pictures that are read, which are those of OpenAI's server."""

MESSAGE_KEYS: dict[str, tuple[Any, ...] | None] = {
    "role": None,
    "content": None,
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "function_call": (),
}
"""Keys of a message; None where any value may stand, else the values (null besides) that ask nothing."""

MEDIA = {"image_url": "image", "video_url": "video"}


def read_messages(messages: list[Any], settings: Settings) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The messages as `text.parse` takes them, with the bytes of pictures; and notes on what does not count.

    Raises RequestError or MediaError.
    """
    reader = _Reader(settings)
    return [reader.message(each, f"messages[{index}]") for index, each in enumerate(messages)], tuple(reader.notes)


class _Reader:
    """Reads the messages of one request."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts = {"image": 0, "video": 0}
        self.notes: list[str] = []

    def message(self, message: Any, place: str) -> dict[str, Any]:
        """One message. place: where it stands, for errors."""
        if not isinstance(message, Mapping):
            raise RequestError(f"{place} must be an object with 'role' and 'content'", param=place)
        for name, value in message.items():
            if name not in MESSAGE_KEYS:
                shown = shorten(str(name), 80)
                raise RequestError(f"{place} has an unknown key {shown!r}{nearest(shown, MESSAGE_KEYS)}", param=place)
            allowed = MESSAGE_KEYS[name]
            if allowed is not None and value is not None and value not in allowed:
                raise RequestError(
                    f"{place} has {name!r}, which this server cannot show to the model; leave it out",
                    code="unsupported_parameter",
                    param=place,
                )
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise RequestError(
                f"{place}: the role is {shorten(repr(role), 80)}; known: system, developer, user, assistant",
                param=place,
            )
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, list):
            content = [self._part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
        elif not isinstance(content, str):
            raise RequestError(f"{place}: 'content' must be text or a list of parts", param=place)
        return {"role": role, "content": content}

    def _part(self, part: Any, place: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if set(part) - {"type", "text"} or not isinstance(part.get("text"), str):
                raise RequestError(f"{place}: a text part has 'type' and 'text', and nothing else", param=place)
            return {"type": "text", "text": part["text"]}
        if not isinstance(kind, str) or kind not in MEDIA:
            raise RequestError(
                f"{place}: the type is {shorten(repr(kind), 80)}; known: text, {', '.join(MEDIA)}", param=place
            )
        value = part.get(kind)
        holder = value if isinstance(value, Mapping) else {"url": value}
        if set(part) - {"type", kind} or set(holder) - {"url", "detail"} or not isinstance(holder.get("url"), str):
            raise RequestError(
                f"{place}: a part of type {kind} is {{'type': '{kind}', '{kind}': {{'url': 'data:...;base64,...'}}}}",
                param=place,
            )
        detail = holder.get("detail")
        if detail not in (None, "auto", "high", "original", "low"):
            raise RequestError(f"{place}: 'detail' is auto, low or high", param=place)
        if detail == "low":
            self.notes.append(f"{place}: detail 'low' does not count; the model sees each picture as it always does")
        return {"type": MEDIA[kind], MEDIA[kind]: self._media(MEDIA[kind], holder["url"], place)}

    def _media(self, kind: str, url: str, place: str) -> bytes | str:
        self.counts[kind] += 1
        if self.counts[kind] > self.settings.max_images:
            raise RequestError(
                f"{place}: more than {self.settings.max_images} {kind}s, the most that a request may show",
                code="too_many_images",
                param=place,
            )
        if url[:5].lower() != "data:":
            raise RequestError(
                f"{place}: {shorten(url, 60)!r} is not a data: URI, and this server fetches and opens nothing. Send "
                f"the {kind} itself: data:{'image/jpeg' if kind == 'image' else 'video/mp4'};base64,...",
                code="address_refused",
                param=place,
            )
        if kind == "video":
            return url
        name = f"image {self.counts[kind]}"
        data, _ = read(url, self.settings.limits, name)
        format_name = sniff(data, name)
        if format_name not in FORMATS:
            raise MediaError(f"{name}: is a {format_name} picture; this server reads {', '.join(FORMATS)}.")
        return data
