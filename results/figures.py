"""
Draw the figures from the rows in results/: python results/figures.py (pip install matplotlib first).

One colour, line and marker for each memory, in every figure; they differ in grey, too.
"""
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.files import one_line_errors                                    # noqa: E402
from results.table import read_runs                                       # noqa: E402

try:
    import matplotlib.pyplot as plt
except ImportError:
    message = "figures need matplotlib: pip install matplotlib"
    raise (SystemExit if __name__ == "__main__" else ImportError)(message) from None

HERE = Path(__file__).parent
LOOK = dict(none=("#888888", ":", "x"), full=("#000000", "-", "s"), bswa=("#a05a00", "--", "v"),
            rmt=("#0066cc", "-", "o"), armt=("#d62728", "-", "D"), fam=("#2a9d3a", "--", "^"),
            lm2=("#8e44ad", "-.", "P"))
DOTTED = (0, (1, 2))
# ARMT of 137M parameters: BABILong, table 4 (up to 16k tokens), and ARMT, table 1 (beyond: mean, deviation)
LENGTHS = (0, 1_000, 4_000, 16_000, 128_000, 1_000_000, 10_000_000, 50_000_000)
PAPER = dict(
    qa1=((100, 0), (99, 0), (100, 0), (100, 0), (99.9, 0.2), (98.5, 1.0), (89.4, 8.1), (49.6, 40.4)),
    qa2=((100, 0), (97, 0), (100, 0), (100, 0), (99.8, 0.2), (99.4, 0.3), (84.4, 4.0)),
    qa3=((97, 0), (85, 0), (92, 0), (92, 0), (86.0, 4.8), (72.1, 14.2), (37.0, 10.3)),
    qa4=((100, 0), (99, 0), (100, 0), (100, 0), (100.0, 0.1), (99.8, 0.3), (91.5, 1.7)),
    qa5=((100, 0), (99, 0), (98, 0), (98, 0), (98.7, 0.4), (97.3, 0.6), (80.9, 7.6)))
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 100,
                     "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "armt", "backend": "agg"})


def look(memory, **other):
    """How a memory is drawn, as arguments of `line`."""
    colour, dashes, marker = LOOK.get(memory, ("#444444", "-", "."))
    return dict(color=colour, linestyle=dashes, marker=marker, label=memory) | other


def accuracies(runs, **cell):
    """[(length, accuracy in per cent)] of eval rows with questions, and with these values in their cell."""
    return [(row["cell"]["length"], 100 * row["accuracy"]) for run in runs for row in run["eval"]
            if row["accuracy"] is not None and cell.items() <= row["cell"].items()]


def groups(folder, task=None):
    found = {}
    for name, run in read_runs(folder):
        if task in (None, run["config"]["task"]):
            found.setdefault(name, []).append(run)
    return found


def line(axis, points, **style):
    """Mean over seeds, and from the worst to the best seed as a shade. `points` are (x, y) of each seed."""
    x = sorted({max(n, 0.5) for n, _ in points})
    seeds = [[y for n, y in points if max(n, 0.5) == at] for at in x]
    axis.fill_between(x, list(map(min, seeds)), list(map(max, seeds)), color=style["color"], alpha=0.12)
    axis.plot(x, list(map(statistics.mean, seeds)), **style)


def save(figure, file):
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if str(file).endswith(".svg") else {})
    plt.close(figure)
    return file


def pairs():
    """Accuracy against the number of pairs and of updates, one line a memory."""
    panels = (("remember", "pairs", (1.8, 17.5), (2, 4, 8, 16), ("rmt/own", "fam/own", "lm2/own")),
              ("rewrite", "updates (trained on 2 to 50)", (13, 600), (16, 50, 100, 200, 500), ("armt/pass",)))
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 3.8), sharey=True)
    for axis, (task, title, limits, ticks, own) in zip(axes, panels):
        for runs in groups(HERE / "compare", task).values():
            line(axis, accuracies(runs), **look(runs[0]["config"]["memory"]))
        for folder in own:
            (runs,), memory = groups(HERE / folder).values(), folder.partition("/")[0]
            line(axis, accuracies(runs), **look(memory, linestyle=DOTTED, label=f"{memory}, own recipe"))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.axhline(6.25, color="#bbbbbb", linewidth=1)
        axis.set(xlabel=f"{task}: {title}", xlim=limits, ylim=(-2, 103))
    axes[0].set_ylabel("accuracy, % (mean, and all seeds)")
    lines = {label: one for axis in axes for one, label in zip(*axis.get_legend_handles_labels())}
    axes[1].legend(lines.values(), lines, loc=(1.02, 0.1))
    return save(figure, HERE / "figures" / "pairs.svg")


def words():
    """BABILong: accuracy against words read, beside the paper's rows."""
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.6), sharey=True)
    shown = [("babilong", "armt", 8, dict(label="armt, a sentence a segment")),
             ("lm2/babilong", "lm2", 8, dict(label="lm2, a sentence a segment")),
             ("cut", "armt", 64, dict(label="armt, cut anywhere", linestyle="--", fillstyle="none"))]
    found = {folder: groups(HERE / folder) for folder, *_ in shown}
    for axis, part in zip(axes, PAPER):
        for folder, memory, tokens, style in shown:
            kept = accuracies(found[folder][f"babilong-{memory}"], part=part, segment_len=tokens)
            line(axis, kept, **look(memory, **style))
        mean, spread = zip(*PAPER[part])
        axis.errorbar([max(n, 0.5) for n in LENGTHS[:len(mean)]], mean, spread, color="#555555", marker="s",
                      linestyle=":", capsize=3, label="paper: ARMT of 137M, cut anywhere")
        axis.set_xscale("symlog", linthresh=500)
        axis.set(title=part, xlabel="words (paper: tokens)", ylim=(0, 104))
        axis.set_xticks([0.5, 1e3, 1e5, 1e7], ["0", "1k", "100k", "10M"])
    axes[0].set_ylabel("accuracy, %")
    axes[4].legend(loc=(1.05, 0.3))
    return save(figure, HERE / "figures" / "words.svg")


def forget():
    """What a book does to memories of qa1: accuracy, and how far the memory has moved, against segments."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    kinds = {("published", "nothing", "sigmoid", 0): ("as published", "#0066cc", ":", "o"),
             ("published", "nothing", "hardsigmoid", 0.01): ("gate that can shut, and a price", "#0066cc",
                                                             "-.", "^"),
             ("published", "gated_z", "hardsigmoid", 0.01): ("the same, z gated", "#2a9d3a", "--", "s"),
             ("delta", "nothing", "hardsigmoid", 0.01): ("the same, no z (delta)", "#d62728", "-", "D")}
    rows = [json.loads(text) for text in (HERE / "forget" / "read.jsonl").read_text().splitlines()]
    for axis, field, scale in zip(axes, ("accuracy", "moved"), (100, 1)):
        for kind, (label, colour, dashes, marker) in kinds.items():
            kept = [(row["segments"], scale * row[field]) for row in rows
                    if (row["rule"], row["ablate"], row["gate"], row["price"]) == kind]
            line(axis, kept, color=colour, linestyle=dashes, marker=marker, markersize=5, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([0.5, 16, 256, 4096, 16384], ["0", "16", "256", "4k", "16k"])
        axis.minorticks_off()
        axis.set_xlabel("segments of a book after what was told")
    axes[0].set(ylabel="accuracy, % (mean, and all seeds)", ylim=(0, 103))
    axes[1].set(ylabel="change of the memory, of its size", yscale="symlog", ylim=(0, None))
    axes[1].legend(loc="upper left")
    return save(figure, HERE / "figures" / "forget.svg")


def curve():
    """Loss against steps: the plateau, and the stages of the curriculum."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    run = next(run for _, run in read_runs(HERE / "rmt" / "own"))
    steps, loss, stages = zip(*((row["step"], row["loss"], row["stage"]) for row in run["curve"]))
    axis.plot(steps, loss, color=LOOK["rmt"][0])
    for stage in dict.fromkeys(stages):
        first = steps[stages.index(stage)]
        axis.axvline(first, color="#cccccc", linewidth=1)
        axis.text(first, 3.0, f" {stage}", fontsize=10, va="top")
    axis.axhline(0.6931, color="#888888", linestyle=":")
    axis.text(steps[-1], 0.72, "ln 2: one of two values seen", ha="right", fontsize=8)
    axis.set(xlabel="step (a line begins a stage, with its pairs)", ylabel="loss", ylim=(0, 3.1))
    return save(figure, HERE / "figures" / "curve.svg")


def capacity():
    """Pairs stored against pairs shown, and at most, against the floats carried."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    shown = set()
    for folder in ("compare", "armt/order", "armt/keys256", "rmt/own", "fam/own", "lm2/own"):
        for runs in groups(HERE / folder, "remember").values():
            memory = runs[0]["config"]["memory"]
            # appendix B of ARMT: n (16 a - 1) / 15 of n pairs; what is not stored is guessed among 16 values
            stored = [(n, n * max(0, 16 * a / 100 - 1) / 15) for n, a in accuracies(runs)]
            style = look(memory, label=None if memory in shown else memory)
            if folder.endswith("own"):
                style["linestyle"] = DOTTED
            shown.add(memory)
            if folder != "armt/order":
                line(axes[0], stored, **style)
            if memory not in ("none", "full"):
                most = max(statistics.mean(y for n, y in stored if n == at) for at, _ in stored)
                axes[1].plot([runs[0]["final"]["state_floats"]], [most], **style | dict(linestyle=""))
    axes[0].plot([2, 256], [2, 256], color="#bbbbbb", linewidth=1)
    for axis, label in zip(axes, ("pairs shown (dotted: own recipe)", "floats carried")):
        axis.set_xscale("log", base=2 if axis is axes[0] else 10)
        axis.set_yscale("symlog", base=2, linthresh=1)
        axis.set(xlabel=label, ylim=(0, 300))
        axis.set_yticks([0, 1, 4, 16, 64, 256], ["0", "1", "4", "16", "64", "256"])
    axes[0].set_xticks([2, 4, 8, 16, 32, 64, 128, 256], [2, 4, 8, 16, 32, 64, 128, 256])
    axes[0].set_ylabel("pairs stored (16 values)")
    axes[1].set_title("at most, by the size of the state", fontsize=11)
    axes[0].legend(loc="upper left")
    return save(figure, HERE / "figures" / "capacity.svg")


def page(memory):
    """The ablations of one memory: a panel for each folder of results/MEMORY, a line for each kind of run."""
    folders = sorted(path for path in (HERE / memory).iterdir() if path.is_dir())
    rows, columns = -(-len(folders) // 3), min(3, len(folders))
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.5 * rows), squeeze=False)
    for axis, folder in zip(axes.flat, folders):
        found = groups(folder)
        several = len({runs[0]["config"]["memory"] for runs in found.values()}) > 1
        for i, (name, runs) in enumerate(found.items()):
            config = runs[0]["config"]
            if several:                                  # memories side by side: each in its colour
                label = name[len(config["task"]) + 1:].replace("-", " ")
                usual = label in (config["memory"], f"{config['memory']} nothing")
                style = look(config["memory"], label=label, fillstyle="full" if usual else "none")
            else:
                kind, _, words = name.partition(f"-{memory}")
                label = f"{kind.partition('-')[2]}{words.replace('-', ' ')}".strip() or "nothing left out"
                style = dict(color=plt.get_cmap("viridis")(i / len(found)), marker="osD^vP"[i % 6],
                             linestyle=("-", "--", "-.", ":")[i % 4], label=label)
            line(axis, accuracies(runs), **style)
        lengths = sorted({length for runs in found.values() for length, _ in accuracies(runs)})
        axis.set_xscale("log", base=2)
        axis.set_xticks([max(n, 0.5) for n in lengths],
                        [n if n not in (64, 128) or n == lengths[-1] else "" for n in lengths], fontsize=8)
        axis.minorticks_off()
        axis.set(title=folder.name, ylim=(-2, 103),
                 xlabel=dict(remember="pairs", rewrite="updates", qa1="words",
                             babilong="words (mean and range of tasks)").get(config["task"], "segments"))
        axis.legend(fontsize=8, loc="best" if several else "lower left")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, %")
    for axis in axes.flat[len(folders):]:
        axis.axis("off")
    return save(figure, HERE / "figures" / f"{memory}.svg")


def written(changes, file):
    """What each segment changed in the memory, as sample.py --written saw it."""
    figure, axis = plt.subplots(figsize=(9, 2.6))
    axis.vlines([i for i, size in enumerate(changes, 1) if size], 0, [size for size in changes if size],
                color=LOOK["armt"][0])
    axis.set(xlim=(0, len(changes) + 1), ylim=(0, None), xlabel="segment", ylabel="change of the memory",
             title=f"{sum(size > 0 for size in changes):,} of {len(changes):,} segments wrote")
    return save(figure, file)


if __name__ == "__main__":
    with one_line_errors("figures.py"):
        (HERE / "figures").mkdir(exist_ok=True)
        for draw in (pairs, words, forget, curve, capacity):
            print(draw())
        for memory in ("rmt", "armt", "fam", "lm2"):
            print(page(memory))
