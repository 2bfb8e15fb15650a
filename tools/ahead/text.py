"""The figures of a step as text."""

from typing import Any

ERROR = "± 15%"  # of each estimate of time: how far published runs lie from it (calibration.py)
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def describe(found: dict[str, Any]) -> str:
    """What tools/compile_ahead.py prints."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{found['topology']}: {found['chips']:,} chip{'s' * (found['chips'] > 1)}, {mesh}; {found['parameters']:,} "
        f"parameters; batch {found['batch_size']} x {found['row_length']} in {found['microbatches']} "
        f"part{'s' * (found['microbatches'] > 1)}, remat {found['remat']}",
        _memory(found),
    ]
    if not found["fits"]:
        lines += ["largest buffers (arrays that share one are in it one after another):"]
        lines += [f"  {_bytes(size):>10}  {shapes}" for size, shapes in found["largest_buffers"]]
    if "estimated_step_seconds" in found:
        lines += _speed(found)
    return "\n".join(lines + [f"note: {note}" for note in dict.fromkeys(found["notes"])])


def ranking(ranked: list[dict[str, Any]]) -> str:
    """What --search prints: a line for each setting that fits, fastest first."""
    return "\n".join(
        f"{found['estimated_mfu']:4.0%} {_seconds(found['estimated_step_seconds']):>10} "
        f"{_bytes(found['bytes_per_chip']):>10}  {found['flags']}"
        for found in ranked
    )


def _memory(found: dict[str, Any]) -> str:
    classes = ", ".join(
        f"{name.replace('_', ' ')} {_bytes(size)}" for name, size in found["bytes_per_chip_by_class"].items() if size
    )
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    return (
        f"{verdict}: {_bytes(found['bytes_per_chip'])} of {_bytes(found['capacity_bytes_per_chip'])} a chip ({classes})"
    )


def rough(value: float) -> str:
    """Two significant digits: what an estimate is worth."""
    if value < 0.995:
        return f"{value:.2g}"
    return f"{float(f'{value:.2g}'):,.{0 if value >= 9.95 else 1}f}"


def _speed(found: dict[str, Any]) -> list[str]:
    parts, assumed = found["parts"], found["assumed"]
    work = ", ".join(f"{kind} {_seconds(parts[f'{kind}_seconds'])}" for kind in ("matmul", "vector", "attention"))
    roads = ", ".join(
        f"{name} {_seconds(parts[f'{name.lower()}_seconds'])}"
        for name in ("ICI", "DCN", "host") if parts[f"{name.lower()}_seconds"]
    )  # fmt: skip
    lines = [
        f"estimate {ERROR}: a step {_seconds(found['estimated_step_seconds'])}, MFU {found['estimated_mfu']:.0%}, "
        f"{rough(found['tokens_per_second_per_chip'])} tokens/s/chip",
        f"of a step: {work}, waiting for transfers {_seconds(parts['exposed_seconds'])}"
        + (f" (they take: {roads})" if roads else ""),
        f"with all transfers hidden {_seconds(found['all_transfers_hidden_seconds'])}, with none "
        f"{_seconds(found['all_transfers_exposed_seconds'])}",
        f"{found['steps']:,} steps, {_si(found['flops_per_step'])}FLOP each, {_si(found['tokens'])}tokens: "
        f"{rough(found['days'])} days, {rough(found['chip_hours'])} chip-hours",
        "transfers, a chip and step:",
    ]
    for c in found["transfers"]:
        each = _bytes(c["bytes"] / max(c["count"], 1))
        lines.append(
            f"  {c['kind']:<18} {c['axes']:<12} {c['network']:<4} {c['count']:7,.0f} x {each:>10} = "
            f"{_bytes(c['bytes']):>10}, {_seconds(c['seconds'])}"
        )
    slowest, mean = assumed["chunks_of_slowest_device"], assumed["chunks_of_mean_device"]
    lines.append(
        f"assumed: {assumed['scored_share']:.0%} of positions scored; in each part the devices wait for the one with "
        f"most of them, {slowest:.1f} chunks (mean {mean:.1f}); attention at "
        f"{assumed['attention_share_of_peak']:.0%} of peak"
    )
    if found["unpriced"]:
        lines.append("not priced: " + ", ".join(f"{n:,.0f} x {name}" for name, n in found["unpriced"].items()))
    return lines


def _bytes(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{rough(seconds)} s" if seconds >= 0.995 else f"{rough(seconds * 1e3)} ms"


def _si(value: float) -> str:
    return next((f"{value / unit:.3g} {name}" for unit, name in _UNITS if value >= unit), f"{value:.3g} ")
