"""What exports and CSR are worth, as Markdown: latencies, sizes and metrics, for the log and for the model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .markdown import escaped, shown, table

TITLE = "## Deployment"
COMPRESS, ACCELERATE, SHRINK = "`hf_bimp.compress`", "`hf_bimp.accelerate`", "`hf_bimp.shrink`"


def deployment_section(deployment: Mapping[str, Any], speed: Mapping[str, Any] | None = None) -> str:
    """The entry "deployment" of `bimp_results.json` as Markdown; empty where there is nothing in it.

    `speed`: what the run measured at its end, the entry "inference" of "throughput".
    """
    parts = [savings_text(deployment["size"], speed)] if "size" in deployment and speed else []
    parts += [_export_section(deployment)] if "latency" in deployment else []
    return "\n\n".join(parts)


def section_of(results: Mapping[str, Any]) -> str:
    """The same of all that is in `bimp_results.json`."""
    return deployment_section(results.get("deployment", {}), results.get("throughput", {}).get("inference"))


def savings_text(size: Mapping[str, Any], speed: Mapping[str, Any]) -> str:
    """What the zeros save, in two sentences."""
    dense, compressed = size["dense_bytes"], size["compressed_bytes"]
    how = f"Shrunk and compressed ({SHRINK}, {COMPRESS})" if size["is_shrunk"] else f"Compressed ({COMPRESS})"
    less = f"{dense / compressed:.2f} times less" if compressed else "nothing"
    told = f"{how}, the weights take {_size(compressed)} in place of {_size(dense)}, {less}."
    means = SHRINK if speed["means"] == "shrink" else ACCELERATE
    if speed["speedup"] is None:
        return f"{told} Speed was not measured with {means}: {escaped(speed['reason'])}"
    batch = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in speed["example"].items())
    where = f"{speed['processor']}, {speed['threads']} thread{'s' * (speed['threads'] != 1)}"
    here = f"with {escaped(batch)} on {escaped(where)}"
    if speed["reason"]:
        return f"{told} No speed is gained by {means} {here}: {escaped(speed['reason'])}."
    return (
        f"{told} A forward pass measures {speed['speedup']:.2f} times as fast by {means}, "
        f"{speed['sparse_ms']:.3g} ms in place of {speed['dense_ms']:.3g}, {here}."
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.2f} kB"


def _export_section(deployment: Mapping[str, Any]) -> str:
    rows = [
        [row["name"], f"{row['milliseconds']:.4g} ms", f"{row['speedup']:.2f}", f"{row['bytes'] / 1e6:.2f} MB"]
        for row in deployment["latency"]
    ]
    batch = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in deployment["example"].items())
    where = f"{deployment['processor']}, {deployment['threads']} thread{'s' * (deployment['threads'] != 1)}"
    told = f"Medians of calls that take turns, with {escaped(batch)}, on {escaped(where)}, in float32 except for int8."
    parts = [told, table(["", "latency", "speedup", "size"], rows)]
    before, after = deployment["metrics_before"], deployment["metrics_after"]
    if before:
        metrics = [[name, shown(value), shown(after.get(name, "-"))] for name, value in before.items()]
        parts.append(table(["metric", "torch", rows[-1][0]], metrics))
    equal = f"Outputs differ from torch's by at most {deployment['max_difference']:.1e} of their magnitude"
    if deployment["int8_difference"] is not None:
        equal += f"; in int8 by {deployment['int8_difference']:.1e}"
    parts.append(equal + ".")
    if deployment["fixed"]:
        fixed = [[name, reason] for name, reason in deployment["fixed"].items()]
        parts.append("Not dynamic:\n\n" + table(["size", "why"], fixed))
    return "\n\n".join(parts)


def acceleration_section(report: Mapping[str, Any]) -> str:
    """What `accelerate` measured, as Markdown; `report` is its report as a dict."""
    batch = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in report["example"].items())
    where = f"{report['processor']}, {report['threads']} thread{'s' * (report['threads'] != 1)}"
    told = f"{report['speedup']:.2f} times as fast as the dense model: {report['accelerated_ms']:.4g} ms in place of "
    told += f"{report['dense_ms']:.4g}, with {escaped(batch)}, on {escaped(where)}."
    told += f" All layers are dense: {escaped(report['reason'])}." if report["reason"] else ""
    told += (
        f" CSR takes {report['extra_bytes'] / 1e6:.3g} MB beside the dense weights." if report["extra_bytes"] else ""
    )
    rows = [
        [
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            f"{layer['sparsity']:.1%}",
            ", ".join(map(str, dict.fromkeys(layer["rows"]))),
            *("-" if layer[ms] is None else f"{layer[ms]:.4g}" for ms in ("dense_ms", "csr_ms")),
            layer["chosen"],
            layer["reason"],
        ]
        for layer in report["layers"]
    ]
    return f"{told}\n\n{table(['layer', 'weight', 'zeros', 'rows', 'dense ms', 'CSR ms', 'chosen', 'why'], rows)}"


def write_into_card(directory: Path, results: Mapping[str, Any]) -> None:
    """Puts the section of a run's `results` into the model card in `directory`, if there is one, for an older one."""
    path = directory / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path)
    before, _, rest = card.text.partition(f"\n{TITLE}\n")
    _, _, after = rest.partition("\n## ")
    after = f"\n\n## {after.rstrip()}" if after else ""
    section = f"{before.rstrip()}\n\n{TITLE}\n\n{section_of(results)}"
    card.text = f"{section}{after}\n"
    part = path.with_name(path.name + ".part")
    try:
        card.save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
