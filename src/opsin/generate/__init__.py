"""Floor 4: answers from prompts. Names are looked up on first use, so that importing the package imports no torch.

from opsin.generate import Chat, Sampling, generate, stream
"""

from typing import TYPE_CHECKING

from opsin.lazy import lookup

if TYPE_CHECKING:
    from opsin.generate.beam import Beams as Beams
    from opsin.generate.beam import beam_search as beam_search
    from opsin.generate.decode import Answer as Answer
    from opsin.generate.decode import Chunk as Chunk
    from opsin.generate.decode import Usage as Usage
    from opsin.generate.decode import generate as generate
    from opsin.generate.decode import stream as stream
    from opsin.generate.engine import Engine as Engine
    from opsin.generate.sampling import Sampling as Sampling
    from opsin.generate.session import Chat as Chat

_HOMES = {
    "Beams": "beam",
    "beam_search": "beam",
    "Answer": "decode",
    "Chunk": "decode",
    "Usage": "decode",
    "generate": "decode",
    "stream": "decode",
    "Engine": "engine",
    "Sampling": "sampling",
    "Chat": "session",
}

__getattr__ = lookup(__name__, _HOMES)
