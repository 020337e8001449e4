"""The report page."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opsin.errors import DataError
from opsin.inspect._html import count, data_uri, duration, size_of
from opsin.inspect.curves import Curve
from opsin.inspect.report import (
    Answer,
    MaskView,
    PictureView,
    Report,
    RunFacts,
    Scores,
    StageView,
    TaskScore,
    TrainedPart,
    flow,
    report_html,
    write_report,
)
from opsin.inspect.tokens import MaskPiece
from opsin.spec.chat import AssistantTurn, ChatFormat, UserTurn
from opsin.spec.connector import MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes
from opsin.spec.vision import VisionConfig
from toys import picture

NASTY = '"><script src="https://example.com/x.js">alert(1)</script><img src=x onerror=alert(1)>'
CONFIG = VLMConfig(
    vision=VisionConfig(image_size=12, patch_size=4, dim=8, num_layers=2, num_heads=1, mlp_dim=8),
    connector=MLPConnector(),
    decoder=DecoderConfig(vocab_size=265, dim=16, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8),
    resolution=AnyRes(tile_size=12, resolutions=((12, 24), (24, 12))),
    chat=ChatFormat(name="test", user=UserTurn(), assistant=AssistantTurn()),
)
VOID = {"meta", "link", "img", "input", "br", "circle", "line", "path"}


def report(text: str = "plain") -> Report:
    """A report with every section; `text` stands wherever a text can."""
    plan = CONFIG.plan((20, 10))
    scores = Scores(0.72, 0.18, 0.2, 600)
    curve = Curve(text, (1, 2, 3), (2.0, 1.0, 0.5), (1e-3, 1e-3, 0.0))
    parts = (TrainedPart(text, 0, 1_800_000), TrainedPart("connector", 66_000, 66_000), TrainedPart("decoder", 10, 99))
    return Report(
        title=text,
        summary=text,
        scores=scores,
        tasks=(TaskScore(text, scores, text), TaskScore("words", replace(scores, accuracy=0.0), "")),
        answers=(
            Answer(picture((9, 9)), text, text, text, text, "right"),
            Answer(picture((9, 9), 1), "shape", "Which?", "", "circle", "wrong"),
        ),
        flow=flow(CONFIG, plan),
        picture=PictureView(picture((20, 10)), plan, text),
        mask=MaskView((MaskPiece(0, (7,), text, "user", False), MaskPiece(1, (2,), "</s>", "control", True)), text),
        stages=(StageView(text, text, parts, 61.0, 1200, curve), StageView("two", "", parts, 3.0)),
        run=RunFacts(352.0, 1_430_000_000, text, text, text, text),
    )


class _Page(HTMLParser):
    """Collects tags and attributes; fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def read(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_the_page_has_every_section_and_well_nested_tags() -> None:
    page = read(report_html(report()))
    sections = [value for tag, name, value in page.attributes if tag == "section" and name == "id"]
    assert sections == ["scores", "answers", "picture", "mask", "stages", "chat"]
    links = [value for tag, name, value in page.attributes if tag == "a" and name == "href"]
    assert links == ["#scores", *(f"#{section}" for section in sections)]
    assert page.tags.count("h1") == 1


def test_sections_without_content_are_left_out() -> None:
    bare = replace(report(), tasks=(), answers=(), flow=(), picture=None, mask=None, stages=())
    page = read(report_html(bare))
    assert [value for tag, name, value in page.attributes if tag == "section" and name == "id"] == ["scores", "chat"]
    assert "table" not in page.tags


@pytest.mark.parametrize("text", ["plain", NASTY], ids=["plain", "nasty"])
def test_the_page_asks_the_network_for_nothing_and_runs_nothing(text: str) -> None:
    source = report_html(report(text))
    page = read(source)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"<{tag}> has a handler"
        if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    style = "".join(re.findall(r"<style>(.*?)</style>", source, re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src &#x27;none&#x27;" in source
    if text == "plain":
        assert set(re.findall(r"https?://[^\"\s<]*", source)) == {"http://www.w3.org/2000/svg"}


def test_what_people_write_is_shown_as_text() -> None:
    assert read(report_html(report(NASTY))).tags == read(report_html(report())).tags


def test_right_and_wrong_differ_by_more_than_colour() -> None:
    source = report_html(report())
    assert '<figure class="card right">' in source
    assert '<figure class="card wrong">' in source
    assert ">✓</span>" in source
    assert ">✕</span>" in source
    assert '<span class="verdict">wrong</span>' in source


def test_every_picture_has_a_description_and_a_size() -> None:
    page = read(report_html(report()))
    for name in ("alt", "width", "height"):
        values = [value for tag, attribute, value in page.attributes if tag == "img" and attribute == name]
        assert len(values) == page.tags.count("img") >= 5
        assert all(values)


@pytest.mark.parametrize(
    ("accuracy", "shuffled", "finding"),
    [
        (0.72, 0.20, "the answers come from the pictures"),
        (0.72, 0.40, "22 points above the baseline of 18 %"),
        (0.21, 0.19, "the pictures hardly matter"),
    ],
)
def test_the_finding_says_whether_the_pictures_are_needed(accuracy: float, shuffled: float, finding: str) -> None:
    assert finding in report_html(replace(report(), scores=Scores(accuracy, 0.18, shuffled, 600)))


def test_the_flow_counts_what_the_plan_counts() -> None:
    plan = CONFIG.plan((20, 10))
    figures = {step.name: step.figure for step in flow(CONFIG, plan)}
    assert figures["picture"] == "20 × 10 px"
    assert figures["tiles"] == "3"
    assert figures["features"] == "27 × 8"
    assert figures["rows"] == "27 × 16"
    assert figures["slots"] == str(plan.num_slots)


def test_the_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, report())
    first = path.read_bytes()
    assert first.decode() == report_html(report())
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opsin.inspect.report.os.replace", full)
    with pytest.raises(DataError, match=r"report\.html: cannot write the report \(No space left on device\)"):
        write_report(path, report("other"))
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_large_pictures_are_carried_smaller() -> None:
    small, large = data_uri(picture((40, 30))), data_uri(picture((900, 700)))
    assert small.startswith("data:image/png;base64,")
    assert large.startswith("data:image/jpeg;base64,")
    assert len(large) < 900 * 700


def test_numbers_read_as_people_write_them() -> None:
    assert [count(n) for n in (999, 1234, 56_300, 1_800_000, 7_063_427_072)] == [
        "999",
        "1,234",
        "56 K",
        "1.8 M",
        "7.1 B",
    ]
    assert [duration(s) for s in (8.42, 59.4, 352, 7500)] == ["8.4 s", "59 s", "5 min 52 s", "2 h 05 min"]
    assert [size_of(n) for n in (143_000_000, 1_430_000_000)] == ["143 MB", "1.4 GB"]


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(AssertionError, match="shares"):
        Scores(72, 18, 20, 600)
