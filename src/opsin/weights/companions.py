"""What stands beside an export for transformers, so that its Auto classes, vLLM and SGLang take the folder as it is.

The tokenizer with the tokens that mark pictures, the chat template, and how an answer ends. config.json and the
processors' files are the family's (`Family.write`).
"""

import json
from collections.abc import Mapping
from typing import Any

from opsin.spec.model import VLMConfig
from opsin.text.template import chat_template
from opsin.text.tokenizer import MARK, Tokenizer, read_added, read_json
from opsin.weights.loader import Model

TEMPLATE = "chat_template.jinja"
TOKENIZER, TOKENIZER_CONFIG, LLAMA = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"

Files = dict[str, bytes]


def companions(model: Model) -> Files:
    """The tokenizer's files and the chat template, by file name; nothing for a model without a tokenizer."""
    if not model.has_tokenizer:
        return {}
    tokenizer = model.tokenizer
    names = _placeholders(model)
    ids = {"image": model.config.image_token_id, "video": model.config.video_token_id}
    marks = {names[kind]: token_id for kind, token_id in ids.items() if kind in names and token_id is not None}
    placeholder = model.family.placeholder.replace(**names)
    files = with_marks(tokenizer, marks, placeholder.attributes)
    # As in the -hf repositories: the template leaves to the tokenizer what the tokenizer writes by itself.
    template = chat_template(model.config.chat, placeholder, with_begin=not adds_begin(files))
    if template is not None:
        files[TEMPLATE] = template.encode()
    return files


def generation(model: Model) -> dict[str, Any]:
    """generation_config.json: how the model's own says it, and otherwise how the chat format ends an answer."""
    if not model.has_tokenizer:
        return dict(model.generation)
    tokenizer, chat = model.tokenizer, model.config.chat
    ends = [tokenizer.controls[token] for token in chat.stop_tokens if token in tokenizer.controls]
    for text in chat.stop_strings:
        ids = tokenizer.encode(text, "after_control").ids
        ends += ids if len(ids) == 1 else []  # longer ones cannot be said there
    known: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    names = _special(tokenizer)
    for key in ("bos", "pad"):
        if names.get(f"{key}_token") in tokenizer.controls:
            known[f"{key}_token_id"] = tokenizer.controls[names[f"{key}_token"]]
    if chat.decoder_start:
        known["decoder_start_token_id"] = tokenizer.control_id(chat.decoder_start)
    return known | model.generation


def _placeholders(model: Model) -> dict[str, str]:
    """Text of the marks: as the tokenizer calls the config's ids, or as the published repositories do."""
    config: VLMConfig = model.config
    by_id = {token_id: name for name, token_id in model.tokenizer.controls.items()}
    names = {"image": model.family.placeholder.image, "video": model.family.placeholder.video}
    for kind, token_id in (("image", config.image_token_id), ("video", config.video_token_id)):
        if token_id in by_id:
            names[kind] = by_id[token_id]
    return {kind: name for kind, name in names.items() if name}


def with_marks(tokenizer: Tokenizer, tokens: Mapping[str, int], attributes: Mapping[str, str]) -> Files:
    """A tokenizer's files with more control tokens at given ids, which lie behind its own.

    attributes: tokens that transformers' tokenizer shows under these names, for its processor.

    Ids between are filled with tokens that no text becomes: transformers counts added tokens without gaps.
    """
    files = dict(tokenizer.files)
    new = {token_id: name for name, token_id in tokens.items() if name not in tokenizer.controls}
    if new:
        last = max(new)
        for token_id in range(tokenizer.vocab_size, last):
            new.setdefault(token_id, f"<|unused_{token_id}|>")
    config = read_json(files, TOKENIZER_CONFIG)
    if TOKENIZER in files or LLAMA in files:
        data = read_json(files, TOKENIZER) or _converted(files)
        if data is not None:
            listed = data.get("added_tokens") or []
            data["added_tokens"] = [*listed, *({"id": i, "content": new[i], **MARK} for i in sorted(new))]
            files[TOKENIZER] = _dump(data)
            config.setdefault("tokenizer_class", "LlamaTokenizer" if LLAMA in files else "PreTrainedTokenizerFast")
    if new:
        own = config.get("added_tokens_decoder", {})
        config["added_tokens_decoder"] = {**own, **{str(i): {"content": new[i], **MARK} for i in sorted(new)}}
    if attributes:
        config["extra_special_tokens"] = dict(attributes)
    files[TOKENIZER_CONFIG] = _dump({**_special(tokenizer), **config})
    return files


def _converted(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """tokenizer.json in place of a tokenizer.model, with the tokens that the folder's other files add."""
    from opsin.text._to_json import to_json

    data = to_json(files)
    if data is not None:
        known = {token["id"] for token in data["added_tokens"]}
        added = sorted((number, name) for name, number in read_added(files).items() if number not in known)
        data["added_tokens"] += [{"id": number, "content": name, **MARK} for number, name in added]
    return data


def adds_begin(files: Mapping[str, bytes]) -> bool:
    """Whether transformers' tokenizer of these files begins every text with a begin-of-sequence token."""
    config = read_json(files, TOKENIZER_CONFIG)
    if (said := config.get("add_bos_token")) is not None:
        return bool(said)
    processor = read_json(files, TOKENIZER).get("post_processor") or {}
    parts = [processor, *(processor.get("processors") or [])]
    return any("SpecialToken" in first for part in parts for first in (part.get("single") or [])[:1])


def _special(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer's special tokens by role; those not named are the customary ones of its vocabulary."""
    files = tokenizer.files
    said = {**read_json(files, "special_tokens_map.json"), **read_json(files, TOKENIZER_CONFIG)}
    customary = {
        "bos_token": ("<s>",),
        "eos_token": ("</s>", "<|im_end|>", "<|endoftext|>"),
        "unk_token": ("<unk>",),
        "pad_token": ("<pad>", "<|endoftext|>", "<unk>", "</s>"),
    }
    names: dict[str, str] = {}
    for role, candidates in customary.items():
        own = said.get(role)
        name = own.get("content") if isinstance(own, dict) else own
        if name is None:
            name = next((each for each in candidates if each in tokenizer.controls), None)
        if name is not None:
            names[role] = name
    return names


def _dump(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
