"""The contract with lmms-eval 0.7, against a stand-in of its base class made from the interface that it documents."""

import abc
import sys
import tomllib
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from opsin import families, weights
from opsin.encode import Encoder
from opsin.errors import ConfigError
from opsin.evaluate import lmms_eval as plug_in
from opsin.evaluate.lmms_eval import cut, sampling_of
from opsin.generate.beam import Beams
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.generate.score import encode_answer, score
from opsin.text.messages import Conversation, ask, assistant, system
from toys import byte_tokenizer, picture

ROOT = Path(__file__).parents[2]
TASK, SPLIT = "toy", "test"


@dataclass
class Instance:
    """A request: what it asks for is in `args`."""

    arguments: tuple[Any, ...]
    resps: list[Any] = field(default_factory=list)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


class CacheHook:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.seen.append((attr, req, res))


class Base(abc.ABC):
    """What lmms-eval's `lmms` promises and asks for."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}
        self.cleaned = False

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, text: str, more: dict[str, Any] | None = None) -> Any:
        pairs = dict(pair.split("=", 1) for pair in text.split(",") if pair)
        return cls(**pairs, **{key: value for key, value in (more or {}).items() if value is not None})

    def clean(self) -> None:
        self.cleaned = True


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval, as far as a plug-in sees it."""
    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")}
    modules["lmms_eval.api.model"] = ModuleType("lmms_eval.api.model")
    modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"] = ModuleType("lmms_eval.models.registry_v2")
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes that were made of another base."""
    for name in ("Opsin", "OpsinSimple"):
        monkeypatch.setitem(vars(plug_in), name, None)
        monkeypatch.delitem(vars(plug_in), name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads pictures and videos, sharp enough to answer differently."""
    place = tmp_path_factory.mktemp("lmms")
    config = families.preset("qwen2-vl-tiny").config
    vlm = weights.build(config, seed=1)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.mul_(3)
    weights.save_native(place / "m", vlm, config, byte_tokenizer(place / "tokenizer"))
    return place / "m"


PICTURES = [picture((60, 40)), picture((50, 70), 1), picture((90, 30), 2)]
DOCS = [
    {"text": "What is it?", "media": [PICTURES[0]]},
    {"text": "Two of them", "media": [PICTURES[1], PICTURES[2]]},
    {"text": "No picture", "media": []},
    {"text": "What happens?", "media": [{"type": "video", "url": PICTURES[:1] * 4}]},
    {"text": "Typed <image> stays text", "media": []},
]


def messages_of(doc: dict[str, Any]) -> list[dict[str, Any]]:
    media = [each if isinstance(each, dict) else {"type": "image", "url": each} for each in doc["media"]]
    return [{"role": "user", "content": [*media, {"type": "text", "text": doc["text"]}]}]


def conversation_of(doc: dict[str, Any]) -> Conversation:
    videos = [tuple(each["url"]) for each in doc["media"] if isinstance(each, dict)]
    return ask(doc["text"], *(each for each in doc["media"] if not isinstance(each, dict)), videos=videos)


def request(number: int, settings: dict[str, Any] | None = None, *, context: bool = True) -> Instance:
    given = settings if settings is not None else {"max_new_tokens": 5, "until": []}
    args = (messages_of, given, number, TASK, SPLIT)
    return Instance(("the context", *args) if context else args)


@pytest.fixture
def lm(harness: None, folder: Path) -> Any:
    return make(folder)


def make(folder: Path, arguments: str = "", name: str = "Opsin") -> Any:
    found = getattr(plug_in, name).create_from_arg_string(f"pretrained={folder}{arguments}", {"device": "cpu"})
    found.task_dict = {TASK: {SPLIT: DOCS}}
    return found


def answers_of(lm: Any, docs: list[dict[str, Any]], limit: int = 5) -> list[str]:
    """What opsin says by itself, one at a time."""
    encoder = Encoder(lm.model.config, lm.model.tokenizer, image_mode="reference")
    asked = [encoder.encode(conversation_of(doc)) for doc in docs]
    how = Sampling(max_new_tokens=limit)
    return [generate(lm.model.vlm, [each], lm.model.tokenizer, how)[0].text for each in asked]


@pytest.mark.usefixtures("harness")
def test_the_entry_point_leads_to_two_classes_that_the_harness_can_make() -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][plug_in.GROUP]
    assert entry == {"opsin": "opsin.evaluate.lmms_eval:manifest"}
    described = plug_in.manifest()
    assert described.model_id == "opsin"
    for path, is_simple in ((described.chat_class_path, False), (described.simple_class_path, True)):
        module, name = path.rsplit(".", 1)
        made = getattr(import_module(module), name)
        assert issubclass(made, Base)
        assert made.is_simple is is_simple
        assert not made.__abstractmethods__
        assert getattr(import_module(module), name) is made


def test_without_lmms_eval_the_module_is_there_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    with pytest.raises(ConfigError, match=r"pip install 'opsin\[lmms-eval\]'"):
        _ = plug_in.Opsin
    with pytest.raises(AttributeError, match="Opsinn"):
        _ = plug_in.Opsinn


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_opsins_own_in_the_order_of_the_requests(harness: None, folder: Path, batch_size: int) -> None:
    lm = make(folder, f",batch_size={batch_size}")
    order = [3, 0, 4, 2, 1, 0]
    settings = [{"max_new_tokens": limit} for limit in (5, 3, 5, 3, 5, 5)]
    requests = [request(*each) for each in zip(order, settings, strict=True)]
    wanted = [answers_of(lm, [DOCS[n]], s["max_new_tokens"])[0] for n, s in zip(order, settings, strict=True)]
    assert lm.generate_until(requests) == wanted
    assert len(set(wanted)) > 2
    assert [each[0] for each in lm.cache_hook.seen] == ["generate_until"] * len(requests)
    assert lm.generate_until([]) == []


def test_requests_with_and_without_a_context_are_read(lm: Any) -> None:
    """0.7.2 puts a context in front; its guide describes the rest alone."""
    assert lm.generate_until([request(0)]) == lm.generate_until([request(0, context=False)]) == answers_of(lm, DOCS[:1])


def test_an_answer_ends_before_the_first_of_until(lm: Any) -> None:
    (whole,) = lm.generate_until([request(0, {"max_new_tokens": 12})])
    stop = whole[4:6]
    for until in (stop, [stop], ["not in it", stop, ""], [whole[6:], stop]):
        (text,) = lm.generate_until([request(0, {"max_new_tokens": 12, "until": until})])
        assert text == whole[: whole.index(stop)].rstrip()
    assert cut("a. b? c", ["?", ". "]) == "a"
    assert cut("abc", []) == "abc"


def test_a_system_prompt_stands_before_what_brings_none(harness: None, folder: Path) -> None:
    lm = make(folder, ",system_prompt=Be brief.")
    asked = conversation_of(DOCS[0])
    prompt = lm.encoder.encode(Conversation((system("Be brief."), *asked.messages), asked.images))
    wanted = generate(lm.model.vlm, [prompt], lm.model.tokenizer, Sampling(max_new_tokens=5))[0].text
    assert lm.generate_until([request(0)]) == [wanted]


def likely(doc: dict[str, Any], target: Any) -> Instance:
    return Instance((doc["text"], target, lambda doc: doc["media"], DOCS.index(doc), TASK, SPLIT))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_teacher_forcing(harness: None, folder: Path, batch_size: int) -> None:
    lm = make(folder, f",batch_size={batch_size}", "OpsinSimple")
    docs, targets = [DOCS[1], DOCS[0], DOCS[2], DOCS[0]], ["a cat", "yes", "no", "no"]
    requests = [likely(doc, lambda doc, target=target: target) for doc, target in zip(docs, targets, strict=True)]
    found = lm.loglikelihood(requests)
    for (value, is_greedy), doc, target in zip(found, docs, targets, strict=True):
        asked = conversation_of(doc)
        whole = Conversation((*asked.messages, assistant(target)), asked.images)
        (wanted,) = score(lm.model.vlm, [encode_answer(lm.encoder, whole)])
        assert value == pytest.approx(wanted.log_probability, abs=1e-3)
        assert value < 0
        assert is_greedy is wanted.is_greedy
    assert lm.loglikelihood([likely(DOCS[0], lambda doc: " no\n")])[0] == pytest.approx(found[3], abs=1e-3)
    (bare,) = lm.loglikelihood([Instance(("", "no"))])
    assert bare[0] < 0


def test_multiple_choice_takes_the_smallest_loss_and_is_told_so(harness: None, folder: Path) -> None:
    lm = make(folder, name="OpsinSimple")
    requests = [likely(DOCS[0], f" {letter}") for letter in "ABC"]
    with pytest.warns(UserWarning, match="scores=loss"):
        sums = [value for value, _ in lm.loglikelihood(requests)]
    losses = [value for value, _ in make(folder, ",scores=loss", "OpsinSimple").loglikelihood(requests)]
    assert losses == pytest.approx([-each for each in sums], abs=1e-3), "of one token each"
    assert losses.index(min(losses)) == sums.index(max(sums))


def test_a_simple_request_shows_its_pictures_at_their_marks_or_in_front(harness: None, folder: Path) -> None:
    lm = make(folder, name="OpsinSimple")

    def ask_simply(text: str, media: Any) -> str:
        args = (text, {"max_new_tokens": 5}, lambda doc: media, 0, TASK, SPLIT)
        return lm.generate_until([Instance(args)])[0]

    assert ask_simply("What is it?", [PICTURES[0]]) == answers_of(lm, DOCS[:1])[0]
    assert ask_simply("<image>What is it?", [PICTURES[0]]) == answers_of(lm, DOCS[:1])[0]
    assert ask_simply("No picture", None) == ask_simply("No picture", []) == answers_of(lm, [DOCS[2]])[0]
    parts = plug_in._beside("See <image 1> and <image 2>.", PICTURES[:2])[0]["content"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image", "text"]
    parts = plug_in._beside("See <image>.", PICTURES[:2])[0]["content"]
    assert [part["type"] for part in parts] == ["image", "image", "text"]


def test_rounds_go_on_until_the_task_ends_them(lm: Any) -> None:
    seen: list[Any] = []

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages_of(doc)
        seen.append((round_idx, list(previous_output), previous_round_info))
        if round_idx == 2:
            return None, True, previous_output, previous_round_info
        return messages_of(DOCS[1]), False, previous_output, {"round": round_idx}

    requests = [Instance(("context", rounds, {"max_new_tokens": 5}, number, TASK, SPLIT)) for number in (0, 2)]
    first, second, third = (answers_of(lm, [DOCS[number]])[0] for number in (0, 1, 2))
    assert lm.generate_until_multi_round(requests) == [[first, second], [third, second]]
    assert seen[:2] == [(1, [first], None), (2, [first, second], {"round": 1})]


def test_rounds_of_simple_requests_bring_pictures_and_text(harness: None, folder: Path) -> None:
    lm = make(folder, name="OpsinSimple")

    def rounds(doc, previous_output=None, round_idx=None, previous_round_info=None):
        if round_idx == 2:
            return None, None, True, [*previous_output, "the end"], None
        return DOCS[1]["media"], DOCS[1]["text"], False, previous_output, None

    args = ("What is it?", {"max_new_tokens": 5}, lambda doc: doc["media"], rounds, 0, TASK, SPLIT)
    first, second = answers_of(lm, DOCS[:2])
    assert lm.generate_until_multi_round([Instance(args)]) == [[first, second, "the end"]]


def test_each_process_knows_its_number_and_takes_its_own_gpu(
    harness: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    lm = make(folder)
    assert (lm.rank, lm.world_size, lm.device) == (3, 4, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plug_in._own_device("auto") == plug_in._own_device("cuda") == "cuda:1"
    assert plug_in._own_device("cuda:0") == "cuda:0"


def test_memory_is_given_back_when_the_answers_are_there(lm: Any) -> None:
    lm.clean()
    assert lm.cleaned
    assert not hasattr(lm, "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (",batchsize=2", r"no 'batchsize' \(did you mean 'batch_size'"),
        (",batch_size=auto", "batch_size is 'auto'; it is a whole number"),
        (",scores=both", "scores is 'both'; it is one of logprob, loss"),
        (",image_mode=raw", "image_mode is 'raw'"),
        (",max_new_tokens=0", "max_new_tokens is '0'"),
    ],
)
@pytest.mark.usefixtures("harness")
def test_settings_that_there_are_not_are_refused(folder: Path, arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(folder, arguments)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "audio", "url": "song.wav"}, "'audio' is unknown"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "a part of a video"),
        ({"type": "video", "url": {"path": "a.mp4", "video_end": 2}}, "a part of a video"),
        ({"type": "image", "url": "nowhere.png"}, "no such file"),
    ],
)
def test_what_cannot_be_shown_is_an_error_that_names_task_and_document(lm: Any, part: Any, message: str) -> None:
    def messages(doc: Any) -> Any:
        return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]

    with pytest.raises(ValueError, match=message) as error:
        lm.generate_until([Instance(("context", messages, {}, 2, TASK, SPLIT))])
    assert "toy[test] 2" in str(error.value)


def test_boxes_stay_as_the_model_writes_them(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control tokens are no text: what comes is what `opsin chat` prints."""
    text = "a box (12,34),(56,78)"
    real = plug_in.generate

    def say(*args: Any) -> Any:
        return [type(each)(**{**vars(each), "text": text}) for each in real(*args)]

    monkeypatch.setattr(plug_in, "generate", say)
    assert lm.generate_until([request(0)]) == [text]


def test_settings_of_tasks_become_settings_of_opsin() -> None:
    def made(**settings: Any) -> Any:
        return sampling_of(settings, ("\n\n", "x" * 300), max_new_tokens=7)

    assert made() == Sampling(7, stop_strings=("\n\n",))
    assert made(temperature=0, top_p=0, top_k=0, num_beams=1, do_sample=False, image_aspect_ratio="pad") == made()
    assert made(temperature=0.7, do_sample=False, top_p=0.9) == made()
    assert made(max_new_tokens=16).max_new_tokens == 16
    drawn = made(temperature=0.7, top_p=0.9, top_k=5, seed=3)
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (0.7, 0.9, 5, 3)
    assert made(temperature=0.7, top_p=None).top_p is None
    assert made(num_beams=3, max_new_tokens=9) == Beams(3, 9)
    with pytest.raises(ValueError, match=r"num_beams 3 at temperature 0\.5"):
        made(num_beams=3, temperature=0.5)


# ---- against lmms-eval itself ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lmms_eval_itself_finds_makes_and_asks_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs lmms_eval on the path; its heavy dependencies are not needed for its base class and registry."""
    forget(monkeypatch)
    registry_v2 = pytest.importorskip("lmms_eval.models.registry_v2", reason="lmms-eval is not installed")
    instance = import_module("lmms_eval.api.instance")
    protocol = import_module("lmms_eval.protocol")
    text = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][plug_in.GROUP]["opsin"]
    entry = EntryPoint("opsin", text, plug_in.GROUP)
    monkeypatch.setattr(registry_v2, "entry_points", lambda: EntryPoints([entry]))
    registry = registry_v2.ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.list_model_names() == ["opsin"]

    def made(name: str, **options: Any) -> Any:
        lm = registry.get_model_class("opsin", **options).create_from_arg_string(
            f"pretrained={folder},scores=loss", {"batch_size": 2, "device": "cpu", "max_batch_size": None}
        )
        assert type(lm).__name__ == name
        lm.task_dict = {TASK: {SPLIT: DOCS}}
        return lm

    def asked(kind: str, *args: Any) -> Any:
        metadata = {"task": TASK, "doc_id": args[-3], "repeats": 1, "split": SPLIT}
        return instance.Instance(request_type=kind, arguments=args, idx=0, metadata=metadata)

    chat, settings = made("Opsin"), {"max_new_tokens": 5, "until": ["\n\n"], "do_sample": False, "top_p": 0}
    requests = [asked("generate_until", "", messages_of, settings, number, TASK, SPLIT) for number in (2, 0, 1)]
    found = chat.generate_until(requests)
    assert found == answers_of(chat, [DOCS[2], DOCS[0], DOCS[1]])
    assert [instance.unwrap_generation_output(each)[0] for each in found] == found
    checked = protocol.ChatMessages(messages=messages_of(DOCS[1]))
    images, videos, audios = checked.extract_media()
    assert (len(images), videos, audios) == (2, [], [])
    assert chat._parse(checked.to_hf_messages(), "hf") == chat._parse(messages_of(DOCS[1]), "hf")

    simple = made("OpsinSimple", force_simple=True)
    simple_args = (DOCS[0]["text"], settings, lambda doc: doc["media"])
    assert simple.generate_until([asked("generate_until", *simple_args, 0, TASK, SPLIT)]) == found[1:2]
    choices = [
        asked("loglikelihood", DOCS[0]["text"], f" {letter}", lambda doc: doc["media"], 0, TASK, SPLIT)
        for letter in "AB"
    ]
    assert all(loss > 0 and greedy in (True, False) for loss, greedy in simple.loglikelihood(choices))
    simple.clean()
    assert not hasattr(simple, "model")
