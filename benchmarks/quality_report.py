"""The page of the quality study: tables, contrasts, answers and figures from the records alone."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality import read_records
from benchmarks.quality_answers import (
    BLOCKS_TRANSFER,
    HEAD_IMPROVES,
    INPUTS,
    STITCHES_BRIDGE,
    Group,
    Groups,
    Record,
    answers,
    corrected,
    goals_table,
    paired,
    primary_values,
    progress,
    reading,
)
from benchmarks.quality_choices import perplexity, real_page, sizes_page
from benchmarks.quality_compute import compute_table, reasons
from benchmarks.quality_plan import ABOUT_ARMS, BUDGETS, KINDS, PRIMARY_CONTRASTS
from benchmarks.quality_statistics import Contrast, estimate, over_text
from benchmarks.quality_tables import TABLES
from benchmarks.report import table_line


def write_page(results: Path, docs: Path) -> Path:
    """Write ``results.md`` and its figures from all files of records; return its path."""
    docs.mkdir(parents=True, exist_ok=True)
    by_table = {name: read_records(results / f"{name}.jsonl") for name in TABLES}
    arms_records = by_table["arms"]
    apart = ("smollm2", "sizes", "half")  # their arms bear the names of the main table's
    records = [record for found in by_table.values() for record in found]
    comparable = [record for n, found in by_table.items() if n not in apart for record in found]
    groups, everything = grouped(arms_records), grouped(comparable)
    half = grouped(by_table["half"])
    sections = [
        HEAD,
        about_data(arms_records),
        f"## How much of the plan is done\n\n{progress(records)}",
        "## H1: does block by block transfer knowledge?\n\n"
        f"{answers(everything, (*BLOCKS_TRANSFER, *INPUTS))}",
        f"## H2: do stitches bridge widths?\n\n{answers(everything, STITCHES_BRIDGE)}",
        f"## H3: does a head phase of its own help?\n\n{answers(everything, HEAD_IMPROVES)}",
        f"## The goals\n\n{goals_table(everything, half)}\n\n{reasons(everything, half)}",
        f"## The same loss for less\n\n{compute_table(everything)}",
    ]
    for kind in KINDS:
        found = {key: group for key, group in groups.items() if key[1] == kind}
        if found:
            name = f"loss_against_budget_{kind.lower()}.png"
            (docs / "figures").mkdir(exist_ok=True)
            draw_budgets(found, docs / "figures" / name, kind)
            sections.append(f"## {kind}\n\n{arms_table(found)}\n\n![{kind}](figures/{name})")
    sections.append("## Contrasts\n\n" + contrasts_table(groups))
    sections += [
        f"## {title}\n\n{arms_table(grouped(by_table[name]))}"
        for name, title in OTHER_TABLES.items()
        if by_table[name]
    ]
    if by_table["sizes"]:
        sections.append(f"## What to choose from\n\n{sizes_page(by_table['sizes'], arms_records)}")
    if by_table["smollm2"]:
        sections.append(f"## A real teacher: SmolLM2-135M\n\n{real_page(by_table['smollm2'])}")
    path = docs / "results.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


OTHER_TABLES = {
    "half": "Students with half of the teacher's parameters",
    "stitches": "Students by stitch",
    "heads": "Students by head phase",
    "inputs": "Students by what entered their blocks",
    "self": "The teacher distilled into its own shape",
}

HEAD = """# How good the students are

Every number on this page comes from `python -m benchmarks.quality` with the names of its tables,
which goes on where it was stopped; `python -m benchmarks.quality report` writes the page from the
records in `benchmarks/results/quality/`. The plan was committed before the runs
(`benchmarks/quality_plan.py`), which also says what was mended after runs had been made: those were
taken out and made again. The last of these: SASP's students from scratch had come apart at their
learning rate, which made its baselines look 1.0 nats worse at the middle budget than they are, and
the way from scratch to the teacher was measured on students of a third of its parameters where half
was asked for; both are shown. Losses are nats per token on the built-in test text, mean over seeds
with a 95 % interval (Student's t). Equal budget means equal training operations, the teacher's
forward passes counted as the library executes them; seconds are of one thread and vary with what
else runs there."""


def about_data(records: Sequence[Record]) -> str:
    """What was compared, and the teacher's own loss."""
    if not records:
        return "No runs yet."
    lines = [f"- **{name}**: {text}" for name, text in ABOUT_ARMS.items()]
    teacher = records[0]["teacher_loss"]
    intro = (
        f"The teacher's test loss in windows of 128 tokens is {teacher:.3f} nats (perplexity"
        f" {perplexity(teacher)})."
    )
    return "\n".join([intro, "", *lines])


def grouped(records: Sequence[Record]) -> Groups:
    """Records by (arm, kind, budget) and seed."""
    groups: Groups = defaultdict(dict)
    for record in records:
        if record["split"] == "test":
            key = (record["arm"], record["kind"], record["budget_name"])
            groups[key][record["seed"]] = record
    return groups


def values(group: Group, name: str, seeds: Sequence[int] | None = None) -> list[float]:
    """One figure of all seeds, in their order."""
    return [group[seed][name] for seed in (sorted(group) if seeds is None else seeds)]


def arms_table(groups: Groups) -> str:
    """One line per arm and budget."""
    columns = [
        "budget",
        "arm",
        "student",
        "test loss",
        "perplexity",
        "KL",
        "agreement",
        "gap closed",
    ]
    lines = [table_line([*columns, "seeds", "seconds"]), table_line(["---"] * 10)]
    for budget in BUDGETS:
        for (arm, kind, name), group in sorted(groups.items()):
            if name != budget:
                continue
            loss = estimate(values(group, "loss"))
            floor = groups.get(("A0", kind, budget))
            lines.append(
                table_line(
                    [
                        budget,
                        arm,
                        kind,
                        str(loss),
                        perplexity(loss.mean),
                        f"{estimate(values(group, 'kl')).mean:.3f}",
                        f"{estimate(values(group, 'agreement')).mean:.1%}",
                        gap_closed(group, floor),
                        str(len(group)),
                        f"{estimate(values(group, 'train_seconds')).mean:.0f}",
                    ]
                )
            )
    return "\n".join(lines)


def gap_closed(group: Group, floor: Group | None) -> str:
    """``(loss of A0 - loss) / (loss of A0 - teacher's)``, over the seeds both have."""
    seeds = sorted(set(group) & set(floor or {}))
    if floor is None or not seeds:
        return ""
    scratch = sum(values(floor, "loss", seeds)) / len(seeds)
    own = sum(values(group, "loss", seeds)) / len(seeds)
    teacher = group[seeds[0]]["teacher_loss"]
    return f"{(scratch - own) / (scratch - teacher):.0%}"


def contrasts_table(groups: Groups) -> str:
    """The primary contrasts at every budget, with Holm's correction over all of them."""
    rows: list[tuple[tuple[str, str, str, str], Contrast, str]] = []
    for first, second in PRIMARY_CONTRASTS:
        for kind in KINDS:
            for budget in BUDGETS:
                found = paired(groups, first, second, kind, budget)
                if found is None:
                    continue
                pair = [groups[arm, kind, budget] for arm in (first, second)]
                rows.append(((first, second, kind, budget), found, text_interval(*pair)))
    adjusted = primary_values(groups)
    head = ["contrast", "student", "budget", "difference in nats (t interval)", "BCa interval"]
    head += ["over the text's windows", "p (Holm)", "seeds", "reading"]
    lines = [table_line(head), table_line(["---"] * len(head))]
    for names, found, windows in rows:
        p = adjusted[names]
        interval = "" if found.bootstrap is None else "[{:.3f}, {:.3f}]".format(*found.bootstrap)
        shown = "" if math.isnan(p) else f"{p:.2g}"
        name = f"{names[0]} - {names[1]}"
        cells = [name, *names[2:], str(found.difference), interval, windows, shown]
        cells.append(str(found.difference.count))
        lines.append(table_line([*cells, corrected(reading(found), p)]))
    return "\n".join(lines)


def text_interval(first: Group, second: Group) -> str:
    """The interval of a difference over the test text's windows; empty without their losses."""
    seeds = sorted(set(first) & set(second))
    if any("window_losses" not in group[seed] for group in (first, second) for seed in seeds):
        return ""
    pair = ([group[seed]["window_losses"] for seed in seeds] for group in (first, second))
    return "[{:.3f}, {:.3f}]".format(*over_text(*pair))


def draw_budgets(groups: Groups, path: Path, kind: str) -> None:
    """Draw each arm's mean loss against the budget, with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    pick: Callable[[str], list[tuple[float, Group]]] = lambda arm: [  # noqa: E731
        (BUDGETS[b], groups[arm, kind, b]) for b in BUDGETS if (arm, kind, b) in groups
    ]
    teacher = None
    for arm in sorted({key[0] for key in groups}):
        points = pick(arm)
        found = [estimate(values(group, "loss")) for _, group in points]
        teacher = next(iter(points[0][1].values()))["teacher_loss"]
        spread = [
            [each.mean - each.low for each in found],
            [each.high - each.mean for each in found],
        ]
        axes.errorbar(
            [budget for budget, _ in points],
            [each.mean for each in found],
            yerr=spread,
            marker="o",
            capsize=3,
            label=arm,
        )
    if teacher is not None:
        axes.axhline(teacher, color="grey", linestyle="--", label="teacher")
    axes.set_xscale("log")
    axes.set_xlabel("training operations")
    axes.set_ylabel("test loss, nats per token")
    axes.set_title(f"{kind} student")
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
