"""A chat format as the template text that transformers, vLLM and SGLang render prompts with.

Nothing here runs a template: it is written, once, from the same `ChatFormat` that `text.render` acts on. Its input are
messages whose content is a string or a list of parts `{"type": "text" | "image" | "video", ...}`.
"""

import json

from opsin.spec.chat import Break, ChatFormat, ImageMarkup, Pieces, Placeholder, Text

IMAGES: tuple[str, ...] = ("image", "image_url")
VIDEOS: tuple[str, ...] = ("video",)
"""What parts of these kinds call themselves."""
TEXTS = """\
{%- macro texts(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}"""


def chat_template(chat: ChatFormat, placeholder: Placeholder, *, with_begin: bool) -> str | None:
    """The template, or None for a format that none can say: with an encoder, or with pictures before everything.

    with_begin: whether it writes the begin-of-sequence token; not where the tokenizer adds one by itself.
    """
    markup = chat.markup
    pieces = (*chat.user.prefix, *chat.assistant.prefix, *chat.system_prefix)
    apart = any(isinstance(piece, Break) for piece in pieces)
    if chat.decoder_start or markup.placement == "first" or chat.user.text == "discard" or apart:
        return None
    head = _lines(
        "{%- if system -%}", _write(chat.system_prefix), "{{- system -}}", _write(chat.system_suffix), "{%- endif -%}"
    )
    before = chat.system_place == "before"
    return _lines(
        "{%- set seen = namespace(images=0, videos=0, user=false) -%}",
        TEXTS,
        _content(chat, placeholder),
        _write(chat.begin if with_begin else ()),
        f"{{%- set system = {_quote(chat.system)} -%}}",
        "{%- set turns = messages -%}",
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set system = texts(messages[0]['content']) -%}",
        "{%- set turns = messages[1:] -%}",
        "{%- endif -%}",
        head if before else "",
        *(_example(chat, role, text) for role, text in chat.example),
        "{%- for message in turns -%}",
        "{%- if message['role'] == 'user' -%}",
        _user(chat, head="" if before else head),
        "{%- elif not (loop.first and message['role'] == 'assistant') -%}"
        if chat.turns == "alternate"
        else "{%- else -%}",
        _assistant(chat),
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}",
        _write(chat.assistant.prefix),
        "{%- endif -%}",
    )


def _user(chat: ChatFormat, *, head: str) -> str:
    turn = chat.user
    whole = _lines(
        "{%- if seen.user -%}" + _write(chat.between) + "{%- endif -%}" if chat.between else "",
        _write((*turn.prefix, *turn.lead)),
        "{%- if not seen.user -%}" + head + "{%- endif -%}" if head else "",
        "{{- content -}}",
        _write(turn.suffix),
    )
    if chat.empty_turn == "prefix":
        whole = _lines("{%- if content -%}", whole, "{%- else -%}", _write(turn.prefix), "{%- endif -%}")
    return _lines("{%- set content = shown(message['content']) -%}", whole, "{%- set seen.user = true -%}")


def _assistant(chat: ChatFormat) -> str:
    turn, trim = chat.assistant, " | trim" if chat.outer_space == "cut" else ""
    answer = _lines(_write(turn.lead), "{{- answer -}}", _write(turn.suffix))
    if chat.empty_turn == "prefix":
        answer = _lines("{%- if answer -%}", answer, "{%- endif -%}")
    return _lines(f"{{%- set answer = texts(message['content']){trim} -%}}", _write(turn.prefix), answer)


def _example(chat: ChatFormat, role: str, text: str) -> str:
    turn = chat.user if role == "user" else chat.assistant
    return _write((*turn.prefix, *turn.lead, Text(text=text), *turn.suffix))


def _content(chat: ChatFormat, placeholder: Placeholder) -> str:
    """The macro `shown`: pictures and text of a user turn, in the order they are written (`text.render._content`)."""
    media = [*IMAGES, *(VIDEOS if placeholder.video else ())]
    trim = " | trim" if chat.outer_space == "cut" else ""
    order = _in_front if chat.markup.placement == "front" else _inline
    return _lines(
        "{%- macro shown(content) -%}",
        "{%- if content is string -%}{{- content" + trim + " -}}{%- else -%}",
        f"{{%- set pictures = content | selectattr('type', 'in', {media}) | list -%}}",
        order(chat, media, _slots(chat.markup, placeholder)),
        "{%- endif -%}",
        "{%- endmacro -%}",
    )


def _in_front(chat: ChatFormat, media: list[str], slots: str) -> str:
    """All pictures, then all text, whose outer white space is cut beside pictures."""
    markup = chat.markup
    follows = {"each": "not loop.last or text", "last": "loop.last and text", "always": "true"}
    cut = "true" if chat.outer_space == "cut" else "pictures"
    return _lines(
        "{%- set text = texts(content) -%}",
        "{%- if " + cut + " -%}{%- set text = text | trim -%}{%- endif -%}",
        "{%- for part in pictures -%}",
        slots,
        "{%- if " + follows[markup.separated] + " -%}" + _write(markup.separator) + "{%- endif -%}",
        "{%- endfor -%}",
        "{{- text -}}",
    )


def _inline(chat: ChatFormat, media: list[str], slots: str) -> str:
    """Pictures and text as they come."""
    markup = chat.markup
    next_is_text = "not loop.last and loop.nextitem['type'] == 'text'"
    follows = {"each": "not loop.last", "last": next_is_text, "always": "true"}
    said = "{%- set said = part['text'] -%}"
    if chat.outer_space == "cut":
        said += "{%- if loop.first -%}{%- set said = said.lstrip() -%}{%- endif -%}"
        said += "{%- if loop.last -%}{%- set said = said.rstrip() -%}{%- endif -%}"
    return _lines(
        "{%- for part in content -%}",
        "{%- if part['type'] == 'text' -%}",
        said + "{{- said -}}",
        f"{{%- elif part['type'] in {media} -%}}",
        slots,
        "{%- if " + follows[markup.separated] + " -%}" + _write(markup.separator) + "{%- endif -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
    )


def _slots(markup: ImageMarkup, placeholder: Placeholder) -> str:
    """Label, mark and what surrounds it, of the picture or video `part`."""
    kinds = [(IMAGES, "images", placeholder.image, markup.label)]
    if placeholder.video:
        kinds.append((VIDEOS, "videos", placeholder.video, markup.video_label))
    around = ("", "") if placeholder.wraps else (_write(markup.before), _write(markup.after))
    written = []
    for types, counter, token, label in kinds:
        number = f'" ~ seen.{counter} ~ "'
        told = "{{- " + _quote(label).replace("{}", number) + " -}}" if label else ""
        if label and markup.labelled == "several_beside":
            told = "{%- if pictures | length > 1 -%}" + told + "{%- endif -%}"
        written += [
            f"{{%- if part['type'] in {list(types)} -%}}",
            f"{{%- set seen.{counter} = seen.{counter} + 1 -%}}" + told,
            around[0] + "{{- " + _quote(token) + " -}}" + around[1],
            "{%- endif -%}",
        ]
    return _lines(*written)


def _write(pieces: Pieces) -> str:
    """An expression that writes template text and control tokens."""
    texts = [piece.text if isinstance(piece, Text) else piece.token for piece in pieces if not isinstance(piece, Break)]
    return "{{- " + _quote("".join(texts)) + " -}}" if any(texts) else ""


def _quote(text: str) -> str:
    """A string literal; the template language reads JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def _lines(*parts: str) -> str:
    """Parts below one another. Every tag cuts the white space on both of its sides, so line breaks are not written."""
    return "\n".join(part for part in parts if part)
