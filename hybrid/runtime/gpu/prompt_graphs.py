"""`PromptGraphs`: pieces of a prompt as CUDA graphs, where all of a model is on the GPU.

Then nothing waits for the CPU or for PCIe, and what limits a prompt is Python: a layer has some thirty launches, which
take it longer than the GPU. So all layers are captured once for each of a few numbers of tokens; a piece of another
number is filled up by tokens whose keys and values are not kept. All of it runs in one stream of its own, since cuBLAS
takes memory for each. Without a GPU, as in tests, pieces are filled up the same and run as they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

SIZES = (64, 128, 256)  # of a piece, beside the most that there is room for


class Piece(NamedTuple):
    """Tokens of a prompt, and how many go through the layers in their place."""

    tokens: slice
    size: int


def sizes_up_to(most: int) -> tuple[int, ...]:
    """Sizes of pieces where there is room for `most` tokens."""
    return (*(size for size in SIZES if size < most), most)


def pieces_of(count: int, sizes: tuple[int, ...]) -> list[Piece]:
    """`count` tokens in pieces of the largest size; a rest beyond half of a smaller size fills it up."""
    found, at = list[Piece](), 0
    while at < count:
        left = count - at
        fits = max((size for size in sizes if size <= left), default=0)
        larger = min((size for size in sizes if size >= left), default=fits)
        size = fits if 2 * (left - fits) <= fits or larger == fits else larger
        found.append(Piece(slice(at, min(at + size, count)), size))
        at += size
    return found


class PromptGraphs:
    """Graphs of up to `most` tokens; `run(size)` is to queue all layers for so many, which it finds in buffers.

    It is given anew each time: an owner that its graphs point back to would keep its memory until Python's collector
    runs.
    """

    def __init__(self, most: int, device: torch.device, native: bool) -> None:
        """native: whether there is a GPU to capture for."""
        self.sizes = sizes_up_to(most)
        self._stream = torch.cuda.Stream(device) if native else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def stream(self) -> AbstractContextManager[object]:
        """What `capture` and `queue` are to be called within, and copies to the buffers are to be made."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def capture(self, size: int, run: Callable[[int], None], blank: Callable[[], None]) -> None:
        """Run the layers once, which compiles their kernels, and capture them, if they are not yet.

        blank: puts tokens in the buffers that are not kept.
        """
        if self._stream is None or size in self._graphs:
            return
        blank()
        run(size)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # what is let go may wait for the GPU, which would end a capture
        with torch.cuda.graph(graph, stream=self._stream):
            run(size)
        self._graphs[size] = graph

    def queue(self, size: int, run: Callable[[int], None]) -> None:
        """All layers for the tokens in the buffers; captured before."""
        if self._stream is None:
            run(size)
        else:
            self._graphs[size].replay()
