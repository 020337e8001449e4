"""`opsin chat --json`: an answer for programs."""

from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsin.generate import Chat


def answer_as_json(session: "Chat", text: str, images: list[str], videos: list[str], *, load_seconds: float) -> str:
    """One answer with what was shown, what it took and how it ended."""
    answer = session.ask(text, *images, videos=videos)
    assert session.prompt is not None
    plans = [image.plan for image in session.prompt.images if not image.plan.frames]
    clips = [image.plan for image in session.prompt.images if image.plan.frames]
    pictures = [
        {"picture": path, "size": plan.size, "tiles": plan.num_tiles, "tokens": plan.num_slots}
        for path, plan in zip(images, plans, strict=True)
    ]
    shown = [
        {"video": path, "size": plan.size, "frames": plan.frames, "tokens": plan.num_slots}
        for path, plan in zip(videos, clips, strict=True)
    ]
    usage: dict[str, Any] = asdict(answer.usage)
    usage["prompt_tokens"] = answer.usage.text_tokens + answer.usage.image_tokens
    return dumps(
        {
            "model": str(getattr(session.model, "name", "")),
            "text": answer.text,
            "finish": answer.finish,
            "usage": usage,
            "pictures": pictures,
            **({"videos": shown} if shown else {}),
            "notes": session.prompt.notes,
            "seconds": {
                "load": round(load_seconds, 3),
                "prefill": round(answer.prefill_seconds, 3),
                "decode": round(answer.decode_seconds, 3),
            },
        },
        indent=1,
        ensure_ascii=False,
    )
