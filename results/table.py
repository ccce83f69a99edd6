"""
Print the rows of runs as tables: mean and standard deviation over seeds, one line for each kind of run.

    python results/table.py out                          the runs in the folders inside out
    python results/table.py results/compare              published results, one file for each run
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.files import FREE, one_line_errors, read_rows                  # noqa: E402


def read_runs(folder):
    """
    All finished runs in `folder`, of either form: [(name without seed, dict(config, final, eval, curve))].
    A cell that was asked twice counts once, with the larger n. What cannot be read is named in one line and
    left out. ValueError if nothing is left.
    """
    runs = []
    files = [Path(folder)] if Path(folder).is_file() else [*Path(folder).glob("*/config.json"),
                                                           *Path(folder).glob("*.json")]
    for path in sorted(files):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if path.name == "config.json":
                rows = read_rows(path.parent)
                of = lambda kind: [row for row in rows if row["kind"] == kind]
                run = dict(config=run, eval=of("eval"), final=(of("final") or [None])[-1], curve=of("train"))
            name = path.parent.resolve().name if path.name == "config.json" else path.stem
            name = re.sub(r"-?seed\d+$", "", name) or name
            kind = lambda row: json.dumps(row["cell"] | dict(n=0))
            last = {kind(row): row for row in sorted(run["eval"], key=lambda row: row["n"])}
            run["eval"] = [row for row in run["eval"] if row is last[kind(row)]]
            if run["final"]:
                tables([(name, run)]), [(row["stage"], row["step"]) for row in run["curve"]]    # or it fails
                runs.append((name, run))
            else:
                print(f"{path.parent}: not finished, left out")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as e:
            print(f"{path}: {type(e).__name__} {str(e)[:100]}; left out")
    if not runs:
        raise ValueError(f"there is no finished run in {folder}")
    return runs


def interval(rows):
    """The 95% interval of the share of right answers in eval rows, in per cent (Wilson 1927)."""
    n = sum(row["n"] for row in rows)
    if not n:
        return "-"
    z, share = 1.96, sum(row["n"] * row["accuracy"] for row in rows if row["n"]) / n
    middle, spread = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (100 * edge / (1 + z * z / n) for edge in (middle - spread, middle + spread))
    return f"{max(0, low):.1f}-{high:.1f}"                                    # not -0.0, by rounding


def mean_of(rows):
    """'95.5 +- 1.0': mean accuracy of eval rows and its standard deviation, in per cent; '-': no question."""
    values = [100 * row["accuracy"] for row in rows if row["accuracy"] is not None]
    spread = f" +-{statistics.stdev(values):4.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "-"


def cells_of(runs):
    """{(kind of run, its cell without length and n, as JSON): (its runs, {length: eval rows})}"""
    found = {}
    for name, run in runs:
        for row in run["eval"]:
            asked = {k: v for k, v in row["cell"].items() if k not in ("length", "n")}
            mine, cells = found.setdefault((name, json.dumps(asked)), ([], {}))
            if run not in mine:
                mine.append(run)
            cells.setdefault(row["cell"]["length"], []).append(row)
    return found


def tables(runs):
    """
    The lines of a table for each task; parts of bAbI have a line each, and one with the 95% interval.
    Settings in which the runs of a line differ, though only their seeds should, are named behind it.
    """
    out = []
    for task in dict.fromkeys(run["config"]["task"] for _, run in runs):
        found = cells_of([(name, run) for name, run in runs if run["config"]["task"] == task])
        lengths = sorted({length for _, cells in found.values() for length in cells})
        asked, lines = [json.loads(kind) for _, kind in found], []
        differ = [k for k in dict.fromkeys(k for kind in asked for k in kind if k != "part")
                  if len({str(kind.get(k)) for kind in asked}) > 1]
        for ((name, _), (mine, cells)), kind in zip(found.items(), asked):
            final = [run["final"] for run in mine]
            label = f"{name} {kind.get('part', '')}" + "".join(f" {k} {kind.get(k)}" for k in differ)
            stuck = [f["stage"] for f in final if not f["learned"]]
            unlike = [k for k, value in mine[0]["config"].items() if k not in (*FREE, "seed")
                      and any(run["config"].get(k, value) != value for run in mine)]
            floats = "grows" if mine[0]["config"]["memory"] == "full" else f"{final[0]['state_floats']:,}"
            lines.append([label, str(len(mine)), f"{final[0]['parameters']:,}", floats,
                          f"{statistics.mean(f['seconds'] for f in final) / 60:.1f}",
                          *(mean_of(cells.get(length, [])) for length in lengths),
                          f"  (not learned: stage {', '.join(stuck)})" * bool(stuck)
                          + f"  (unlike: {', '.join(unlike)})" * bool(unlike)])
            if task.startswith(("qa", "babilong")):
                lines.append(["  95% interval", "", "", "", "",
                              *(interval(cells.get(length, [])) for length in lengths), ""])
        head = ["accuracy, %", "seeds", "parameters", "state", "minutes", *(f"{n:,}" for n in lengths), ""]
        widths = [max(map(len, column)) for column in zip(head, *lines)]
        out.append("")
        for line in [head, *lines]:
            out.append("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:])])
                       + line[-1])
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python results/table.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of runs, or of published results")
    args = parser.parse_args()
    with one_line_errors("table.py"):
        folders = {Path(folder).resolve(): folder for folder in args.folders}     # each counts once
        runs = [(f"{folder}/{name}" if len(folders) > 1 else name, run)          # two may have one name
                for folder in folders.values() for name, run in read_runs(folder)]
        print("\n".join(tables(runs)))
