"""Chat formats, one value each.

Names in the LLaVA line are those of the authors' `conv_templates` (llava/conversation.py). Two of their formats are
written differently for training than for inference, and so are two values here: `v0` and `v0_train`, `plain_prompt` and
`plain`.
"""

from opsin.families._blip2_parts import BLIP2_CHATS
from opsin.families._grounding import INTERNVL_BOXES, LLAVA_BOXES, QWEN2_VL_BOXES, QWEN_VL_BOXES
from opsin.spec.chat import AssistantTurn, Break, ChatFormat, Control, ImageMarkup, Piece, Text, UserTurn

BOS = Control(token="<s>")
EOS = Control(token="</s>", supervised=True)

LLAVA_MARKUP = ImageMarkup(separator=(Text(text="\n"),))
"""`<image>`, a newline, then the question (preprocess_multimodal)."""
MMTAG_MARKUP = LLAVA_MARKUP.replace(before=(Text(text="<Image>"),), after=(Text(text="</Image>"),))

HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
USER_SYSTEM = HUMAN_SYSTEM.replace("human", "user")
MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
V0_EXAMPLE = (
    ("user", "What are the key differences between renewable and non-renewable energy sources?"),
    (
        "assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
        "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
        "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
        "between renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources are "
        "finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
        "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
        "operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
        "than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
        "and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
        "sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _taught(text: str) -> Text:
    return Text(text=text, supervised=True)


def _separated(name: str, system: str, *, markup: ImageMarkup = LLAVA_MARKUP) -> ChatFormat:
    """v0 as it is written for inference: `{system}###Human: {question}###Assistant: {answer}###`."""
    return ChatFormat(
        name=name,
        system=system,
        begin=(BOS,),
        system_suffix=(Text(text="###"),),
        user=UserTurn(prefix=(Text(text="Human:"),), lead=(Text(text=" "),), suffix=(Text(text="###"),)),
        assistant=AssistantTurn(prefix=(Text(text="Assistant:"),), lead=(_taught(" "),), suffix=(_taught("###"),)),
        turns="any",
        markup=markup,
        stop_tokens=("</s>",),
        stop_strings=("###",),
    )


def _separated_training(name: str, system: str, *, markup: ImageMarkup = LLAVA_MARKUP) -> ChatFormat:
    """v0 as it is written for training (train.py, preprocess and _mask_targets).

    Not only answers are taught: so is `###`, which ends an answer, wherever it opens a turn, and the assistant's name.
    """
    return ChatFormat(
        name=name,
        system=system,
        begin=(BOS,),
        system_suffix=(Text(text="\n\n"),),
        user=UserTurn(prefix=(_taught("###"), Text(text=" Human:")), lead=(Text(text=" "),), suffix=(Text(text="\n"),)),
        assistant=AssistantTurn(prefix=(_taught("### Assistant:"),), lead=(_taught(" "),), suffix=(_taught("\n"),)),
        end=(_taught("### "),),
        turns="any",
        empty_turn="whole",
        markup=markup,
        stop_tokens=("</s>",),
        stop_strings=("###",),
    )


def _vicuna(name: str, system: str, *, markup: ImageMarkup = LLAVA_MARKUP) -> ChatFormat:
    """v1: `{system} USER: {question} ASSISTANT: {answer}</s>USER: ...`."""
    return ChatFormat(
        name=name,
        system=system,
        begin=(BOS,),
        system_suffix=(Text(text=" "),),
        user=UserTurn(prefix=(Text(text="USER:"),), lead=(Text(text=" "),), suffix=(Text(text=" "),)),
        assistant=AssistantTurn(prefix=(Text(text="ASSISTANT:"),), lead=(_taught(" "),), suffix=(EOS,)),
        markup=markup,
        stop_tokens=("</s>",),
    )


def _llama_2(name: str, system: str, *, between: tuple[Piece, ...] = (BOS,)) -> ChatFormat:
    """Llama-2 chat: `[INST] <<SYS>>...<</SYS>> {question} [/INST] {answer} </s>`, `<s>` before later questions."""
    return ChatFormat(
        name=name,
        system=system,
        begin=(BOS,),
        system_prefix=(Text(text="<<SYS>>\n"),),
        system_suffix=(Text(text="\n<</SYS>>\n\n"),),
        system_place="in_first_user",
        between=between,
        user=UserTurn(lead=(Text(text="[INST] "),), suffix=(Text(text=" [/INST]"),)),
        assistant=AssistantTurn(lead=(_taught(" "),), suffix=(_taught(" "), EOS)),
        markup=LLAVA_MARKUP,
        stop_tokens=("</s>",),
    )


def _chatml(name: str, system: str) -> ChatFormat:
    """ChatML without line breaks between turns. Its tokenizers (Yi, GPT-NeoX) add no begin-of-sequence token.

    The authors never released working training code for it; answers and the token that ends them are taught.
    """
    start, end = Control(token="<|im_start|>"), Control(token="<|im_end|>")
    return ChatFormat(
        name=name,
        system=system,
        system_prefix=(start, Text(text="system\n")),
        system_suffix=(end,),
        user=UserTurn(prefix=(start, Text(text="user\n")), suffix=(end,)),
        assistant=AssistantTurn(prefix=(start, Text(text="assistant\n")), suffix=(end.replace(supervised=True),)),
        turns="any",
        markup=LLAVA_MARKUP,
        stop_tokens=("<|im_end|>",),
    )


LLAVA_V0 = _separated("llava_v0", HUMAN_SYSTEM)
V0 = LLAVA_V0.replace(name="v0", example=V0_EXAMPLE)
V0_MMTAG = _separated("v0_mmtag", MMTAG_SYSTEM, markup=MMTAG_MARKUP)
V0_TRAIN = _separated_training("v0_train", HUMAN_SYSTEM)
V0_MMTAG_TRAIN = _separated_training("v0_mmtag_train", MMTAG_SYSTEM, markup=MMTAG_MARKUP)
V1 = _vicuna("v1", USER_SYSTEM).replace(grounding=LLAVA_BOXES)
LLAVA_V1 = _vicuna("llava_v1", HUMAN_SYSTEM)
V1_MMTAG = _vicuna("v1_mmtag", MMTAG_SYSTEM, markup=MMTAG_MARKUP)
LLAMA_2 = _llama_2("llama_2", LLAMA_2_SYSTEM)
LLAVA_LLAMA_2 = _llama_2("llava_llama_2", LLAVA_LLAMA_2_SYSTEM)
MISTRAL_INSTRUCT = _llama_2("mistral_instruct", "", between=())
CHATML_DIRECT = _chatml("chatml_direct", "Answer the questions.")
MPT = _chatml(
    "mpt",
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
)
PLAIN = ChatFormat(
    name="plain",
    begin=(BOS,),
    user=UserTurn(text="discard"),
    assistant=AssistantTurn(suffix=(_taught("\n"),)),
    empty_turn="whole",
    markup=LLAVA_MARKUP,
    stop_tokens=("</s>",),
    stop_strings=("\n",),
)
"""Captions (stage 1): the picture, its caption, a newline. The instruction is thrown away and no `</s>` is learnt."""
PLAIN_PROMPT = PLAIN.replace(name="plain_prompt", user=UserTurn(suffix=(Text(text="\n"),)), empty_turn="prefix")
"""What the authors' get_prompt writes for `plain`: unlike in training, the user's text stays."""

QWEN_VL_MARKUP = ImageMarkup(
    label="Picture {}:",
    labelled="beside",
    before=(Control(token="<img>"),),
    after=(Control(token="</img>"),),
    placement="inline",
    separator=(Text(text="\n"),),
    separated="always",
)
"""`Picture 1:<img>...</img>` and a line break (tokenization_qwen.py, from_list_format). Text that says where pictures
belong numbers them itself, as the README's training data does."""
QWEN_VL_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
"""Of the nine tags that make_context finds in messages, those that are no picture's."""
QWEN_VL_CHAT = ChatFormat(
    name="qwen_vl_chat",
    system="You are a helpful assistant.",
    system_prefix=(Control(token="<|im_start|>", supervised=True), Text(text="system\n"), Break()),
    system_suffix=(Control(token="<|im_end|>", supervised=True), _taught("\n")),
    user=UserTurn(
        prefix=(Control(token="<|im_start|>", supervised=True), Text(text="user\n"), Break()),
        suffix=(Control(token="<|im_end|>", supervised=True), _taught("\n")),
    ),
    assistant=AssistantTurn(
        prefix=(Control(token="<|im_start|>", supervised=True), Text(text="assistant\n"), Break()),
        suffix=(Control(token="<|im_end|>", supervised=True), _taught("\n")),
    ),
    turns="any",
    empty_turn="whole",
    markup=QWEN_VL_MARKUP,
    tags=QWEN_VL_TAGS,
    grounding=QWEN_VL_BOXES,
    stop_tokens=("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
)
"""Qwen-VL-Chat (qwen_generation_utils.py, make_context; finetune.py, preprocess). The authors' code also teaches the
marks of turns, those of system and user included."""
QWEN_VL_BASE = ChatFormat(
    name="qwen_vl_base",
    user=UserTurn(),
    assistant=AssistantTurn(suffix=(Control(token="<|endoftext|>", supervised=True),)),
    turns="any",
    empty_turn="whole",
    markup=QWEN_VL_MARKUP,
    tags=QWEN_VL_TAGS,
    grounding=QWEN_VL_BOXES,
    stop_tokens=("<|endoftext|>",),
)
"""Qwen-VL: contents one after the other (the `raw` format of make_context), answers ended by `<|endoftext|>`."""

VISION_MARKUP = ImageMarkup(
    before=(Control(token="<|vision_start|>"),), after=(Control(token="<|vision_end|>"),), placement="inline"
)
"""Qwen2-VL: pictures and videos between two tokens, wherever they stand in the text."""
QWEN2_VL = ChatFormat(
    name="qwen2_vl",
    system="You are a helpful assistant.",
    system_prefix=(Control(token="<|im_start|>"), Text(text="system\n")),
    system_suffix=(Control(token="<|im_end|>"), Text(text="\n")),
    user=UserTurn(
        prefix=(Control(token="<|im_start|>"), Text(text="user\n")),
        suffix=(Control(token="<|im_end|>"), Text(text="\n")),
    ),
    assistant=AssistantTurn(
        prefix=(Control(token="<|im_start|>"), Text(text="assistant\n")),
        suffix=(Control(token="<|im_end|>", supervised=True), _taught("\n")),
    ),
    turns="any",
    empty_turn="whole",
    markup=VISION_MARKUP,
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    grounding=QWEN2_VL_BOXES,
)
"""Qwen2-VL-Instruct: the published chat template. Answers are taught with `<|im_end|>` and the line break after it, as
2U1/Qwen2-VL-Finetune does; the authors' own training code is not published."""
QWEN2_VL_NUMBERED = QWEN2_VL.replace(
    name="qwen2_vl_numbered", markup=VISION_MARKUP.replace(label="Picture {}: ", video_label="Video {}: ")
)
"""The same with the template's `add_vision_id`: for questions about several pictures by number."""
QWEN2_VL_BASE = ChatFormat(
    name="qwen2_vl_base",
    user=UserTurn(),
    assistant=AssistantTurn(suffix=(Control(token="<|endoftext|>", supervised=True),)),
    turns="any",
    empty_turn="whole",
    markup=VISION_MARKUP,
    stop_tokens=("<|endoftext|>", "<|im_end|>"),
    grounding=QWEN2_VL_BOXES,
)
"""Qwen2-VL base models: contents one after the other, nothing around them. Their template writes no answers; that these
end with `<|endoftext|>` is ours, after generation_config.json, which stops at it."""

INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
INTERNVL_25_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
RELEASE_MARKUP = ImageMarkup(
    label="<image {}> (图{}):",
    labelled="several_beside",
    before=(Control(token="<img>"),),
    after=(Control(token="</img>"),),
    placement="inline",
    separator=(Text(text="\n"),),
    separated="last",
)
"""InternVL-1.5 on its first day: a picture, a line break, the question; several are numbered and not broken."""
INTERNVL_MARKUP = RELEASE_MARKUP.replace(label="Image-{}: ", separated="each")
"""The same in later code, which leaves the words to people and recommends these."""


def _internvl(name: str, system: str, *, markup: ImageMarkup, newline: bool = False) -> ChatFormat:
    """InternVL's chat for InternLM2. newline: whether a line break, never taught, follows each turn (InternVL-2.5)."""
    start, end = Control(token="<|im_start|>"), Control(token="<|im_end|>")
    after = (Text(text="\n"),) if newline else ()
    return ChatFormat(
        name=name,
        system=system,
        begin=(BOS,),
        system_prefix=(start, Text(text="system\n")),
        system_suffix=(end, *after),
        user=UserTurn(prefix=(start, Text(text="user\n")), suffix=(end, *after)),
        assistant=AssistantTurn(
            prefix=(start, Text(text="assistant\n")), suffix=(end.replace(supervised=True), *after)
        ),
        outer_space="cut",
        empty_turn="whole",
        markup=markup,
        stop_tokens=("<|im_end|>", "<|im_start|>", "</s>"),
        grounding=INTERNVL_BOXES,
    )


INTERNLM2_CHAT = _internvl(
    "internlm2_chat", "You are an AI assistant whose name is InternLM (书生·浦语).", markup=RELEASE_MARKUP
)
"""InternVL-Chat-V1-5 and Mini 2B as they were trained and released (conversation.py at a08ba33)."""
INTERNLM2_CHAT_LATER = _internvl("internlm2_chat_later", INTERNVL_SYSTEM, markup=INTERNVL_MARKUP)
"""The template of that name since InternVL2, which the repositories' code has come to use for 1.5 as well."""
INTERNVL_25 = _internvl("internvl2_5", INTERNVL_25_SYSTEM, markup=INTERNVL_MARKUP, newline=True)
INTERNVL_HF = INTERNVL_25.replace(
    name="internvl_hf", system="", begin=(), markup=INTERNVL_MARKUP.replace(label=""), stop_tokens=("<|im_end|>",)
)
"""transformers' own InternVL: no system text, no begin-of-sequence token, pictures not numbered."""
PHI3_CHAT = ChatFormat(
    name="phi3_chat",
    system="You are an AI assistant whose name is Phi-3.",
    begin=(BOS,),
    system_prefix=(Control(token="<|system|>"), Text(text="\n")),
    system_suffix=(Control(token="<|end|>"),),
    user=UserTurn(prefix=(Control(token="<|user|>"), Text(text="\n")), suffix=(Control(token="<|end|>"),)),
    assistant=AssistantTurn(
        prefix=(Control(token="<|assistant|>"), Text(text="\n")),
        suffix=(Control(token="<|end|>", supervised=True),),
    ),
    outer_space="cut",
    empty_turn="whole",
    markup=RELEASE_MARKUP,
    stop_tokens=("<|end|>", "<|endoftext|>", "</s>"),
    grounding=INTERNVL_BOXES,
)
"""Mini-InternVL 4B as it was trained and released (conversation.py at 0556aa8)."""
PHI3_CHAT_LATER = PHI3_CHAT.replace(name="phi3_chat_later", system=INTERNVL_SYSTEM, markup=INTERNVL_MARKUP)

CHATS: dict[str, ChatFormat] = {
    chat.name: chat
    for chat in (
        V0,
        V0_TRAIN,
        LLAVA_V0,
        V0_MMTAG,
        V0_MMTAG_TRAIN,
        V1,
        LLAVA_V1,
        V1_MMTAG,
        LLAMA_2,
        LLAVA_LLAMA_2,
        MISTRAL_INSTRUCT,
        CHATML_DIRECT,
        MPT,
        PLAIN,
        PLAIN_PROMPT,
        QWEN_VL_CHAT,
        QWEN_VL_BASE,
        QWEN2_VL,
        QWEN2_VL_NUMBERED,
        QWEN2_VL_BASE,
        INTERNLM2_CHAT,
        INTERNLM2_CHAT_LATER,
        INTERNVL_25,
        INTERNVL_HF,
        PHI3_CHAT,
        PHI3_CHAT_LATER,
        *BLIP2_CHATS,
    )
}


def with_start_end(chat: ChatFormat) -> ChatFormat:
    """The format for checkpoints with `mm_use_im_start_end` (LLaVA v0): pictures between two learned tokens."""
    markup = chat.markup.replace(before=(Control(token="<im_start>"),), after=(Control(token="<im_end>"),))
    return chat.replace(markup=markup)
