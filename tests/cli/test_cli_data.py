"""`opsin data`: check, show and convert, and the commands of docs/data_check.md."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import toys
from data import seeded
from opsin.cli.app import run as main
from opsin.data.files import FileSource
from train.toy import two_stages

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data_check.md").read_text()
MODEL = ["--model", "llava-1.5-tiny", "--tokenizer", "tokenizer"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with data, a tokenizer, and a run that trains on the data."""
    monkeypatch.chdir(tmp_path)
    seeded.write(tmp_path, 30, ())
    records = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    (tmp_path / "data.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "test.json").write_text(json.dumps([seeded.clean(5000, tmp_path)]))
    toys.tokenizer_folder(tmp_path / "tokenizer")
    run = yaml.safe_load(yaml.safe_dump(two_stages(tmp_path / "out").model_dump(mode="json")))
    for stage in run["stages"]:
        stage["data"], stage["chat"] = [{"path": "data.json"}], None
    run["tokenizer"] = "tokenizer"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def spoil(place: Path, number: int, **changes) -> None:
    records = json.loads((place / "data.json").read_text())
    records[number].update(changes)
    (place / "data.json").write_text(json.dumps(records, indent=1))


def commands() -> list[str]:
    return [line.split("#")[0].strip() for line in PAGE.splitlines() if line.startswith("opsin ")]


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_page_run(command, place, capsys):
    words = [word if word != "pictures" else "." for word in shlex.split(command)]  # where toy pictures are
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_a_clean_file_says_what_it_comes_to(place, capsys):
    assert main(["data", "check", "data.json", *MODEL]) == 0
    out = capsys.readouterr().out
    assert "30 records, 22 different pictures" in out
    assert re.search(r"[\d,]+ tokens \([\d,]+ of pictures, [\d,]+ taught\); a record has", out)
    assert "0 errors, 0 warnings" in out
    assert main(["data", "check", "data.json"]) == 0
    assert "give --model" in capsys.readouterr().out


def test_problems_have_a_place_and_a_fix_and_the_exit_code_tells(place, capsys):
    spoil(place, 4, id="r3")
    assert main(["data", "check", "data.json"]) == 0
    assert main(["data", "check", "data.json", "--strict"]) == 2
    spoil(place, 6, image="pictures/nowhere.png")
    capsys.readouterr()
    assert main(["data", "check", "data.json"]) == 2
    out = capsys.readouterr().out
    line = 1 + (place / "data.json").read_text().split("nowhere")[0].count("\n")
    assert "error picture_missing x 1: a file that is not there" in out
    assert re.search(r"data\.json record 7 \(line \d+\): picture .*nowhere\.png is not there", out)
    assert line > 6
    assert "-> set image_root, or correct the record" in out
    assert "1 errors, 1 warnings" in out
    assert main(["data", "check", "data.json", "--json"]) == 2
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    assert (found["records"], found["errors"], found["warnings"]) == (30, 1, 1)
    assert {each["kind"]: each["severity"] for each in found["problems"]} == {
        "picture_missing": "error",
        "duplicate_id": "warning",
    }
    assert all(each["fix"] and each["where"].startswith("data.json record ") for each in found["problems"])


def test_only_a_few_of_each_kind_are_printed(place, capsys):
    for number in range(10, 20):
        spoil(place, number, conversations=[])
    assert main(["data", "check", "data.json", "--show", "2"]) == 2
    out = capsys.readouterr().out
    assert out.count("the list of messages is empty") == 2
    assert "and 8 more" in out
    assert main(["data", "check", "data.json", "--show", "0"]) == 2
    assert capsys.readouterr().out.count("the list of messages is empty") == 10


@pytest.mark.parametrize("path", ["nowhere.json", "empty.json", "cut.json"])
def test_a_file_that_cannot_be_opened_is_a_problem(place, capsys, path):
    (place / "empty.json").write_text("")
    (place / "cut.json").write_text((place / "data.json").read_text()[:3000])
    assert main(["data", "check", path]) == 2
    out = capsys.readouterr().out
    assert "1 errors, 0 warnings" in out
    assert path in out


def test_a_run_is_checked_stage_by_stage_with_its_own_limits(place, capsys):
    run = yaml.safe_load((place / "run.yaml").read_text())
    run["stages"][1]["max_tokens"] = 300
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["data", "check", "run.yaml"]) == 2
    first, second = capsys.readouterr().out.split("stage second")
    assert "0 errors" in first
    assert re.search(r"error too_long x \d+", second)
    run["stages"][1]["overlong"] = "trim_turns"
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["data", "check", "run.yaml"]) == 0
    assert re.search(r"[1-9]\d* too long and shortened, 0 too long and dropped", capsys.readouterr().out)


def test_what_a_stage_is_judged_on_must_not_be_among_its_data(place, capsys):
    run = yaml.safe_load((place / "run.yaml").read_text())
    run["stages"][1]["evaluate"] = {"data": [{"path": "test.json"}], "every": 5}
    (place / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["data", "check", "run.yaml", "--strict"]) == 0
    assert "stage second evaluation\n1 records" in capsys.readouterr().out
    (place / "test.json").write_text(json.dumps([seeded.clean(5, place)]))
    assert main(["data", "check", "run.yaml", "--strict"]) == 2
    out = capsys.readouterr().out
    assert "warning held_out x 1" in out
    assert "data.json record 6 " in out
    assert "those of test.json record 1 (line 1)" in out


def test_a_sample_is_shown_with_ids_mask_and_plans(place, capsys):
    assert main(["data", "show", "data.json", "--index", "5", *MODEL]) == 0
    out = capsys.readouterr().out
    assert "data.json record 6 " in out
    assert re.search(r"picture 1: 1 tiles, \d+ tokens", out)
    assert "tile of" in out
    assert re.search(r"\d+ tokens, \d+ of pictures, \d+ taught; the limit is \d+", out)
    assert "USER:" in out
    assert "tokens with their ids" in out
    assert main(["data", "show", "data.json", "--index", "99", *MODEL]) == 2
    assert "there is no record 99: the data has 30" in capsys.readouterr().err
    assert main(["data", "show", "data.json"]) == 2
    assert "--model" in capsys.readouterr().err


def test_a_stage_of_a_run_is_shown_by_its_name(place, capsys):
    assert main(["data", "show", "run.yaml", "--stage", "second", "--index", "1"]) == 0
    assert "record 2 " in capsys.readouterr().out
    assert main(["data", "show", "run.yaml", "--stage", "third"]) == 2
    assert "first, second" in capsys.readouterr().err


def test_converted_data_reads_back_as_the_same_conversations(place, capsys):
    spoil(place, 1, image=seeded.base64_picture())
    assert main(["data", "convert", "data.json", "--to", "neutral.jsonl"]) == 0
    assert "30 records: neutral.jsonl; 1 pictures beside it" in capsys.readouterr().out
    before, after = FileSource("data.json"), FileSource("neutral.jsonl")
    assert len(before) == len(after) == 30
    for index in range(30):
        old, new = before.sample(index, 0), after.sample(index, 0)
        assert old.messages == new.messages
        assert before.own_id(index) == after.own_id(index) == f"r{index}"
        if index != 1:
            assert [Path(image).resolve() for image in old.images] == [Path(image).resolve() for image in new.images]
    assert Path(after.sample(1, 0).images[0]).is_file()
    assert main(["data", "convert", "data.json", "--to", "neutral.jsonl"]) == 2
    assert "exists already" in capsys.readouterr().err
    spoil(place, 3, conversations=[])
    assert main(["data", "convert", "data.json", "--to", "other.jsonl"]) == 2
    assert not list(place.glob("other*"))


def test_unknown_commands_name_the_nearest(place, capsys):
    assert main(["data", "chek"]) == 2
    assert "chek" in capsys.readouterr().err
    assert main(["data", "--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ("check",))
