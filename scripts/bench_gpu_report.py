"""Tables, a CSV file and a plot of the results that `bench_gpu.py` collects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hybrid.bench.measurements import append_csv
from hybrid.console import percent
from hybrid.errors import InputError

Found = Mapping[str, Any]
Results = dict[tuple[str, str], dict[str, Any]]
GIB = 2**30
DECODES = ("budgets", "int4", "13b", "latency", "ablation")
_CSV_FIELDS = (
    "speed", "speed_p20", "speed_p80", "tpot_p50", "tpot_p90", "tpot_p99", "ttft", "ceiling", "share", "predicted",
    "error", "cpu_bytes", "gpu_bytes", "handoffs", "cpu_rate", "gpu_rate", "handoff", "planned", "arena", "taken",
    "hot_share", "hot_neurons", "layers_on_gpu", "threads", "context",
)  # fmt: skip


def read_results(path: Path) -> Results:
    """The last line of each measurement, by stage and case; a failure does not replace what was measured before.

    Raises `InputError` for a line that is no result.
    """
    found: Results = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key = (record["stage"], record["case"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number} is not a result of bench_gpu.py; give another file") from None
        if "failed" not in record or "failed" in found.get(key, record):
            found[key] = record
    return found


def write_report(out: Path, folder: Path) -> str:
    """The tables as markdown, with `gpu_budgets.csv` and `gpu_budgets.svg` written to `folder`."""
    results = read_results(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = csv_rows(results)
    if rows:
        target = folder / "gpu_budgets.csv"
        target.unlink(missing_ok=True)
        append_csv(target, rows)
    if curves(results)["measured"]:
        (folder / "gpu_budgets.svg").write_text(plot(curves(results)), encoding="utf-8")
    return markdown(results)


def csv_rows(results: Results) -> list[dict[str, Any]]:
    """A row for each decode."""
    kept = {key: found for key, found in results.items() if key[0] in DECODES and "speed" in found}
    return [
        {name: found.get(name) for name in ("date", "commit", "machine")}
        | {"stage": stage, "case": case}
        | {name: found.get(name) for name in _CSV_FIELDS}
        for (stage, case), found in kept.items()
    ]


def markdown(results: Results) -> str:
    """Every table, each only where something was measured."""
    parts = [
        _machine(results),
        _bars(results),
        _table("Decoding", _DECODE_HEADER, [_decode_row(*key, f) for key, f in results.items() if "speed" in f]),
        _table("Memory", _MEMORY_HEADER, [_memory_row(*key, f) for key, f in results.items() if f.get("planned")]),
        _table("Same greedy tokens", _SAME_HEADER, [_same_row(*key, f) for key, f in results.items() if _same(f)]),
        _table("Prefill", _PREFILL_HEADER, _prefill_rows(results)),
        _table("Predicted", ["budget", "tok/s"], _predicted_rows(results)),
        _table("Kernels", ["kernel", "us", "GB/s", "of the bandwidth"], _kernel_rows(results)),
        _text(results, "ablation", "hybrid bench --ablation"),
        _table("Failed", ["measurement", "why"], [[" / ".join(k), f["failed"]] for k, f in results.items() if _bad(f)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _bad(found: Found) -> bool:
    return "failed" in found


def _same(found: Found) -> bool:
    return "engines" in found


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]
    return f"### {title}\n\n" + "\n".join(lines)


def _machine(results: Results) -> str:
    first = next(iter(results.values()))
    name = results.get(("hardware", "profile"), {}).get("name", first.get("machine", ""))
    return f"{name}; {first.get('date', '')}, commit {first.get('commit', '')}"


_DECODE_HEADER = (
    "stage", "case", "tok/s", "TPOT p50 / p90 / p99, ms", "MB CPU / GPU", "GB/s CPU / GPU", "ceiling", "of ceiling",
    "predicted", "error", "served hot",
)  # fmt: skip


def _decode_row(stage: str, case: str, f: Found) -> list[str]:
    tpot = " / ".join(f"{1e3 * f[name]:.2f}" for name in ("tpot_p50", "tpot_p90", "tpot_p99"))
    return [
        stage,
        case,
        f"{f['speed']:.1f}",
        tpot,
        f"{f['cpu_bytes'] / 1e6:,.0f} / {f['gpu_bytes'] / 1e6:,.0f}",
        f"{f['cpu_rate'] / 1e9:.0f} / {f['gpu_rate'] / 1e9:,.0f}",
        f"{f['ceiling']:.1f}",
        percent(f["share"]),
        f"{f['predicted']:.1f}" if f.get("predicted") else "-",
        f"{f['error']:+.1%}" if "error" in f else "-",
        percent(f.get("hot_share")),
    ]


_MEMORY_HEADER = ("stage", "case", "planned, MiB", "arena", "taken", "taken / planned", "layers", "hot neurons")


def _memory_row(stage: str, case: str, f: Found) -> list[str]:
    sizes = [f"{f[name] / 2**20:,.0f}" for name in ("planned", "arena", "taken")]
    return [
        stage,
        case,
        *sizes,
        f"{f['taken'] / f['planned']:.3f}",
        str(f["layers_on_gpu"]),
        percent(f["hot_neurons"]),
    ]


_SAME_HEADER = ("model", "strategies", "workers", "tokens", "engines", "as the CPU alone", "as dense", "differing")


def _same_row(stage: str, case: str, f: Found) -> list[object]:
    listed = [", ".join(map(str, f[name])) for name in ("strategies", "threads")]
    return [case, *listed, f["tokens"], f["engines"], f["as_cpu"], f["as_dense"], "; ".join(f["differing"]) or "none"]


_PREFILL_HEADER = (
    "budget",
    "tokens",
    "way",
    "s",
    "predicted",
    "error",
    "tok/s",
    "layers streamed / split / CPU / all CPU",
)


def _prefill_rows(results: Results) -> list[list[object]]:
    return [
        [
            case,
            r["length"],
            r["way"],
            f"{r['seconds']:.3f}",
            f"{r['predicted']:.3f}" if "predicted" in r else "-",
            f"{r['error']:+.1%}" if "error" in r else "-",
            f"{r['length'] / r['seconds']:,.0f}",
            _ways(r),
        ]
        for (stage, case), found in results.items()
        if stage == "prefill"
        for r in found.get("rows", [])
    ]


def _ways(row: Found) -> str:
    """Layers that were streamed whole, split, whose cold neurons the CPU computed, and that are wholly on the CPU."""
    split = row.get("split", 0)
    return f"{row['streamed'] - split} / {split} / {row['computed'] - split} / {row.get('on_cpu', 0)}"


def _predicted_rows(results: Results) -> list[list[object]]:
    rows = results.get(("predicted", "7b"), {}).get("rows", [])
    return [[f"{row['budget'] / GIB:g} GiB", f"{row['speed']:.1f}"] for row in rows]


def _kernel_rows(results: Results) -> list[list[object]]:
    rows = results.get(("kernels", "all"), {}).get("kernels", [])
    return [[r["case"], f"{r['microseconds']:.1f}", f"{r['gigabytes']:,.0f}", percent(r["share"])] for r in rows]


def _text(results: Results, stage: str, case: str) -> str:
    text = results.get((stage, case), {}).get("text")
    return f"### {case}\n\n```\n{text}\n```" if text else ""


def _bars(results: Results) -> str:
    """What was asked for beside what was measured."""
    rows = [[what, asked, got, "met" if fine else "NOT MET"] for what, asked, got, fine in bars(results)]
    return _table("What was asked", ["what", "asked", "measured", ""], rows)


def bars(results: Results) -> list[tuple[str, str, str, bool]]:
    """(what, asked, measured, whether met) of everything that was measured."""
    rows = []

    def add(what: str, asked: str, got: str, fine: bool) -> None:
        rows.append((what, asked, got, fine))

    box = results.get(("handoff", "mailbox"), {})
    if "empty" in box:
        add("hand-off, empty", "13.3 us", f"{1e6 * box['empty']:.1f} us", box["empty"] <= 13.3e-6)
        add(f"hand-off, {box['active']} neurons", "42 us", f"{1e6 * box['full']:.1f} us", box["full"] <= 42e-6)
    for (_, case), f in results.items():
        if _same(f):
            add(f"same tokens, {case}", f"{f['engines']}", f"{f['as_cpu']}", f["as_cpu"] == f["engines"])
    budgets = {case: f for (stage, case), f in results.items() if stage == "budgets" and "speed" in f}
    _add_speeds(add, budgets, results)
    for case, f in budgets.items():
        if "error" in f:
            add(f"predicted time, {case}", "15%", f"{f['error']:+.1%}", abs(f["error"]) <= 0.15)
    memory = {f"{stage} {case}": f for (stage, case), f in results.items() if f.get("planned")}
    for case, f in memory.items():
        off = f["taken"] / f["planned"] - 1
        add(f"memory taken, {case}", "planned, less than 2% off", f"{off:+.1%}", -0.02 <= off <= 0)
    prompts = _prefill_by_length(results)
    for length, ways in prompts.items():
        best = min(("stream", "cpu"), key=lambda way: ways[way]["seconds"])
        # Where every layer goes the faster way it is the same computation, and what differs is noise.
        same = _ways(ways["chosen"]) == _ways(ways[best])
        took, least = ways["chosen"]["seconds"], ways[best]["seconds"]
        got = f"{took:.3f} s" + ", the same way" * same
        add(f"prefill of {length}", f"{least:.3f} s ({best})", got, same or took <= 1.03 * least)
    for (stage, case), f in results.items():
        for row in f.get("rows", []) if stage == "prefill" else []:
            if "error" in row:
                off = row["error"]
                add(f"predicted first token, {case}, {row['length']}", "15%", f"{off:+.1%}", abs(off) <= 0.15)
    return rows


def _add_speeds(add: Any, budgets: Mapping[str, Found], results: Results) -> None:
    at8, every = budgets.get("8 GiB"), budgets.get("all")
    if at8:
        add("7B at 8 GiB", "140 tok/s", f"{at8['speed']:.1f}", at8["speed"] >= 140)
        add("7B at 8 GiB, share of the ceiling", "70%", percent(at8["share"]), at8["share"] >= 0.7)
    chance = results.get(("ablation", "hybrid bench --ablation"), {}).get("solver_over_random")
    if chance:
        add("solver over random", "1.3", f"{chance:.2f}", chance >= 1.3)
    if every:
        add("all on the GPU, share of the ceiling", "85%", percent(every["share"]), every["share"] >= 0.85)
    tokens = {case: f["tokens"] for case, f in budgets.items()}
    if len(tokens) > 1:
        shown = min(map(len, tokens.values()))
        different = len({tuple(found[:shown]) for found in tokens.values()})
        add(f"first {shown} tokens over {len(tokens)} budgets", "1 text", f"{different}", different == 1)


def _prefill_by_length(results: Results) -> dict[int, dict[str, Found]]:
    found: dict[int, dict[str, Found]] = {}
    for row in results.get(("prefill", "8 GiB"), {}).get("rows", []):
        found.setdefault(row["length"], {})[row["way"]] = row
    return found


Curve = list[tuple[float, float]]


def curves(results: Results) -> dict[str, Curve]:
    """(GiB, tok/s) of the 7B model over its budgets; all that the card has stands at what was planned of it."""
    found: dict[str, Curve] = {"measured": [], "ceiling": [], "predicted": []}
    for (stage, case), f in results.items():
        if stage == "budgets" and "speed" in f:
            gib = f["planned"] / GIB if case == "all" else float(case.split()[0])
            for name, value in (("measured", "speed"), ("ceiling", "ceiling"), ("predicted", "predicted")):
                if f.get(value):
                    found[name].append((gib, f[value]))
    top = max((gib for gib, _ in found["measured"]), default=0.0)
    more = results.get(("predicted", "7b"), {}).get("rows", [])
    known = {gib for gib, _ in found["predicted"]}
    between = [(row["budget"] / GIB, row["speed"]) for row in more]
    found["predicted"] += [point for point in between if point[0] not in known and point[0] <= top]
    return {name: sorted(points) for name, points in found.items()}


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 440, 60, 50, 40, 20
_STYLES = {
    "measured": 'stroke="#0b6e4f" stroke-width="2.5"',
    "ceiling": 'stroke="#888888" stroke-width="1.5" stroke-dasharray="6 4"',
    "predicted": 'stroke="#c8553d" stroke-width="1.5" stroke-dasharray="2 3"',
}


def plot(lines: Mapping[str, Curve]) -> str:
    """SVG of tok/s over GiB, a line for each of `lines`."""
    points = [point for line in lines.values() for point in line]
    x_step, y_step = (_step(max(point[axis] for point in points)) for axis in (0, 1))
    x_top, y_top = (step * 6 for step in (x_step, y_step))

    def x(value: float) -> float:
        return _LEFT + value / x_top * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - value / y_top * (_HEIGHT - _TOP - _BOTTOM)

    marks = []
    for k in range(7):
        across, up = k * x_step, k * y_step
        marks.append(f'<line x1="{x(0):.1f}" x2="{x(x_top):.1f}" y1="{y(up):.1f}" y2="{y(up):.1f}" stroke="#e5e5e5"/>')
        marks.append(_label(x(0) - 8, y(up) + 4, f"{up:g}", "end"))
        marks.append(_label(x(across), y(0) + 18, f"{across:g}", "middle"))
    marks += [
        _label(x(x_top / 2), _HEIGHT - 10, "VRAM budget, GiB", "middle"),
        _label(_LEFT, 22, "tokens/s, 7B shape in bf16", "start"),
    ]
    for number, (name, line) in enumerate(lines.items()):
        if not line:
            continue
        path = " ".join(f"{x(gib):.1f},{y(speed):.1f}" for gib, speed in line)
        marks.append(f'<polyline points="{path}" fill="none" {_STYLES[name]}/>')
        if name == "measured":
            marks += [f'<circle cx="{x(gib):.1f}" cy="{y(speed):.1f}" r="3.5" fill="#0b6e4f"/>' for gib, speed in line]
        at = _WIDTH - 150, _HEIGHT - _BOTTOM - 70 + 20 * number
        marks.append(f'<line x1="{at[0]}" x2="{at[0] + 30}" y1="{at[1] - 4}" y2="{at[1] - 4}" {_STYLES[name]}/>')
        marks.append(_label(at[0] + 38, at[1], name, "start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>', *marks, "</svg>"]) + "\n"


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="#333333" text-anchor="{anchor}">{escape(text)}</text>'


def _step(top: float) -> float:
    """The least round distance of which six cover `top`."""
    return next(
        step * 10.0**power for power in range(-3, 7) for step in (1, 2, 2.5, 5) if 6 * step * 10.0**power >= top
    )
