"""Draws the trade-offs of a sweep's report.json as SVG files that stand alone, for the documentation.

python benchmarks/picture.py runs/systems/report.json --group Systems --out docs/results/systems-nano
"""

import argparse
import json
from pathlib import Path

from openembed.report.charts import COLORS
from openembed.report.tradeoff import Cost, tradeoff_figures

INKS = ("#0b62a8", "#c2500a", "#04805e", "#9b3f86", "#8a6d00", "#3b6fd4", "#b3243b", "#5c6570")
STYLE = (
    "svg { background: #fff; --card: #fff; } text { fill: #5c6570; font: 11px system-ui, sans-serif; }"
    " .grid, .axis { stroke: #dcdfe3; } .line { fill: none; stroke: var(--k); stroke-width: 1.8; stroke-linejoin: round; }"
    " .whisker { stroke: var(--k); stroke-width: 1.4; stroke-opacity: .45; } .dot { fill: var(--k); } .name { fill: #1c2024; }"
    " .frontier { fill: none; stroke: #5c6570; stroke-dasharray: 3 4; } .divider { stroke: #5c6570; stroke-dasharray: 2 3; }"
    " .frontier ~ .name { paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-linejoin: round; } "
) + " ".join(f".s{number} {{ --k: {ink}; }}" for number, ink in enumerate(INKS[:COLORS]))


def standalone(svg: str) -> str:
    """Returns an SVG element of a report as a file of its own: with colours, whatever page shows it."""
    opening, rest = svg.split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg" width="720"><style>{STYLE}</style>{rest}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--group", default="Systems")
    parser.add_argument("--metric", default="overall")
    parser.add_argument("--out", type=Path, required=True, help="beginning of the files' names")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    names = next(group["variants"] for group in report["groups"] if group["title"] == args.group)
    variants = {name: report["variants"][name] for name in names if report["variants"][name]["cost"]}
    scores = {name: tuple(v["scores"][args.metric][key] for key in ("mean", "low", "high")) for name, v in variants.items()}
    costs = {name: Cost(**v["cost"]) for name, v in variants.items()}
    for figure in tradeoff_figures("all tasks", args.metric, scores, costs, list(variants)):
        path = args.out.with_name(f"{args.out.name}-{'bytes' if 'bytes' in figure.title else 'ms'}.svg")
        path.write_text(standalone(figure.svg))
        print(path)


if __name__ == "__main__":
    main()
