"""How subroutines are compiled: to intermediate code, which their callers link, optimise and compile as their own.

Numba optimises and compiles every function by itself as well as within each of its callers. A subroutine has no use for
that: it is called by compiled code alone. This is a third of all compiling. The rest is Numba's: type inference,
lowering, and the caller's own compilation, which inlines what it has linked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult


class LinkedLibrary(JITCodeLibrary):
    """A subroutine's code, and of those that it calls: never optimised or compiled by itself."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def serialize_using_object_code(self) -> tuple[str, str, bytes]:
        """For the cache on disk: there is no object code."""
        found: tuple[str, str, bytes] = self.serialize_using_bitcode()
        return found

    @classmethod
    def restored(cls, codegen: Any, state: tuple[str, str, bytes]) -> LinkedLibrary:
        """Of what `serialize_using_object_code` gave."""
        name, _, bitcode = state
        library = cls(codegen, name)
        library._final_module = binding.parse_bitcode(bitcode)
        library._finalize_final_module()
        return library


class SubroutineCompiler(Compiler):
    """Numba's compiler for a function that only compiled code calls."""

    def __init__(
        self,
        typing_context: Any,
        target_context: Any,
        library: Any,
        args: Any,
        return_type: Any,
        flags: Any,
        local: Any,
    ) -> None:
        flags.no_compile = True
        library = LinkedLibrary(target_context.codegen(), "subroutine")
        library.enable_object_caching()
        super().__init__(typing_context, target_context, library, args, return_type, flags, local)


def callable_by_kernels(result: Any) -> Any:
    """`result` with what Numba knows an overload by, in the place of a function that Python could call; now it does."""
    named = result._replace(entry_point=object())
    named.target_context.insert_user_function(named.entry_point, named.fndesc, [named.library])
    return named


def restored(target_context: Any, *state: Any) -> Any:
    """A subroutine's result from what `CompileResult._reduce` gave."""
    stored, descriptor, environment, signature, in_object_mode, lifted, annotation, reload_init, referenced = state
    for initialise in reload_init:
        initialise()
    return CompileResult(  # type: ignore[call-arg]
        target_context=target_context,
        typing_context=target_context.typing_context,
        library=LinkedLibrary.restored(target_context.codegen(), stored),
        environment=environment,
        entry_point=object(),
        fndesc=descriptor,
        type_annotation=annotation,
        signature=signature,
        objectmode=in_object_mode,
        lifted=lifted,
        typing_error=None,
        call_helper=None,
        metadata=None,
        reload_init=reload_init,
        referenced_envs=referenced,
    )
