"""Containers of records: the same conversations from each, in any order, and what each error names."""

import io
import json
import random
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data.containers import png, write_json, write_tar
from data.test_shapes import told
from opsin.data import scan
from opsin.data.files import DatasetSource, FileSource
from opsin.data.open import find_files
from opsin.data.problems import Checked
from opsin.data.source import open_data
from opsin.errors import ConfigError, DataError
from opsin.spec.recipe import DataFile, Stage


def turns(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\nNo. {number}é?"}, {"from": "gpt", "value": "Yes. " * (number + 1)}]


def check_any_order(source: Any, *, length: int) -> None:
    """Random access, from threads too, gives what reading in order gives."""
    assert isinstance(source, Checked)
    in_order = [source.sample(index, 0) for index in range(len(source))]
    assert len(in_order) == length
    places = list(range(length)) * 3
    random.Random(0).shuffle(places)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda index: source.sample(index, 0), places)) == [in_order[index] for index in places]
    assert list(source.problems()) == []
    assert all(source.where(index) in sample.id for index, sample in enumerate(in_order))


# ---- JSON ------------------------------------------------------------------------------------------------------------


def test_json_is_read_alike_through_windows_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    records = [{"id": "é" * number, "image": "a.png", "conversations": turns(number)} for number in range(7)]
    paths = [write_json(tmp_path / name, records) for name in ("x.json", "x.jsonl")]
    (tmp_path / "one-line.json").write_text(json.dumps(records), encoding="utf-8-sig")
    for path in (*paths, tmp_path / "one-line.json"):
        whole = FileSource(path)
        check_any_order(whole, length=7)
        for size in (1, 2, 5, 64, 1000):
            monkeypatch.setattr(scan, "CHUNK", size)
            again = FileSource(path)
            assert [again.sample(n, 0) for n in range(7)] == [whole.sample(n, 0) for n in range(7)]
        monkeypatch.undo()


def test_after_a_bad_line_the_rest_is_read(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]})
    path = tmp_path / "x.jsonl"
    path.write_bytes(f'{good}\n{{"messages": [\n\n{good}\n'.encode() + b'{"id": "\xff"}\n' + good.encode())
    source = FileSource(path, on_bad="keep")
    assert len(source) == 5
    assert [(problem.kind, problem.where) for problem in source.problems()] == [
        ("json", f"{path} line 2, column 15"),
        ("encoding", f"{path} line 5"),
    ]
    assert source.sample(4, 0).messages[1].text == "Yes"


def test_a_list_is_read_up_to_where_it_breaks(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]})
    path = tmp_path / "x.json"
    path.write_text(f'[{good},\n{good},\n{{"messages" }},\n{good}]')
    source = FileSource(path, on_bad="keep")
    assert len(source) == 3
    assert [str(problem) for problem in source.problems()] == [
        f"{path} line 3, column 13: record 3 is not JSON: Expecting ':' delimiter"
    ]


def test_a_million_records_would_take_megabytes_not_gigabytes(tmp_path: Path) -> None:
    """Only places are kept: a record of two kilobytes costs some tens of bytes."""
    record = {"messages": [{"role": "user", "content": "Hi " * 600}, {"role": "assistant", "content": "Yes"}]}
    path = write_json(tmp_path / "x.jsonl", [record] * 3000)
    tracemalloc.start()
    source = FileSource(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 3000
    assert kept / 3000 < 60


# ---- shards ----------------------------------------------------------------------------------------------------------


def shard(path: Path, first: int, count: int) -> Path:
    """Captions, and conversations of two pictures, in turn."""
    members: dict[str, Any] = {}
    for number in range(first, first + count):
        if number % 2:
            members |= {f"{number:04d}.jpg": png(number), f"{number:04d}.txt": f"picture {number}\n"}
        else:
            record = {
                "conversations": [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "No."}]
            }
            members |= {f"{number:04d}.json": record}
            members |= {f"{number:04d}.{place}.png": png(10 * number + place) for place in (0, 1)}
    return write_tar(path, members)


def test_shards_are_one_source_without_unpacking(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"shard-{number:03d}.tar", 10 * number, 5)
    names = ("shard-{000..002}.tar", "shard-*.tar", "")
    sources = [FileSource(tmp_path / name if name else tmp_path) for name in names]
    for source in sources:
        assert [source.sample(n, 0) for n in range(15)] == [sources[0].sample(n, 0) for n in range(15)]
        assert source.fingerprint == sources[0].fingerprint
    check_any_order(sources[0], length=15)
    pair, caption = sources[0].sample(5 + 2, 0), sources[0].sample(5 + 1, 0)
    assert told(pair) == ["u: {0}{1}Same?", "a: No."]
    assert pair.images == (png(120), png(121))
    assert told(caption) == ["u: [0]", "a: picture 11"]
    assert caption.images == (png(11),)
    assert caption.id == f"{tmp_path / 'shard-001.tar'} member 0011 (jpg, txt)"
    assert len(FileSource(tmp_path / "shard-{000..002}.tar", limit=7)) == 7


def test_a_shard_with_a_missing_member_is_named(tmp_path: Path) -> None:
    conversation = {"image": "b.jpg", "conversations": turns(1)}
    path = write_tar(
        tmp_path / "x.tar",
        {"sub/a.jpg": png(), "sub/a.txt": "good", "sub/b.json": conversation, "sub/c.txt": "alone", "sub/d.jpg": png()},
    )
    source = FileSource(path, on_bad="keep")
    assert [str(problem) for problem in source.problems()] == [
        f"{path} member sub/b (json): it names the image b.jpg, which is not in the shard",
        f"{path} member sub/c (txt): sub/c has a text but no picture; add the member, or leave it out",
        f"{path} member sub/d (jpg): no known shape of record has its keys ['images']; it needs 'conversations' or "
        "'messages', or a picture with 'caption', or with 'question' and 'answer'; `columns` names keys that are "
        "called otherwise",
    ]
    with pytest.raises(DataError, match=r"x.tar member sub/b \(json\): it names the image b.jpg"):
        FileSource(path)


def test_members_are_checked_and_ordered_by_number(tmp_path: Path) -> None:
    many = {f"a.{number}.png": png(number) for number in (10, 2, 1)}
    text = {"messages": [{"role": "user", "content": "<image>" * 3}, {"role": "assistant", "content": "Yes"}]}
    source = FileSource(write_tar(tmp_path / "x.tar", {**many, "a.json": {**text, "images": ["x", "y", "z"]}}))
    assert source.sample(0, 0).images == (png(1), png(2), png(10))
    named = {**text, "images": ["a.10.png", "a.1.png", "a.2.png"]}
    source = FileSource(write_tar(tmp_path / "y.tar", {**many, "a.json": named}))
    assert source.sample(0, 0).images == (png(10), png(1), png(2))
    path = write_tar(tmp_path / "z.tar", {**many, "a.json": {**text, "images": ["x"]}})
    with pytest.raises(DataError, match=r"it names 1 images but has 3 members"):
        FileSource(path)


def test_broken_and_packed_shards_are_told_apart(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", 0, 4)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"x.tar ends inside its member 0000.0.png: 2000 bytes are there"):
        FileSource(path)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(DataError, match="is compressed"):
        FileSource(tmp_path / "x.tar.gz")
    (tmp_path / "no.tar").write_bytes(b"x" * 4000)
    with pytest.raises(DataError, match="is no tar file that can be read"):
        FileSource(tmp_path / "no.tar")


# ---- tables ----------------------------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, Any]]:
    """Rows as `datasets` writes them: pictures as structs of bytes and path, some rows without any."""
    made = []
    for number in range(count):
        pictures = [{"bytes": png(number), "path": None}] * (number % 3)
        text = "<image>" * len(pictures) + f"No. {number}?"
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        made.append({"id": str(number), "images": pictures, "messages": messages})
    return made


def test_parquet_is_read_by_row_in_any_order(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number in range(2):
        table = arrow.Table.from_pylist(rows(20)[10 * number : 10 * number + 10])
        parquet.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=4)
    source = FileSource(tmp_path / "part-*.parquet")
    check_any_order(source, length=20)
    assert source.sample(14, 0).images == (png(14), png(14))
    assert source.sample(14, 0).id == f"{tmp_path / 'part-1.parquet'} row 5 '14'"
    assert [length > 0 for length in source.modality_lengths(0)] == [number % 3 > 0 for number in range(20)]
    assert len(FileSource(tmp_path, limit=13)) == 13
    assert FileSource(tmp_path).fingerprint == source.fingerprint != FileSource(tmp_path / "part-0.parquet").fingerprint


@pytest.mark.parametrize("with_path", [False, True], ids=["bytes", "struct"])
def test_opening_parquet_does_not_read_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_path: bool
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(name: str, pictures: list[bytes | None]) -> Path:
        cells = [{"bytes": each, "path": "x.png"} if with_path else each for each in pictures]
        parquet.write_table(arrow.Table.from_pylist([{"jpg": c, "caption": "a"} for c in cells]), tmp_path / name)
        return tmp_path / name

    read: list[list[str]] = []
    original = parquet.ParquetFile.read_row_group

    def spy(self: Any, *arguments: Any, **options: Any) -> Any:
        read.append(options["columns"])
        return original(self, *arguments, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", spy)
    source = FileSource(write("whole.parquet", [png(1), png(2)]))
    assert read == [[*(["jpg.path"] if with_path else []), "caption"]] or read == [["caption", "jpg.path"]]
    assert source.sample(1, 0).images == (png(2),)
    if not with_path:  # where one is missing, only reading tells which
        path = write("gap.parquet", [png(1), None])
        with pytest.raises(DataError, match=r"gap.parquet row 2: a caption without a picture"):
            FileSource(path)


def test_an_arrow_dataset_on_disk_is_mapped(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(names):
        table = arrow.Table.from_pylist(rows(12)[6 * number : 6 * number + 6])
        with arrow.ipc.new_stream(str(tmp_path / name), table.schema) as stream:
            stream.write_table(table, max_chunksize=4)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    source = FileSource(tmp_path)
    check_any_order(source, length=12)
    assert source.sample(8, 0).images == (png(8), png(8))
    assert source.where(8) == f"{tmp_path} row 9"
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is no Arrow dataset"):
        FileSource(tmp_path)


def test_objects_of_the_datasets_package_are_sources(tmp_path: Path) -> None:
    """Needs the package, which opsin itself does not."""
    arrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    rows = [{"image": {"bytes": png(number), "path": None}, "text": f"no. {number}"} for number in range(9)]
    info = datasets.DatasetInfo(features=datasets.Features(image=datasets.Image(), text=datasets.Value("string")))
    made = datasets.Dataset(arrow.Table.from_pylist(rows).cast(info.features.arrow_schema), info=info, fingerprint="a")
    made = made.shuffle(seed=0, new_fingerprint="b")
    source = DatasetSource(made)
    check_any_order(source, length=9)
    number = int(source.sample(3, 0).messages[1].text.split()[1])
    assert source.sample(3, 0).images == (png(number),)
    assert source.fingerprint
    made.save_to_disk(tmp_path / "saved")
    assert [told(FileSource(tmp_path / "saved").sample(n, 0)) for n in range(9)] == [
        told(source.sample(n, 0)) for n in range(9)
    ]


def test_a_stream_is_refused() -> None:
    with pytest.raises(DataError, match="dataset is generator, which has no length"):
        DatasetSource(row for row in rows(2))


# ---- sets of one object ----------------------------------------------------------------------------------------------


def test_coco_captions_are_one_record_for_each_annotation(tmp_path: Path) -> None:
    (tmp_path / "9.jpg").write_bytes(png())
    images = [{"id": 9, "file_name": "9.jpg", "width": 30, "height": 20}]
    notes = [{"id": 1, "image_id": 9, "caption": "one"}, {"id": 2, "image_id": 9, "caption": "two"}]
    whole = {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": notes}
    for indent in (None, 2):
        path = tmp_path / f"captions_{indent}.json"
        path.write_text(json.dumps(whole, indent=indent))
        source = FileSource(path)
        check_any_order(source, length=2)
        assert [told(source.sample(n, 0)) for n in range(2)] == [["u: [0]", "a: one"], ["u: [0]", "a: two"]]
    path.write_text(json.dumps({**whole, "annotations": [*notes, {"image_id": 8, "caption": "x"}]}))
    with pytest.raises(
        DataError, match=r"annotation 3 \(line 1\): its image_id '8' is not among the 1 images with a file_name"
    ):
        FileSource(path)
    path.write_text(json.dumps({**whole, "annotations": [{"image_id": 9, "bbox": [1, 2, 3, 4], "caption": "the cat"}]}))
    assert told(FileSource(path).sample(0, 0))[1] == "a: (1, 2, 4, 6 pixels)"


def test_vqa_joins_questions_and_answers(tmp_path: Path) -> None:
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").write_bytes(png())
    questions = [{"image_id": 9, "question": f"Is it {n}?", "question_id": n} for n in (1, 2)]
    answers = [
        {"question_id": n, "image_id": 9, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate("yny")]}
        for n in (2, 1)
    ]
    answers[0]["multiple_choice_answer"] = "no"
    path = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    path.write_text(json.dumps({"data_subtype": "train2014", "questions": questions}))
    with pytest.raises(DataError, match=r"v2_mscoco_train2014_annotations.json is not there; name the file"):
        FileSource(path)
    beside = tmp_path / "v2_mscoco_train2014_annotations.json"
    beside.write_text(json.dumps({"annotations": answers}))
    source = FileSource(path)
    check_any_order(source, length=2)
    assert told(source.sample(0, 0)) == ["u: [0]Is it 1?", "a: y"]
    assert told(source.sample(1, 0)) == ["u: [0]Is it 2?", "a: no"]
    assert source.sample(0, 0).images == (tmp_path / "train2014/COCO_train2014_000000000009.jpg",)
    beside.write_text(json.dumps({"annotations": answers[:1]}))
    with pytest.raises(DataError, match=r"question 1 .* has no answer to question_id 1"):
        FileSource(path)
    with pytest.raises(DataError, match="name the file of the questions"):
        FileSource(beside)


def test_scienceqa_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "train/1").mkdir(parents=True)
    (tmp_path / "train/1/image.png").write_bytes(png())
    problem = {
        "question": "Which?",
        "choices": ["a", "b"],
        "answer": 0,
        "hint": "Look.",
        "image": None,
        "split": "train",
    }
    problems = {"1": {**problem, "image": "image.png"}, "2": problem, "3": {**problem, "split": "val"}}
    for indent in (None, 1):
        (tmp_path / "problems.json").write_text(json.dumps(problems, indent=indent))
        (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "val": ["3"]}))
        source = FileSource(tmp_path)
        check_any_order(source, length=2)
        question = "Which?\nContext: Look.\nOptions: (A) a (B) b"
        assert told(source.sample(0, 0)) == [f"u: [0]{question}", "a: The answer is A."]
        assert told(source.sample(1, 0)) == [f"u: {question}", "a: The answer is A."]
        assert len(FileSource(tmp_path / "problems.json", split="val")) == 1
    with pytest.raises(DataError, match=r"has no split 'vall' \(did you mean 'val'\?\)"):
        FileSource(tmp_path, split="vall")


def test_another_object_is_refused_with_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n "a": 1,\n "b": {}\n}')
    with pytest.raises(DataError, match=r"is one JSON object with the keys \['b', 'a'\]"):
        FileSource(path)


# ---- hub -------------------------------------------------------------------------------------------------------------


def test_files_of_the_hub_are_downloaded_once_and_read_locally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        (tmp_path / "data").mkdir(exist_ok=True)
        for number in range(2):
            shard(tmp_path / f"data/part-{number}.tar", 10 * number, 3)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = FileSource("hf://datasets/someone/pictures@v1/data/part-{0..1}.tar#4")
    assert len(source) == 4
    patterns = ["data/part-0.tar", "data/part-1.tar"]
    assert asked == [("someone/pictures", {"repo_type": "dataset", "revision": "v1", "allow_patterns": patterns})]
    with pytest.raises(DataError, match="is an address of a kind that is not read"):
        FileSource("s3://example/x.json")

    def refuse(repository: str, **options: Any) -> str:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(DataError, match="someone/pictures is not, or not wholly, in the local cache"):
        FileSource("hf://datasets/someone/pictures/x.json")


# ---- mixtures --------------------------------------------------------------------------------------------------------


def test_a_count_behind_a_path_is_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = write_json(tmp_path / "x.json", [{"image": "a.png", "conversations": turns(n)} for n in range(9)])
    assert len(FileSource(f"{path}#4")) == 4
    assert len(FileSource(f"{path}#4", limit=2)) == 2
    odd = write_json(tmp_path / "x.json#4", [{"image": "a.png", "conversations": turns(0)}])
    assert find_files(str(odd)) == ([odd], None)
    with pytest.raises(DataError, match="no file is named like"):
        FileSource(tmp_path / "*.tar")


def test_weights_share_an_epoch(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for name, count in (("x", 12), ("y", 4)):
        write_json(tmp_path / f"{name}.json", [{"image": "a.png", "conversations": turns(n)} for n in range(count)])
    files = [DataFile(path=str(tmp_path / "x.json"), weight=1), DataFile(path=str(tmp_path / "y.json"), weight=3)]
    source = open_data(files, seed=0)
    assert len(source) == 16
    names = [source.sample(index, 0).id.split(".json")[0][-1] for index in range(16)]
    assert (names.count("x"), names.count("y")) == (4, 12)
    assert [source.sample(n, 1) for n in range(16)] == [open_data(files, seed=0).sample(n, 1) for n in range(16)]
    assert isinstance(source, Checked)
    assert source.where(15).startswith(f"{tmp_path / 'y.json'} record ")
    with pytest.raises(ConfigError, match="1 of 2 data files have a weight"):
        open_data([files[0], DataFile(path=str(tmp_path / "y.json"))], seed=0)
    with pytest.raises(ConfigError, match="has both weight and repeat"):
        DataFile.parse({"path": "x", "weight": 1, "repeat": 2}, where="x")


def test_a_stage_names_all_of_this_in_its_data(tmp_path: Path) -> None:
    shard(tmp_path / "shard-0.tar", 0, 4)
    stage = Stage.parse(
        {
            "name": "s",
            "trainable": ["connector"],
            "steps": 1,
            "batch": {"samples": 1},
            "optim": {"kind": "adamw", "lr": 1e-3},
            "data": [{"path": str(tmp_path / "shard-{0..0}.tar"), "prompt": "Describe it.", "format": "tar"}],
        },
        where="x",
    )
    assert told(open_data(stage.data, seed=0).sample(1, 0)) == ["u: [0]Describe it.", "a: picture 1"]  # type: ignore[arg-type]
