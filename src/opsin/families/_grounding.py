"""How the families write boxes, one value each."""

from opsin.spec.grounding import Grounding

QWEN_VL_BOXES = Grounding(space="per_1000", largest=999, form="points", quad=("<quad>", "</quad>"))
"""Qwen-VL: each axis for itself, half-open (README of Qwen/Qwen-VL)."""
QWEN2_VL_BOXES = Grounding(
    space="per_1000",
    largest=999,
    form="points",
    ref=("<|object_ref_start|>", "<|object_ref_end|>"),
    box=("<|box_start|>", "<|box_end|>"),
    quad=("<|quad_start|>", "<|quad_end|>"),
)
"""Qwen2-VL (arXiv:2409.12191, section 2.2); its tokenizer has the marks as control tokens."""
INTERNVL_BOXES = Grounding(space="per_1000", form="lists")
"""InternVL: several boxes of one name in one list."""
LLAVA_BOXES = Grounding(space="unit", form="bare", frame="square")
"""LLaVA-1.5: shares of the padded square, two decimals."""
