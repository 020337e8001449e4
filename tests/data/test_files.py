"""Files of conversations: what is read, and what each error names."""

import json
from pathlib import Path

import pytest

import toys
from opsin.data.files import FileSource, num_words
from opsin.data.problems import BadRecord
from opsin.data.records import JsonRecords
from opsin.data.source import Mixture, open_data
from opsin.errors import DataError
from opsin.spec.recipe import DataFile
from opsin.text.messages import Conversation, assistant, user

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat on a mat."}]
TEXT_TURNS = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Hi"}]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        toys.picture((30, 20)).save(tmp_path / "images" / name)
    return tmp_path


def write(path: Path, records: list, *, lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=2)
    path.write_text(text, encoding="utf-8")
    return path


def with_picture(number: int, image: str = "images/a.png") -> dict:
    return {"id": f"c{number}", "image": image, "conversations": TURNS}


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_both_kinds_of_file_give_the_same_conversations(folder, lines):
    records = [with_picture(0), {"conversations": TEXT_TURNS}, with_picture(2, "images/b.png")]
    source = FileSource(write(folder / "data.json", records, lines=lines))
    assert len(source) == 3
    first, second, third = (source.sample(index, 0) for index in range(3))
    assert first.images == (folder / "images" / "a.png",)
    assert third.images == (folder / "images" / "b.png",)
    assert second.images == ()
    assert first.messages[1].text == "A cat on a mat."
    written = (folder / "data.json").read_text().splitlines()
    line = [at for at, text in enumerate(written, start=1) if text.startswith("{" if lines else "  {")]
    names = [f"{folder / 'data.json'} record {n} (line {at})" for n, at in enumerate(line, start=1)]
    assert [sample.id for sample in (first, second, third)] == [f"{names[0]} 'c0'", names[1], f"{names[2]} 'c2'"]


def test_lines_are_cut_only_at_line_breaks(tmp_path):
    """JSON allows U+2028 inside a string, where str.splitlines would cut."""
    record = {"conversations": [{"from": "human", "value": "a\u2028b"}, {"from": "gpt", "value": "c"}]}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n\n" + json.dumps(record), encoding="utf-8-sig")
    places = JsonRecords(path).places
    assert [places[index].line for index in range(len(places))] == [1, 3]
    assert FileSource(path).sample(0, 0).messages[0].text == "a\u2028b"


def test_a_limit_takes_the_first_records_and_reads_no_further(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": TEXT_TURNS}) + "\nnot json", encoding="utf-8")
    assert len(FileSource(path, limit=1)) == 1
    path.write_text("[" + json.dumps({"conversations": TEXT_TURNS}) + ", not json", encoding="utf-8")
    assert len(FileSource(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record"),
        ("[]", "holds no record"),
        ("[ ]", "holds no record"),
        ('{"a": 1}\n{"a": }', r"line 2, column 7: not JSON: Expecting value"),
        ('[\n{"a": 1},\n{"a" 2}]', r"line 3, column 6: record 2 is not JSON: Expecting ':' delimiter"),
        ('[\n{"a": 1}\n\n{"a": 2}]', r"line 4: a comma or the closing bracket is missing after record 1"),
        ('[\n{"a": 1}', r"line 2: a comma or the closing bracket is missing after record 1; the file ends here"),
        ('[{"a": 1},', r"line 1, column 11: record 2 is not JSON"),
    ],
)
def test_a_file_that_is_not_json_is_told_by_line(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"data.json {message}"):
        raise BadRecord(list(FileSource(path, on_bad="keep").problems())[-1])


def test_a_file_that_is_not_utf8_or_not_there_is_told(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b'[{"messages": []},\n{"b": "\xff"}]')
    with pytest.raises(DataError, match=r"data.json line 2: byte 26 is no UTF-8"):
        FileSource(path)
    with pytest.raises(DataError, match=r"none.json cannot be read: No such file or directory"):
        FileSource(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": 3}, "'conversations'"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "'cat'"),
        ({"image": "images/a.png", "conversations": TEXT_TURNS}, r"1 picture\(s\) but 0"),
        (with_picture(1, "images/none.png"), r"picture .*images/none.png is not there. Relative paths start from"),
        (with_picture(1, "https://example.org/a.png"), "is a web address"),
        ([1], "'role'"),
    ],
    ids=["no turns", "role", "marks", "picture", "address", "list"],
)
def test_a_bad_record_is_told_by_file_record_and_line_before_training(folder, record, message):
    path = write(folder / "data.jsonl", [with_picture(0), record], lines=True)
    with pytest.raises(DataError, match=rf"data.jsonl record 2 \(line 2\): .*{message}"):
        FileSource(path)


def test_pictures_start_from_the_image_root(folder):
    path = write(folder / "data.json", [with_picture(0, "a.png")])
    assert FileSource(path, image_root=folder / "images").sample(0, 0).images == (folder / "images" / "a.png",)
    with pytest.raises(DataError, match="is not there"):
        FileSource(path)


def test_the_fingerprint_follows_the_content(folder):
    one = FileSource(write(folder / "a.json", [with_picture(0)])).fingerprint
    same = FileSource(write(folder / "b.json", [with_picture(0)])).fingerprint
    other = FileSource(write(folder / "c.json", [with_picture(1)])).fingerprint
    assert one == same != other


def test_lengths_are_words_and_their_sign_is_the_modality(folder):
    source = FileSource(write(folder / "data.json", [with_picture(0), {"conversations": TEXT_TURNS}]))
    # "<image>", "What is it?", "A cat on a mat."; "Hello there", "Hi"
    assert list(source.modality_lengths(0)) == [9, -3]
    assert num_words(Conversation((user(""), assistant("")))) == 1


class Numbers:
    """A source whose samples are their own numbers."""

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length, self.fingerprint = name, length, name

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, epoch: int):
        assert 0 <= index < self.length
        return self.name, index

    def modality_lengths(self, epoch: int) -> list[int]:
        return [index + 1 for index in range(self.length)]


def test_a_mixture_repeats_whole_sources_and_takes_a_new_part_of_fractions():
    mixture = Mixture([Numbers("a", 4), Numbers("b", 10), Numbers("c", 3)], [2, 0.5, 1.34], seed=0)
    assert len(mixture) == 8 + 5 + 4
    epochs = [[mixture.sample(index, epoch) for index in range(len(mixture))] for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2]
    assert [index for name, index in epochs[0] if name == "a"] == [0, 1, 2, 3] * 2
    parts = [[index for name, index in epoch if name == "b"] for epoch in epochs]
    assert len(set(parts[0])) == 5
    assert sorted(parts[0]) != sorted(parts[1])
    assert [index for name, index in epochs[0] if name == "c"][:3] == [0, 1, 2]
    assert mixture.modality_lengths(1) == [index + 1 for _, index in epochs[1]]
    assert mixture.fingerprint == "a b c"


def test_the_data_of_a_stage_is_one_file_or_a_mixture(folder):
    path = str(write(folder / "data.json", [with_picture(n) for n in range(6)]))
    assert isinstance(open_data([DataFile(path=path)], seed=0), FileSource)
    mixture = open_data([DataFile(path=path, repeat=1.5), DataFile(path=path, limit=2)], seed=0)
    assert len(mixture) == 9 + 2
