"""`opsin serve`: a model behind OpenAI's chat protocol."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from opsin.cli._options import MODE_HELP, Mode
from opsin.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
MIB = 2**20


def serve(
    model: Annotated[str, typer.Argument(help="A model's folder, a preset's id, or a hub repository.")] = "opsin-mini",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPSIN_API_KEY", help="Key that clients must send; the variable hides it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="On 127.0.0.1: a further name that requests may ask for, of a proxy.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto keeps the checkpoint's.")] = "auto",
    mode: Annotated[Mode, typer.Option(help=MODE_HELP)] = Mode.display,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers drawn side by side.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beside them.")] = 32,
    max_images: Annotated[int, typer.Option(min=0, help="Pictures of one request.")] = 16,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request in MiB.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to a request that does not say.")] = 512,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds from a request's arrival to its end.")] = 300,
) -> None:
    """Serve a model over HTTP, as OpenAI's chat completions, with a page to try it at /.

    Pictures come inside requests, as data: URIs; the server fetches no addresses and opens no files. Requests that come
    together are answered together. Ctrl-C lets running answers end; a second one stops at once.

    Examples:

        opsin serve

        opsin serve qwen2-vl-2b-instruct --port 9000

        OPSIN_API_KEY=... opsin serve ./run/model --host 0.0.0.0 --name my-model
    """
    missing = [package for package in ("fastapi", "uvicorn") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be installed to serve: pip install 'opsin[serve]'")
    if api_key is not None and not api_key.strip():
        raise ConfigError("the API key is empty; give one, or leave --api-key and OPSIN_API_KEY out to serve everyone")
    # Torch is imported from here on.
    from opsin.generate.ready import load_ready
    from opsin.serve.run import listen
    from opsin.serve.run import serve as serve_model
    from opsin.serve.settings import Settings

    sock = listen(host, port)  # before the model is loaded, which takes longer
    is_local = host in (*LOOPBACK, "::1")
    hosts = tuple(each.lower() for each in (*LOOPBACK, *(allow_host or ()))) if is_local or allow_host else None
    _say(f"loading {model} ...")
    loaded = load_ready(model, device=device, dtype=dtype)
    settings = Settings(
        name=name or (Path(model).resolve().name if Path(model).expanduser().exists() else model),
        api_key=None if api_key is None else api_key.strip(),
        allowed_hosts=hosts,
        max_body_bytes=max_body * MIB,
        max_images=max_images,
        image_mode=mode.value,
        max_rows=max_rows,
        max_queue=max_queue,
        default_max_tokens=max_tokens,
        timeout_seconds=timeout,
    )

    def ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        _say(f"{settings.name} is served at http://{shown}:{sock.getsockname()[1]} (Ctrl-C ends)")
        if not is_local and api_key is None:
            _say("everyone who reaches this address is served; --api-key or OPSIN_API_KEY asks for a key")

    if not serve_model(loaded, settings, sock, ready=ready):
        raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
