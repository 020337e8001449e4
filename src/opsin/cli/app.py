"""The frame of the command line: finds the verb, and turns whatever goes wrong into one line and an exit code.

Exit codes: 0 done, 1 a bug of ours, 2 something the user can mend, 130 stopped by Ctrl-C.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from opsin.errors import OpsinError, nearest, unknown

VERBS = {
    "demo": "Train a small model here, ask it about new pictures, write a report.",
    "chat": "Talk with a model about pictures.",
    "serve": "Serve a model over HTTP, as OpenAI's chat completions.",
    "match": "Which text fits a picture, or which pictures of a folder fit a text.",
    "plan": "How many tokens pictures take, before anything is loaded.",
    "verify": "Compare a model with transformers, rung by rung.",
    "show": "What a model consists of: parts, shapes, counts.",
    "train": "Train a model by a recipe.",
    "eval": "Evaluate a model: figures with intervals, controls, two results compared.",
    "export": "Write a model for transformers, vLLM, SGLang or the authors' code.",
    "merge": "Add an adapter to its model and write the result.",
    "data": "Check, show and convert training data.",
    "env": "Versions and devices, for bug reports.",
}
"""Each verb is the function of that name in the module `opsin.cli.VERB`, or a group of commands of its own."""
NEED_MORE = ("plan", "show", "eval", "export", "data")
"""Verbs that show their help where nothing is given."""


class Verbs(TyperGroup):
    """The group of all verbs. A verb's module is imported when it runs, not to be listed."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """All verbs, in the order of `--help`."""
        return list(VERBS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:  # type: ignore[override]
        """What a list of commands needs to know of a verb."""
        return TyperCommand(cmd_name, help=VERBS[cmd_name]) if cmd_name in VERBS else None

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """The verb that is to run. An unknown one is an error with the nearest name."""
        name, *rest = args
        if name not in VERBS:
            raise unknown("command", name, VERBS)
        return name, load_verb(name), rest


def load_verb(name: str) -> Any:
    """The command of a verb, made from the function of its module, or from each function of its group."""
    found = getattr(import_module(f"opsin.cli.{name}"), name)
    app = typer.Typer(
        add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True
    )
    functions = [found] if callable(found) else found
    for each in functions:
        app.command(name=each.__name__, help=_flowing(each.__doc__), no_args_is_help=name in NEED_MORE)(each)
    if functions is found:
        examples = "\n\n".join(f"    opsin {name} {each.__name__} --help" for each in functions)
        app.callback(help=f"{VERBS[name]}\n\n{examples}")(lambda: None)  # makes it a group
    return typer.main.get_command(app)


def _flowing(docstring: str) -> str:
    """Paragraphs without the line breaks of the source, so that they are wrapped to the terminal. Examples stay."""
    paragraphs = cleandoc(docstring).split("\n\n")
    return "\n\n".join(each if each.startswith(" ") else " ".join(each.split("\n")) for each in paragraphs)


_app = typer.Typer(
    cls=Verbs,
    name="opsin",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from opsin import __version__

        typer.echo(f"opsin {__version__}")
        raise typer.Exit


@_app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where errors come from (also: OPSIN_DEBUG=1).")] = False,
) -> None:
    """Published vision-language models from shared parts: load, chat, train and look inside.

    [dim]opsin demo[/] · [dim]opsin chat llava-1.5-7b --image photo.jpg[/] · [dim]opsin plan photo.jpg --model all[/]
    """
    if debug:
        os.environ["OPSIN_DEBUG"] = "1"


def run(arguments: Sequence[str]) -> int:
    """Run the command line. Returns the exit code; prints errors, raises nothing."""
    try:
        result = typer.main.get_command(_app).main(list(arguments), prog_name="opsin", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _stopped()
    except typer.Abort as error:
        return _stopped() if isinstance(error.__cause__, KeyboardInterrupt) else 1
    except BrokenPipeError:
        # Whoever read our output has left (`| head`). Nothing is wrong, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        if os.environ.get("OPSIN_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        message, code = explain(error)
        print(f"error: {message}", file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[str, int]:
    """What to print for an error, and the exit code."""
    if isinstance(error, OpsinError):
        return str(error), 2
    if hasattr(error, "format_message"):  # a wrong option or argument; typer's own types have moved between versions
        option, possible = getattr(error, "option_name", None), getattr(error, "possibilities", None)
        context = getattr(error, "ctx", None)
        if option is not None and type(error).__name__ == "NoSuchOption":
            message = f"no option {option}{nearest(option, possible or ())}"
        else:
            message = error.format_message().rstrip(".") or "nothing was given"
        return f"{message}. See `{context.command_path} --help`." if context else f"{message}.", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}", 2
    if isinstance(error, OSError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return str(error) or "there is not enough memory", 2
    return (
        f"{type(error).__name__}: {error} (this is a bug in opsin; run it again with OPSIN_DEBUG=1 to see where, "
        "and report it with the output of `opsin env`)",
        1,
    )


def _stopped() -> int:
    print(file=sys.stderr)
    return 130
