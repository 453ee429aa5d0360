"""Storage of embeddings: all of their numbers or the first few, as floats, as bytes or as bits, in lists.

Every row is stored by itself, so that its bytes follow from its embedding alone: there is no calibration over a
dataset. Embeddings have length 1, which is the scale of a row that is stored as bytes or bits:

=======  ==============================================  ===================  =============================
dtype    a row ``x`` of ``D`` numbers is stored as       element of the list  is read as
=======  ==============================================  ===================  =============================
float32  ``x``                                           float32 ``[D]``      ``x``
float16  ``x``, rounded                                  float16 ``[D]``      ``x``
int8     ``q = rint(127 * x / max(abs(x)))``             int8 ``[D]``         ``q / norm(q)``
binary   ``numpy.packbits(x > 0)``, highest bit first    uint8 ``[D / 8]``    ``(2 * bit - 1) / sqrt(D)``
=======  ==============================================  ===================  =============================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config.schema import OutputConfig
from pipeline.core.errors import ConfigError, NumericalError, Problem, StorageError
from pipeline.core.plain import one_array

# Part of the fingerprints: how readers get the numbers back.
ENCODINGS = {
    "int8": "q = rint(127 * x / max(abs(x))) for each row; x = q / norm(q)",
    "binary": "numpy.packbits(x > 0), highest bit first; x = (2 * bit - 1) / sqrt(dim)",
}
_ELEMENTS = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """The form of stored embeddings.

    Attributes:
        dtype: float32, float16, int8 or binary.
        dim: length of an embedding.
        fixed: in lists of a fixed length, which some readers do not know; else in plain ones.
    """

    dtype: str
    dim: int
    fixed: bool = True

    @classmethod
    def of(cls, output: Mapping[str, Any], dim: int) -> VectorFormat:
        """The form that the fingerprints of an output name; ``dim`` is the length where they do not name it."""
        return cls(str(output["dtype"]), int(output.get("dim", dim)), fixed=output.get("vector") != "list")

    @property
    def exact(self) -> bool:
        """True if stored numbers are floats."""
        return self.dtype not in ENCODINGS

    @property
    def width(self) -> int:
        """Length of a stored list."""
        return self.dim // 8 if self.dtype == "binary" else self.dim

    @property
    def element(self) -> np.dtype[Any]:
        """The type of its elements."""
        return np.dtype("uint8" if self.dtype == "binary" else self.dtype)

    @property
    def type(self) -> pa.DataType:
        """The type of the column."""
        return pa.list_(pa.field("element", _ELEMENTS[self.dtype]), self.width if self.fixed else -1)

    @property
    def size(self) -> int:
        """Bytes of a stored embedding."""
        return self.width * self.element.itemsize

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[Any]:
        """Store embeddings of a model, float32 ``[N, >= D]`` of length 1, as ``[N, width]``.

        Raises:
            NumericalError: the first ``D`` numbers of one are 0.
        """
        vectors = cut(vectors, self.dim)
        if self.dtype == "int8":
            largest = np.abs(vectors).max(axis=1, keepdims=True)
            rounded: NDArray[np.int8] = np.rint(vectors * (np.float32(127) / largest)).astype(np.int8)
            return rounded
        if self.dtype == "binary":
            return np.packbits(vectors > 0, axis=1)
        return vectors.astype(self.element, copy=False)

    def decode(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """The embeddings ``[N, width]`` as float32 ``[N, D]``; read-only where they are stored so."""
        if self.dtype == "int8":
            whole = stored.astype(np.float32)
            # Sums of squares of small integers are exact in float64. Rows that failed hold zeros.
            lengths = np.sqrt(np.einsum("ij,ij->i", whole, whole, dtype=np.float64)).astype(np.float32)
            whole /= np.maximum(lengths, 1)[:, None]
            return whole
        if self.dtype == "binary":
            one = np.float32(1 / np.sqrt(self.dim))
            return np.where(np.unpackbits(stored, axis=1).view(bool), one, -one)
        return stored.astype(np.float32, copy=False)

    def floats(self, vector: NDArray[np.float32]) -> NDArray[Any]:
        """One embedding of a model as floats ``[D]``: as it is stored, or before it would become bytes or bits.

        Raises:
            NumericalError: its first ``D`` numbers are 0.
        """
        first: NDArray[Any] = cut(vector[None], self.dim)[0]
        return first.astype(self.element) if self.exact else first

    def column(self, stored: NDArray[Any], failed: NDArray[np.bool_]) -> pa.Array:
        """Rows ``[N, width]`` as a column, null where one ``failed``."""
        if self.fixed:
            values = pa.array(stored.reshape(-1), type=self.type.value_type)
            return pa.FixedSizeListArray.from_arrays(values, type=self.type, mask=pa.array(failed))
        values = pa.array(stored[~failed].reshape(-1), type=self.type.value_type)
        offsets = np.concatenate([[0], np.cumsum(~failed) * self.width]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), values, type=self.type, mask=pa.array(failed))

    def load(self, column: pa.ChunkedArray) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The embeddings of a column, float32 ``[n, D]``, and the positions of their rows; see :func:`vectors_of`."""
        stored, rows = vectors_of(column, self.width)
        return self.decode(stored), rows


def form_of(output: OutputConfig, dim: int) -> VectorFormat:
    """The form in which an output stores embeddings of length ``dim``.

    Raises:
        ConfigError: see :func:`form_fingerprint`.
    """
    return VectorFormat.of(form_fingerprint(output, dim), dim)


def vectors_of(column: pa.ChunkedArray, width: int = 0) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The embeddings of a column ``embedding`` as stored, read-only ``[n, width]``, and the positions of their rows.

    ``width`` is the length of the lists where their type does not fix it.

    Raises:
        StorageError: one of them has another length.
    """
    array = one_array(column)
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
    elif wrong := other_lengths(array, width):
        raise StorageError(f"an embedding has {wrong[0]} elements, not {width}; pipeline.verify names the part")
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    values = array.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(-1, width), np.flatnonzero(valid)


def other_lengths(lists: pa.Array, width: int) -> list[int]:
    """The lengths of lists, not of nulls, that differ from ``width``."""
    found = pc.unique(pc.list_value_length(lists).drop_null()).to_pylist()
    return [int(length) for length in found if length != width]


def cut(vectors: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """The first ``dim`` numbers of vectors ``[N, >= dim]``, of length 1 again; the same ones where that is all.

    Raises:
        NumericalError: those of one are 0.
    """
    if vectors.shape[1] == dim:
        return vectors
    first = vectors[:, :dim].astype(np.float64)
    lengths = np.linalg.norm(first, axis=1, keepdims=True)
    if not lengths.all():
        raise NumericalError(f"output.dims={dim}: the first {dim} numbers of an embedding are 0; store more of them")
    scaled: NDArray[np.float32] = (first / lengths).astype(np.float32)
    return scaled


def check_heads(form: VectorFormat, heads: Sequence[str]) -> None:
    """Refuse heads, files of ``labels.heads``, where only signs are stored: a linear head errs by standard deviations.

    Raises:
        ConfigError: there is one.
    """
    if heads and form.dtype == "binary":
        allowed = "needs the numbers of embeddings, of which output.dtype=binary stores the signs alone"
        raise ConfigError([Problem("labels.heads", list(heads), allowed, "output.dtype=int8 stores numbers")])


def form_fingerprint(output: OutputConfig, dim: int) -> dict[str, Any]:
    """The form of an output's vectors for its fingerprints; that of earlier versions is named by its dtype alone.

    Args:
        output: of the config.
        dim: length of an embedding of the model.

    Raises:
        ConfigError: there are fewer numbers than are to be stored, or they do not fill bytes.
    """
    kept = dim if output.dims is None else output.dims
    if kept > dim:
        allowed = f"must be at most {dim}, the length of this model's embeddings"
        raise ConfigError([Problem("output.dims", kept, allowed, "leave it out to store all of them")])
    if output.dtype == "binary" and kept % 8:
        allowed = f"fills whole bytes; {kept} numbers do not"
        raise ConfigError([Problem("output.dtype", "binary", allowed, f"output.dims={kept // 8 * 8} does")])
    found: dict[str, Any] = {"dtype": output.dtype}
    if output.dtype in ENCODINGS:
        found["encoding"] = ENCODINGS[output.dtype]
    if output.vector == "list":
        found["vector"] = "list"
    if len(found) > 1 or kept != dim:
        found["dim"] = kept
    return found
