"""What a server allows, in numbers. Each limit is checked before the work or memory that it guards is spent."""

from opsin.media.image import DEFAULT_LIMITS, ImageMode, Limits
from opsin.spec.base import Spec

MIB = 2**20


class Settings(Spec):
    """The limits of a server. The defaults suit one model on one machine."""

    name: str
    """What clients call the model."""
    api_key: str | None = None
    """Without it, everyone who reaches the server is served."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that requests may ask for (`Host`), without ports; None allows all. A server on this machine alone lists
    its own: a web page whose name was turned to this address (DNS rebinding) asks under another."""
    max_body_bytes: int = 32 * MIB
    """Size of a request. Pictures in it take a third more than their files."""
    max_images: int = 16
    """Pictures of one request, and apart from them videos."""
    limits: Limits = DEFAULT_LIMITS
    """Of each picture and video."""
    image_mode: ImageMode = "display"
    max_rows: int = 8
    """Answers that are drawn side by side."""
    max_queue: int = 32
    """Requests that may wait beside those being answered; one more is refused at once."""
    max_choices: int = 8
    """Answers to one request (`n`)."""
    default_max_tokens: int = 512
    """Longest answer of a request that does not say."""
    timeout_seconds: float = 300
    """From the arrival of a request to the end of its answer."""
    body_timeout_seconds: float = 30
    """For a request to arrive."""
