"""The application: its routes, and the shape of what is refused."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from opsin.serve.chat import ChatCompletions
from opsin.serve.errors import RequestError, told
from opsin.serve.guard import Guard
from opsin.serve.send import to_json
from opsin.serve.service import Service
from opsin.serve.settings import Settings
from opsin.weights import Model

PAGE = Path(__file__).parent / "page" / "index.html"


def make_app(model: Model, settings: Settings) -> FastAPI:
    """The server's ASGI application. `app.state.service` is what stands behind its routes.

    The model must not be used by anyone else while the application runs.
    """
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.close()

    # No pages of documentation: FastAPI's fetch scripts from another server.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Guard, settings=settings)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _our_mistake)
    app.router.routes.append(Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]))
    _add_pages(app, service)
    return app


def _add_pages(app: FastAPI, service: Service) -> None:
    page = PAGE.read_text(encoding="utf-8")
    policy = _content_policy(page)

    @app.get("/", response_model=None)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/health", response_model=None)
    async def health() -> Response:
        if service.draining:
            return _json({"status": "draining"}, 503)
        alive = service.worker.is_alive
        return _json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return _json({"object": "list", "data": [_description(service)]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def one_model(name: str) -> Response:
        if name != service.settings.name:
            error = RequestError(
                f"this server has the model {service.settings.name!r} alone", status=404, code="model_not_found"
            )
            return _refusal(error)
        return _json(_description(service))

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return PlainTextResponse(_metrics(service), media_type="text/plain; version=0.0.4")


def _description(service: Service) -> dict[str, Any]:
    config = service.model.config
    return {
        "id": service.settings.name,
        "object": "model",
        "created": service.started,
        "owned_by": "opsin",
        "max_model_len": service.context,
        "opsin": {
            "chat_format": config.chat.name,
            "reads_videos": config.reads_videos,
            "answers_boxes": config.chat.grounding is not None,
        },
    }


def _metrics(service: Service) -> str:
    """In the text format of Prometheus."""
    lines = ["# TYPE opsin_requests_total counter"]
    lines += [f'opsin_requests_total{{status="{status}"}} {count}' for status, count in service.statuses.items()]
    for name, kind, value in (
        ("opsin_prompt_tokens_total", "counter", service.prompt_tokens),
        ("opsin_completion_tokens_total", "counter", service.worker.num_tokens),
        ("opsin_requests_inside", "gauge", service.inside),
        ("opsin_answers_running", "gauge", service.worker.engine.num_rows),
        ("opsin_prompts_waiting", "gauge", service.worker.engine.num_waiting),
    ):
        lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
    return "\n".join(lines) + "\n"


def _content_policy(page: str) -> str:
    """The page's own script and style, pictures that its user chose, this server: a browser allows it nothing else."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _json(data: Any, status: int = 200) -> Response:
    return Response(to_json(data), status, media_type="application/json")


def _refusal(error: RequestError) -> Response:
    return Response(to_json(error.body), error.status, headers=error.headers, media_type="application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method[:20]} {request.url.path[:100]}"
    known = "POST /v1/chat/completions, GET /v1/models, /health, /metrics and /"
    message = f"this server has no {what}; it has {known}"
    return _refusal(RequestError(message, status=error.status_code, code="no_such_route"))


async def _our_mistake(request: Request, error: Exception) -> Response:
    return _refusal(told(error))
