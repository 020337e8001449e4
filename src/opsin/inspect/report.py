"""The report: one HTML file with everything in it, which fetches nothing and runs nothing.

`Report` is data (see `parts`); `write_report` puts it on a page. The page's content policy forbids scripts and every
address but the pictures it carries.
"""

import os
from importlib.resources import files
from pathlib import Path

from opsin.errors import DataError
from opsin.inspect import _sections as sections
from opsin.inspect._html import escape
from opsin.inspect.parts import (
    Answer,
    FlowStep,
    MaskView,
    PictureView,
    Report,
    RunFacts,
    Scores,
    StageView,
    TaskScore,
    TrainedPart,
    flow,
)

__all__ = [
    "Answer",
    "FlowStep",
    "MaskView",
    "PictureView",
    "Report",
    "RunFacts",
    "Scores",
    "StageView",
    "TaskScore",
    "TrainedPart",
    "flow",
    "report_html",
    "write_report",
]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_NAMES = {
    "scores": "what it can see",
    "answers": "answers",
    "picture": "picture to slots",
    "mask": "loss mask",
    "stages": "training",
    "chat": "your turn",
}


def report_html(report: Report) -> str:
    """The page."""
    bodies = {"scores": sections.scores_section(report)}
    if report.answers:
        bodies["answers"] = sections.gallery_section(report.answers)
    if report.picture or report.flow:
        bodies["picture"] = sections.picture_section(report.picture, report.flow)
    if report.mask:
        bodies["mask"] = sections.mask_section(report.mask)
    if report.stages:
        bodies["stages"] = sections.stages_section(report.stages)
    bodies["chat"] = sections.chat_section(report.run)
    links = "".join(f'<a href="#{name}">{_NAMES[name]}</a>' for name in bodies)
    style = files("opsin.inspect").joinpath("report.css").read_text(encoding="utf-8")
    title = escape(report.title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head><body>'
        '<a class="skip" href="#scores">Skip to the results</a>'
        f'<header><p class="brand">opsin</p><h1>{title}</h1><p class="summary">{escape(report.summary)}</p>'
        f"{sections.hero(report.scores)}{sections.facts(report.run, report.stages)}"
        f'<nav aria-label="Sections">{links}</nav></header><main>{"".join(bodies.values())}</main></body></html>\n'
    )


def write_report(path: Path, report: Report) -> None:
    """Write the page to `path`, whole or not at all. Raises DataError when it cannot be written."""
    page = report_html(report)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot write the report ({error.strerror})") from None
