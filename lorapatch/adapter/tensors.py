"""Tensors in .safetensors and PyTorch .bin files, read without torch and without running what a pickle asks for."""

from __future__ import annotations

import itertools
import json
import math
import operator
import pickle
import struct
import zipfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from lorapatch.errors import Refused

__all__ = ["FLOATS", "SIZES", "Tensor", "read_tensors"]

# Bytes of an element, by safetensors' names of the types.
SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
# The highest two bytes of a little-endian number: it is infinite or no number when both masks are full.
_NOT_FINITE = {"F64": (0x7F, 0xF0), "F32": (0x7F, 0x80), "BF16": (0x7F, 0x80), "F16": (0x7C, 0x00)}
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor in ``file``: its shape, its type in safetensors' words ("BF16"), and how to read its bytes.

    ``start`` is the offset of its bytes in the file; None where they do not lie there in one piece.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int | None
    load: Callable[[], bytes]

    @property
    def parameters(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.parameters * SIZES[self.dtype]

    def read(self) -> bytes:
        """Its bytes, in the order of its elements. Raises Refused."""
        try:
            data = self.load()
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise Refused(f"{self.file} is damaged: {self.name} cannot be read ({error})") from error
        if len(data) != self.nbytes:
            raise Refused(f"{self.file} is cut short: {self.name} has {len(data)} bytes of {self.nbytes}")
        return data

    def is_finite(self) -> bool:
        """Whether no element is infinite or NaN; whole numbers always are finite."""
        if self.dtype not in _NOT_FINITE:
            return True
        data, size = self.read(), SIZES[self.dtype]
        high_mask, low_mask = _NOT_FINITE[self.dtype]
        high = data[size - 1 :: size].translate(bytes(byte & high_mask == high_mask for byte in range(256)))
        if 1 not in high:
            return True
        low = data[size - 2 :: size].translate(bytes(byte & low_mask == low_mask for byte in range(256)))
        return not any(map(operator.and_, high, low))

    def is_zero(self) -> bool:
        """Whether every element is zero (or minus zero)."""
        data, size = bytearray(self.read()), SIZES[self.dtype]
        if self.dtype in FLOATS:
            data[size - 1 :: size] = data[size - 1 :: size].translate(bytes(byte & 0x7F for byte in range(256)))
        return data == bytes(len(data))

    def norm(self) -> float:
        """The Euclidean norm. About 30 ns an element. Raises Refused for a type that is no float."""
        data = self.read()
        if self.dtype == "BF16":  # the upper half of a float32
            wide = bytearray(2 * len(data))
            wide[2::4], wide[3::4] = data[0::2], data[1::2]
            return math.hypot(*array("f", bytes(wide)))
        if self.dtype == "F16":
            return math.hypot(*struct.unpack(f"<{len(data) // 2}e", data))
        if self.dtype in ("F32", "F64"):
            return math.hypot(*array("f" if self.dtype == "F32" else "d", data))
        raise Refused(f"{self.name} has the type {self.dtype}, which has no norm here")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of ``path`` by name; only the file's index is read, the bytes when they are asked for.

    Raises Refused when the file is damaged, cut short, or a pickle that holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _safetensors(path, file)
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    return _pytorch(path, archive)
            raise Refused(f"{path} is cut short, or no file of PyTorch 1.6 or later")
    except (OSError, zipfile.BadZipFile) as error:
        raise Refused(f"{path} cannot be read ({error})") from error


def _safetensors(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    """Eight bytes of length, a JSON header, then the data: https://github.com/huggingface/safetensors#format"""
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise Refused(f"{path} is cut short: {size} bytes, its header alone should have {length + 8}")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            first, last = (int(offset) for offset in entry["data_offsets"])
            shape, dtype = tuple(map(int, entry["shape"])), str(entry["dtype"])
            start = 8 + length + first
            tensor = Tensor(name, shape, dtype, path, start, _piece(path, start, last - first))
            if 8 + length + last > size:
                raise Refused(f"{path} is cut short: {name} should end at byte {8 + length + last} of {size}")
            if dtype not in SIZES:
                raise Refused(f"{path}: {name} has the type {dtype}, which nobody here can read")
            if tensor.nbytes != last - first:
                raise Refused(f"{path} is damaged: {name} has {last - first} bytes for the shape {list(shape)}")
            found[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{path} is damaged: its header cannot be read ({error})") from error
    return found


def _piece(path: Path, start: int, size: int) -> Callable[[], bytes]:
    def load() -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    return load


def _pytorch(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """A zip file with a pickle of the names and shapes, and each storage's bytes as a file of its own."""
    (index, *_) = [name for name in archive.namelist() if name.endswith("/data.pkl")] or [""]
    if not index:
        raise Refused(f"{path} holds no tensors of PyTorch")
    with archive.open(index) as file:
        try:
            content = _Unpickler(file, archive, path, index.removesuffix("data.pkl")).load()
        except Refused as error:
            raise Refused(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle may raise nearly anything
            raise Refused(f"{path} is damaged: {error}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, _Rebuilt) for value in content.values()):
        raise Refused(f"{path} holds more than tensors by name, and nothing else is read")
    return {str(name): value.named(str(name), path) for name, value in content.items()}


@dataclass(frozen=True)
class _Storage:
    dtype: str
    start: int | None
    load: Callable[[], bytes]  # checks the zip file's sum


@dataclass(frozen=True)
class _Rebuilt:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def named(self, name: str, path: Path) -> Tensor:
        size, elements = SIZES[self.storage.dtype], math.prod(self.shape)
        whole = self._is_contiguous()

        def load() -> bytes:
            data = self.storage.load()
            return data[self.offset * size : (self.offset + elements) * size] if whole else self._gather(data, size)

        start = self.storage.start + self.offset * size if whole and self.storage.start is not None else None
        return Tensor(name, self.shape, self.storage.dtype, path, start, load)

    def _is_contiguous(self) -> bool:
        if 0 in self.shape:
            return True
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True

    def _gather(self, data: bytes, size: int) -> bytes:
        """The elements of a transposed or sliced tensor in their own order, one row at a time."""
        format_of: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
        numbers = memoryview(data).cast(format_of[size])
        *outer, (length, stride) = zip(self.shape, self.strides, strict=True)
        rows = []
        for places in itertools.product(*(range(count) for count, _ in outer)):
            first = self.offset + sum(place * step for place, (_, step) in zip(places, outer, strict=True))
            row = numbers[first : first + length * stride : stride] if stride else numbers[first : first + 1]
            rows.append(row.tobytes() * (1 if stride else length))
        return b"".join(rows)


class _Unpickler(pickle.Unpickler):
    """Knows tensors and nothing else: a pickle could otherwise call any function."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, path: Path, folder: str) -> None:
        super().__init__(file)
        self._archive, self._path, self._folder = archive, path, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Rebuilt(storage, offset, tuple(shape), tuple(strides))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise Refused(f"its pickle asks for {module}.{name}; only tensors are read, anything else could run code")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        member = self._archive.getinfo(f"{self._folder}data/{key}")
        return _Storage(dtype, self._start(member), self._loader(member.filename))

    def _loader(self, member: str) -> Callable[[], bytes]:
        def load() -> bytes:
            with zipfile.ZipFile(self._path) as archive:
                return archive.read(member)

        return load

    def _start(self, member: zipfile.ZipInfo) -> int | None:
        """Where a member's bytes are: behind its own header, whose lengths may differ from the directory's."""
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        with self._path.open("rb") as file:
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        return member.header_offset + 30 + int(name) + int(extra)
