"""Towers compiled ahead of time for the CPU: a shared library in the artefact store, loaded in place of a compilation.

``torch.compile`` traces the tower and looks up its kernels at every start, even where these are cached. AOTInductor
writes the same kernels, with the weights, into one library. A library is used only if its embeddings are equal, bit for
bit, to those of ``torch.compile``, which is tried once, when it is made. It is called by its C interface
(``aoti_runtime/interface.h`` and ``aoti_torch/c/shim.h`` of torch), without Python's lock: torch's own bindings hold
the lock for the whole batch, so that neither a second batch nor the loader would go on beside it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
import time
import weakref
import zipfile
from collections.abc import Callable, Mapping
from ctypes import byref, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.backends.artifacts.exports import recipe
from pipeline.backends.artifacts.onnx_export import quiet
from pipeline.backends.artifacts.store import Artifact, ArtifactStore, Recipe
from pipeline.backends.devices import out_of_memory
from pipeline.backends.proofs import surroundings
from pipeline.backends.streams import count_streams
from pipeline.backends.torch_module import Forward, compiled, count_bytes
from pipeline.config.schema import BackendConfig
from pipeline.core.errors import ArtifactError, StorageError
from pipeline.models.checkpoint import Checkpoint

KIND, FILE = "compiled", "model.so"
# Part of the recipe: raise it when a library is made, or called, in another way.
VERSION = "1"
# The function by which a library calls operators that have no C interface, through an object that is not made here.
_PROXY = b"aoti_torch_proxy_executor_call_function"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compilation:
    """A tower to compile for the CPU.

    Attributes:
        checkpoint: the model.
        config: names the backend and the artefact store.
        options: facts on which the tower depends besides the model, such as its precision.
        pixels: normalised pixels of the static shape, in the dtype of the tower.
    """

    checkpoint: Checkpoint
    config: BackendConfig
    options: Mapping[str, str]
    pixels: torch.Tensor

    @property
    def recipe(self) -> Recipe:
        """The key of the library: model, versions, shape, threads, and the processor with its instructions."""
        around = surroundings(self.pixels.device)
        # A place of the compiler's own cache changes nothing in what it makes.
        environment = {name: value for name, value in around["environment"].items() if not name.endswith("_CACHE_DIR")}
        options = {
            "backend": self.config.name,
            **self.options,
            "dtype": str(self.pixels.dtype),
            "shape": list(self.pixels.shape),
            # Loops are compiled for so many.
            "threads": torch.get_num_threads(),
            "version": VERSION,
            **around,
            "environment": environment,
        }
        return recipe(KIND, self.checkpoint, options, self.config.info.packages)


class _NotMade(Exception):
    """No library can be made of this tower here."""


class Library:
    """The forward of a tower in a shared library, for ``runners`` batches side by side; safe to call from many threads.

    Raises:
        OSError: the library cannot be loaded.
    """

    def __init__(self, path: Path, compilation: Compilation) -> None:
        pixels, config = compilation.pixels, compilation.config
        self._shape, self._dtype, self._dim = pixels.shape, pixels.dtype, compilation.checkpoint.dim
        self._functions = functions = ctypes.CDLL(str(path))
        self._code = int(functions[f"aoti_torch_dtype_{str(pixels.dtype).removeprefix('torch.')}"]())
        self._container = c_void_p()
        runners = count_streams(config.streams, pixels.device)
        self._call("AOTInductorModelContainerCreateWithDevice", byref(self._container), c_size_t(runners), b"cpu", None)
        end = weakref.finalize(self, functions.AOTInductorModelContainerDelete, self._container)
        # Another thread may be in it when the interpreter ends.
        end.atexit = False

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings float32 ``[B, D]`` of normalised pixels of the static shape."""
        if pixels.shape != self._shape or pixels.dtype != self._dtype:
            raise ValueError(f"compiled for {self._dtype} {list(self._shape)}, not {pixels.dtype} {list(pixels.shape)}")
        pixels = pixels.contiguous()
        given, result = self._handle(pixels), c_void_p()
        # It takes over the handle of the pixels.
        run = (self._container, byref(given), c_size_t(1), byref(result), c_size_t(1), None, None)
        self._call("AOTInductorModelContainerRun", *run)
        try:
            values = torch.empty(self._shape[0], self._dim)
            address, count = c_void_p(), c_int64()
            self._call("aoti_torch_get_data_ptr", result, byref(address))
            self._call("aoti_torch_get_numel", result, byref(count))
            if count.value != values.numel():
                raise RuntimeError(f"the compiled tower gave {count.value} values, expected {values.numel()}")
            ctypes.memmove(values.data_ptr(), address, values.nbytes)
        finally:
            self._functions.aoti_torch_delete_tensor_object(result)
        return values

    def _handle(self, values: torch.Tensor) -> c_void_p:
        sizes, strides = (
            (c_int64 * values.dim())(*numbers) for numbers in (tuple(values.shape), tuple(values.stride()))
        )
        handle, device = c_void_p(), self._functions.aoti_torch_device_type_cpu()
        memory = (c_void_p(values.data_ptr()), c_int64(values.dim()), sizes, strides, c_int64(0))
        kind = (c_int32(self._code), c_int32(device), c_int32(0))
        self._call("aoti_torch_create_tensor_from_blob", *memory, *kind, byref(handle))
        return handle

    def _call(self, name: str, *arguments: Any) -> None:
        # ctypes gives Python's lock back for the time of the call.
        if self._functions[name](*arguments):
            raise RuntimeError(f"the compiled tower failed in {name}; the lines before this one say why")


def load_or_compile(compilation: Compilation, tower: Callable[[], torch.nn.Module]) -> tuple[Forward, int]:
    """The forward of a tower and the bytes of its weights, from the artefact store, or compiled and then stored.

    Where no library can be stored or used, the tower is compiled at each start, with the same numbers.

    Args:
        compilation: what to compile.
        tower: makes the tower; called only if there is no library yet.

    Raises:
        BackendUnavailable: there is no C++ compiler, or the compiler failed.
    """
    store, made = ArtifactStore(compilation.config.artifacts), list[tuple[Forward, int]]()

    def just_in_time() -> tuple[Forward, int]:
        if not made:
            module = tower()
            made.append((compiled(module, mode="default", pixels=compilation.pixels), count_bytes(module)))
        return made[0]

    try:
        artifact = store.make(compilation.recipe, lambda folder: _build(folder, compilation, tower, just_in_time))
        if artifact.card["facts"]["equal"]:
            return Library(_trusted(artifact), compilation), int(artifact.card["facts"]["weight_bytes"])
        why = "compiled ahead of time, it gives other last digits"
    except (ArtifactError, StorageError, OSError, _NotMade) as error:
        why = str(error)
    log.info("%s is compiled at each start: %s", compilation.checkpoint.name, why)
    return just_in_time()


def _build(
    folder: Path,
    compilation: Compilation,
    tower: Callable[[], torch.nn.Module],
    just_in_time: Callable[[], tuple[Forward, int]],
) -> dict[str, Any]:
    """Write the library, and compare it with what ``torch.compile`` gives."""
    name, shape = compilation.checkpoint.name, compilation.pixels.shape
    log.info("compiling %s for batches of %d; later starts load it from the store", name, shape[0])
    began = time.perf_counter()
    forward, weight_bytes = just_in_time()
    path = folder / FILE
    _compile(path, tower(), compilation.pixels)
    # Nobody else may change what is executed.
    path.chmod(0o644)
    folder.chmod(0o755)
    dice = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, generator=dice).to(compilation.pixels.dtype)
    with torch.inference_mode():
        equal = torch.equal(Library(path, compilation)(noise), forward(noise))
    return {"facts": {"equal": equal, "weight_bytes": weight_bytes, "seconds": round(time.perf_counter() - began, 1)}}


def _compile(path: Path, module: torch.nn.Module, pixels: torch.Tensor) -> None:
    """Compile a module at the static shape of ``pixels`` into a shared library.

    Raises:
        _NotMade: the exporter or the compiler failed, or the library needs more than the C interface.
    """
    try:
        with quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            from torch._inductor import aoti_compile_and_package

            exported = torch.export.export(_plain(module), (torch.zeros_like(pixels),), strict=False)
            package = aoti_compile_and_package(exported, package_path=f"{folder}/tower.pt2")
            with zipfile.ZipFile(package) as archive:
                member = next(name for name in archive.namelist() if name.endswith(".so"))
                path.write_bytes(archive.read(member))
    except Exception as error:
        if isinstance(error, OSError) or out_of_memory(error):
            raise
        # The exporter and the compiler raise their own and the toolchain's exceptions, of many kinds.
        first = (str(error).splitlines() or [""])[0]
        raise _NotMade(f"compiling ahead of time failed ({type(error).__name__}: {first})") from error
    if _PROXY in path.read_bytes():
        raise _NotMade("compiled ahead of time, it calls operators without a C interface")


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    """The module with torchao's tensors taken apart, which the exporter does not take."""
    if any(hasattr(value, "__tensor_flatten__") for value in module.parameters()):
        from torchao.utils import unwrap_tensor_subclass

        unwrap_tensor_subclass(module)
    return module


def _trusted(artifact: Artifact) -> Path:
    """The library of an artefact, if nobody but this user and root could have written it: its code runs here.

    Raises:
        ArtifactError: others own it or may write it, or its folder.
    """
    path = artifact.file(FILE)
    for each in (path, artifact.path):
        found = each.lstat()
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o022:
            raise ArtifactError(
                f"{each}: another user owns it or may write it, and its code would run in this process; name a folder "
                "of your own with backend.artifacts"
            )
    return path
