"""What a search leaves: its progression as a table and a picture, its front, and all of it in one object.

Names are those of the tools that came before: ``search_progression.csv`` (their columns ``config, macs,
top1_acc, generation`` first; ``top1_acc`` is the score whatever the metric, for the loss its negative),
``search_progression.png``, ``pareto_front.json``, and last ``search_result.json``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comps.tuning import rundir

CSV, PNG, FRONT, RESULT = (
    "search_progression.csv",
    "search_progression.png",
    "pareto_front.json",
    "search_result.json",
)
FILES = (CSV, PNG, FRONT, RESULT)
_COLUMNS = ("config", "macs", "top1_acc", "generation", "parameters", "items", "stderr")


def write(output: Path, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """``rows``: one for each configuration in the order they were asked for, with ``_COLUMNS`` as keys."""
    output.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.DictWriter(table, _COLUMNS)
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"config": json.dumps(row["config"])})
    rundir.write_file(output / CSV, table.getvalue().encode())
    rundir.write_file(output / PNG, _picture(rows, result))
    front = {"metric": result["metric"], "cost": result["cost"], "items": result["items"]}
    rundir.write_json(output / FRONT, front | {"front": result["front"], "references": result["references"]})
    rundir.write_json(output / RESULT, result)


def _picture(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    cost = result["cost"]
    whole = [row for row in rows if row["items"] >= result["items"]]
    dots = axes.scatter(
        [row[cost] for row in whole], [row["top1_acc"] for row in whole],
        c=[row["generation"] for row in whole], s=18, cmap="viridis",
    )  # fmt: skip
    figure.colorbar(dots, label="generation")
    front = sorted(result["front"], key=lambda entry: entry[cost])
    axes.errorbar(
        [entry[cost] for entry in front], [entry["score"] for entry in front],
        yerr=[entry["stderr"] for entry in front], color="tab:red", linewidth=1, capsize=2, label="front",
    )  # fmt: skip
    for name, entry in result["references"].items():
        axes.plot(entry[cost], entry["score"], "k*")
        axes.annotate(name, (entry[cost], entry["score"]), textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel(cost)
    axes.set_ylabel(f"-{result['metric']}" if result["metric"] == "loss" else result["metric"])
    axes.set_title(f"{result['algorithm']}: {len(rows)} configurations, {result['items']} items")
    axes.legend(loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
