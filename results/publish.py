"""
Keep what a run showed in one small file: its settings, its evaluation and a thinned curve.

    python results/publish.py out/compare results/compare   one file for each finished run in out/compare
    python results/publish.py --weights out/RUN DIR         config.json and float16 weights, to use the model
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.files import one_line_errors, write_atomically                  # noqa: E402
from table import read_runs                                               # noqa: E402

MACHINE = ("out_dir", "device", "threads", "compile", "babi_dir")


def thin(curve):
    """At most 12 rows of a curve, and the last one of each stage."""
    keep = {round(i * (len(curve) - 1) / 11) for i in range(12)} | {
        i for i in range(len(curve)) if i + 1 == len(curve) or curve[i]["stage"] != curve[i + 1]["stage"]}
    return [row for i, row in enumerate(curve) if i in keep]


def portable(files):
    """Names of files as they were given, or without their folder if that is a place on this machine."""
    return [Path(file).name if Path(file).is_absolute() else file for file in files]


def as_text(run):
    """One JSON object, a line for each setting, row and point."""
    config = {k: portable(v) if k in ("background", "eval_text") else v
              for k, v in run["config"].items() if k not in (*MACHINE, "vocab")}
    part = lambda rows: "[\n" + ",\n".join(
        f"  {json.dumps({k: v for k, v in row.items() if k != 'kind'})}" for row in rows) + "]"
    return (f'{{"config": {json.dumps(config)},\n "final": {json.dumps(run["final"])},\n'
            f' "eval": {part(run["eval"])},\n "curve": {part(thin(run["curve"]))}}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python results/publish.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--weights", action="store_true", help="the weights of a run, not what it showed")
    args = parser.parse_args()
    with one_line_errors("publish.py"):
        args.target.mkdir(parents=True, exist_ok=True)
        if args.weights:
            if any((args.target / name).exists() for name in ("ckpt.pt", "config.json")):
                raise ValueError(f"{args.target} holds a run already; choose another folder")
            from train import load, save                     # needs torch; the rest of this file does not
            config, model, _ = load(args.source)
            for name in MACHINE:
                setattr(config, name, getattr(type(config), name))
            config.background, config.eval_text = portable(config.background), []
            save(args.target, config, model={name: p.half() for name, p in model.state_dict().items()})
            print(f"{args.target}: {sum(p.stat().st_size for p in args.target.iterdir()):,} bytes")
        else:
            for name, run in read_runs(args.source):
                path, text = args.target / f"{name}-seed{run['config']['seed']}.json", as_text(run)
                if path.exists() and path.read_text(encoding="utf-8") != text:
                    raise ValueError(f"{path} holds another run; move it away first")
                write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
                print(path)
