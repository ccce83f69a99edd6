"""
The tables of the five tasks in the README, beside the paper's rows, from the rows in results/babilong:

    python results/babilong/table.py
"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from train import finished_runs, interval, right_of

LENGTHS = [0, 1_000, 4_000, 16_000, 128_000, 1_000_000, 10_000_000, 50_000_000]
PAPER = {        # BABILong (Kuratov et al. 2024), table 4, up to 16k tokens; ARMT (Rodkin et al. 2024), table 1, beyond
    "qa1": ["100", "99", "100", "100", "99.9 ± 0.2", "98.5 ± 1.0", "89.4 ± 8.1", "49.6 ±40.4"],
    "qa2": ["100", "97", "100", "100", "99.8 ± 0.2", "99.4 ± 0.3", "84.4 ± 4.0", "-"],
    "qa3": ["97", "85", "92", "92", "86.0 ± 4.8", "72.1 ±14.2", "37.0 ±10.3", "-"],
    "qa4": ["100", "99", "100", "100", "100.0 ± 0.1", "99.8 ± 0.3", "91.5 ± 1.7", "-"],
    "qa5": ["100", "99", "98", "98", "98.7 ± 0.4", "97.3 ± 0.6", "80.9 ± 7.6", "-"]}
BOOK, CANTERBURY = ["pride_and_prejudice.txt"], ["alice29.txt", "asyoulik.txt", "lcet10.txt", "plrabn12.txt"]


def rows_of(kind, part, background=None):
    """{length: the eval rows of all seeds} of the runs called kind-seed0, kind-seed1, ..."""
    found = {}
    for config, _, rows in finished_runs(HERE):
        if Path(config.out_dir).name.rpartition("-")[0] == kind:
            for row in rows:
                if row.get("part", part) == part and background in (None, row.get("background")):
                    found.setdefault(row["length"], []).append(row)
    return found


def accuracy(rows):
    values = [100 * row["accuracy"] for row in rows]
    spread = f" ±{statistics.stdev(values):4.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def pooled(rows):
    n = sum(row["n"] for row in rows)
    low, high = interval(sum(row["n"] * row["accuracy"] for row in rows), n)
    return f"{100 * low:.1f}-{100 * high:.1f}"


def minutes(rows):
    return f"{statistics.mean(row['read_seconds'] for row in rows) / 60:.1f}"


def by_depth(rows):
    return [right_of(*(sum(row["depths"][i][k] for row in rows) for k in (1, 0))) for i in range(5)]


def line(part, name, cells):
    return f"{part:4} {name:12}  {'  '.join(f'{cell:>11}' for cell in cells)}".rstrip()


def show(title, lines, lengths=LENGTHS):
    print("\n".join([f"\n{title:17}  " + "  ".join(f"{length:>11,}" for length in lengths), *lines]))


def main():
    models = {part: "qa2-armt" if part == "qa2" else "joint-armt" for part in PAPER}
    lines, times, depths = [], [], []
    for part, model in models.items():
        for background, name in ((BOOK, "from joint" if part == "qa2" else "joint"), (CANTERBURY, "Canterbury")):
            found = rows_of(model, part, background)
            if background == CANTERBURY and not found:
                continue
            shown = [found.get(length) for length in LENGTHS]
            lines += [line(part if background == BOOK else "", name, [accuracy(r) if r else "-" for r in shown]),
                      line("", "95% interval", [pooled(r) if r else "-" for r in shown])]
            times.append(line(part if background == BOOK else "", name, [minutes(r) if r else "-" for r in shown]))
        none = rows_of(f"{part}-none", part)
        lines += [line("", "paper, ARMT", PAPER[part]),
                  line("", "no memory", [accuracy(none[length]) if length in none else "-" for length in LENGTHS])]
        million = rows_of(model, part, BOOK)[1_000_000]
        depths.append(f"{part}    " + "  ".join(f"{cell:>14}" for cell in by_depth(million)))
    show("accuracy, %", lines)
    show("minutes of reading", times)
    print("\nright  " + "  ".join(f"{f'{start}-{start + 20}%':>14}" for start in range(0, 100, 20)), *depths, sep="\n")
    lines = []
    for part in PAPER:
        found = rows_of("joint-armt" if part == "qa2" else f"{part}-armt", part, BOOK)
        shown = [found.get(length) for length in LENGTHS[:4]]
        lines += [line(part, "joint" if part == "qa2" else "alone", [accuracy(r) if r else "-" for r in shown]),
                  line("", "95% interval", [pooled(r) if r else "-" for r in shown])]
    show("accuracy, %", lines, LENGTHS[:4])


if __name__ == "__main__":
    main()
