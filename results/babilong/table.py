"""
The tables of the five tasks in results/README.md (the first one, shorter, in the README), beside the paper's rows, from the
rows in results/babilong or in another folder of the same runs:

    python results/babilong/table.py
    python results/babilong/table.py out/babilong
"""
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from train import accuracy_of, finished_runs, interval_of, right_of

LENGTHS = [0, 1_000, 4_000, 16_000, 128_000, 1_000_000, 10_000_000, 50_000_000]
PAPER = {        # BABILong (Kuratov et al. 2024), table 4, up to 16k tokens; ARMT (Rodkin et al. 2024), table 1, beyond
    "qa1": ["100", "99", "100", "100", "99.9 ± 0.2", "98.5 ± 1.0", "89.4 ± 8.1", "49.6 ±40.4"],
    "qa2": ["100", "97", "100", "100", "99.8 ± 0.2", "99.4 ± 0.3", "84.4 ± 4.0", "-"],
    "qa3": ["97", "85", "92", "92", "86.0 ± 4.8", "72.1 ±14.2", "37.0 ±10.3", "-"],
    "qa4": ["100", "99", "100", "100", "100.0 ± 0.1", "99.8 ± 0.3", "91.5 ± 1.7", "-"],
    "qa5": ["100", "99", "98", "98", "98.7 ± 0.4", "97.3 ± 0.6", "80.9 ± 7.6", "-"]}
BOOK, CANTERBURY = ["pride_and_prejudice.txt"], ["alice29.txt", "asyoulik.txt", "lcet10.txt", "plrabn12.txt"]


def rows_of(runs, kind, part, background=None):
    """The eval rows of the runs called kind-seed0, kind-seed1, ...: for each of LENGTHS a list."""
    rows = [row for config, _, rows in runs if Path(config.out_dir).name.rpartition("-")[0] == kind for row in rows
            if row.get("part", part) == part and background in (None, row.get("background"))]
    return [[row for row in rows if row["length"] == length] for length in LENGTHS]


def minutes(rows):
    """Of reading all texts of a cell, in the mean of the runs."""
    return f"{statistics.mean(row['read_seconds'] for row in rows) / 60:.1f}" if rows else "-"


def by_depth(rows):
    """Right answers in each fifth of the text, of all runs together."""
    return [right_of(*(sum(row["depths"][i][k] for row in rows) for k in (1, 0))) for i in range(5)]


def line(part, name, cells):
    return f"{part:4} {name:12}  {'  '.join(f'{cell:>11}' for cell in cells)}".rstrip()


def lines_of(part, name, found):
    return [line(part, name, map(accuracy_of, found)), line("", "95% interval", map(interval_of, found))]


def show(title, lines, lengths=LENGTHS):
    print("\n".join([f"\n{title:17}  " + "  ".join(f"{length:>11,}" for length in lengths), *lines]))


def main(folder=HERE):
    """
    Of the runs in `folder` print accuracy, minutes of reading, right answers by depth at a million words, and the
    models of one task. ValueError when it has no finished run.
    """
    runs, lines, times, depths, alone = finished_runs(folder), [], [], [], []
    for part in PAPER:
        model, name = ("qa2-armt", "from joint") if part == "qa2" else ("joint-armt", "joint")
        book, other = rows_of(runs, model, part, BOOK), rows_of(runs, model, part, CANTERBURY)
        lines += [*lines_of(part, name, book), *lines_of("", "Canterbury", other), line("", "paper, ARMT", PAPER[part]),
                  line("", "no memory", map(accuracy_of, rows_of(runs, f"{part}-none", part)))]
        times += [line(part, name, map(minutes, book)), line("", "Canterbury", map(minutes, other))]
        depths.append(f"{part}    " + "  ".join(f"{cell:>14}" for cell in by_depth(book[LENGTHS.index(1_000_000)])))
        model, name = ("joint-armt", "joint") if part == "qa2" else (f"{part}-armt", "alone")
        alone += lines_of(part, name, rows_of(runs, model, part, BOOK)[:4])
    show("accuracy, %", lines)
    show("minutes of reading", times)
    print("\nright  " + "  ".join(f"{f'{start}-{start + 20}%':>14}" for start in range(0, 100, 20)), *depths, sep="\n")
    show("accuracy, %", alone, LENGTHS[:4])


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except ValueError as error:
        sys.exit(f"table.py: {str(error).removeprefix('--table: ')}")
