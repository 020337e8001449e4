"""Names to folders: local ones, presets, repositories in a cache, and what is said when none of them is there.

No test reaches a hub: the cache is laid out by hand as huggingface_hub lays it out, or its download is replaced.
"""

from pathlib import Path

import pytest
from huggingface_hub import errors as hub_errors

from opsin import families, weights
from opsin.errors import UnknownNameError, WeightError
from opsin.weights.hub import PATTERNS, locate
from weights.folders import published, same, tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "llava-hf/llava-v1.6-mistral-7b-hf"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline, as HF_HOME and HF_HUB_OFFLINE would make it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def cached(cache: Path, repository: str = REPOSITORY) -> Path:
    """A snapshot of a repository in the cache, tiny though it is."""
    place = cache / f"models--{repository.replace('/', '--')}"
    published(place / "snapshots" / COMMIT, "llava-next-tiny", "hf")
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


@pytest.mark.parametrize(
    "name", [REPOSITORY, f"{REPOSITORY}@main", f"{REPOSITORY}@{COMMIT}", "llava-next-mistral-7b-hf"]
)
def test_a_cached_repository_loads_offline_by_name_and_by_preset(cache: Path, name: str) -> None:
    snapshot = cached(cache)
    assert weights.resolve(name) == snapshot
    model = weights.load(name)
    assert model.name == f"{REPOSITORY}@0123456"
    assert same(model.vlm.state_dict(), tiny().vlm.state_dict())


def test_a_local_folder_comes_before_a_preset_and_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llava-1.5-7b", REPOSITORY):
        published(Path(name))
        assert weights.resolve(name) == Path(name)
        assert weights.describe(name) == weights.load(name).config
        assert weights.load(name).config.decoder.dim == 64


def test_what_is_not_cached_says_so_and_what_to_do(cache: Path) -> None:
    with pytest.raises(WeightError) as caught:
        weights.load("llava-1.5-7b-hf")
    text = str(caught.value)
    assert text.startswith("llava-hf/llava-1.5-7b-hf is not, or not wholly, in the local cache")
    assert str(cache) in text
    assert "HF_HUB_OFFLINE is set" in text
    assert "Connect once and load it again, set HF_HOME" in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "is gated: accept its terms at https://huggingface.co/some/model"),
        (hub_errors.RepositoryNotFoundError, "the hub has no repository 'some/model', or it is private"),
        (hub_errors.RevisionNotFoundError, "some/model has no revision 'v2'"),
        (hub_errors.LocalEntryNotFoundError, "the hub cannot be reached .LocalEntryNotFoundError."),
        (TimeoutError, "the hub cannot be reached .TimeoutError."),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise error.__new__(error)  # its constructor wants a response of one HTTP library or another

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(WeightError, match=message):
        weights.resolve("some/model@v2")


def test_no_pickle_and_no_code_is_ever_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fnmatch import fnmatch

    asked: dict[str, object] = {}

    def download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    located = locate("llava-1.5-13b-hf", revision="v1")
    assert (asked["repository"], asked["revision"]) == ("llava-hf/llava-1.5-13b-hf", "v1")
    assert located.preset == families.preset("llava-1.5-13b-hf")
    assert asked["allow_patterns"] == list(PATTERNS)

    def taken(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in PATTERNS)

    wanted = ("model-00001-of-00003.safetensors", "config.json", "tokenizer.model", "tokenizer.json", "merges.txt")
    assert all(taken(name) for name in wanted)
    refused = (
        "pytorch_model.bin",
        "modeling_x.py",
        "model.pt",
        "model.pth",
        "training_args.bin",
        "tf_model.h5",
        "x.pkl",
    )
    assert not any(taken(name) for name in refused)


def test_unknown_names_get_the_nearest_preset() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no model 'llava-1.5-7' \(did you mean 'llava-1.5-7b'.*one of these: opsin-mini"
    ):
        weights.load("llava-1.5-7")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_is_not_there_is_called_a_folder(name: str) -> None:
    with pytest.raises(WeightError, match=f"there is no folder '{name}'"):
        weights.load(name)


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("llava-7b-v0", "difference to LLaMA weights .liuhaotian/LLaVA-7b-delta-v0.*apply_delta"),
        ("llava-llama-2-7b", "LoRA weights.*merge_lora_weights.py"),
        ("llava-1.5-13b-hd", "weights were never published"),
        ("llava-1.5-tiny", "size for tests without weights; opsin.weights.build"),
    ],
)
def test_presets_without_a_repository_say_what_to_do(id: str, message: str) -> None:
    with pytest.raises(WeightError, match=message):
        weights.load(id)
