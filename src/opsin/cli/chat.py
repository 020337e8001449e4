"""`opsin chat`: talk with a model about pictures, once or back and forth."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsin import families
from opsin.cli._beams import check_beams
from opsin.cli._draw import check_draw, draw_answer
from opsin.cli._json import answer_as_json
from opsin.cli._options import MODE_HELP, Mode
from opsin.cli._videos import NO_VIDEOS, describe_clip
from opsin.cli._words import read_words
from opsin.errors import ConfigError, MediaError, OpsinError, UnknownNameError, nearest
from opsin.media.image import image_size
from opsin.spec.model import VLMConfig
from opsin.weights.config import describe
from opsin.weights.shipped import is_shipped

if TYPE_CHECKING:
    from opsin.generate import Chat

COMMANDS = {
    "/image": "PATH   show a picture with the next question; may be repeated",
    "/video": "PATH   the same with a video (Qwen2-VL)",
    "/reset": "        forget everything that was said and shown",
    "/help": "         this list",
    "/quit": "         end (so does Ctrl-D); Ctrl-C stops an answer",
}


def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PICTURE...] [PROMPT]",
            show_default=False,
            help="A model's folder, a preset's id or a hub repository; pictures and videos; a question.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", help="A picture for the first question; may be repeated.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", help="A video for the first question (Qwen2-VL); may be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token; 1 draws as trained.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many likeliest tokens.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less of what was said already.")] = 1.0,
    beams: Annotated[int | None, typer.Option(help="Search for the likeliest answer: 5 with BLIP-2.")] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(help="With --beams (else 1): above 0 long answers gain, below 0 short ones."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    system: Annotated[str | None, typer.Option(help="Replaces the system text of the model's chat format.")] = None,
    mode: Annotated[Mode, typer.Option(help=MODE_HELP)] = Mode.display,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto keeps the checkpoint's.")] = "auto",
    draw: Annotated[str | None, typer.Option(help="Draw the boxes of the answer on the picture: a new file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer to PROMPT as JSON, with usage.")] = False,
) -> None:
    """Talk with a model about pictures.

    With PROMPT: one answer, streamed (with --beams it comes at once). Without: back and forth, also with questions
    piped in line by line; /help lists what can be typed. Pictures and videos stand before the text of their question.
    Settings are the ones given here, whatever the model's generation_config.json says.

    A word that is an existing file is a picture or video, like those after --image and --video. The first word is the
    model, unless it is such a file or a text with spaces; then opsin-mini answers, the small model that comes with
    opsin and needs no download. One more word is the question.

    Examples:

        opsin chat

        opsin chat photo.jpg "What colour is the largest shape?"

        opsin chat left.jpg right.jpg "Which one shows a circle?"

        opsin chat llava-1.5-7b "What is unusual about this picture?" --image photo.jpg

        opsin chat llava-hf/llava-1.5-7b-hf --image left.jpg --image right.jpg

        opsin chat qwen2-vl-2b-instruct "What happens?" --video clip.mp4

        opsin chat ./demo/model "Which shapes are there?" -i test.png --json
    """
    given = read_words(words or [])
    model, prompt = given.model, given.prompt
    if json and prompt is None:
        raise ConfigError("--json prints one answer; give a PROMPT")
    images, videos = [*given.images, *(image or [])], [*given.videos, *(video or [])]
    if beams is not None or length_penalty is not None:
        check_beams(
            beams,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    if draw is not None:
        check_draw(draw, prompt, images)
    for path in images:  # before the model is loaded, which takes longer
        image_size(path, mode=mode.value)
    for path in videos:
        describe_clip(path, mode.value)
    if (config := _known_config(model)) is not None:  # of others nothing is known before they are loaded
        _check_abilities(model, config, videos, draw)
    # Torch is imported from here on.
    from opsin.generate import Chat, Sampling
    from opsin.generate.beam import Beams
    from opsin.generate.ready import load_ready

    sampling: Sampling | Beams
    if beams is not None:
        penalty = 1.0 if length_penalty is None else length_penalty
        sampling = Beams(num_beams=beams, max_new_tokens=max_new_tokens, length_penalty=penalty)
    else:
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    started = time.perf_counter()
    _remark(f"loading {model} ...")
    try:
        loaded = load_ready(model, device=device, dtype=dtype)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{error}. Nor is there a picture or video {model!r} in {Path.cwd()}; a question of one word stands after "
            "a model or a picture"
        ) from None
    _check_abilities(model, loaded.config, videos, draw)
    session = Chat(loaded, sampling=sampling, system_text=system, image_mode=mode.value)
    seconds = time.perf_counter() - started
    if json:
        assert prompt is not None
        typer.echo(answer_as_json(session, prompt, images, videos, load_seconds=seconds))
    elif prompt is not None:
        _answer(session, prompt, images, videos)
    else:
        _remark(f"{loaded.name} is ready after {seconds:.1f} s. /help lists what you can type.")
        Interactive(session, mode).run(images, videos)
    if draw is not None:
        draw_answer(session, draw, images[0], mode.value)


def _known_config(model: str) -> VLMConfig | None:
    """What is known of a model by its name alone."""
    if is_shipped(model):
        return describe(model)
    known = [each for each in families.all_presets() if model == each.id or model in each.hub]
    return known[0].config if known and not Path(model).exists() else None


def _check_abilities(model: str, config: VLMConfig, videos: list[str], draw: str | None) -> None:
    """Whether the model can do what is asked of it. Raises ConfigError."""
    if videos and not config.reads_videos:
        raise ConfigError(f"--video: {model} {NO_VIDEOS}; take a Qwen2-VL model, or show single frames with --image")
    if draw is not None and config.chat.grounding is None:
        raise ConfigError(f"--draw: {model} (chat format {config.chat.name}) was not taught to write boxes")


class Interactive:
    """The loop of questions and answers."""

    def __init__(self, session: "Chat", mode: Mode) -> None:
        self.session = session
        self.mode = mode
        self.waiting: list[str] = []
        """Pictures for the next question."""
        self.waiting_videos: list[str] = []

    def run(self, images: list[str], videos: list[str]) -> None:
        """Answer line by line until the input ends."""
        for path in images:
            self._show(path)
        for path in videos:
            self._show_video(path)
        if sys.stdin.isatty():
            _edit_lines()
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                _remark("")
                return
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                _remark("\n/quit or Ctrl-D ends")
                continue
            if line.strip() == "/quit":
                return
            try:
                self._take(line)
            except KeyboardInterrupt:
                _remark("(stopped)", always=True)
            except OpsinError as error:
                if isinstance(error, MediaError):
                    self._forget_waiting()
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _take(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command in ("/image", "/video"):
            path = rest.strip().strip("'\"")
            if not path:
                raise ConfigError(f"{command} needs the path of a {'picture' if command == '/image' else 'video'}")
            (self._show if command == "/image" else self._show_video)(str(Path(path).expanduser()))
        elif command == "/reset":
            self.session.reset()
            self._forget_waiting()
            _remark("everything is forgotten")
        elif command == "/help":
            print("\n".join(f"{name} {text}" for name, text in COMMANDS.items()), file=sys.stderr)
        elif command[:1] == "/" and command.count("/") == 1:
            raise ConfigError(
                f"no command {command!r}{nearest(command, COMMANDS)}; /help lists them. "
                "A question that begins with / needs a space before it"
            )
        elif line.strip():
            _answer(self.session, line.strip(), self.waiting, self.waiting_videos)
            self.waiting, self.waiting_videos = [], []

    def _forget_waiting(self) -> None:
        self.waiting.clear()
        self.waiting_videos.clear()

    def _show(self, path: str) -> None:
        """Check a picture now, and keep it for the next question."""
        size = image_size(path, mode=self.mode.value)
        slots = self.session.model.config.plan(size).num_slots
        self.waiting.append(path)
        _remark(f"{Path(path).name}, {size[0]}x{size[1]}: {slots} tokens, shown with the next question")

    def _show_video(self, path: str) -> None:
        """Check a video now, and keep it for the next question."""
        if not self.session.model.config.reads_videos:
            raise ConfigError(f"this model {NO_VIDEOS}")
        clip = describe_clip(path, self.mode.value)
        self.waiting_videos.append(path)
        _remark(f"{Path(path).name}, {clip.num_frames} frames of {clip.size[0]}x{clip.size[1]}, with the next question")


def _answer(session: "Chat", text: str, images: list[str], videos: list[str]) -> None:
    """Stream one answer to standard output."""
    clean = sys.stdout.isatty()
    try:
        for piece in session.stream(text, *images, videos=videos):
            print(printable(piece) if clean else piece, end="", flush=True)
    finally:
        if session.prompt is not None and session.messages[-1].role == "assistant":
            print(flush=True)
    assert session.prompt is not None
    assert session.answer is not None
    for note in session.prompt.notes:
        _remark(f"note: {note}")
    if session.num_left_out:
        _remark(f"note: the first {session.num_left_out} messages no longer fit the model's window")
    usage, took = session.answer.usage, session.answer.prefill_seconds + session.answer.decode_seconds
    speed = (usage.new_tokens - 1) / max(session.answer.decode_seconds, 1e-9)
    _remark(
        f"({usage.image_tokens} picture and {usage.text_tokens} text tokens, {usage.new_tokens} new in {took:.1f} s"
        + (f", {speed:.1f} a second)" if usage.new_tokens > 1 else ")")
    )


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey: line breaks and tabs stay."""
    return "".join(each for each in text if each in "\n\t" or not (ord(each) < 32 or 127 <= ord(each) < 160))


def _remark(text: str, *, always: bool = False) -> None:
    """Something beside the answers, on standard error; only for people, unless it must be said."""
    if always or sys.stderr.isatty():
        style = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{style[0]}{text}{style[1]}", file=sys.stderr, flush=True)


def _edit_lines() -> None:
    """Arrow keys and history for `input`, where the system has them."""
    with suppress(ImportError):
        import readline  # noqa: F401
