"""The folder of an evaluation: what was asked, every output as it came, and what follows from them.

run.json        what decides the outputs; another run may go on only where it is equal
outputs.jsonl   one line per output, written as it comes
scores.jsonl    the same, parsed and scored; made anew from the outputs each time
results.json    figures with intervals, and everything needed to know what they are of
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from opsin.errors import ConfigError, DataError
from opsin.evaluate.figures import Scored

RUN, OUTPUTS, SCORES, RESULTS = "run.json", "outputs.jsonl", "scores.jsonl", "results.json"
FORMAT = 1
Name = tuple[str, str]
"""(control, key) of an output; the control of the real ones is empty."""


class Output(NamedTuple):
    """One line of outputs.jsonl."""

    control: str
    """Empty, or the control that it belongs to."""
    key: str
    text: str
    """What the model wrote, white space at its ends cut."""
    finish: str
    """Why it ended: stop_token, stop_string or length."""
    new_tokens: int


class OutputFile:
    """outputs.jsonl: lines that are there when `write` returns. A line that a crash has cut in two is taken back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outputs: dict[Name, Output] = {}
        kept = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    output = Output(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise DataError(f"{path} line {len(self.outputs) + 1} is no output: {error}") from None
                self.outputs[output.control, output.key] = output
                kept += len(line)
        self._stream: BinaryIO = path.open("ab")
        self._stream.truncate(kept)

    def write(self, outputs: Sequence[Output]) -> None:
        """Append some."""
        for output in outputs:
            self.outputs[output.control, output.key] = output
        lines = [json.dumps(output._asdict(), ensure_ascii=False) + "\n" for output in outputs]
        self._stream.write("".join(lines).encode())
        self._stream.flush()

    def close(self) -> None:
        """Wait until all is on the disk, and close."""
        os.fsync(self._stream.fileno())
        self._stream.close()


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of an evaluation, or find that it goes on. settings: what decides the outputs.

    Raises ConfigError for a folder of other things, or of outputs under other settings.
    """
    file = folder / RUN
    if file.is_file():
        changed = list(_changes(read_object(file), settings))
        if changed:
            raise ConfigError(
                f"{folder} holds outputs under other settings: {'; '.join(changed)}. Take the settings back to go on "
                "with it, or name another folder with --output"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and holds no evaluation; name a new folder with --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{key}.{change}" for change in _changes(old, new))
        elif old != new:
            yield f"{key}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def write_scores(
    folder: Path,
    scored: Mapping[str, Sequence[Scored]],
    told: Callable[[str, str], Mapping[str, Any]] = lambda control, key: {},
) -> None:
    """scores.jsonl, whole or not there. scored: by control. told: what else a reader wants to see of an example."""
    lines = [
        json.dumps({"control": control, **asdict(each), **told(control, each.key)}, ensure_ascii=False) + "\n"
        for control, several in scored.items()
        for each in several
    ]
    write_whole(folder / SCORES, "".join(lines))


def read_scores(folder: Path) -> list[Scored]:
    """The real outputs of a finished evaluation, scored. Raises DataError."""
    path = folder / SCORES
    try:
        lines = path.read_bytes().splitlines()  # of text it would also split at other marks
        rows = [row for line in lines if not (row := json.loads(line))["control"]]
        names = [field.name for field in fields(Scored)]
        return [Scored(**{**{name: row[name] for name in names}, "sums": tuple(row["sums"])}) for row in rows]
    except FileNotFoundError:
        raise DataError(f"{folder} holds no finished evaluation ({SCORES} is not there)") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__} {error}") from None


def read_results(folder: Path) -> dict[str, Any]:
    """results.json. Raises DataError where there is none."""
    if not (folder / RESULTS).is_file():
        raise DataError(f"{folder} holds no finished evaluation ({RESULTS} is not there)")
    results = read_object(folder / RESULTS)
    if results.get("format") != FORMAT:
        raise DataError(f"{folder / RESULTS} has format {results.get('format')!r}; this opsin reads {FORMAT}")
    return results


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds {type(data).__name__}, not an object")
    return data


def write_whole(path: Path, text: str) -> None:
    """A file that is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
