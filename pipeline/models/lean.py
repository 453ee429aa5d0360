"""transformers as a command imports it: without other libraries, and what training and compilers need of torch.

A model of transformers imports torch's tensors of several machines with sympy, the compiler, and libraries that happen
to be installed, and looks through the files of all models twice: together more than half of what it takes to import
torch and transformers. Here transformers gets the answers of a torch that was built for one process, and of an
environment with nothing but what models need. Of the compiler it takes decorators, which only leave marks, and names
that are looked up when they are called.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.concurrency import aside
from pipeline.core.processes import runs_a_command

_COMPILER = "torch._dynamo"
# Decorators of the compiler that return a function as it is, with marks that the compiler reads.
_MARKS = ("allow_in_graph", "assume_constant_result", "disable", "skip")
# Functions of transformers that say what is there, and the libraries that may be there: modules that are imported
# meanwhile keep the answers. Others (torchvision, accelerate, SciPy, torchao) take seconds, no model here needs them,
# and some do not load without the compiler.
_ASKED = re.compile(r"is_(\w+)_available")
_PRESENT = re.compile(
    r"torch|torch_(?!distributed|flex_attn)\w+|vision|tokenizers|sentencepiece|tiktoken|protobuf|jinja"
)
# Modules that models share, and those that find a model.
_SHARED = ("modeling_utils", "masking_utils", "modeling_layers", "models.auto.modeling_auto")


def load_torch_aside() -> None:
    """Load torch's largest library in a thread: that takes a quarter of its import, and not Python's lock.

    A torch for CUDA has more libraries, which it finds by itself.
    """
    found = find_spec("torch")
    for folder in found.submodule_search_locations or () if found is not None else ():
        library, others = Path(folder, "lib", "libtorch_cpu.so"), Path(folder, "lib", "libtorch_cuda.so")
        if library.is_file() and not others.exists():
            load = ctypes.CDLL(None).dlopen
            load.argtypes, load.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
            aside(partial(load, os.fsencode(library), os.RTLD_LAZY), name="libraries")


def import_transformers() -> None:
    """Import what opening a model needs; nothing is done where another program may train with transformers."""
    found = find_spec("transformers") if runs_a_command() and "transformers" not in sys.modules else None
    if found is None or found.loader is None:
        return
    import torch  # noqa: F401 - whole, before its compiler is put off

    # A release that is built otherwise is imported as it is, by the modules that need it.
    with suppress(Exception):
        _import_lean(found, found.loader)


def import_open_clip() -> ModuleType:
    """Import open_clip with its own modules; torchvision, whose pictures it would make, is left out.

    Pixels are made here, so what open_clip takes of torchvision is never called. Its import takes seconds, and fails
    where it was built for another torch. In a program of others it is imported as it is, if that works.

    Raises:
        ImportError: open_clip, or what it needs, is not installed.
    """
    if "open_clip" in sys.modules or _imports_torchvision():
        return import_module("open_clip")
    with ExitStack() as opened:
        if _COMPILER not in sys.modules:
            opened.enter_context(_put_off(_COMPILER))
        opened.enter_context(_put_off("torchvision", _Absent))
        return import_module("open_clip")


def _imports_torchvision() -> bool:
    """True if torchvision is imported now, or can be and this is no command."""
    if runs_a_command() or "torchvision" in sys.modules:
        return "torchvision" in sys.modules
    try:
        import_module("torchvision")
    # One that does not fit torch raises anything.
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


def _import_lean(found: ModuleSpec, loader: Loader) -> None:
    from importlib.metadata import version

    with ExitStack() as opened:
        if _COMPILER not in sys.modules:
            opened.enter_context(_put_off(_COMPILER))
        # As the import system does, but its tools come before the package itself, which uses them.
        package: Any = module_from_spec(found)
        package.__version__ = version("transformers")
        opened.enter_context(_removed_after_error("transformers", package))
        utils: Any = import_module("transformers.utils")
        inner: Any = import_module("transformers.utils.import_utils")
        for module in (utils, inner):
            for name in [name for name in vars(module) if _is_left_out(name)]:
                opened.enter_context(_replaced(module, name, lambda before: _no))
        opened.enter_context(_replaced(inner, "fetch__all__", _of_the_end))
        opened.enter_context(_replaced(inner, "define_import_structure", _once))
        loader.exec_module(package)
        for name in _SHARED:
            import_module(f"transformers.{name}")


def _is_left_out(name: str) -> bool:
    asked = _ASKED.fullmatch(name)
    return asked is not None and not _PRESENT.fullmatch(asked[1])


def _no(*_: object, **__: object) -> bool:
    return False


def _of_the_end(names: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """Find the names in the last ``__all__`` of a file, without a look at every line before it."""

    def of(content: str) -> list[str]:
        begin = f"\n{content}".rfind("\n__all__")
        return names(content[begin:]) if begin >= 0 else []

    return of


def _once(define: Callable[..., Any]) -> Callable[..., Any]:
    """Return the structure of a folder for a file in it too: transformers remembers it by the argument alone."""

    def of_folder(place: Any, *given: Any, **named: Any) -> Any:
        folder = Path(place).parent if Path(place).suffix == ".py" else Path(place)
        # The folder of all models is asked for as a path, those in it as text.
        return define(folder if folder.name == "models" else str(folder), *given, **named)

    return of_folder


@contextmanager
def _removed_after_error(name: str, module: ModuleType) -> Iterator[None]:
    sys.modules[name] = module
    try:
        yield
    except BaseException:
        # Half of it would not do.
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]
        raise


@contextmanager
def _replaced(module: Any, name: str, change: Callable[[Any], object]) -> Iterator[None]:
    """Change an attribute in the body, where this release has it."""
    if not hasattr(module, name):
        yield
        return
    before = getattr(module, name)
    setattr(module, name, change(before))
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _put_off(package: str, kind: type[ModuleType] | None = None) -> Iterator[None]:
    """Put modules in the place of a package in the body, by default such as import the real ones when called."""
    kind = kind or _Later
    finder: Any = _Finder(package, kind)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, kind):
                del sys.modules[name]
                parent, _, own = name.rpartition(".")
                if vars(sys.modules.get(parent, module)).get(own) is module:
                    delattr(sys.modules[parent], own)


class _Finder:
    """A finder and loader of the modules of one package."""

    def __init__(self, package: str, kind: type[ModuleType]) -> None:
        self._package, self._kind = package, kind

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        mine = name == self._package or name.startswith(f"{self._package}.")
        return ModuleSpec(name, self, is_package=True) if mine else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._kind(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Later(ModuleType):
    """A module whose names are looked up in the real one when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _MARKS:
            return _unmarked

        def real(*given: Any, **named: Any) -> Any:
            return getattr(import_module(self.__name__), name)(*given, **named)

        if not name[0].isupper():
            return real
        # A class, since isinstance may be called with it; it makes instances of the real one.
        return type(name, (), {"__new__": lambda cls, *given, **named: real(*given, **named)})


def _unmarked(function: Any = None, *_: object, **__: object) -> Any:
    return function if callable(function) else _unmarked


class _Absent(ModuleType):
    """A module without content, in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Empty(type):
    """The type of a class in which every name is such a class again."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})
