"""Time products of many rows on the GPU, with tensor cores and without, beside the time that the weights' bytes take.

    python scripts/bench_gpu_rows.py [--replays 15]

bf16 matrices of a 7B model and a layer of 11008 gated neurons of which a share is listed; 1 to 32 rows of x. Exits with
2 where there is no GPU, with 1 when an answer is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import click
import torch
from bench_gpu_kernels import WRONG, microseconds, read_bandwidth
from gpu_kernel_cases import FF, GEMV_SHAPES, D, checked, copies, random_matrix, random_values, relative_error

from gpu_kernels.gemv import gemv, gemv_ref
from gpu_kernels.row_ffn import ffn_floats
from gpu_kernels.row_gemm import gemm_floats
from gpu_kernels.sparse_ffn import DeviceFFNView, down_parts, sparse_ffn, sparse_ffn_ref

ROWS, UNIONS = (1, 2, 4, 8, 16, 32), (0.1, 0.3, 0.5, 0.7, 0.9)
Found = tuple[str, float, Sequence[Callable[[], None]], Callable[[], float]]


def products(rows: int, tensor_cores: bool) -> Iterator[Found]:
    """Name, bytes, calls on distinct weights and the error of each matrix."""
    for name, (n, d) in GEMV_SHAPES.items():
        matrices = [random_matrix("bf16", n, d) for _ in range(copies(2 * n * d))]
        x, out = random_values(rows, d), random_values(rows, n)
        scratch = random_values(gemm_floats(rows, n, d)) if tensor_cores else None
        calls = [partial(gemv, matrix, x, None, out, scratch=scratch) for matrix in matrices]
        yield (
            f"gemv {name} {n}x{d}",
            2.0 * n * d,
            calls,
            partial(checked, calls[0], partial(gemv_ref, matrices[0], x, None, out), [out]),
        )


def layer_error(run: Callable[[], None], reference: Callable[[], None], parts: torch.Tensor) -> float:
    """Of the sum over the parts, the largest relative error."""
    run()
    found = parts.sum(0)
    reference()
    return relative_error(found, parts.sum(0))


def layers(rows: int, tensor_cores: bool) -> Iterator[Found]:
    """The same of a layer's listed neurons, all of which fire."""
    ones = [[random_matrix("bf16", FF, D) for _ in range(3)] for _ in range(2)]
    bias = torch.full((FF,), 50.0, device="cuda")
    views = [DeviceFFNView(*one, bias, None, "relu") for one in ones]
    x, hidden, parts = random_values(rows, D), random_values(rows, FF), random_values(down_parts(D), rows, D)
    scratch = random_values(ffn_floats(rows, FF, D, True)) if tensor_cores else None
    for share in UNIONS:
        listed = round(share * FF)
        ids = torch.zeros(FF, dtype=torch.int32, device="cuda")
        ids[:listed] = torch.randperm(FF, device="cuda")[:listed].sort().values
        count = torch.tensor([listed], dtype=torch.int32, device="cuda")
        given = x, ids, count, None, hidden, parts
        calls = [partial(sparse_ffn, view, *given, eager=True, scratch=scratch) for view in views]

        error = partial(layer_error, calls[0], partial(sparse_ffn_ref, views[0], *given), parts)
        yield f"sparse_ffn {listed} of {FF}", 6.0 * D * listed, calls, error


@click.command(help="Time products of many rows, with tensor cores and without, beside the bytes' time.")
@click.option("--replays", type=click.IntRange(3), default=15, show_default=True)
def main(replays: int) -> None:
    """Command line of this script."""
    if not torch.cuda.is_available():
        click.echo("error: GPU kernels are timed on a CUDA GPU, and none was found", err=True)
        sys.exit(2)
    torch.manual_seed(0)
    bandwidth, wrong = read_bandwidth(replays), False
    click.echo(f"{torch.cuda.get_device_name()}: a torch sum reads {bandwidth:,.0f} GB/s; microseconds:")
    click.echo(f"{'rows':>4} {'way':12} {'kernel':28} {'bytes':>9} {'found':>9} {'error':>9}")
    for rows in ROWS:
        for tensor_cores in (False, True) if rows >= 8 else (False,):
            for make in (products, layers):
                for name, nbytes, calls, error in make(rows, tensor_cores):
                    off, time = error(), microseconds(calls, replays)
                    wrong |= not off < WRONG
                    way = "tensor cores" if tensor_cores else "groups"
                    click.echo(f"{rows:4} {way:12} {name:28} {nbytes / 1e3 / bandwidth:9.2f} {time:9.2f} {off:9.1e}")
                torch.cuda.empty_cache()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
