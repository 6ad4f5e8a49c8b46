"""`@kernel`: Numba's `njit(nogil=True)` with a disk cache, so that only the first start compiles. `@subroutine`: a part
of kernels.

Numba's own cache watches the file that a function stands in, so an edit of a helper leaves its callers stale, and it
refuses to import a function where no folder can be written. This one keeps a file per function and signature, named by
a hash over all sources of this package and one over everything else that the code depends on: versions, target CPU.

Folders: `__pycache__` beside the sources, then the user's cache folder; both are read, the first that can be written
is written. Without one, or with a full disk or a damaged file, every start compiles: time, never an error. Processes
that compile at once each write a whole file and rename it; either result serves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import serialize
from numba.core.caching import NullCache, _Cache
from numba.core.compiler import CompileResult

from cpu_kernels.folders import user_cache
from cpu_kernels.linked import SubroutineCompiler, callable_by_kernels, restored

_SUFFIX = ".kernel"
_DIGEST_BYTES = 32


def target_features(context: Any) -> frozenset[str]:
    """Features of the CPU that `context` (an intrinsic's) compiles for, such as `avx2`; NUMBA_CPU_FEATURES rules."""
    _, _, listed = context.codegen().magic_tuple()
    have: set[str] = set()
    for item in listed.split(","):
        (have.add if item.startswith("+") else have.discard)(item[1:])
    return frozenset(have)


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compile `function` without the GIL and cache the result on disk; `options` are those of `numba.njit`."""
    if function is None:
        return functools.partial(kernel, **options)
    return _dispatcher(function, CompileResult._rebuild, **options)


def _dispatcher(function: Callable[..., Any], rebuild: Callable[..., CompileResult], **options: Any) -> Any:
    """rebuild: as for `_KernelCache`."""
    # The wrapper is for C, which nobody calls it from. A kernel allocates nothing, and its caller holds its arrays for
    # its time: references to them are not counted, which was two fifths of the code and a tenth of its compiling.
    without: dict[str, Any] = {"no_cfunc_wrapper": True, "_nrt": False}
    dispatcher = numba.njit(nogil=True, **without, **options)(function)
    dispatcher._cache = _cache_of(function, rebuild)
    return dispatcher


def subroutine(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A `kernel` for other kernels alone, which is compiled with them (`linked.py`); a call from Python raises
    `TypeError`. It may raise exceptions whose arguments are constants, and neither print nor call in a circle.

    `forceinline=True` where it is called for every few rows: an array is passed as seven numbers, and a call with some
    100 of them takes 40 ns, as long as reading 1 KB.
    """
    if function is None:
        return functools.partial(subroutine, **options)
    alone: dict[str, Any] = {"no_cpython_wrapper": True, "pipeline_class": SubroutineCompiler}
    dispatcher = _dispatcher(function, restored, **alone, **options)

    def add_overload(result: Any) -> None:
        """As the dispatcher's own, but without an address that Python would call."""
        known = result if result.entry_point is not None else callable_by_kernels(result)
        dispatcher.overloads[tuple(result.signature.args)] = known

    def refuse(*args: Any, **keywords: Any) -> None:
        raise TypeError(f"{function.__name__} is a subroutine: only compiled code can call it")

    dispatcher.add_overload, dispatcher._compile_for_args = add_overload, refuse
    return dispatcher


@functools.cache
def _package_digest() -> str | None:
    """Hash over all sources of this package, as they were when its first kernel was defined; None without sources."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    try:
        return hashlib.sha256(b"".join(_digest(path.read_bytes()) for path in sources)).hexdigest()[:16]
    except OSError:
        return None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _folders() -> Iterator[Path]:
    """Where compiled kernels may lie, in the order in which they are read and written."""
    yield Path(importlib.util.cache_from_source(__file__)).parent
    # One folder per installation: each removes what its own older sources left.
    place = hashlib.sha256(os.fsencode(Path(__file__).resolve().parent)).hexdigest()[:16]
    if (cache := user_cache()) is not None:
        yield cache / "hybrid" / "kernels" / place


def _cache_of(function: Any, rebuild: Callable[..., CompileResult]) -> Any:
    sources = _package_digest()
    try:
        own = _digest(Path(function.__code__.co_filename).read_bytes())  # a kernel may stand outside the package
    except OSError:
        return NullCache()
    # Other values that a function closes over, such as kernels, have no name that would outlive this process.
    known = all(isinstance(value, (bool, int, float, str, np.generic)) for value in _closed_values(function))
    return _KernelCache(function, sources, own, rebuild) if sources is not None and known else NullCache()


def _closed_values(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


class _KernelCache(_Cache):
    """The compiled versions of one function on disk, in the form that Numba's dispatcher asks for."""

    def __init__(self, function: Any, sources: str, own: bytes, rebuild: Callable[..., CompileResult]) -> None:
        """rebuild: from the target's context and what `CompileResult._reduce` gave."""
        self._rebuild = rebuild
        self._sources, self._own, self._enabled = sources, own, True
        self._name = f"{function.__module__}.{function.__qualname__}".replace("<", "").replace(">", "")
        self._function = (function.__code__.co_firstlineno, _closed_values(function))

    @property
    def cache_path(self) -> str:
        return str(next(_folders()))

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Called before a forced recompilation, whose reason is unknown here: its result is not for others."""
        self.disable()

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        target_context.refresh()
        name = self._file_name(signature, target_context.codegen())
        if not self._enabled or name is None:
            return None
        for folder in _folders():
            with contextlib.suppress(OSError):
                stored = (folder / name).read_bytes()
                if stored[:_DIGEST_BYTES] == _digest(stored[_DIGEST_BYTES:]):
                    return self._rebuild(target_context, *pickle.loads(stored[_DIGEST_BYTES:]))
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        name = self._file_name(signature, result.codegen)
        # Code that holds an address of this process serves no other.
        if not self._enabled or name is None or result.library.has_dynamic_globals or result.lifted:
            return
        data = serialize.dumps(result._reduce())
        for folder in _folders():
            with contextlib.suppress(OSError):
                _write(folder, name, _digest(data) + data)
                _remove_stale(folder, self._sources)
                return

    def _file_name(self, signature: Any, codegen: Any) -> str | None:
        """None for a signature that names objects of this process, such as a function passed as argument."""
        versions = (sys.version, numba.__version__, llvmlite.__version__)
        key = repr((str(signature), codegen.magic_tuple(), versions, self._own, self._function))
        if " at 0x" in key:
            return None
        return f"{self._name}-{self._sources}-{_digest(key.encode()).hex()[:16]}{_SUFFIX}"


def _write(folder: Path, name: str, data: bytes) -> None:
    """Write a whole file or none, whoever else writes it now."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{name}.{uuid.uuid4().hex}{_SUFFIX}"
    try:
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_stale(folder: Path, sources: str) -> None:
    """Remove what other states of the sources left; another process may be doing the same."""
    for path in folder.glob(f"*{_SUFFIX}"):
        if f"-{sources}-" not in path.name:
            with contextlib.suppress(OSError):
                path.unlink()
