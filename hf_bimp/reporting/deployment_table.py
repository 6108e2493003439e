"""What exports and CSR are worth, as Markdown: latencies, sizes and metrics, for the log and for the model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .markdown import escaped, shown, table

TITLE = "## Deployment"
COMPRESS, ACCELERATE, SHRINK = "`hf_bimp.compress`", "`hf_bimp.accelerate`", "`hf_bimp.shrink`"


def deployment_section(deployment: Mapping[str, Any]) -> str:
    """The entry "deployment" of `bimp_results.json` as Markdown; empty where there is nothing in it."""
    parts = [savings_text(deployment["savings"])] if "savings" in deployment else []
    parts += [_export_section(deployment)] if "latency" in deployment else []
    return "\n\n".join(parts)


def savings_text(savings: Mapping[str, Any]) -> str:
    """What the zeros save, in two sentences; `savings` is the entry of that name."""
    dense, compressed = savings["dense_bytes"], savings["compressed_bytes"]
    is_shrunk = savings["means"] == "shrink"
    how = f"Shrunk and compressed ({SHRINK}, {COMPRESS})" if is_shrunk else f"Compressed ({COMPRESS})"
    size = (
        f"{how}, the weights take {_size(compressed)} in place of {_size(dense)}: {dense / compressed:.2f} times less."
    )
    means = SHRINK if is_shrunk else ACCELERATE
    if savings["speedup"] is None:
        return f"{size} Speed was not measured with {means}: {escaped(savings['reason'])}"
    batch = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in savings["example"].items())
    where = f"{savings['processor']}, {savings['threads']} thread{'s' * (savings['threads'] != 1)}"
    here = f"with {escaped(batch)} on {escaped(where)}"
    if savings["reason"]:
        return f"{size} No speed is gained by {means} {here}: {escaped(savings['reason'])}."
    return (
        f"{size} A forward pass measures {savings['speedup']:.2f} times as fast by {means}, "
        f"{savings['sparse_ms']:.3g} ms in place of {savings['dense_ms']:.3g}, {here}."
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


def write_into_card(directory: Path, deployment: Mapping[str, Any]) -> None:
    """Puts the section into the model card in `directory`, in place of an older one, if there is a card."""
    path = directory / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path)
    before, _, rest = card.text.partition(f"\n{TITLE}\n")
    _, _, after = rest.partition("\n## ")
    after = f"\n\n## {after.rstrip()}" if after else ""
    card.text = f"{before.rstrip()}\n\n{TITLE}\n\n{deployment_section(deployment)}{after}\n"
    part = path.with_name(path.name + ".part")
    try:
        card.save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
