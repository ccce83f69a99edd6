"""
Train a small GPT with a memory, on tasks that cannot be done without one.

    python train.py                                   recall 16 pairs with ARMT
    python train.py --memory none                     the control: it stays at chance
    python train.py --memory rmt,armt --seed 0,1,2    a grid: one folder a run
    python train.py --task rewrite --ablate no_gamma  leave something out
    python train.py --task qa1                        BABILong: who is where, hidden in other text
    python train.py --like results/armt/rule/rewrite-armt-nothing-seed0.json    the settings of another run

A run is a curriculum. It begins with the easiest stage and advances when a stage is learned; in the last one
the learning rate falls to zero. Then the model is evaluated, often beyond the training lengths. A run has
a folder, with config.json, ckpt.pt and metrics.jsonl. If it is interrupted, the same command continues it,
with exactly the numbers of an uninterrupted run.

Defaults of flags are in brackets; a task has its own in place of some (TASKS, in its file in data/).
"""
import argparse
import inspect
import itertools
import json
import os
import re
import signal
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)         # Ctrl-C while torch is imported: no traceback

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from armt import GPT, MEMORIES, OPTIONAL, GPTConfig, checked, state_floats, state_map, tensors
from data import chunks, fill, find, generator, make_task, numbers
from data.files import (FREE, RANK, add_row, one_line_errors, only_user, read_rows, read_text,
                        write_atomically, write_rows)


@dataclass
class Config(GPTConfig):
    """A run. Each field but `vocab` is a flag, its comment the help. A task's own defaults override these."""
    # the task
    vocab: list = ()                # set by the task: the words with ids of their own
    task: str = "remember"          # remember, rewrite, passkey, babilong, or qa1 to qa5, joined by +
    stages: str = "2,4,8,16"        # curriculum: most pairs, segments (passkey), facts/words/segment_len (qa)
    questions: int = 4              # recall: questions about a sample
    align: int = 0                  # qa: pad sentences to multiples of it; below segment_len: training only
    decoys: float = 0.0             # qa: share of the training background that looks like facts
    background: list = ("prose",)   # qa, passkey: UTF-8 files to train with; prose is the built-in text
    # training
    stage_steps: int = 3000         # step limit of a stage but the last; if not learned, training ends there
    learned: float = 0.98           # running accuracy, of the task's worst part, at which a stage is learned
    last_steps: int = 200           # steps of the last stage, in which the learning rate falls to zero
    price: float = 0.0              # weight, at the end of the last stage, of a penalty on memory changes
    pass_state: float = 0.0         # share of last-stage batches that go on with the memory of the one before
    batch_size: int = 32            # rows in a batch, in training and in evaluation
    lr: float = 1e-3                # peak learning rate of AdamW
    muon_lr: float = 5e-3           # peak learning rate of Muon, for the matrices; 0 leaves them to AdamW
    seed: int = 0                   # determines the initial weights and all batches
    # evaluation
    eval_lengths: str = "2,4,8,16"  # where to evaluate, in pairs, segments or words; 1k and 1M work
    eval_samples: str = "2000"      # questions at each length; the last number repeats
    eval_text: list = ()            # qa: UTF-8 files to ask in, if not those of training
    babi_dir: str = ""              # qa: folder of the published files, whose test questions are then asked
    # the machine
    device: str = "auto"            # auto takes cuda, then mps, then cpu
    dtype: str = "float32"          # or bfloat16: autocast, with memories in float32
    compile: int = 0                # 1 compiles the model first; meant for a GPU, a tenth faster on a CPU
    threads: int = 0                # CPU threads; 0 takes OMP_NUM_THREADS, or one
    out_dir: str = ""               # folder of the run, or of a grid; out/TASK-MEMORY-seedN if left out


WHOLE = ("stages", "background", "eval_lengths", "eval_samples", "eval_text", "babi_dir")    # make no grid
SOURCE = inspect.getsource(GPTConfig) + inspect.getsource(Config)
NOTES = dict(re.findall(r"^    (\w+): .*?# +(.+)$", SOURCE, re.M))        # {field: its comment}
WEIGHT_DECAY, CLIP, WARMUP, LEAST_STEPS = 1e-3, 1.0, 100, 25      # LEAST_STEPS of a stage
HALF_PRICE = 0.1                 # change of a tensor of the memory at which half of the price is due
WORLD = int(os.environ.get("WORLD_SIZE", 1))                     # processes, set by torchrun


# --- Flags --------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")        # one line, which names the flag


def comma_list(kind):
    """A type for argparse: one value, or several with commas between them."""
    convert = lambda text: [kind(part) for part in text.split(",")]
    convert.__name__ = kind.__name__                                    # for its messages
    return convert


def parse(argv):
    """Command line -> (like, eval_only, {flag: value} for each run)"""
    about = [f"  {name:6}{', '.join(f'{k} {v}' for k, v in Memory.options.items())}"
             f"{'; --ablate ' * bool(Memory.ablations)}{', '.join(Memory.ablations)}"
             for name, Memory in MEMORIES.items()]
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(
                        ["memories, the options they have, and words for --ablate (joined by +):", *about]))
    source = parser.add_mutually_exclusive_group()       # a model is evaluated as it was trained
    source.add_argument("--like", metavar="RUN", type=Path, help="settings of a run: folder or results file")
    source.add_argument("--eval_only", action="store_true", help="evaluate the run in --out_dir")
    group = parser.add_argument_group("the model")
    heads = dict(task="the task", stage_steps="training", eval_lengths="evaluation", device="the machine")
    for f in fields(Config):
        if f.name in heads:
            group = parser.add_argument_group(heads[f.name])
        if "set by the task" not in NOTES[f.name]:
            kind = f.type if f.type in (int, float) else int if f.type == int | None else str
            default = f" ({f.default})" * (f.default not in ("", None) and f.type is not list)
            group.add_argument(f"--{f.name}", metavar=kind.__name__.upper(), default=argparse.SUPPRESS,
                               nargs="+" if f.type is list else None,
                               type=kind if f.name in WHOLE else comma_list(kind),
                               help=NOTES[f.name] + default)
    given = vars(parser.parse_args(argv))
    like, eval_only = given.pop("like"), given.pop("eval_only")
    values = [[value] if name in WHOLE else value for name, value in given.items()]
    return like, eval_only, [dict(zip(given, chosen)) for chosen in itertools.product(*values)]


def grid(like, runs):
    """All runs that the flags ask for, checked: a list of Config, each with its own folder as out_dir."""
    base, configs, refused = asdict(read_config(like)) if like else {}, [], []
    varied = [name for name in runs[0] if any(chosen[name] != runs[0][name] for chosen in runs)]
    if "out_dir" in varied:
        raise ValueError("--out_dir: name one folder; the runs of a grid have folders of their own in it")
    for chosen in runs:
        Task, settings = find(chosen.get("task", base.get("task", Config.task)))
        if like and Task is not find(base["task"])[0]:
            raise ValueError(f"--task: the settings of {like} are for {base['task']}; leave --like out")
        c = Config(**{**settings, **base, "vocab": [], "out_dir": "", **chosen})
        options = getattr(MEMORIES.get(c.memory), "options", {})
        for name in set(OPTIONAL) - {*chosen, *options}:        # a task, or --like, has it for another memory
            setattr(c, name, None)
        words = "task", "memory", "ablate"
        shown = chosen if like else dict(task=c.task, memory=c.memory) | chosen
        name = [like.resolve().name.removesuffix(".json").rsplit("-seed", 1)[0]] if like else []
        name += [flag * (flag not in words) + str(value) for flag, value in shown.items()
                 if flag in {*words, *varied} - {"seed"}]
        if varied or not c.out_dir:
            c.out_dir = str(Path(c.out_dir or "out", "-".join([*name, f"seed{c.seed}"])))
        try:
            configs.append(check(c, chosen))
        except ValueError as e:                                  # not every combination makes sense
            refused.append(e)
    if not configs:
        raise refused[-1]
    print("".join(f"skipped: {e}\n" for e in refused), end="")
    return configs


def to_evaluate(chosen):
    """The Config of the run in --out_dir, with the flags of an evaluation."""
    saved = read_config(chosen.get("out_dir", "out"))
    c = replace(saved, **{"out_dir": "out", **chosen})
    if wrong := chosen.keys() - {*FREE, "task", "align", "segment_len", "batch_size"}:
        raise ValueError(f"--{min(wrong)}: a model is evaluated as it was trained; leave it out")
    task, trained = make_task(c), make_task(saved)
    if c.task != saved.task and (task.kind != "qa" or not set(task.rows) <= set(trained.rows)):
        raise ValueError(f"--task: the model in {c.out_dir} was trained on {saved.task}")
    if c.segment_len != saved.segment_len and (task.kind != "qa" or c.window):
        raise ValueError(f"--segment_len: this model is evaluated with {saved.segment_len}; leave it out")
    return check(c, chosen, training=False)


def check(c, chosen, training=True):
    """The config with the memory's defaults. ValueError names a flag that is wrong or does not apply."""
    most = 10 ** 9
    ranges = dict(questions=(1, 256), align=(0, 512), decoys=(0, 1), stage_steps=(1, most), learned=(0, 1),
                  last_steps=(1, most), price=(0, most), pass_state=(0, 1), batch_size=(1, most),
                  lr=(0, 100), muon_lr=(0, 100), seed=(0, 2 ** 32 - 1), compile=(0, 1), threads=(0, 1024))
    for name, (low, high) in ranges.items():
        if not low <= getattr(c, name) <= high:                  # nan is refused, too
            raise ValueError(f"--{name}: {getattr(c, name)} is not between {low} and {high:,}")
    task = make_task(c)
    for name in chosen:
        kinds = NOTES[name].split(":")[0].split(", ")            # as in "qa, passkey: UTF-8 files ..."
        if {"recall", "passkey", "qa"}.issuperset(kinds) and task.kind not in kinds:
            raise ValueError(f"--{name}: is for {' and '.join(kinds)}, not for {c.task}")
    if c.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype: there is no '{c.dtype}'; choose float32 or bfloat16")
    if c.compile and (c.memory in ("full", "bswa") or c.window):
        raise ValueError(f"--compile: memory '{c.memory}' keeps a cache, and code is compiled for one size")
    if c.price and c.memory in ("none", "full", "bswa") and "price" in chosen:
        raise ValueError(f"--price: a memory '{c.memory}' has nothing to be charged for")
    if not training and c.align not in (0, c.segment_len) and "align" in chosen:
        raise ValueError(f"--align: in an evaluation it is 0 or --segment_len, {c.segment_len}")
    if c.pass_state and WORLD > 1:
        raise ValueError("--pass_state: only the memory of one process is in a checkpoint")
    if c.batch_size % WORLD:
        raise ValueError(f"--batch_size: {c.batch_size} rows cannot be shared by {WORLD} processes")
    pick_device(c.device)
    task.check(c, training)
    try:
        return checked(replace(c, vocab=task.vocab, vocab_size=task.vocab_size, background=list(c.background),
                               eval_text=list(c.eval_text)))
    except ValueError as e:
        raise ValueError(f"--{e}") from None


def pick_device(name):
    """The device to use. ValueError when the one that was asked for is not there."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if WORLD > 1 and name in ("auto", "cuda"):                   # torchrun: a GPU for each process, or no GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}" if gpus or name == "cuda" else "cpu"
    found = ["cuda"] * bool(gpus) + ["mps"] * torch.mps.is_available() + ["cpu"]
    if name not in ("auto", *found, *gpus):
        raise ValueError(f"--device: there is no '{name}' here; choose auto, {', '.join([*found, *gpus])}")
    return found[0] if name == "auto" else name


# --- The folder of a run ------------------------------------------------------------------------------------

def read_config(path):
    """The Config in a run's folder or results file. Fields that no longer exist are ignored."""
    file = Path(path, "config.json") if Path(path).is_dir() else Path(path)
    with suppress(ValueError, AttributeError, TypeError, RecursionError):
        saved = json.loads(read_text(file))
        saved = saved.get("config", saved)
        config = Config(**{f.name: saved[f.name] for f in fields(Config) if f.name in saved})
        kinds = {float: float | int, list: list | tuple}
        fit = [isinstance(getattr(config, f.name), kinds.get(f.type, f.type)) for f in fields(Config)]
        fit += [isinstance(x, str) for x in (*config.vocab, *config.background, *config.eval_text)]
        fit += [not isinstance(x, bool) for x in vars(config).values()]              # True is an int, too
        if all(fit) and "memory" in saved:
            return config
    raise ValueError(f"{path} holds no run: {file.name} is missing or damaged")


def load(folder, device="cpu"):
    """A run's folder -> (config, model, checkpoint). ValueError, one line, if it is not a whole run."""
    config = read_config(folder)
    try:
        checkpoint = torch.load(Path(folder, "ckpt.pt"), map_location=device, weights_only=True)
        model = GPT(config).to(device)
        model.load_state_dict(checkpoint["model"])       # float16 weights become float32 here
    except Exception as e:                               # torch.load can raise almost anything
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
        raise ValueError(f"{folder} does not hold a whole run of this program ({why})") from None
    return model.config, model, checkpoint


def save(folder, config, **checkpoint):
    """What `load` reads: config.json and ckpt.pt."""
    text = json.dumps(asdict(config), indent=1) + "\n"
    if RANK == 0:
        write_atomically(Path(folder, "config.json"), lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(Path(folder, "ckpt.pt"), lambda path: torch.save(checkpoint, path))


# --- Training -----------------------------------------------------------------------------------------------

def changes(old, new):
    """
    How far a memory moved: |new - old| / (1 + |old|), (B,), of each tensor but caches: those of four axes,
    (B, H, P, d), which move with each segment, and any that has grown.
    """
    size = lambda x: torch.linalg.vector_norm(x.flatten(1), dim=1)                               # (B,)
    return [size(b - a) / (1 + size(a).detach()) for a, b in zip(tensors(old), tensors(new))
            if a.shape == b.shape and a.ndim < 4]


def ask(model, questions, answers, state):
    """
    Questions (q, n) and their answers (q, A) -> logits of the answers (q, A, V), loss. Each id of an answer
    is asked with the correct ones before it, which a model that was correct so far has written.
    """
    idx = torch.cat((questions, answers[:, :-1]), dim=1)                                      # (q, n + A - 1)
    targets = torch.full_like(idx, -1)
    targets[:, questions.size(1) - 1:] = answers
    return model(idx, targets, state, write=False)[:2]


class BatchLoss(torch.nn.Module):
    """What a step computes, as a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model, device):
        super().__init__()
        self.model, self.device = model, device

    def forward(self, batch, price=0.0, state=None):
        """
        Read a Batch once, then ask every question about it. Returns the mean loss, the price of what was
        written, each question's row and whether it was answered correctly (numpy, (q,) each), the new state.
        """
        context = torch.from_numpy(batch.context).to(self.device)                                # (B, S, T)
        row, which = np.nonzero(batch.answers[..., 0] >= 0)                                      # q questions
        questions, answers = (torch.from_numpy(x[row, which]).to(self.device)
                              for x in (batch.questions, batch.answers))
        state = self.model.init_state(len(context)) if state is None else state
        written = torch.zeros((), device=self.device)
        for segment in context.unbind(1):
            _, new = self.model.memory(self.model.wte(segment), state)
            if price:
                # m / (HALF_PRICE + m): many small changes cost more than a large one
                written = written + price * sum((m / (HALF_PRICE + m)).mean() for m in changes(state, new))
            state = new
        asked = torch.from_numpy(row).to(self.device)
        logits, loss = ask(self.model, questions, answers, state_map(lambda s: s[asked], state))
        return loss, written, row, (logits.argmax(-1) == answers).all(1).cpu().numpy(), state


def compiled(model, c):
    """With --compile, give `model` compiled code for segments of full batches; others run as usual."""
    if not c.compile:
        return
    grown = {stage[2] for stage in numbers("stages", c.stages) if len(stage) == 3}
    shapes = {(c.batch_size // WORLD, T) for T in {c.segment_len, c.align or c.segment_len, *grown}}
    warnings.filterwarnings("ignore", module="torch._dynamo")
    usual, on_gpu = model.memory.forward, model.lm_head.weight.is_cuda
    fast = torch.compile(usual, dynamic=False, mode="reduce-overhead" if on_gpu else None,
                         recompile_limit=4 * len(shapes))        # empty state or not, with gradient or not

    def forward(x, state):               # copies, since a CUDA graph writes its next outputs over the last
        return state_map(torch.clone, fast(x, state)) if x.shape[:2] in shapes else usual(x, state)
    model.memory.forward = forward
    print("compiling: the first steps take longer")


def make_optimizers(model, c):
    """AdamW, and Muon for the matrices between embedding and head if it has a learning rate."""
    matrices = [p for p in model.memory.parameters() if p.ndim == 2 and min(p.shape) > 1 and c.muon_lr]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr=c.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    muon = [torch.optim.Muon(matrices, lr=c.muon_lr, weight_decay=WEIGHT_DECAY)] if matrices else []
    return [adamw, *muon]


def of_all_processes(sums, row, correct):
    """Sums (n,), rows of questions and which were correct (q,) of this process -> of all together."""
    found = [(sums, row * WORLD + RANK, correct)] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(found, found[RANK])
    sums, row, correct = zip(*found)
    return sum(sums), np.concatenate(row), np.concatenate(correct)


def next_batch(c, task, stage, place, before):
    """
    The rows of a Batch that this process takes, and their share of its questions, 1 on average. `place` are
    the numbers of stage and step, `before` is the memory that is there already, or None.
    """
    batch = task.batch(generator(c.seed, "train", *place), c.batch_size, stage)
    known = (batch.answers >= 0) & (batch.answers != task.unknown_id)
    if before is not None and known.any():        # what its texts do not say, those before them may have said
        batch.answers[~known] = -1
    mine = type(batch)(*(x[RANK::WORLD] for x in batch))
    return mine, (mine.answers[..., 0] >= 0).sum() * WORLD / (batch.answers[..., 0] >= 0).sum()


def train(c, model, task, device, optimizers, p):
    """
    Step until the last stage is over, with a bar, a log and checkpoints. False when Ctrl-C stopped it. `p` is
    the progress: what a step changes is there, in the model or in the optimizers, so a checkpoint has it all.
    """
    names, stages, parts = c.stages.split(","), numbers("stages", c.stages), task.rows
    batch_loss, pressed, stop, saved = BatchLoss(model, device), [], 0, 0.0
    if WORLD > 1:
        batch_loss = torch.nn.parallel.DistributedDataParallel(      # rmt's first memory may have no gradient
            batch_loss, find_unused_parameters="stop_gradient" in c.ablate)
    handler = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if pressed else pressed.append(1))
    bar = tqdm(initial=p["step"], desc=Path(c.out_dir).name, unit="step", dynamic_ncols=True,
               disable=RANK > 0 or None)
    while not p["done"] and not stop:
        stage, last, began = p["stage"], p["stage"] + 1 == len(stages), time.time()

        # learning rate: it rises in the first steps and falls to zero in the last stage, as the price rises
        through = p["stage_step"] / c.last_steps if last else 0.0
        rate = min(1.0, (p["step"] + 1) / (WARMUP + 1)) * (1 - through)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate        # there is one group
            optimizer.zero_grad()

        # a batch, its loss, and a step, unless the gradient is not finite
        passed = last and generator(c.seed, "train", stage, p["step"], 1).random() < c.pass_state
        before = p["state"] if passed else None
        mine, share = next_batch(c, task, stages[stage], (stage, p["step"]), before)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=c.dtype == "bfloat16"):
            loss, written, row, correct, state = batch_loss(mine, c.price * through, before)
        (loss * share + written).backward()
        finite = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).isfinite()
        p["state"] = state_map(torch.Tensor.detach, state) if c.pass_state and finite else None
        p["failed"] = max(0, p["failed"] - 1) if finite else p["failed"] + 1
        if p["failed"] == 20:
            break
        for optimizer in optimizers if finite else ():
            optimizer.step()

        # what all processes found, and whether one shall stop; accuracy of each part of the task
        sums = np.array([loss.item() * share / WORLD, written.item() / WORLD, len(pressed)])
        (loss, written, stop), row, correct = of_all_processes(sums, row, correct)
        part_of = np.array(parts)[row % len(parts)]
        shares = {part: float(correct[part_of == part].mean()) for part in dict.fromkeys(part_of.tolist())}

        # curriculum: a stage is learned when its worst part is; the last one runs for last_steps
        p["step"], p["stage_step"] = p["step"] + 1, p["stage_step"] + 1
        p["seconds"] += time.time() - began
        p["sums"] |= {part: 0.95 * p["sums"].get(part, 0.0) + 0.05 * right for part, right in shares.items()}
        running = min(p["sums"].values()) / (1 - 0.95 ** p["stage_step"])        # bias-corrected, as in Adam
        p["loss"] = 0.95 * p["loss"] + 0.05 * float(loss) if finite else p["loss"]
        p["learned"] = running >= c.learned and (last or p["stage_step"] >= LEAST_STEPS)
        if p["learned"] and not last:
            p.update(stage=stage + 1, stage_step=0, sums={})
        p["done"] = p["stage_step"] >= (c.last_steps if last else c.stage_steps)

        # log and checkpoint
        bar.total = p["step"] - p["stage_step"] + c.last_steps if p["stage"] + 1 == len(stages) else None
        bar.set_postfix_str(f"stage {names[stage]} ({stage + 1} of {len(stages)}) loss {loss:.3f} "
                            f"accuracy {running:.1%}", refresh=False)
        bar.update()
        if p["step"] % 25 == 0 or p["done"] or stage != p["stage"]:
            number = lambda x: round(x, 5) if np.isfinite(x) else None                # JSON has no nan
            add_row(c.out_dir, kind="train", step=p["step"], stage=names[stage],
                    seconds=round(p["seconds"], 2), written=number(written), loss=number(loss),
                    accuracy={part: round(right, 4) for part, right in shares.items()})
        if p["done"] or stage != p["stage"] or stop or time.time() - saved > 60:
            save(c.out_dir, c, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                 progress=p)
            saved = time.time()                          # the first step is saved, too
    bar.close()
    signal.signal(signal.SIGINT, handler)
    if p["failed"] == 20:
        raise ValueError(f"the loss or its gradient is no longer finite, at step {p['step']} in stage "
                         f"{names[stage]}: try a smaller --lr or --muon_lr")
    if p["done"] and not p["learned"]:
        flag = "--last_steps" if last else "--stage_steps"
        loss = min(20.0, p["loss"] / (1 - 0.95 ** p["step"]))
        print(f"stage {names[stage]} was not learned ({flag} gives it more time): accuracy {running:.1%}, "
              f"--learned {c.learned}; loss {loss:.2f}, as of a guess among {np.exp(loss):.1f} answers")
    return not (stop or pressed)


# --- Evaluation ---------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(model, questions, device, bar):
    """Read the contexts of Questions side by side, ask each its own -> the likeliest answers, (B, A) ids."""
    state, T = None, model.config.segment_len
    for chunk in chunks([q.context for q in questions], 16 * T, T):
        _, _, state = model(torch.from_numpy(chunk).to(device), state=state)
        bar.update(chunk.size)
    asked = torch.from_numpy(fill([q.question for q in questions])).to(device)
    answers = torch.tensor([q.answer for q in questions], device=device)
    return ask(model, asked, answers, state)[0].argmax(-1).tolist()


def evaluate(c, model, task, device):
    """A row of metrics.jsonl for each part of the task and length, if it is not there yet."""
    model.config.segment_len = c.segment_len
    write_rows(c.out_dir, rows := read_rows(c.out_dir))          # drops half a last row
    done = [row for row in rows if row["kind"] == "eval"]
    share = lambda row: "-" if row["accuracy"] is None else f"{row['accuracy']:.1%} of {row['n']:,}"
    for cell in task.cells(c):
        where = f"{cell.get('part', '')} {cell['length']} {task.unit}:".lstrip()
        if before := [row for row in done if row["cell"] == cell]:
            print(where, share(before[-1]), "(evaluated before)")
            continue
        (questions, left_out), began = task.questions(cell), time.time()
        batches = [questions[i:i + c.batch_size] for i in range(0, len(questions), c.batch_size)]
        tokens = [[sum(map(len, q.context)) for q in batch] for batch in batches]
        total = sum(len(n) * (max(n) + -max(n) % c.segment_len) for n in tokens)       # with blanks
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=c.dtype == "bfloat16"), \
                tqdm(total=total, desc=f"{cell['length']} {task.unit}", unit="tok", unit_scale=True,
                     leave=False, disable=None) as bar:
            said = [ids for batch in batches for ids in answer(model, batch, device, bar)]
        correct = [list(q.answer) == ids for q, ids in zip(questions, said)]
        row = dict(cell=cell, n=len(correct), left_out=left_out, tokens=sum(map(sum, tokens)),
                   seconds=round(time.time() - began, 2),
                   accuracy=round(np.mean(correct), 5) if correct else None)
        add_row(c.out_dir, kind="eval", **row)
        done.append(row)
        example = ""
        if correct:
            end = np.concatenate(questions[-1].context[-2:])[-20:]      # two pieces, the last may be blank
            example = f"  ...{task.show([*end, *questions[-1].question])[-60:]} -> {task.show(said[-1])}"
        longer = f" ({left_out} questions are about longer stories, and left out)" * (left_out > 0)
        print(where, share(row) + example + longer)


# --- The program --------------------------------------------------------------------------------------------

def one_run(c, eval_only):
    """Train, or continue training, then evaluate; with --eval_only only that."""
    device, folder, task = pick_device(c.device), Path(c.out_dir), make_task(c)
    torch.manual_seed(c.seed)
    begun = eval_only or (folder / "ckpt.pt").exists()
    saved, model, checkpoint = load(folder) if begun else (c, GPT(c), {})
    model = model.to(device)
    if eval_only:
        compiled(model, c)
        return evaluate(c, model, task, device)
    optimizers, rows = make_optimizers(model, c), read_rows(folder)
    progress = dict(step=0, stage=0, stage_step=0, sums={}, failed=0, seconds=0.0, loss=0.0,
                    learned=False, done=False, state=None)
    if begun:
        if "optimizers" not in checkpoint:
            raise ValueError(f"--out_dir: {folder} holds weights only, for sample.py and --eval_only")
        for name in ("task", *asdict(c)):        # first the task, from which defaults of others follow
            if name not in FREE and getattr(saved, name) != getattr(c, name):
                raise ValueError(f"--{name}: the run in {folder} has {getattr(saved, name)}, not "
                                 f"{getattr(c, name)}; choose another --out_dir")
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress |= checkpoint["progress"]
        if progress["state"] is not None:
            progress["state"] = state_map(lambda s: s.to(device), progress["state"])
        if not progress["done"]:                                 # an evaluation made halfway is no result
            rows = [row for row in rows if row["kind"] == "train" and row["step"] <= progress["step"]]
            print(f"{folder}: continues at step {progress['step']}")
    elif rows:
        raise ValueError(f"--out_dir: {folder} holds results but no checkpoint; choose another folder")
    elif (folder / "config.json").exists():
        read_config(folder)                                      # ValueError if it is another program's
    write_rows(folder, rows)                                     # drops half a last row
    with torch.no_grad():                                        # enough blanks to fill a cache
        state = model(torch.tensor([[0] * max(1, (c.window or 0) * c.segment_len)], device=device))[2]
    sizes = dict(parameters=model.n_params(), state_floats=state_floats(state), device=device,
                 threads=torch.get_num_threads(), torch=str(torch.__version__))
    options = [f"{name} {getattr(c, name)}" for name in MEMORIES[c.memory].options] + [f"ablate {c.ablate}"]
    print(f"{folder}: {c.task}, memory {c.memory} ({', '.join(options)}); {sizes['parameters']:,} parameters,"
          f" {sizes['state_floats']:,} floats carried{' for each token' * (c.memory == 'full')}; {device}, "
          f"{sizes['threads']} threads, torch {sizes['torch']}")
    compiled(model, c)
    if WORLD > 1:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    trained = progress["done"] or train(c, model, task, device, optimizers, progress)
    if WORLD > 1:                # torchrun stops all once one leaves: wait until all is saved
        distributed.barrier()
        distributed.destroy_process_group()
    if not trained:
        print(f"stopped at step {progress['step']} and saved; the same command continues")
        sys.exit(130)
    if RANK == 0:
        evaluate(c, model, task, device)
        if not any(row["kind"] == "final" for row in rows):
            add_row(folder, kind="final", **sizes, stage=c.stages.split(",")[progress["stage"]],
                    **{name: progress[name] for name in ("step", "seconds", "learned")})


def main(argv=None):
    """The program. `argv` is a list of arguments; None takes those of the command line."""
    like, eval_only, runs = parse(argv)
    with one_line_errors("train.py", "stopped; the same command continues"):
        torch.set_flush_denormal(True)      # numbers below 1e-38 are 0: with them a CPU trains 3 times slower
        configs, failed = list(map(to_evaluate, runs)) if eval_only else grid(like, runs), 0
        usual = torch.get_num_threads()
        if WORLD > 1 and (eval_only or len(configs) > 1):
            raise ValueError("torchrun trains one run; evaluate, or train a grid, without it")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        for c in configs:
            torch.set_num_threads(c.threads or (usual if os.environ.get("OMP_NUM_THREADS") else 1))
            try:
                with only_user(c.out_dir) if RANK == 0 else nullcontext():
                    one_run(c, eval_only)
            except ValueError as e:
                if len(configs) == 1:
                    raise
                print(f"{c.out_dir}: {e}")      # the other runs of a grid can still go on
                failed += 1
        if failed:
            raise ValueError(f"{failed} of {len(configs)} runs failed")
        if argv is None:                        # a program that calls main prints its own next step
            print(f"next: python results/table.py {Path(configs[0].out_dir).parent}" if len(configs) > 1 else
                  f"next: python sample.py --out_dir {configs[0].out_dir}")


if __name__ == "__main__":
    main()
