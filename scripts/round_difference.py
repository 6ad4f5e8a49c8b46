"""Round a low-rank difference, as training wrote it, to the file that ships: see `hybrid/formats/difference.py`.

    python scripts/round_difference.py difference-*.safetensors hybrid/embedded/smollm2-reglu/difference.npz --bits 6

The sources hold `NAME.lora_a` [r, m] and `NAME.lora_b` [n, r] for each matrix, `NAME.weight` for each vector.
"""

from __future__ import annotations

from pathlib import Path

import click
from safetensors.torch import load_file

from hybrid.formats.difference import write_difference


@click.command(help="Round a low-rank difference to few bits.")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bits", type=click.IntRange(2, 8), default=6, show_default=True)
def main(sources: tuple[Path, ...], out: Path, bits: int) -> None:
    """Command line of this script."""
    tensors = {name: tensor for source in sources for name, tensor in load_file(source).items()}
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    products = {name: (tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names}
    vectors = {name.removesuffix(".weight"): tensors[name] for name in tensors if name.endswith(".weight")}
    write_difference(out, products, vectors, bits)
    click.echo(f"wrote {out}, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
