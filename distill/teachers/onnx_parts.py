"""What an ONNX file says of weights in other files, read from its bytes.

onnxruntime takes such weights from the working folder, or wherever the file points, and no hash of the file is theirs.
The package `onnx` comes with `mvmr[export]` alone, hence this walk through the few protobuf messages that hold tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_EXTERNAL = 1
_TENSOR_NAME, _DATA_LOCATION = 8, 14
# By message, the fields that hold a message in which a tensor may lie: number in onnx.proto -> message.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}


def external_tensor(content: bytes) -> str | None:
    """The name of a tensor whose values lie in another file, in the main graph or one below it; None for none.

    Raises: ValueError for bytes that are no protobuf message.
    """
    waiting = [("model", memoryview(content))]
    while waiting:
        kind, message = waiting.pop()
        name, external = "", False
        for field, value in _fields(message):
            if isinstance(value, int):
                external |= (kind, field) == ("tensor", _DATA_LOCATION) and value % 2**32 == _EXTERNAL
            elif inside := _INSIDE[kind].get(field):
                waiting.append((inside, value))
            elif (kind, field) == ("tensor", _TENSOR_NAME):
                name = bytes(value).decode(errors="replace")
        if external:
            return name
    return None


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: a number, or bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag % 8
        if kind == _VARINT:
            number, place = _varint(message, place)
            yield tag // 8, number
            continue
        if kind == _BYTES:
            size, place = _varint(message, place)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise ValueError(f"a field of kind {kind}")
        if place + size > len(message):
            raise ValueError("a field that is cut off")
        yield tag // 8, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits to a byte, the lowest first, and the place behind it."""
    number = 0
    for count in range(10):
        if place + count >= len(message):
            break
        byte = message[place + count]
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number % 2**64, place + count + 1
    raise ValueError("a number that has no end")
