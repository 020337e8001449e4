"""Records in tables: parquet files, Arrow datasets on disk, and dataset objects of the `datasets` package.

Rows are read when they are asked for. A parquet file can only be read by row groups, so some of these are kept; an
Arrow dataset is mapped into memory and costs none. Reading tables needs the optional package pyarrow.
"""

import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from opsin.data.records import STAND_IN
from opsin.errors import DataError

KEPT_BYTES = 1 << 29
"""Row groups of one parquet source that are kept in memory."""


def pyarrow(module: str = "pyarrow") -> Any:
    """The optional package. Raises DataError where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise DataError("reading tables needs pyarrow: pip install 'opsin[tables]'", kind="package") from None


class ParquetRecords:
    """The rows of one or several parquet files."""

    def __init__(self, paths: Sequence[Path], *, limit: int | None = None) -> None:
        """Raises DataError, naming the file, for what is no parquet file."""
        self.paths = tuple(paths)
        self._groups: list[tuple[int, int]] = []
        """(file, row group of it)"""
        self._begins: list[int] = [0]
        """First row of each group; at the end the number of rows."""
        self._first_groups: list[int] = []
        """First group of each file."""
        digest = hashlib.sha256()
        for number, path in enumerate(self.paths):
            metadata = self._open(path).metadata
            self._first_groups.append(len(self._groups))
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                self._begins.append(self._begins[-1] + metadata.row_group(group).num_rows)
            digest.update(_footer(path))
        self._length = self._begins[-1] if limit is None else min(limit, self._begins[-1])
        if not self._length:
            raise DataError(f"{self.paths[0]} holds no record", kind="empty")
        self.fingerprint = digest.hexdigest()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._light: tuple[int, Any, set[str]] = (-1, None, set())
        """The group that was last looked at without bytes: its number, table, and the columns left out of it."""
        self._lock = threading.Lock()

    @staticmethod
    def _open(path: Path) -> Any:
        parquet, arrow = pyarrow("pyarrow.parquet"), pyarrow()
        try:
            return parquet.ParquetFile(path)
        except (OSError, arrow.ArrowException) as error:
            raise DataError(f"{path} is no parquet file that can be read: {error}", kind="file") from None

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        """File and row of a record, from 1."""
        number, _ = self._groups[self._group(index)]
        return f"{self.paths[number]} row {index - self._begins[self._first_groups[number]] + 1}"

    def load(self, index: int, *, light: bool = False) -> dict[str, Any]:
        """A row as plain data."""
        group = self._group(index)
        row = index - self._begins[group]
        with self._lock:
            if light:
                if self._light[0] != group:
                    self._light = (group, *self._read_light(group))
                _, table, left_out = self._light
                record: dict[str, Any] = table.slice(row, 1).to_pylist()[0] if table.num_columns else {}
                for path in left_out:
                    _fill(record, path.split("."))
                return record
            if group in self._kept:
                self._kept.move_to_end(group)
            else:
                self._kept[group] = self._read(group, None)
                while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > KEPT_BYTES:
                    self._kept.popitem(last=False)
            table = self._kept[group]
        return table.slice(row, 1).to_pylist()[0]

    def _group(self, index: int) -> int:
        return bisect_right(self._begins, index) - 1

    def _read(self, group: int, columns: list[str] | None) -> Any:
        number, local = self._groups[group]
        path = self.paths[number]
        try:
            return self._open(path).read_row_group(local, columns=columns, use_threads=False)
        except (OSError, pyarrow().ArrowException) as error:
            raise DataError(f"{path} row group {local + 1} cannot be read: {error}", kind="file") from None

    def _read_light(self, group: int) -> tuple[Any, set[str]]:
        """A group without bytes, which are not even read from the file where its statistics say that none is missing,
        and the columns not read."""
        number, local = self._groups[group]
        file = self._open(self.paths[number])
        left_out: set[str] = set()
        kept: list[str] = []
        for place in range(len(file.schema)):
            column, statistics = file.schema.column(place), file.metadata.row_group(local).column(place).statistics
            is_bytes = column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
            always = statistics is not None and statistics.has_null_count and statistics.null_count == 0
            (left_out.add if is_bytes and always else kept.append)(column.path)
        for path in list(left_out):
            beside = path.rpartition(".")[0]
            if beside and not any(other.startswith(f"{beside}.") for other in kept):
                left_out.remove(path)  # nothing else tells how many there are
                kept.append(path)
        return light_table(self._read(group, kept)), left_out


class ArrowRecords:
    """The rows of an Arrow dataset on disk, as `datasets.Dataset.save_to_disk` writes it, mapped into memory."""

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        """Raises DataError for a folder that is none."""
        arrow, self.folder = pyarrow(), folder
        self._batches: list[Any] = []
        self._begins: list[int] = [0]
        digest = hashlib.sha256()
        for path in arrow_files(folder):
            try:
                table = arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all()
            except (OSError, arrow.ArrowException) as error:
                raise DataError(f"{path} is no Arrow file that can be read: {error}", kind="file") from None
            for batch in table.to_batches():
                self._batches.append(batch)
                self._begins.append(self._begins[-1] + batch.num_rows)
            digest.update(f"{path.name} {path.stat().st_size} {table.num_rows} {table.schema}".encode())
        digest.update((folder / "state.json").read_bytes())
        self._length = self._begins[-1] if limit is None else min(limit, self._begins[-1])
        if not self._length:
            raise DataError(f"{folder} holds no record", kind="empty")
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        """Folder and row of a record, from 1."""
        return f"{self.folder} row {index + 1}"

    def load(self, index: int, *, light: bool = False) -> dict[str, Any]:
        """A row as plain data."""
        batch = bisect_right(self._begins, index) - 1
        row = pyarrow().Table.from_batches([self._batches[batch].slice(index - self._begins[batch], 1)])
        return (light_table(row) if light else row).to_pylist()[0]


class RowRecords:
    """The rows of an object with a length and numbered rows: a `datasets.Dataset`, or a list of records."""

    def __init__(self, rows: Any, *, name: str = "dataset", limit: int | None = None) -> None:
        """name: what messages call it. Raises DataError for an object without a length, such as a stream."""
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise DataError(
                f"{name} is {type(rows).__name__}, which has no length or numbered rows: a stream cannot be shuffled "
                "and resumed exactly; load the data set without streaming",
                kind="file",
            )
        # As Arrow: pictures stay bytes, which opsin opens under its own limits.
        self._rows = rows.with_format("arrow") if hasattr(rows, "with_format") else rows
        self._length = len(rows) if limit is None else min(limit, len(rows))
        self._name = name
        self.fingerprint = str(getattr(rows, "_fingerprint", ""))
        if not self._length:
            raise DataError(f"{name} holds no record", kind="empty")

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        """Name and row of a record, from 1."""
        return f"{self._name} row {index + 1}"

    def load(self, index: int, *, light: bool = False) -> Any:
        """A row as plain data."""
        row = self._rows[index]
        if not hasattr(row, "to_pylist"):
            return row
        return (light_table(row) if light else row).to_pylist()[0]


def arrow_files(folder: Path) -> list[Path]:
    """The data files of an Arrow dataset, in their order. Raises DataError for a folder that is none."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder} is no Arrow dataset: its state.json does not list data files. A folder of several splits is not "
            "one data set; name one split's folder",
            kind="file",
        ) from None


def light_table(table: Any) -> Any:
    """A table with a stand-in where bytes are."""
    arrays = [_light(column.combine_chunks()) for column in table.columns]
    return pyarrow().Table.from_arrays(arrays, names=table.column_names)


def _light(array: Any) -> Any:
    arrow, types = pyarrow(), pyarrow("pyarrow.types")
    kind = array.type
    if isinstance(array, arrow.ChunkedArray):
        return arrow.chunked_array([_light(chunk) for chunk in array.chunks])
    if types.is_binary(kind) or types.is_large_binary(kind):
        return pyarrow("pyarrow.compute").if_else(array.is_valid(), arrow.scalar(STAND_IN, kind), None)
    if types.is_struct(kind) and kind.num_fields:
        fields = [_light(array.field(place)) for place in range(kind.num_fields)]
        names = [kind.field(place).name for place in range(kind.num_fields)]
        return arrow.StructArray.from_arrays(fields, names=names, mask=array.is_null())
    if types.is_list(kind) and "binary" in str(kind):
        # Row by row: offsets of a slice do not begin at 0.
        values, offsets = _light(array.values), array.offsets.to_pylist()
        several = [
            values[begin:end].to_pylist() if valid else None
            for begin, end, valid in zip(offsets, offsets[1:], array.is_valid().to_pylist(), strict=False)
        ]
        return arrow.array(several, arrow.list_(values.type))
    return array


def _fill(value: Any, path: list[str]) -> None:
    """Put the stand-in where a column was left out."""
    if isinstance(value, list):
        for each in value:
            _fill(each, path[2:])  # .list.element
    elif isinstance(value, dict):
        if len(path) == 1:
            value[path[0]] = STAND_IN
        else:
            _fill(value.get(path[0]), path[1:])


def _footer(path: Path) -> bytes:
    """The end of a parquet file: its schema, and sizes, places and extremes of every column."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return file.read() + str(size).encode()
