"""
Train a small GPT with a memory, on tasks that cannot be done without one.

    python train.py                                            recall 16 pairs with ARMT: minutes on a laptop CPU
    python train.py --memory none                              the control: it stays at chance
    python train.py --memory rmt,armt --seed 0,1,2             a grid: each run in its folder, one table at the end
    python train.py --task rewrite                             keys that are written again and again
    python train.py --task qa1                                 BABILong qa1: facts in background text
    python train.py --task text --background book.txt          bytes of any text
    python train.py --task qa1 --eval_only --eval_lengths 0,1k,16k --babi_dir DIR --background book.txt

A run is a curriculum: it begins with the easiest stage, goes on when a stage is learned, ends with a cool-down (the
step size falls to zero on the last stage) and is evaluated at lengths far beyond those it was trained on. It lives in
a folder: config.json, ckpt.pt, metrics.jsonl. Ctrl-C saves it, and --resume goes on to the very same numbers.
"""
import argparse
import inspect
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from armt import GPT, GPTConfig, state_floats, state_map
from data import babi, babilong, chunks, fill, generator
from data.recall import Recall
from data.text import Text


@dataclass
class Config(GPTConfig):
    vocab_size: int = 0              # set by the task
    words: list = ()                 # qa1: the words with ids of their own; set by the task
    task: str = "remember"           # remember, rewrite, qa1 or text
    stages: str = "2,4,8,16"         # the curriculum: pairs (recall), facts/words (qa1), bytes (text)
    stage_steps: int = 3000          # most steps in one stage; a stage not learned by then ends the run
    learned: float = 0.98            # running accuracy that ends a stage
    cooldown: int = 100              # further steps on the last stage, while the step size falls to zero
    key_size: int = 1                # recall: symbols in a key, so 16^key_size keys
    questions: int = 4               # recall: questions asked of one read
    buckets: int = 1024              # qa1: ids shared by all words that are in no bAbI task
    carry: float = 0.0               # qa1, rewrite: probability, in the last stage, that a row reads on from its last state
    batch_size: int = 64             # rows in a batch
    optimizer: str = "muon"          # muon for the matrices inside the blocks and adamw for the rest, or adamw
    lr: float = 2e-3                 # peak step size of adamw
    muon_lr: float = 1e-2            # peak step size of muon
    weight_decay: float = 1e-3       # pull of all weights towards zero
    warmup: int = 100                # steps in which the step size rises from zero
    clip: float = 1.0                # largest norm of a gradient
    seed: int = 0                    # initial weights and all batches follow from it
    background: list = ("prose",)    # qa1, text: UTF-8 files, or prose for the built-in sentences
    babi_dir: str = ""               # qa1: folder of the published files; evaluation then asks their test questions
    eval_lengths: str = "2,4,8,16"   # where to evaluate: pairs (recall), words (qa1), bytes (text); 1k and 1M work
    eval_samples: str = "2000"       # questions at each length; in a list, the last number repeats
    eval_batch: int = 0              # rows read side by side in an evaluation; 0 means batch_size
    device: str = "auto"             # auto takes cuda, then mps, then cpu
    out_dir: str = ""                # folder of the run, or of all runs of a grid; left out, out/TASK-MEMORY-...-seedN


PRESETS = {
    "remember": dict(segment_len=4),
    "rewrite": dict(task="rewrite", segment_len=4, stages="2,4,8,16,50", questions=16, cooldown=100,
                    eval_lengths="16,50,100,200,500"),
    "qa1": dict(task="qa1", n_layer=3, ablate="unit+no_denom", stages="2/0,3/0,4/0,6/0,10/0,10/64,10/128,10/512",
                carry=0.98, batch_size=32, lr=1e-3, muon_lr=5e-3, learned=0.95, cooldown=2500,
                eval_lengths="0,1k,4k,16k", eval_samples="1000,1000,500,200"),
    "text": dict(task="text", n_layer=3, stages="512", learned=1.0, batch_size=16, stage_steps=1000,
                 eval_lengths="64,512,4k", eval_samples="64"),
}
LISTS = {"stages", "background", "eval_lengths", "eval_samples"}             # a comma in these makes no grid
ASIDE = {"background", "babi_dir", "eval_lengths", "eval_samples", "eval_batch", "device", "out_dir"}   # may change later


# ---------------------------------------------------------------------------------------------------------------------
# Flags: one for each field of Config; the field's comment is its --help line
# ---------------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")              # one line that names the flag


def several(kind):
    """A type for argparse: one value, or several with commas between them."""
    def convert(value):
        return [kind(part) for part in value.split(",")]
    convert.__name__ = kind.__name__
    return convert


def parse(argv):
    """Command line -> (switches, {name: list of values} for every flag that was given)."""
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="named defaults; left out, those of the task")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--eval_only", "--eval-only", action="store_true", help="evaluate the run in the folder")
    parser.add_argument("--table", metavar="DIR", default="", help="only print the comparison of all runs in this folder")
    parser.add_argument("--export", metavar="DIR", default="", help="write the run's weights, as float16, to this folder")
    source = inspect.getsource(GPTConfig) + inspect.getsource(Config)
    for f in fields(Config):
        if f.name in ("vocab_size", "words"):
            continue
        note = re.findall(rf"^    {f.name}:.*?# +(.+)$", source, re.M)[-1].replace("%", "%%")
        kind = int if isinstance(f.type, types.UnionType) else str if f.type is list else f.type
        default = "" if f.default in (None, "") else f" ({' '.join(f.default) if f.type is list else f.default})"
        parser.add_argument(*dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"]), dest=f.name,
                            default=argparse.SUPPRESS, help=note + default, metavar=kind.__name__.upper(),
                            type=kind if f.name in LISTS else several(kind), nargs="+" if f.type is list else None)
    given = vars(parser.parse_args(argv))
    switches = argparse.Namespace(**{name: given.pop(name) for name in ("preset", "resume", "eval_only", "table", "export")})
    return switches, {name: [value] if name in LISTS else value for name, value in given.items()}


def grid(preset, given):
    """All runs that the flags ask for: a list of Config, each with its own folder as out_dir."""
    varied = [name for name, values in given.items() if len(values) > 1]
    configs = []
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values))
        task = chosen.get("task", "remember") if preset is None else preset
        if task not in PRESETS:
            raise ValueError(f"--task: there is no '{task}'; choose one of {', '.join(PRESETS)}")
        c = Config(**{**PRESETS[task], **chosen})
        parts = [c.task, c.memory] + [c.ablate] * (c.ablate != "nothing")
        parts += [f"{n}{getattr(c, n)}" for n in varied if n not in ("task", "memory", "ablate", "seed", "out_dir")]
        name = "-".join([*parts, f"seed{c.seed}"])
        c.out_dir = str(Path(c.out_dir, name) if varied and c.out_dir else Path(c.out_dir or Path("out", name)))
        configs.append(c)
    return configs


def numbers(name, value, suffixes={"k": 1000, "M": 1000000}):
    """'0,1k,2/64' -> [(0,), (1000,), (2, 64)]. ValueError names the flag."""
    try:
        return [tuple(int(n[:-1]) * suffixes[n[-1]] if n[-1:] in suffixes else int(n) for n in part.split("/"))
                for part in value.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: '{value}' is not a list of whole numbers such as {getattr(Config, name)}") from None


def pick_device(name):
    """(device, why). ValueError when the device asked for is not there."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        device = next(d for d in found if found[d])
        return device, "no GPU found" if device == "cpu" else "found, --device cpu decides otherwise"
    if not found.get(name.split(":")[0]):
        raise ValueError(f"--device: '{name}' is not available here; choose auto or one of "
                         f"{', '.join(d for d in found if found[d])}")
    return name, "as asked"


def make_task(config):
    if config.task in ("remember", "rewrite"):
        return Recall(config.key_size, config.questions, rewrite=config.task == "rewrite")
    if config.task == "qa1":
        return babilong.QA1(babilong.Words(config.words or babi.WORDS, config.buckets), config.background)
    return Text(config.background)


def check(config):
    """ValueError, naming the flag, for what GPT itself does not check."""
    stages = numbers("stages", config.stages)
    want = 2 if config.task == "qa1" else 1
    if any(len(stage) != want or min(stage[:1]) < 1 for stage in stages):
        raise ValueError(f"--stages: '{config.stages}'; a stage of {config.task} reads {'FACTS/WORDS' if want == 2 else 'N'}")
    for name, low, high in (("stage_steps", 1, math.inf), ("learned", 0, 1), ("cooldown", 0, math.inf), ("lr", 0, math.inf),
                            ("key_size", 1, 4), ("questions", 1, math.inf), ("buckets", 1, math.inf), ("carry", 0, 1),
                            ("batch_size", 1, math.inf), ("seed", 0, math.inf), ("dropout", 0, 0.99), ("warmup", 0, math.inf),
                            ("eval_batch", 0, math.inf), ("weight_decay", 0, math.inf), ("clip", 0, math.inf)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"--{name}: {getattr(config, name)} is out of range, it goes from {low} to {high}")
    if config.optimizer not in ("adamw", "muon"):
        raise ValueError(f"--optimizer: there is no '{config.optimizer}'; choose adamw or muon")
    if config.carry and config.task not in ("qa1", "rewrite"):
        raise ValueError(f"--carry: {config.task} cannot go on from an old memory; only qa1 and rewrite can")
    if config.carry and config.memory == "full":
        raise ValueError("--carry: memory 'full' grows without end; use it with --carry 0")
    if config.carry and config.task == "rewrite" and config.questions < 16 ** config.key_size:
        raise ValueError(f"--questions: with --carry all {16 ** config.key_size} keys are asked, not {config.questions}")
    if config.task == "remember" and max(stages)[0] > 16 ** config.key_size:
        raise ValueError(f"--stages: {max(stages)[0]} different keys need a larger --key_size than {config.key_size}")


# ---------------------------------------------------------------------------------------------------------------------
# A run in its folder
# ---------------------------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Whatever happens, `path` holds the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def save(folder, config, checkpoint):
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", lambda p: p.write_text(json.dumps(asdict(config), indent=1) + "\n"))
    write_atomically(folder / "ckpt.pt", lambda p: torch.save(checkpoint, p))


def load(folder, device="cpu"):
    """A run's folder -> (config, model, checkpoint). ValueError, one line, for anything that is not a run of ours."""
    folder = Path(folder)
    try:
        config = Config(**json.loads((folder / "config.json").read_text()))
        checkpoint = torch.load(folder / "ckpt.pt", map_location=device, weights_only=True)
        model = GPT(config).to(device)
        model.load_state_dict(checkpoint["model"])             # float16 weights become float32 here
    except FileNotFoundError as e:
        raise ValueError(f"{folder} holds no run: {Path(e.filename).name} is missing") from None
    except Exception as e:                                     # torch.load of a broken file can raise nearly anything
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"{folder} does not hold a whole run of this program ({first[:120]})") from None
    return config, model, checkpoint


def read_metrics(folder):
    path = Path(folder, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Run:
    """One training run: its parts, and where it stands. Everything that `step` changes is in the checkpoint."""

    def __init__(self, config, device, checkpoint=None):
        self.config, self.device, self.folder = config, device, Path(config.out_dir)
        self.task, self.stages = make_task(config), numbers("stages", config.stages)
        config.vocab_size = self.task.vocab_size
        config.words = self.task.words.words if config.task == "qa1" else ()
        torch.manual_seed(config.seed)
        self.model = GPT(config).to(device)
        config.n_mem, config.d_mem = self.model.config.n_mem, self.model.config.d_mem
        matrices = [p for p in self.model.memory.parameters() if p.ndim == 2 and min(p.shape) > 1]
        muon = {id(p) for p in matrices} if config.optimizer == "muon" else set()
        others = [p for p in self.model.parameters() if id(p) not in muon]
        self.optimizers = [torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)]
        if muon:
            self.optimizers += [torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)]
        self.at = dict(step=0, stage=0, stage_step=0, accuracy=0.0, seconds=0.0, cooling=False, done=False, learned=False)
        self.state = self.known = None          # with --carry: the memory of each row, and the answers it should know
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(state)
            self.at, self.state, self.known = checkpoint["at"], checkpoint["state"], checkpoint["known"]
            torch.set_rng_state(checkpoint["rng"].cpu())

    def save(self):
        save(self.folder, self.config, dict(
            model=self.model.state_dict(), optimizers=[o.state_dict() for o in self.optimizers], at=self.at,
            state=self.state, known=self.known, rng=torch.get_rng_state(), torch=str(torch.__version__)))

    def log(self, kind, **values):
        with open(self.folder / "metrics.jsonl", "a") as file:
            place = dict(kind=kind, step=self.at["step"], seconds=round(self.at["seconds"], 2))
            file.write(json.dumps({**place, **values}) + "\n")

    def carry(self, rng, size):
        """The state that each row starts from: with probability config.carry its own last one, else the empty one."""
        if self.state is None:
            return None
        stay = torch.from_numpy(rng.random(size) < self.config.carry).to(self.device)                   # (B,)
        self.known = torch.where(stay[:, None], self.known, -1)
        return state_map(lambda old, new: torch.where(stay.view(-1, *[1] * (old.dim() - 1)), old, new),
                         self.state, self.model.init_state(size))

    def loss(self, rng, stage):
        """One batch -> (loss, share of right answers)."""
        carrying = self.config.carry > 0 and self.at["stage"] == len(self.stages) - 1
        batch = self.task.batch(rng, self.config.batch_size, stage, going_on=carrying and self.state is not None)
        tensors = [torch.from_numpy(a).to(self.device) for a in map(lambda a: a.copy(), batch)]
        if len(tensors) == 2:                                                      # text: say the next byte, everywhere
            logits, loss, _ = self.model(*tensors)
            return loss, (logits.argmax(-1) == tensors[1]).float().mean()
        context, questions, answers = tensors                                      # (B, N), (B, Q, n), (B, Q)
        state = self.carry(rng, len(context))
        if state is not None:
            answers = torch.where(answers < 0, self.known, answers)                # what it was told before still holds
        _, _, state = self.model(context, state=state)                             # read once ...
        if carrying:
            self.state, self.known = state_map(torch.Tensor.detach, state), answers
        row, which = (answers >= 0).nonzero(as_tuple=True)                         # ... ask everything that can be known
        questions, answers = questions[row, which], answers[row, which]            # (questions, n), (questions,)
        targets = torch.full_like(questions, -1)
        targets[:, -1] = answers
        logits, loss, _ = self.model(questions, targets, state_map(lambda s: s[row], state))
        return loss, (logits[:, -1].argmax(-1) == answers).float().sum() / max(1, len(answers))

    def step(self):
        """One step of the optimizers -> (loss, accuracy). Then move on through the curriculum."""
        at, config, began = self.at, self.config, time.time()
        speed = min(1.0, (at["step"] + 1) / (config.warmup + 1))
        if at["cooling"]:
            speed *= 1 - at["stage_step"] / config.cooldown
        for optimizer, peak in zip(self.optimizers, (config.lr, config.muon_lr)):
            optimizer.param_groups[0]["lr"] = peak * speed
        rng = generator(config.seed, "train", at["stage"], at["step"])
        loss, accuracy = self.loss(rng, self.stages[at["stage"]])
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimizer in self.optimizers:
            optimizer.step()

        loss, accuracy = loss.item(), accuracy.item()
        at["step"] += 1
        at["stage_step"] += 1
        at["accuracy"] += 0.05 * (accuracy - at["accuracy"])                       # a running mean over some 20 steps
        if at["cooling"]:
            at["done"] = at["stage_step"] >= config.cooldown
        elif at["accuracy"] >= config.learned:
            if at["stage"] + 1 < len(self.stages):
                at.update(stage=at["stage"] + 1, stage_step=0, accuracy=0.0)
            else:
                at.update(cooling=config.cooldown > 0, done=config.cooldown == 0, learned=True, stage_step=0)
        elif at["stage_step"] >= config.stage_steps:
            at["done"] = True                                                      # out of budget
        at["seconds"] += time.time() - began
        return loss, accuracy

    def train(self):
        """Step until done, with a progress bar, a log and checkpoints. Returns False when Ctrl-C stopped it."""
        at, config = self.at, self.config
        stop = []
        handler = signal.signal(signal.SIGINT, lambda *_: stop.append(1) if not stop else sys.exit(130))
        saved = time.time()
        bar = tqdm(initial=at["step"], desc=self.folder.name, unit="step", dynamic_ncols=True)
        try:
            while not at["done"] and not stop:
                stage, cooling = at["stage"], at["cooling"]
                loss, accuracy = self.step()
                left = len(self.stages) - 1 - at["stage"]
                bar.total = at["step"] + left * config.stage_steps - at["stage_step"] + (
                    config.cooldown if at["cooling"] else config.stage_steps + config.cooldown)          # at most
                bar.set_postfix_str(f"stage {'/'.join(map(str, self.stages[stage]))}{' cooling' * cooling} "
                                    f"loss {loss:.3f} acc {at['accuracy'] if at['accuracy'] else accuracy:.1%}", refresh=False)
                bar.update()
                moved = (at["stage"], at["cooling"]) != (stage, cooling)
                if at["step"] % 25 == 0 or at["done"] or moved:
                    self.log("train", stage=stage, loss=round(loss, 5), accuracy=round(accuracy, 5))
                if moved or time.time() - saved > 60:
                    self.save()
                    saved = time.time()
        finally:
            signal.signal(signal.SIGINT, handler)
            bar.total = at["step"]
            bar.close()
        self.save()
        if at["done"] and not at["learned"]:
            print(f"the stage {'/'.join(map(str, self.stages[at['stage']]))} was not learned in {config.stage_steps} steps "
                  f"(--stage_steps): accuracy {at['accuracy']:.1%}, loss {loss:.2f}, as if guessing among "
                  f"{math.exp(loss):.1f} answers")
        return at["done"]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(model, questions, device, bar=None):
    """Read the contexts of several Questions side by side, ask each its question: ids of the likeliest tokens, (B,)."""
    state = None
    for chunk in chunks([q.context for q in questions], 16 * model.config.segment_len):
        _, _, state = model(torch.from_numpy(chunk).to(device), state=state)
        if bar is not None:
            bar.update(chunk.size)
    asked = torch.from_numpy(fill([q.question for q in questions])).to(device)
    return model(asked, state=state)[0][:, -1].argmax(-1).tolist()


def evaluate(model, task, config, device, files=None):
    """Yield one row for each of config.eval_lengths: accuracy, number of questions, split, tokens read and seconds."""
    lengths = [n for n, in numbers("eval_lengths", config.eval_lengths)]
    counts = [n for n, in numbers("eval_samples", config.eval_samples)]
    size = config.eval_batch or config.batch_size
    model.eval()
    for i, length in enumerate(lengths):
        n, began = counts[min(i, len(counts) - 1)], time.time()
        if config.task == "text":
            with torch.no_grad():
                x, y = (torch.from_numpy(a.copy()).to(device) for a in task.batch(generator(0, "val", length), n, (length,), part="val"))
                logits, loss, _ = model(x, y)
            right = (logits.argmax(-1) == y).float().mean().item()
            yield dict(length=length, accuracy=round(right, 5), loss=round(loss.item(), 5), n=y.numel(), split="val",
                       tokens=y.numel(), read_seconds=round(time.time() - began, 2))
            continue
        if config.task == "qa1":
            questions, left_out = task.questions(length, n, config.babi_dir, files)
        else:
            questions, left_out = task.questions(length, n)
        right, tokens = 0, sum(len(piece) for q in questions for piece in q.context)
        with tqdm(total=tokens, desc=f"evaluate {length} {task.unit}", unit="tok", unit_scale=True, leave=False) as bar:
            for start in range(0, len(questions), size):
                group = questions[start:start + size]
                said = answer(model, group, device, bar)
                right += sum(a == q.answer for a, q in zip(said, group))
        shown = task.show([i for piece in group[-1].context for i in piece[-60:]][-60:] + list(group[-1].question))
        print(f"{length} {task.unit}: ...{shown[-100:]} -> {task.show([said[-1]])} (right: {task.show([group[-1].answer])})")
        yield dict(length=length, accuracy=round(right / max(1, len(questions)), 5), n=len(questions), left_out=left_out,
                   split="test" if config.babi_dir or config.task != "qa1" else "val", tokens=tokens,
                   read_seconds=round(time.time() - began, 2))
    model.train()


def table(results):
    """Print one line for each kind of run, its seeds together: [(config, final row, eval rows)] -> mean and spread."""
    kinds = {}
    for config, final, rows in results:
        name = Path(config.out_dir).name
        kinds.setdefault(re.sub(r"-?seed\d+$", "", name) or name, []).append((final, {r["length"]: r["accuracy"] for r in rows}))
    lengths = sorted({length for runs in kinds.values() for _, row in runs for length in row})
    width = max([len("accuracy, %"), *map(len, kinds)])
    print("\n" + "  ".join([f"{'accuracy, %':{width}}", "seeds", "parameters", "state floats", "minutes",
                            *[f"{n:>11,}" for n in lengths]]))
    for kind, runs in kinds.items():
        cells = []
        for length in lengths:
            values = [100 * row[length] for _, row in runs if length in row]
            spread = f" ±{statistics.stdev(values):4.1f}" if len(values) > 1 else ""
            cells.append(f"{f'{statistics.mean(values):.1f}{spread}' if values else '-':>11}")
        finals = [final for final, _ in runs]
        minutes = statistics.mean(f["seconds"] for f in finals) / 60
        stuck = sum(not f["learned"] for f in finals)
        print("  ".join([f"{kind:{width}}", f"{len(runs):5}", f"{finals[0]['parameters']:10,}",
                         f"{finals[0]['state_floats']:12,}", f"{minutes:7.1f}", *cells])
              + (f"   ({stuck} stuck on the way)" if stuck else ""))


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------

def describe(model, device, why, config):
    print(f"device {device} ({why}), torch {torch.__version__}, seed {config.seed}\n"
          f"{config.task} with memory {config.memory}: {model.n_params():,} parameters, "
          f"{state_floats(model.init_state(1)):,} floats carried between segments"
          + (" at first, growing with every token" if config.memory == "full" else "")
          + (f", n_mem {config.n_mem}" if config.n_mem else "") + (f", d_mem {config.d_mem}" if config.d_mem else "")
          + (f", without {config.ablate}" if config.ablate != "nothing" else ""))


def one_run(config, given, resume, must_be_new):
    """Train, or go on training, then evaluate. Returns (config, final row, eval rows), or None when stopped."""
    folder = Path(config.out_dir)
    device, why = pick_device(config.device)
    checkpoint = None
    if (folder / "ckpt.pt").exists():
        saved, _, checkpoint = load(folder, device)
        if must_be_new and not resume:
            raise ValueError(f"{folder} already holds a run; --resume goes on with it, --out_dir chooses another folder")
        for name in given:
            if name not in ASIDE and getattr(saved, name) != getattr(config, name):
                raise ValueError(f"--{name}: the run in {folder} has {getattr(saved, name)}, not {getattr(config, name)}; "
                                 f"leave the flag out, or choose another --out_dir")
        if "optimizers" not in checkpoint:
            raise ValueError(f"{folder} holds weights only: it can be used (sample.py, --eval_only) but cannot be continued")
        config = Config(**{**asdict(saved), **{name: getattr(config, name) for name in ASIDE & given.keys()},
                           "out_dir": str(folder)})
        rows = read_metrics(folder)
        if checkpoint["at"]["done"] and any(r["kind"] == "final" for r in rows):
            print(f"{folder}: finished, skipped")
            return config, next(r for r in rows if r["kind"] == "final"), [r for r in rows if r["kind"] == "eval"]
        rows = [r for r in rows if r["step"] <= checkpoint["at"]["step"] and r["kind"] == "train"]
        write_atomically(folder / "metrics.jsonl", lambda p: p.write_text("".join(json.dumps(r) + "\n" for r in rows)))
    elif resume and must_be_new:
        raise ValueError(f"--resume: {folder} holds no run to go on with")
    else:
        check(config)
    run = Run(config, device, checkpoint)
    run.folder.mkdir(parents=True, exist_ok=True)
    describe(run.model, device, why, config)
    if not run.train():
        print(f"stopped at step {run.at['step']} and saved; the same command with --resume goes on")
        return None
    rows = []
    for row in evaluate(run.model, run.task, config, device):
        run.log("eval", **row)
        rows.append(row)
    final = dict(learned=run.at["learned"], stage="/".join(map(str, run.stages[run.at["stage"]])),
                 parameters=run.model.n_params(), state_floats=state_floats(run.model.init_state(1)),
                 device=device, torch=str(torch.__version__))
    run.log("final", **final)
    return config, dict(final, seconds=run.at["seconds"]), rows


def evaluate_only(config, given):
    """Evaluate the run in config.out_dir, with the evaluation flags that were given, and append the rows."""
    folder = Path(config.out_dir)
    device, why = pick_device(config.device)
    saved, model, checkpoint = load(folder, device)
    task = make_task(saved)
    files = config.background if "background" in given else None
    config = Config(**{**asdict(saved), **{name: getattr(config, name) for name in ASIDE & given.keys()}})
    describe(model, device, why, config)
    at = checkpoint.get("at", dict(step=0, seconds=0.0, learned=True))
    rows = []
    for row in evaluate(model, task, config, device, files):
        with open(folder / "metrics.jsonl", "a") as file:
            place = dict(kind="eval", step=at["step"], seconds=round(at["seconds"], 2))
            file.write(json.dumps({**place, **row, **(dict(background=[Path(f).name for f in files]) if files else {})}) + "\n")
        rows.append(row)
    final = dict(learned=at["learned"], seconds=at["seconds"], parameters=model.n_params(),
                 state_floats=state_floats(model.init_state(1)))
    return config, final, rows


def finished_runs(folder):
    """All finished runs in the folders inside `folder`: [(config, final row, eval rows)]. Test rows, where there are any."""
    results = []
    for path in sorted(Path(folder).glob("*/config.json")):
        rows = read_metrics(path.parent)
        evals = [r for r in rows if r["kind"] == "eval"]
        evals = [r for r in evals if r["split"] == "test"] or evals
        results += [(Config(**{**json.loads(path.read_text()), "out_dir": str(path.parent)}), final, evals)
                    for final in rows if final["kind"] == "final"]
    if not results:
        raise ValueError(f"--table: no finished run in the folders inside {folder}")
    return results


def export(config, folder):
    """Write config and weights, as float16, to `folder`: enough to use the model, not to go on training it."""
    saved, model, _ = load(config.out_dir)
    saved.out_dir, saved.background = "", [Path(name).name for name in saved.background]
    save(Path(folder), saved, dict(model={name: p.half() for name, p in model.state_dict().items()}))
    print(f"{folder}: {sum(p.stat().st_size for p in Path(folder).iterdir()):,} bytes; "
          f"try: python sample.py --out_dir {folder}")


def main(argv=None):
    switches, given = parse(argv)
    try:
        if switches.table:
            return table(finished_runs(switches.table))
        configs = grid(switches.preset, given)
        results = []
        for config in configs:
            if switches.export:
                export(config, switches.export)
            elif switches.eval_only:
                results.append(evaluate_only(config, given))
            else:
                results.append(one_run(config, given, switches.resume, must_be_new=len(configs) == 1))
                if results[-1] is None:
                    sys.exit(130)
        if results:
            table(results)
            print(f"\nnext: python sample.py --out_dir {results[0][0].out_dir}")
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: {e}")


if __name__ == "__main__":
    main()
