"""Whether a file of weights is what its name says, and no larger inside than on disk.

Looked at before any library reads the file: a page of HTML or a pointer in its place gets its name,
and nothing that is read can make this process allocate more than the file's own size. Standard
library only.
"""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself for the part of a file that lists its tensors."""
MAX_BLOCKS = 1_000
"""So many blocks any configuration may describe; more only if as many tensors are there."""
_MAX_RECORDS = 1_000_000
_TEXTS = (b"version https://git-lfs", b"<!doctype", b"<html", b"/annex/")
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_FLOAT, _GGUF_STRING, _GGUF_ARRAY = 6, 8, 9
_GGUF_SCALING, _GGUF_SCALED = ".rope.scaling.type", ("rope_freqs.", "rope_factors_")
_GGUF_FACTORS = (".rope.scaling.factor", ".rope.scale_linear")
"""Fields and tensors of rotary positions that are scaled (Llama 3.1 and later): transformers reads
none that we know of, and the model would be another one. A factor without a type scales linearly,
the second being its old name; 0 and 1 scale nothing, nor does "linear" without a factor."""


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a HuggingFace folder."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def check_folder(folder: Path) -> int:
    """Check every file of weights in a HuggingFace folder, and return how many tensors they list.

    Raises:
        ValueError: Naming the first file that cannot be used, and why.
    """
    return sum(map(check_file, weight_files(folder)))


def check_blocks(config: Any, tensors: int) -> None:
    """Refuse a configuration with far more blocks than there are tensors for.

    Every block costs time and memory to build, before a library notices that it has no weights.

    Args:
        config: A HuggingFace configuration.
        tensors: How many the files list.

    Raises:
        ValueError: With both numbers.
    """
    blocks = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(blocks, int) and blocks > max(MAX_BLOCKS, tensors):
        raise ValueError(
            f"the configuration has {blocks:,} blocks, and there are {tensors:,} tensors"
        )


def check_file(path: Path) -> int:
    """Check one ``.safetensors``, ``.bin``, ``.pt`` or ``.gguf`` file; return its tensors' number.

    A ``.bin`` file of the format before PyTorch 1.6 does not tell it: 0.

    Raises:
        ValueError: Naming the file, and why it cannot be used.
    """
    try:
        _refuse_texts(path)
        if path.suffix == ".safetensors":
            return _check_safetensors(path)
        return _check_gguf(path) if path.suffix == ".gguf" else _check_archive(path)
    except (ValueError, OSError, RecursionError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{path} {_cause(error)}") from error
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged, or no file that PyTorch wrote: {error}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    return str(error) if type(error) is ValueError else f"is damaged: {error}"


def _refuse_texts(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if not head:
        raise ValueError("is empty")
    if head.startswith(_TEXTS):
        raise ValueError("is a text file (an HTML page or a large-file pointer), not weights")


def _check_safetensors(path: Path) -> int:
    """The header must fit into the file, and its tensors must be those bytes that follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"is damaged: its header would take {length:,} of {size:,} bytes")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("is damaged: its header lists no tensors")
    return len(header.keys() - {"__metadata__"})


def _check_archive(path: Path) -> int:
    """PyTorch stores records as they are, one after another: they are never larger than the file.

    Its formats before version 1.6 are no archives. Old models on the hub have them, and PyTorch's
    restricted loader reads them; we never wrote any.
    """
    if path.suffix == ".bin" and not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    size, total = path.stat().st_size, sum(record.file_size for record in records)
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or total > size or len(records) > _MAX_RECORDS:
        raise ValueError(
            f"is no file that PyTorch wrote: {len(records):,} records in {size:,} bytes"
            f" {'are packed, and' if compressed else ''} would take {total:,}"
        )
    return len(records)


def _check_gguf(path: Path) -> int:
    """Walk over the fields before the tensors; the library's reader believes every length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        magic, version, tensors, fields = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("is no GGUF file of version 2 or 3 (little-endian)")
        if max(tensors, fields) > size:
            raise ValueError(f"is damaged: {fields:,} fields, {tensors:,} tensors, {size:,} bytes")
        reader = _Gguf(file, size)
        scaled = _scaled_fields(reader, fields)
        for _ in range(tensors):
            name = reader.string()
            scaled += [name] * name.startswith(_GGUF_SCALED)
            reader.skip(8 * reader.number("<I") + 12)  # its shape, kind and place
    if scaled:
        raise ValueError(
            f"has scaled rotary positions ({scaled[0]}), which are not read from GGUF files; give"
            " the model's HuggingFace folder"
        )
    return int(tensors)


def _scaled_fields(reader: "_Gguf", fields: int) -> list[str]:
    """Walk over the fields; name those by which positions are scaled."""
    ways, factors = {}, []
    for _ in range(fields):
        name, kind = reader.string(), reader.number("<I")
        if name.endswith(_GGUF_SCALING) and kind == _GGUF_STRING:
            ways[name] = reader.string()
        elif name.endswith(_GGUF_FACTORS) and kind == _GGUF_FLOAT:
            factors += [name] * (reader.fraction() not in (0, 1))
        else:
            factors += [name] * name.endswith(_GGUF_FACTORS)  # of a kind it never is
            reader.skip_value(kind)
    if not ways:
        return factors
    return [name for name, way in ways.items() if way != "none" and (way != "linear" or factors)]


class _Gguf:
    """Skips over what a GGUF file holds, and refuses lengths that lead out of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(kind, self._file.read(struct.calcsize(kind)))
        return int(value)

    def fraction(self) -> float:
        (value,) = struct.unpack("<f", self._file.read(4))
        return float(value)

    def skip(self, length: int) -> None:
        if self._file.tell() + length > self._size:
            raise ValueError(f"is damaged: a field of {length:,} bytes leads out of it")
        self._file.seek(length, 1)

    def string(self) -> str:
        start = self._file.tell() + 8
        self.skip_string()
        length = self._file.tell() - start
        self._file.seek(start)
        return self._file.read(length).decode(errors="replace")

    def skip_string(self) -> None:
        self.skip(self.number("<Q"))

    def skip_value(self, kind: int) -> None:
        if kind == _GGUF_STRING:
            self.skip_string()
        elif kind == _GGUF_ARRAY:
            self._skip_array()
        elif kind in _GGUF_SIZES:
            self.skip(_GGUF_SIZES[kind])
        else:
            raise ValueError(f"is damaged: a field is of the unknown kind {kind}")

    def _skip_array(self) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _GGUF_SIZES:
            self.skip(count * _GGUF_SIZES[kind])
            return
        if kind != _GGUF_STRING or count > self._size:
            raise ValueError(f"is damaged: an array of {count:,} values of the kind {kind}")
        for _ in range(count):
            self.skip_string()
