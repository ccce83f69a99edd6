"""
Train a small GPT with a memory, on tasks that cannot be done without one.

    python train.py                                   recall 16 pairs with ARMT
    python train.py --memory none                     the control: it stays at chance
    python train.py --memory rmt,armt --seed 0,1,2    a grid: one folder a run, one table at the end
    python train.py --task rewrite                    keys that are written again and again
    python train.py --preset remember256              256 keys of two symbols, up to 100 pairs
    python train.py --task qa1                        BABILong: facts in background text (qa1 to qa20)
    python train.py --task qa2 --init out/qa1-armt-seed0       begin with what qa1 has learned
    python train.py --task passkey --memory fam       five digits, told once in a long text
    python train.py --task text --background a.txt    the bytes of any text
    python train.py --task qa1 --eval_only --eval_lengths 0,1k,16k --babi_dir DIR --background b.txt

A run is a curriculum. It begins with the easiest stage and goes on when a stage is learned; in the
last one the step size falls to zero; then it is evaluated, far beyond the lengths it was trained on.
It lives in a folder: config.json, ckpt.pt, metrics.jsonl. Ctrl-C saves it, --resume goes on to the
very same numbers.
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
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from armt import MEMORIES, GPT, GPTConfig, state_floats, state_map, tensors
from data import babi, babilong, chunks, fill, generator
from data.passkey import KINDS, WORDS, PassKey
from data.recall import Recall, stored_pairs
from data.text import Text


@dataclass
class Config(GPTConfig):
    """A run: the model, the task, the curriculum, the optimizers. Each field is a flag of that name."""
    vocab_size: int = 0              # set by the task
    words: list = ()                 # qa, passkey: the words with ids of their own; set by the task
    equal: str = ""                  # a memory: n_embd becomes what gives as many parameters as it has
    task: str = "remember"           # remember, rewrite, passkey, text, or qa1 to qa20, joined by +
    stages: str = "2,4,8,16,16"      # curriculum: pairs, qa facts/words, passkey segments, text bytes
    stage_steps: int = 3000          # most steps of any other stage; if they are used up, the run ends
    learned: float = 0.98            # running accuracy, of the worst part, at which a stage is learned
    last_steps: int = 200            # steps of the last stage, in which the step size falls to zero
    key_size: int = 1                # recall: symbols in a key, so 16^key_size keys
    questions: int = 4               # recall: questions asked of one read
    key: str = "first"               # passkey: first, random, decoys or rewritten, see data/passkey.py
    buckets: int = 1024              # qa, passkey: ids shared by all words that are not the task's
    align: int = 0                   # qa: 1 lets every sentence begin a segment, with blanks before it
    decoys: float = 0.0              # qa: share of background in training that looks like facts
    cut: float = 0.0                 # qa: share of batches with background that are cut in two
    carry: float = 0.0               # last stage: with what probability the most patient row reads on
    jitter: float = 0.0              # share of a carried memory that is replaced by noise
    stretch: float = 1.0             # --carry: a text that tells nothing new counts up to so many times
    quiet: float = 0.0               # --carry: weight in the loss of what such a text changes in the memory
    bptt: int = 0                    # segments that the gradient goes back through; 0 means all
    recompute: int = 0               # segments whose activations are computed again; 0 keeps them all
    pass_state: float = 0.0          # last stage: share of batches whose texts start from others' states
    batch_size: int = 32             # rows in a batch
    optimizer: str = "muon"          # muon (between embedding and head; adamw for the rest) or adamw
    lr: float = 1e-3                 # largest step size of adamw
    muon_lr: float = 5e-3            # largest step size of muon
    weight_decay: float = 1e-3       # pull of all weights towards zero
    warmup: int = 100                # steps in which the step size rises from zero
    clip: float = 1.0                # largest norm of a gradient
    init: str = ""                   # folder of a run whose weights to begin with; {seed} is the seed
    seed: int = 0                    # initial weights and all batches follow from it
    background: list = ("prose",)    # qa, passkey, text: UTF-8 files; prose is the built-in text
    babi_dir: str = ""               # qa: folder of published files, whose test questions are asked
    eval_lengths: str = "2,4,8,16"   # where to evaluate, in pairs, words or bytes; 1k and 1M work
    eval_samples: str = "2000"       # questions at each length; in a list, the last number repeats
    eval_parts: str = ""             # qa: the tasks of qa1+qa2+... to ask, such as qa2,qa1; all if left out
    band: str = "0,1"                # qa: the part of a text in which an evaluation hides the facts
    released: list = ()              # qa: files of released BABILong samples, asked instead
    eval_batch: int = 0              # texts read side by side; 0 means batch_size, 1 skips what was silent
    device: str = "auto"             # auto takes cuda, then mps, then cpu
    compile: int = 0                 # 1 compiles the model first: minutes of waiting, then twice as fast
    out_dir: str = ""                # folder of the run, or of a grid; left out, out/TASK-MEMORY-seedN


PRESETS = {
    "compare": dict(n_layer=3, equal="armt", last_steps=300),    # laid over the preset of any task
    "remember": dict(segment_len=4, n_head=2),
    "rewrite": dict(
        task="rewrite", segment_len=4, n_head=2, questions=16, stages="2,4,8,16,50,50",
        eval_lengths="16,50,100,200,500", eval_samples="500"),
    "remember256": dict(
        segment_len=5, key_size=2, d_mem=64, questions=8, stages="1,2,4,8,16,50,100", learned=0.9,
        lr=2e-3, muon_lr=1e-2, last_steps=300,
        eval_lengths="16,32,50,64,100,128,200,256", eval_samples="1000"),
    "passkey": dict(
        task="passkey", segment_len=32, stages="1,2,4,8,18,18", carry=0.995, jitter=0.3,
        last_steps=1500, eval_lengths="2,18,254,2540", eval_samples="1000,1000,100,100", eval_batch=100),
    "qa1": dict(
        task="qa1", n_layer=3, ablate="unit+no_denom", beta="hardsigmoid", batch_size=64, segment_len=8,
        align=1, decoys=0.3,
        stages="4/0,10/0,10/128,10/256", carry=0.98, stretch=1000.0, quiet=0.1, last_steps=500,
        eval_lengths="0,1k,4k,16k", eval_samples="1000,1000,500,200"),
    "text": dict(
        task="text", n_layer=3, stages="512", learned=0.0, batch_size=16, lr=2e-3, muon_lr=1e-2,
        last_steps=1000, eval_lengths="64,512,4k", eval_samples="64"),
}
MORE = dict(n_mem=8, stretch=100.0)            # eight tokens a segment; stretched further they overflow
for name, own in dict(                         # as qa1, but for these
        # from nothing qa2 gets past 20 facts with some seeds only; the README begins with a joint model
        qa2=dict(MORE, learned=0.97, stages="4/0,10/0,20/0,20/128,30/256", last_steps=1000),
        qa3=dict(MORE, learned=0.9, stages="6/0,10/0,20/0,40/0,40/128,40/256", last_steps=1500),
        qa4=dict(stages="2/0,2/128,2/256"),
        qa5=dict(MORE, stages="4/0,10/0,20/0,20/128,20/256"),
        # all five in one model, three rows in seven of qa3. It begins with a run of
        #   python train.py --task qa4 --n_mem 8 --stages 2/0,2/0 --last_steps 1 --eval_lengths 0
        # for beside the others north and south of one place are not told apart
        joint=dict(MORE, task="qa1+qa2+qa3+qa3+qa3+qa4+qa5", init="out/qa4-armt-seed{seed}", learned=0.93,
                   quiet=0.3, stages="6/0,10/0,20/0,40/128,40/256", last_steps=1000),
        # the shortest published story of qa16 has nine facts
        **{f"qa{n}": dict(MORE, stages="20/0,20/128,20/256") for n in range(6, 21)}).items():
    PRESETS[name] = {**PRESETS["qa1"], "task": name, **own}
TASKS = ("remember", "rewrite", "passkey", "text")       # and qa1 to qa20, or several of these: qa1+qa2
LISTS = {"stages", "background", "band", "released", "eval_lengths", "eval_samples", "eval_parts"}  # no grid
ASIDE = {"background", "babi_dir", "band", "released", "eval_lengths", "eval_samples", "eval_parts",
         "eval_batch", "device", "compile", "out_dir"}


# --------------------------------------------------------------------------------------------------
# Flags: one for each field of Config, whose comment is its --help line
# --------------------------------------------------------------------------------------------------

def babi_parts(task):
    """'qa1+qa2' -> ['qa1', 'qa2'], the tasks of bAbI; [] if it is another task."""
    parts = task.split("+")                      # of what is named twice there are twice as many rows
    return parts if all(re.fullmatch("qa([1-9]|1[0-9]|20)", part) for part in parts) else []


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")          # one line, which names the flag


def several(kind):
    """A type for argparse: one value, or several with commas between them."""
    def convert(value):
        return [kind(part) for part in value.split(",")]
    convert.__name__ = kind.__name__
    return convert


def parse(argv):
    """Command line -> (switches, {name: list of values} of the flags that were given)"""
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = parser.add_argument
    switch("--preset", choices=PRESETS, help="named defaults; left out, those of the task")
    switch("--resume", action="store_true", help="go on with the run, or the evaluation, in the folder")
    switch("--eval_only", "--eval-only", action="store_true", help="evaluate the run in the folder")
    switch("--table", metavar="DIR", default="", help="only print the table of all runs inside DIR")
    switch("--export", metavar="DIR", default="", help="only write the run's weights, float16, to DIR")
    source = inspect.getsource(GPTConfig) + inspect.getsource(Config)
    for f in fields(Config):
        if f.name in ("vocab_size", "words"):
            continue
        note = re.findall(rf"^    {f.name}:.*?# +(.+)$", source, re.M)[-1].replace("%", "%%")
        kind = int if isinstance(f.type, types.UnionType) else str if f.type is list else f.type
        default = " ".join(f.default) if f.type is list else f.default
        parser.add_argument(
            *dict.fromkeys([f"--{f.name}", f"--{f.name.replace('_', '-')}"]), dest=f.name,
            type=kind if f.name in LISTS else several(kind), nargs="+" if f.type is list else None,
            default=argparse.SUPPRESS, metavar=kind.__name__.upper(),
            help=note if default in (None, "") else f"{note} ({default})")
    given = vars(parser.parse_args(argv))
    names = ("preset", "resume", "eval_only", "table", "export")
    switches = argparse.Namespace(**{name: given.pop(name) for name in names})
    return switches, {k: [value] if k in LISTS else value for k, value in given.items()}


def grid(preset, given):
    """All runs that the flags ask for: a list of Config, each with its own folder as out_dir."""
    varied = [name for name, values in given.items() if len(values) > 1]
    named = {"task", "memory", "ablate", "seed", "out_dir"}
    configs = []
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values))
        task = chosen.get("task", PRESETS.get(preset, {}).get("task", "remember"))
        if task not in TASKS and not babi_parts(task):
            raise ValueError(f"--task: there is no '{task}'; choose one of {', '.join(TASKS)}, "
                             f"qa1 ... qa20, or several of these as in qa1+qa2")
        c = Config(**{**PRESETS.get(task, PRESETS["qa1"]), **PRESETS.get(preset, {}), **chosen})
        for name in ("ablate", "n_mem", "stretch", "quiet") if c.memory != "armt" else ():
            if name not in chosen:                           # a preset has them for armt alone
                setattr(c, name, getattr(Config, name))
        if keeps_cache(c) and "carry" not in chosen:
            c.carry = 0.0                                    # its rows would have caches of unequal length
        parts = [*dict.fromkeys(filter(None, [preset, chosen.get("task")]))] or [task]
        parts += [c.memory] + [c.ablate] * ("ablate" in chosen)
        parts += [f"{n}{getattr(c, n)}" for n in varied if n not in named]
        name = "-".join([*parts, f"seed{c.seed}"])
        if varied or not c.out_dir:
            c.out_dir = str(Path(c.out_dir or "out", name))
        configs.append(c)
    return configs


def numbers(name, value):
    """'0,1k,2/64' -> [(0,), (1000,), (2, 64)]. ValueError names the flag."""
    def number(text):
        scale = {"k": 1000, "M": 1000000}.get(text[-1:], 1)
        return int(text if scale == 1 else text[:-1]) * scale
    try:
        return [tuple(map(number, part.split("/"))) for part in value.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: '{value}' is not a list of whole numbers such as "
                         f"{getattr(Config, name)}") from None


def keeps_cache(config):
    """Whether a state holds keys and values, as many for each row of a batch."""
    return config.memory in ("full", "bswa") or bool(config.window)


def check_evaluation(config):
    """ValueError, naming the flag, for what an evaluation would stumble over later."""
    parts = babi_parts(config.task)
    lengths, counts = (numbers(name, getattr(config, name)) for name in ("eval_lengths", "eval_samples"))
    if any(len(length) > 1 or length[0] < (0 if parts else 1) for length in lengths):
        raise ValueError(f"--eval_lengths: '{config.eval_lengths}', but a length of {config.task} is one "
                         f"number from {0 if parts else 1} on")
    if any(len(count) > 1 or count[0] < 1 for count in counts):
        raise ValueError(f"--eval_samples: '{config.eval_samples}' has a number below 1")
    for part in config.eval_parts.split(",") if config.eval_parts else ():
        if part not in parts:
            raise ValueError(f"--eval_parts: '{part}' is not a part of --task {config.task}")
    if config.eval_batch < 0:
        raise ValueError(f"--eval_batch: {config.eval_batch} is not a number from 0 on")
    if config.task == "remember" and max(lengths)[0] > 16 ** config.key_size:
        raise ValueError(f"--eval_lengths: {max(lengths)[0]} different keys need a --key_size of more "
                         f"than {config.key_size}")
    if config.band != Config.band and not parts:
        raise ValueError(f"--band: {config.task} has no facts to hide, qa1 to qa20 have")
    if not re.fullmatch(r"[\d.]+,[\d.]+", config.band) or not (
            0 <= float(config.band.split(",")[0]) <= float(config.band.split(",")[1]) <= 1):
        raise ValueError(f"--band: '{config.band}' is not two numbers from 0 to 1, such as 0,0.2")
    for part in parts if config.babi_dir else ():
        babi.find_file(config.babi_dir, part)


def check(config):
    """ValueError, naming the flag, for what GPT does not check itself."""
    ranges = dict(stage_steps=(1, math.inf), learned=(0, 1), last_steps=(1, math.inf), key_size=(1, 4),
                  questions=(1, math.inf), buckets=(1, math.inf), align=(0, 1),
                  decoys=(0, 1), cut=(0, 1), compile=(0, 1), carry=(0, 1), jitter=(0, 1), stretch=(1, math.inf),
                  pass_state=(0, 1), bptt=(0, math.inf), quiet=(0, math.inf), recompute=(0, math.inf),
                  dropout=(0, 0.99), batch_size=(1, math.inf), lr=(0, math.inf),
                  muon_lr=(0, math.inf), seed=(0, math.inf),
                  weight_decay=(0, math.inf), warmup=(0, math.inf), clip=(0, math.inf))
    for name, (low, high) in ranges.items():
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"--{name}: {getattr(config, name)} is not between {low} and {high}")
    stages = numbers("stages", config.stages)
    form = "FACTS or FACTS/WORDS" if babi_parts(config.task) else "N"
    if any(len(stage) > 1 + form.count("/") or stage[0] < 1 for stage in stages):
        raise ValueError(f"--stages: '{config.stages}', but a stage of {config.task} reads {form}")
    if not config.babi_dir and set(babi_parts(config.task)) - set(babi.TASKS):
        raise ValueError(f"--babi_dir: only {', '.join(babi.TASKS)} can be simulated; for "
                         f"{config.task} name a folder with the published files")
    check_evaluation(config)
    if config.optimizer not in ("adamw", "muon"):
        raise ValueError(f"--optimizer: there is no '{config.optimizer}'; choose muon or adamw")
    if config.task == "remember" and max(stages)[0] > 16 ** config.key_size:
        raise ValueError(f"--stages: {max(stages)[0]} different keys need a --key_size of more than "
                         f"{config.key_size}")
    if config.equal and config.equal not in MEMORIES:
        raise ValueError(f"--equal: there is no '{config.equal}'; choose one of {', '.join(MEMORIES)}")
    if config.align and not babi_parts(config.task):
        raise ValueError(f"--align: {config.task} has no sentences, qa1 to qa20 have; use --align 0")
    if config.align and config.cut:
        raise ValueError("--cut: where sentences begin segments no fact is cut; use --cut 0 or --align 0")
    if config.decoys and not babi_parts(config.task):
        raise ValueError(f"--decoys: {config.task} has no facts, qa1 to qa20 have; use --decoys 0")
    if config.key not in KINDS:
        raise ValueError(f"--key: there is no '{config.key}'; choose one of {', '.join(KINDS)}")
    if config.carry and config.task in ("remember", "text"):
        raise ValueError(f"--carry: {config.task} cannot read on; rewrite, passkey and qa1 can")
    if config.carry and keeps_cache(config):
        raise ValueError(f"--carry: memory '{config.memory}' keeps a cache, and in a batch that of a new "
                         f"text would have to be as long as that of one that reads on; use --carry 0")
    if config.pass_state and config.memory == "full":
        raise ValueError("--pass_state: memory 'full' would grow without end; use --pass_state 0")
    if config.carry and config.task == "rewrite" and config.questions < 16 ** config.key_size:
        raise ValueError(f"--questions: with --carry all {16 ** config.key_size} keys must be asked")


def pick_device(name):
    """(device, why). ValueError when the device asked for is not there."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        device = next(d for d in found if found[d])
        return device, "no GPU found" if device == "cpu" else "found; --device cpu decides otherwise"
    if not found.get(name.split(":")[0]):
        raise ValueError(f"--device: there is no '{name}' here; choose auto or one of "
                         f"{', '.join(d for d in found if found[d])}")
    return name, "as asked"


def make_task(config):
    """The task of a config: it makes batches and questions, and shows ids as text."""
    if parts := babi_parts(config.task):
        words = babilong.Words(config.words or babi.WORDS, config.buckets,
                               align=config.segment_len * config.align)
        return babilong.BABILong(words, config.background, parts, config.babi_dir, config.decoys)
    if config.task == "passkey":
        words = babilong.Words(config.words or WORDS, config.buckets)
        return PassKey(words, config.background, config.key, config.segment_len)
    if config.task == "text":
        return Text(config.background)
    return Recall(config.key_size, config.questions, rewrite=config.task == "rewrite")


def compiled(model, config, device):
    """
    Give `model` compiled code for segments of whole batches; whatever has another shape goes through the
    usual code. ValueError where there is no compiler, or if the state of the memory grows.
    """
    if keeps_cache(config):
        raise ValueError(f"--compile: memory '{config.memory}' keeps a cache, and code is compiled for one "
                         f"size; use --compile 0")
    warnings.filterwarnings("ignore", module="torch._dynamo")      # it may trace what is cached
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as e:                                         # of a kind for each thing that is missing
        raise ValueError(f"--compile: {str(e).strip().splitlines()[0][:120]}; use --compile 0") from None
    usual = model.memory.forward
    fast = torch.compile(usual, dynamic=False)
    whole = {(rows, config.segment_len) for rows in (config.batch_size, config.eval_batch)}
    model.memory.forward = lambda x, state: (fast if x.shape[:2] in whole else usual)(x, state)
    print("compiling: the first steps take minutes")


# --------------------------------------------------------------------------------------------------
# The folder of a run
# --------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Whatever happens, `path` holds its old content or its new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def file_names(files):
    """The names of files, wherever they lie: the same text is in another folder on another machine."""
    return [Path(file).name for file in files]


def save(folder, config, checkpoint):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(config), indent=1) + "\n"
    write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(folder / "ckpt.pt", lambda path: torch.save(checkpoint, path))


def load(folder, device="cpu"):
    """A run's folder -> (config, model, checkpoint). ValueError, one line, if it is not a whole run."""
    folder = Path(folder)
    try:
        config = Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        checkpoint = torch.load(folder / "ckpt.pt", map_location=device, weights_only=True)
        model = GPT(config).to(device)
        model.load_state_dict(checkpoint["model"])         # float16 weights become float32 here
    except FileNotFoundError as e:
        inside = min(folder.glob("*/config.json"), default=None)
        hint = f"; there is one in {inside.parent}" if inside else ""
        raise ValueError(f"{folder} holds no run: {Path(e.filename).name} is missing{hint}") from None
    except Exception as e:                                 # what a broken file raises can be anything
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
        raise ValueError(f"{folder} does not hold a whole run of this program ({why})") from None
    return config, model, checkpoint


def read_metrics(folder):
    path = Path(folder, "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_metrics(folder, at, kind, **values):
    place = dict(kind=kind, step=at["step"], seconds=round(at["seconds"], 2))
    with open(Path(folder, "metrics.jsonl"), "a") as file:
        file.write(json.dumps({**place, **values}) + "\n")


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------

def ask(model, questions, answers, state):
    """
    Questions (q, n), their answers (q, A) -> logits of the answers (q, A, V), loss. Each id of an
    answer is asked with the right ones in front of it: what a model that is right so far has written.
    """
    idx = torch.cat((questions, answers[:, :-1]), dim=1)                             # (q, n + A - 1)
    targets = torch.full_like(idx, -1)
    targets[:, questions.size(1) - 1:] = answers
    logits, loss, _ = model(idx, targets, state)
    return logits, loss


def equal_width(config):
    """The n_embd at which config.memory comes closest to the parameters that config.equal has."""
    def n_params(memory, ablate, n_embd):
        try:
            with torch.device("meta"):                              # shapes alone, no numbers
                return GPT(replace(config, memory=memory, ablate=ablate, n_embd=n_embd)).n_params()
        except ValueError:                                          # too narrow for its slots
            return math.inf
    goal, step = n_params(config.equal, "nothing", config.n_embd), 2 * config.n_head
    widths = range(step * (config.n_embd // step // 2 + 1), 2 * config.n_embd, step)
    return min(widths, key=lambda width: abs(n_params(config.memory, config.ablate, width) - goal))


def disturb(memory, share):
    """A memory (B, ...), a share of it replaced by noise: what is to last has to repair itself."""
    if not share or memory[0].numel() < 2:                           # a flag stays what it is
        return memory
    size = memory.flatten(1).square().mean(1).sqrt()                                             # (B,)
    noise = torch.randn_like(memory) * size.view(-1, *[1] * (memory.dim() - 1))
    return math.sqrt(1 - share ** 2) * memory + share * noise


def change(old, new):
    """How far a memory (B, ...) went, measured by its size: (B,), of all its tensors together."""
    def size(x):
        return torch.linalg.vector_norm(x.flatten(1), dim=1)                                                 # (B,)
    return sum(size(b - a) / (1 + size(a).detach()) for a, b in zip(tensors(old), tensors(new)))


class Run:
    """One training run. Whatever a step changes is in its checkpoint."""

    def __init__(self, config, device, checkpoint=None):
        self.config, self.device, self.folder = config, device, Path(config.out_dir)
        self.task, self.stages = make_task(config), numbers("stages", config.stages)
        self.parts = getattr(self.task, "rows", ("",))     # row i of a batch is of parts[i % len(parts)]
        config.vocab_size = self.task.vocab_size
        config.words = self.task.words.words if hasattr(self.task, "words") else ()
        if config.equal and not checkpoint:
            config.n_embd = equal_width(config)
        torch.manual_seed(config.seed)
        self.model = GPT(config).to(device)
        if config.compile:
            compiled(self.model, config, device)
        if config.init and not checkpoint:
            try:
                weights = load(config.init.format(seed=config.seed))[1].state_dict()
            except ValueError as e:
                raise ValueError(f"--init: {e}") from None
            if {k: p.shape for k, p in weights.items()} != {
                    k: p.shape for k, p in self.model.state_dict().items()}:
                raise ValueError(f"--init: the model in {config.init} has other sizes")
            self.model.load_state_dict(weights)
        for name in getattr(type(self.model.memory), "defaults", {}):
            setattr(config, name, getattr(self.model.config, name))
        self.optimizers = self.make_optimizers()
        self.at = dict(step=0, stage=0, stage_step=0, accuracy=0.0, parts={}, loss=0.0, seconds=0.0,
                       done=False, learned=False)
        self.carried = None          # --carry: each row's memory, its story, whether it answered right
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(state)
            self.at.update(checkpoint["at"])
            self.carried = checkpoint["carried"]
            cpu, *gpus = (rng.cpu() for rng in checkpoint["rng"])
            torch.set_rng_state(cpu)
            for i, rng in enumerate(gpus[:torch.cuda.device_count()]):
                torch.cuda.set_rng_state(rng, i)

    def make_optimizers(self):
        """AdamW for all, or Muon for the matrices between embedding and head and AdamW for the rest."""
        c = self.config
        matrices = [p for p in self.model.memory.parameters() if p.ndim == 2 and min(p.shape) > 1]
        if c.optimizer == "adamw":
            matrices = []
        ids = set(map(id, matrices))
        others = [p for p in self.model.parameters() if id(p) not in ids]
        adamw = torch.optim.AdamW(others, lr=c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay)
        if not matrices:
            return [adamw]
        return [adamw, torch.optim.Muon(matrices, lr=c.muon_lr, weight_decay=c.weight_decay)]

    def save(self):
        save(self.folder, self.config, dict(
            model=self.model.state_dict(), optimizers=[o.state_dict() for o in self.optimizers],
            at=self.at, carried=self.carried, rng=[torch.get_rng_state(), *torch.cuda.get_rng_state_all()]))

    def first_state(self, rng, earlier):
        """
        What a batch starts from. With --pass_state a new text may find the memory of another, which is
        out of date; with --carry a text that goes on has its own.
        """
        size, new = self.config.batch_size, None
        if self.carried and rng.random() < self.config.pass_state:
            other = torch.from_numpy(rng.permutation(size)).to(self.device)
            new = state_map(lambda old: old[other], self.carried[0])
        if not earlier:
            return new
        stay = torch.tensor([story is not None for story in earlier], device=self.device)         # (B,)

        def choose(old, new):
            old = disturb(old, self.config.jitter)
            return torch.where(stay.view(-1, *[1] * (old.dim() - 1)), old, new)
        return state_map(choose, self.carried[0], self.model.init_state(size) if new is None else new)

    def stretch(self, rng, old, new, silent):
        """
        The memory of rows that were told nothing new, moved on in the direction in which it went from `old`
        to `new`, up to --stretch times as far: what one text does to it, many will do again and again.
        """
        c, size = self.config, len(silent)
        most = c.stretch ** min(1.0, 2 * self.at["stage_step"] / c.last_steps)   # it grows in the first half
        times = np.where(silent, most ** rng.random(size), 1.0)                  # of all magnitudes alike
        times = torch.tensor(times, dtype=torch.float32, device=self.device)                      # (B,)
        return state_map(
            lambda a, b: torch.lerp(a, b, times.to(b.dtype).view(-1, *[1] * (b.dim() - 1))), old, new)

    def cut(self, context, stage, rng):
        """A context in the pieces that begin a segment: one (B, N), two with --cut, or its F facts."""
        if context.ndim == 3:
            return context.unbind(1)                                                 # (B, N) each
        if babi_parts(self.config.task) and stage[1] and context.size(1) > 1 \
                and rng.random() < self.config.cut:
            end = int(rng.integers(1, context.size(1)))                  # a fact may be in two segments
            return context[:, :end], context[:, end:]
        return [context]

    def read(self, context, state):
        """
        The state after a context (B, N). With --bptt the gradient goes back through its last segments
        only; with --recompute activations are not kept but computed again, some segments at a time.
        """
        c, N = self.config, context.size(1)
        T, early = c.segment_len, 0
        if 0 < c.bptt * T < N:
            early = (N - 1) // T * T - (c.bptt - 1) * T                  # what stands before these segments
            with torch.no_grad():
                _, _, state = self.model(context[:, :early], state=state)
        for piece in context[:, early:].split(c.recompute * T or N, dim=1):
            if c.recompute:
                _, _, state = recompute(self.model, piece, None, state, use_reentrant=False)
            else:
                _, _, state = self.model(piece, state=state)
        return state

    def shares(self, row, right):
        """{part of the task: share of right answers} of questions (q,) that were asked of these rows."""
        names = [self.parts[i % len(self.parts)] for i in row.tolist()]
        return {part: right[[name == part for name in names]].float().mean().item()
                for part in dict.fromkeys(names)}

    def loss(self, rng, stage):
        """
        Loss, shares of right answers, what --quiet charges, on one batch: read once, ask all that is known.
        """
        c, earlier = self.config, None
        keeping = self.on_last_stage() and (c.carry or c.pass_state)
        if keeping and c.carry and self.carried:
            _, stories, knew = self.carried
            fresh = (1 - c.carry) ** np.linspace(0, 1, c.batch_size)     # ages on a logarithmic scale
            stay = (rng.random(c.batch_size) >= fresh) & knew.cpu().numpy()
            earlier = [story if stays else None for story, stays in zip(stories, stay)]
        batch = self.task.batch(rng, c.batch_size, stage, earlier)
        if c.task == "text":
            idx, targets = (torch.tensor(part, device=self.device) for part in batch)
            logits, loss, _ = self.model(idx, targets)
            return loss, {"": (logits.argmax(-1) == targets).float().mean().item()}, 0.0
        start = state = self.first_state(rng, earlier) if keeping else None
        context, questions, answers = (torch.tensor(part, device=self.device) for part in batch[:3])
        *first, last = self.cut(context, stage, rng)
        for piece in first:
            _, _, state = self.model(piece, state=state)
        state = self.read(last, state)
        charge = 0.0
        if earlier and (c.stretch > 1 or c.quiet):
            silent = [old == new for old, new in zip(earlier, batch.stories)]
            charge = c.quiet * (change(start, state) * torch.tensor(silent, device=self.device)).mean()
            state = self.stretch(rng, start, state, silent)
        answers = answers.view(*questions.shape[:2], -1)                             # (B, Q, A)
        row, which = (answers[..., 0] >= 0).nonzero(as_tuple=True)
        asked, answers = questions[row, which], answers[row, which]                  # (q, n), (q, A)
        logits, loss = ask(self.model, asked, answers, state_map(lambda s: s[row], state))
        right = (logits.argmax(-1) == answers).all(1)                                # (q,)
        if keeping:
            knew = torch.ones(len(context), dtype=torch.bool, device=self.device)
            knew[row[~right]] = False                     # a row that has forgotten will start anew
            self.carried = state_map(torch.Tensor.detach, state), batch.stories, knew
        return loss, self.shares(row, right), charge

    def step(self):
        """One step of the optimizers, then on through the curriculum."""
        at, c, began = self.at, self.config, time.time()
        speed = min(1.0, (at["step"] + 1) / (c.warmup + 1))
        if self.on_last_stage():
            speed *= 1 - at["stage_step"] / c.last_steps
        for optimizer, peak in zip(self.optimizers, (c.lr, c.muon_lr)):
            optimizer.param_groups[0]["lr"] = peak * speed
        rng = generator(c.seed, "train", at["stage"], at["step"])
        loss, shares, charge = self.loss(rng, self.stages[at["stage"]])
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        (loss + charge).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        if norm.isfinite():                                              # a stretched memory can overflow
            for optimizer in self.optimizers:
                optimizer.step()

        at["step"] += 1
        at["stage_step"] += 1
        at["loss"] = loss.item()
        for part, share in shares.items():                               # means of some 20 steps
            old = at["parts"].get(part, 0.0)
            at["parts"][part] = old + 0.05 * (share - old)
        at["accuracy"] = min(at["parts"].values())          # a mean would hide the task that lags behind
        self.move_on()
        at["seconds"] += time.time() - began
        return at["loss"], shares

    def on_last_stage(self):
        return self.at["stage"] + 1 == len(self.stages)

    def move_on(self):
        """The curriculum: a stage that is learned makes way for the next; the last one has its time."""
        at, c = self.at, self.config
        learned = at["accuracy"] >= c.learned
        if self.on_last_stage():
            at.update(learned=learned, done=at["stage_step"] >= c.last_steps)
        elif learned:
            at.update(stage=at["stage"] + 1, stage_step=0, accuracy=0.0, parts={})
        elif at["stage_step"] >= c.stage_steps:
            at.update(done=True)                                         # stuck: nothing to build on

    def most_steps(self):
        """Steps until the end of the run if no further stage is learned early."""
        at, c = self.at, self.config
        others = len(self.stages) - 1 - at["stage"]
        return at["step"] - at["stage_step"] + others * c.stage_steps + c.last_steps

    def train(self):
        """Step until done, with a bar, a log and checkpoints. False when Ctrl-C stopped it."""
        at, stop, saved = self.at, [], time.time()
        names = ["/".join(map(str, stage)) for stage in self.stages]
        handler = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(1))
        bar = tqdm(initial=at["step"], desc=self.folder.name, unit="step", dynamic_ncols=True)
        try:
            while not at["done"] and not stop:
                stage = at["stage"]
                loss, shares = self.step()
                bar.total = self.most_steps()
                bar.set_postfix_str(f"stage {names[stage]} loss {loss:.3f} acc {at['accuracy']:.1%}",
                                    refresh=False)
                bar.update()
                if at["step"] % 25 == 0 or at["done"] or stage != at["stage"]:
                    each = dict(parts={part: round(share, 5) for part, share in shares.items()})
                    add_metrics(self.folder, at, "train", stage=stage, loss=round(loss, 5),
                                accuracy=round(statistics.mean(shares.values()), 5),
                                **each if len(shares) > 1 else {})
                if stage != at["stage"] or time.time() - saved > 60:
                    self.save()
                    saved = time.time()
        finally:
            signal.signal(signal.SIGINT, handler)
            bar.total = at["step"]
            bar.close()
        self.save()
        if at["done"] and not at["learned"]:
            flag = "--last_steps" if self.on_last_stage() else "--stage_steps"
            print(f"stage {names[at['stage']]} was not learned ({flag} gives it more time): "
                  f"accuracy {at['accuracy']:.1%}, loss {at['loss']:.2f}, like a guess among "
                  f"{math.exp(at['loss']):.1f} answers")
        return at["done"]


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(model, questions, device, bar, keep=lambda chunk, state: None, start=0, state=None, silent=None):
    """
    Read the contexts of Questions side by side, ask each its own: the likeliest answers, (B, A). A single
    one is read ahead, with `silent` of GPT.read_ahead. After each chunk keep(chunks read, state) is called;
    with these two as `start` and `state` it goes on.
    """
    segments = 16 if len(questions) > 1 else 4096
    pieces = chunks([q.context for q in questions], segments * model.config.segment_len)
    for i, chunk in enumerate(pieces, start=1):
        if i > start:
            text = torch.from_numpy(chunk).to(device)                                # (B, n)
            if len(text) == 1:                                   # all but its last segment
                state, text = model.read(text, state, silent=silent)
            _, _, state = model(text, state=state)
            keep(i, state)
        bar.update(chunk.size)
    asked = torch.from_numpy(fill([q.question for q in questions])).to(device)       # (B, n)
    answers = torch.tensor(np.array([q.answer for q in questions]), device=device).view(len(asked), -1)
    return ask(model, asked, answers, state)[0].argmax(-1).tolist()


class Bookmark:
    """
    How far the evaluation of one cell of the table is, in a file: hours of reading can be stopped. `what`
    is all that decides what is read; a bookmark of anything else is not used.
    """

    def __init__(self, folder, what):
        self.path, self.what = Path(folder, "reading.pt"), what
        self.place, self.seconds = ([], 0, None), 0.0
        if self.path.exists():
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            if kept["what"] == what:
                self.place, self.seconds = kept["place"], kept["seconds"]
        self.began = self.saved = time.time()

    def keep(self, *place):
        """`place` is (answers so far, chunks read of this batch, its state)."""
        self.place = place
        if time.time() - self.saved > 60:
            self.save()

    def spent(self):
        """Seconds of reading, those of earlier sessions included."""
        return self.seconds + time.time() - self.began

    def save(self):
        content = dict(what=self.what, place=self.place, seconds=self.spent())
        write_atomically(self.path, lambda path: torch.save(content, path))
        self.saved = time.time()


def evaluate_questions(model, task, config, cell, device, files):
    """Accuracy on the questions of one cell of the table; prints the last one."""
    length, part, left_out = cell["length"], cell.get("part", ""), 0
    if "released" in cell:
        questions = task.released(cell["released"])
    else:
        options = {name: cell[name] for name in ("part", "band") if name in cell}
        questions, left_out = task.questions(length, cell["asked"], config.babi_dir, files, **options)
    size = config.eval_batch or config.batch_size
    mark = Bookmark(config.out_dir, dict(cell, rows=size, files=list(map(str, files or ())),
                                         babi=config.babi_dir))
    batches = [questions[i:i + size] for i in range(0, len(questions), size)]
    tokens = [[sum(map(len, q.context)) for q in some] for some in batches]
    read, silent = [len(some) * max(some) for some in tokens], {}        # short ones are filled in front
    with tqdm(total=sum(read), desc=f"{part} {length} {task.unit}".strip(), unit="tok", unit_scale=True,
              leave=False) as bar:
        try:
            for i, some in enumerate(batches):
                said, start, state = mark.place
                if len(said) > i * size:
                    bar.update(read[i])
                    continue
                state = None if state is None else state_map(lambda s: s.to(device), state)
                said = said + answer(model, some, device, bar, start=start, state=state, silent=silent,
                                     keep=lambda *place: mark.keep(said, *place))
                mark.keep(said, 0, None)
        except KeyboardInterrupt:
            mark.save()
            raise
    said = mark.place[0]
    mark.path.unlink(missing_ok=True)
    right = [np.array_equal(a, np.atleast_1d(q.answer)) for a, q in zip(said, questions)]
    if questions:
        q = questions[-1]
        shown = task.show([*q.context[-1][-40:], *q.question])[-80:]
        print(f"{length} {task.unit}: ...{shown} -> {task.show(said[-1])} "
              f"(right: {task.show(np.atleast_1d(q.answer))})")
    accuracy = sum(right) / max(1, len(questions))
    row = dict(accuracy=round(accuracy, 5), n=len(questions), left_out=left_out, tokens=sum(map(sum, tokens)),
               read_seconds=round(mark.spent(), 2))
    if config.task == "remember":
        row["stored"] = round(stored_pairs(length, accuracy), 2)
    if questions and questions[0].depth is not None:
        row["depths"] = [[0, 0] for _ in range(5)]       # in each fifth of the text: questions, right ones
        for question, ok in zip(questions, right):
            fifth = row["depths"][min(int(5 * question.depth), 4)]
            fifth[:] = fifth[0] + 1, fifth[1] + ok
    return row


@torch.no_grad()
def evaluate_text(model, task, cell, device):
    """Loss and share of right next bytes on passages of text that was kept back."""
    began, length = time.time(), cell["length"]
    batch = task.batch(generator(0, "val", length), cell["asked"], (length,), part="val")
    idx, targets = (torch.tensor(part, device=device) for part in batch)
    logits, loss, _ = model(idx, targets)
    right = (logits.argmax(-1) == targets).float().mean().item()
    return dict(accuracy=round(right, 5), loss=round(loss.item(), 5), n=targets.numel(),
                tokens=idx.numel(), read_seconds=round(time.time() - began, 2))


WHAT = ("length", "asked", "split", "part", "released", "background", "band", "step")   # what makes a cell


def cells(task, config, files):
    """What there is to evaluate: one dict for each cell of the table."""
    parts = config.eval_parts.split(",") if config.eval_parts else getattr(task, "parts", [])
    if config.released and not parts:
        raise ValueError(f"--released: these samples are of qa1 to qa20, not of {config.task}")
    if config.released:
        return [dict(length=task.typical_length(file), asked=0, split="test", part=parts[0], released=file)
                for file in map(str, config.released)]
    counts = [n for n, in numbers("eval_samples", config.eval_samples)]
    lengths = [length for length, in numbers("eval_lengths", config.eval_lengths)]
    fresh = config.task in ("remember", "rewrite", "passkey") or config.babi_dir
    common = dict(split="test" if fresh else "val")
    if files:
        common["background"] = file_names(files)
    if config.band != Config.band:
        common["band"] = [float(part) for part in config.band.split(",")]
    return [dict(length=length, asked=counts[min(i, len(counts) - 1)], **common, **part)
            for part in ([dict(part=part) for part in parts] or [{}]) for i, length in enumerate(lengths)]


def evaluate(model, task, config, device, at, files=None, resume=False):
    """
    One row of metrics for each part of the task and each of config.eval_lengths, written down as they
    come. With resume, rows that are there already are not made again.
    """
    before, rows = read_metrics(config.out_dir) if resume else [], []
    if config.task == "text" and files:
        task = Text(files)
    if not resume:
        Path(config.out_dir, "reading.pt").unlink(missing_ok=True)
    model.eval()
    for cell in cells(task, config, files):
        cell["step"] = at["step"]
        done = [row for row in before
                if row["kind"] == "eval" and all(row.get(name) == cell.get(name) for name in WHAT)]
        row = done[-1] if done else None
        if row is None:
            if config.task == "text":
                row = evaluate_text(model, task, cell, device)
            else:
                row = evaluate_questions(model, task, config, cell, device, files)
            row = {**cell, **row}
            add_metrics(config.out_dir, at, "eval", **row)
        rows.append(row)
    return rows


def interval(right, n):
    """The 95% interval of a share, right of n (Wilson 1927)."""
    z = 1.96
    share, spread = right / n, z * math.sqrt(right * (n - right) / n + z * z / 4) / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    return middle - spread / (1 + z * z / n), middle + spread / (1 + z * z / n)


def accuracy_of(rows):
    """'95.5 ± 1.0': the mean accuracy of eval rows, in per cent, and its deviation; '-' for no row."""
    values = [100 * row["accuracy"] for row in rows]
    spread = f" ±{statistics.stdev(values):4.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "-"


def interval_of(rows):
    """'94.7-96.2': the 95% interval, in per cent, of the questions of all rows together; '-' for no row."""
    n = sum(row["n"] for row in rows)
    low, high = interval(sum(row["n"] * row["accuracy"] for row in rows), n) if n else (0, 0)
    return f"{100 * low:.1f}-{100 * high:.1f}" if n else "-"


def right_of(right, n):
    """'171/174 95-99': how many are right of how many, and the 95% interval in per cent."""
    low, high = interval(right, n) if n else (0, 0)
    return f"{right}/{n} {100 * low:.0f}-{100 * high:.0f}" if n else "-"


def final_rows(rows):
    """The eval rows of a run that tell what it can do: those on test questions, if there are any."""
    rows = [row for row in rows if row["kind"] == "eval"]
    return [row for row in rows if row["split"] == "test"] or rows


def table(results):
    """
    Print [(config, final row, eval rows)], a table for each task and in it one line a kind of run: mean
    and spread over seeds. For the tasks of bAbI also the 95% interval of all seeds' questions together,
    and a table by depth.
    """
    for task in dict.fromkeys(config.task for config, _, _ in results):
        mine = [result for result in results if result[0].task == task]

        def condition(row):
            """What was asked, apart from the length, in words: the part of the task, where, in what text."""
            band = "facts at {:.0%} to {:.0%}".format(*row["band"]) if "band" in row else None
            told = [row.get("part"), band, *row.get("background", []), row.get("released")]
            return ", ".join(filter(None, told))

        conditions = {condition(row) for _, _, rows in mine for row in rows}
        kinds = {}
        for config, final, rows in mine:
            name = Path(config.out_dir).name
            name = re.sub(r"-?seed\d+$", "", name) or name
            for here in dict.fromkeys(map(condition, rows)):
                cells = {row["length"]: row for row in rows if condition(row) == here}
                kind = f"{name} {here}" if len(conditions) > 1 else name
                kinds.setdefault(kind, []).append((config, final, cells))
        table_of_task(task, kinds)


def table_of_task(task, kinds):
    """Print {kind: [(config, final row, {length: eval row})]}, and what the sizes of the models say."""
    lengths = sorted({length for runs in kinds.values() for _, _, cells in runs for length in cells})
    width = max([len("accuracy, %"), *map(len, kinds)])
    print("\n" + "  ".join([f"{'accuracy, %':{width}}", "seeds", "parameters", "state floats",
                            "minutes", "tokens/s", *[f"{length:>11,}" for length in lengths]]))
    for kind, runs in kinds.items():
        configs, finals, _ = zip(*runs)
        rows = [row for _, _, cells in runs for row in cells.values()]
        speed = sum(row["tokens"] for row in rows) / max(0.01, sum(row["read_seconds"] for row in rows))
        floats = "grow" if configs[0].memory == "full" else f"{finals[0]['state_floats']:,}"
        means, pooled = [], []
        for length in lengths:
            here = [cells[length] for _, _, cells in runs if length in cells]
            means.append(f"{accuracy_of(here):>11}")
            pooled.append(f"{interval_of(here):>11}")
        stuck = [final["stage"] for final in finals if not final["learned"]]
        print("  ".join([f"{kind:{width}}", f"{len(runs):5}", f"{finals[0]['parameters']:10,}",
                         f"{floats:>12}", f"{statistics.mean(f['seconds'] for f in finals) / 60:7.1f}",
                         f"{speed:8,.0f}", *means])
              + (f"   (not learned: stage {', '.join(stuck)})" if stuck else ""))
        if any("depths" in row for row in rows):
            print("  ".join([f"{'':{width}}", f"{'95% interval':>46}", *pooled]))
    sizes = [final["parameters"] for runs in kinds.values() for _, final, _ in runs]
    if max(sizes) > 1.05 * min(sizes):
        print(f"The largest has {max(sizes) / min(sizes) - 1:.0%} more parameters than the smallest.")
    for kind, runs in kinds.items():
        table_by_depth(task, kind, [cells for _, _, cells in runs])


def table_by_depth(task, kind, runs):
    """
    Print the accuracy by where the oldest fact stands that a question needs, of all seeds together, with
    its 95% interval. For bAbI also how long the text is for GPT-2, about: published lengths are counted so.
    """
    depths = {}                                                  # length -> questions and right ones
    for cells in runs:
        for length, row in cells.items():
            if "depths" in row:
                depths[length] = depths.get(length, 0) + np.array(row["depths"])
    per_word = babilong.GPT2_TOKENS if babi_parts(task) else None
    if depths:
        fifths = "  ".join(f"{f'{start}-{start + 20}%':>16}" for start in range(0, 100, 20))
        names = f"{'words':>11}  {'GPT-2 tokens':>12}" if per_word else f"{'segments':>11}"
        print(f"\n{kind}: right of questions, and the 95% interval, by the place of the oldest fact they need\n"
              f"{names}  {fifths}")
    for length in sorted(depths):
        tokens = f"  {round(length * per_word) or 'the facts':>12}" if per_word else ""
        print(f"{length:11,}{tokens}  "
              + "  ".join(f"{right_of(right, n):>16}" for n, right in depths[length].tolist()))


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------

@torch.no_grad()
def floats_carried(model):
    """The floats of one row's state once a cache is full; of `full`, which never is, at the start."""
    n, device = model.room if model.room < math.inf else 0, model.lm_head.weight.device
    training = model.training
    model.eval()                         # dropout here would use up random numbers of the run
    state = model(torch.zeros(1, n, dtype=torch.long, device=device))[2] if n else model.init_state(1)
    model.train(training)
    return state_floats(state)


def describe(model, config, device, why):
    """Print what is about to run, and its sizes."""
    names = ["n_embd"] * bool(config.equal) + ["n_mem", "d_mem", "window", "mem_layers"]
    own = {name: getattr(config, name) for name in names}
    sizes = "".join(f", {name} {value}" for name, value in own.items() if value is not None)
    print(f"device {device} ({why}), torch {torch.__version__}, seed {config.seed}\n"
          f"{config.task}, memory {config.memory}{sizes}, ablate {config.ablate}: {model.n_params():,} "
          f"parameters, {floats_carried(model):,} floats carried between segments"
          f"{' at first, more with every token' if config.memory == 'full' else ''}")


def final_row(run, device):
    """The last line of metrics: how the run ended, and what its model costs."""
    at, model = run.at, run.model
    return dict(learned=at["learned"], stage="/".join(map(str, run.stages[at["stage"]])),
                parameters=model.n_params(), state_floats=floats_carried(model), device=device,
                torch=str(torch.__version__))


def same_run(saved, config, given):
    """ValueError if a flag was given that says something else than the run in the folder was made with."""
    for name in given.keys() - ASIDE - ({"n_embd"} if saved.equal else set()):
        if getattr(saved, name) != getattr(config, name):
            raise ValueError(f"--{name}: the run in {config.out_dir} has {getattr(saved, name)}, not "
                             f"{getattr(config, name)}; choose another --out_dir")


def one_run(config, given, resume, alone):
    """Train or go on training, then evaluate: (config, final row, eval rows). None when stopped."""
    folder, checkpoint = Path(config.out_dir), None
    device, why = pick_device(config.device)
    if (folder / "ckpt.pt").exists():
        saved, _, checkpoint = load(folder, device)
        if alone and not resume:
            raise ValueError(f"{folder} holds a run already; --resume goes on with it, --out_dir "
                             f"chooses another folder")
        if "optimizers" not in checkpoint:
            raise ValueError(f"{folder} holds weights only: it can be used (sample.py, --eval_only) "
                             f"but cannot be continued")
        same_run(saved, config, given)
        if "background" in given \
                and sorted(file_names(config.background)) != sorted(file_names(saved.background)):
            raise ValueError(f"--background: the run in {folder} is trained on {' '.join(saved.background)}; "
                             f"choose another --out_dir")
        config = Config(**{**asdict(saved), **{k: getattr(config, k) for k in ASIDE & given.keys()},
                           "out_dir": str(folder)})
        rows = read_metrics(folder)
        finals = [row for row in rows if row["kind"] == "final"]
        if finals:
            print(f"{folder}: finished, skipped")
            return config, finals[0], final_rows(rows)
        step = checkpoint["at"]["step"]
        rows = [row for row in rows if row["kind"] == "train" and row["step"] <= step
                or row["kind"] == "eval" and row["step"] == step and checkpoint["at"]["done"]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / "metrics.jsonl", lambda path: path.write_text(text))
    elif resume and alone:
        raise ValueError(f"--resume: {folder} holds no run to go on with")
    else:
        check(config)
        (folder / "metrics.jsonl").unlink(missing_ok=True)   # of a run that was killed before it was saved
    run = Run(config, device, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    describe(run.model, config, device, why)
    if not run.train():
        print(f"stopped at step {run.at['step']} and saved; the same command with --resume goes on")
        return None
    rows = evaluate(run.model, run.task, config, device, run.at, resume=True)
    add_metrics(folder, run.at, "final", **final_row(run, device))
    return config, read_metrics(folder)[-1], rows


def evaluate_only(config, given, resume):
    """Evaluate the run in config.out_dir as the evaluation flags say, and append the rows."""
    device, why = pick_device(config.device)
    saved, model, checkpoint = load(config.out_dir, device)
    same_run(saved, config, given)
    files = config.background if "background" in given else None
    flags = {k: getattr(config, k) for k in ASIDE & given.keys() | {"out_dir"}}
    config = Config(**{**asdict(saved), **flags})
    check_evaluation(config)
    if config.compile:
        compiled(model, config, device)
    describe(model, config, device, why)
    at = checkpoint.get("at", dict(step=0, seconds=0.0, learned=True, stage=0))
    rows = evaluate(model, make_task(saved), config, device, at, files, resume)
    stage = "/".join(map(str, numbers("stages", saved.stages)[at["stage"]]))
    final = dict(learned=at["learned"], seconds=at["seconds"], stage=stage,
                 parameters=model.n_params(), state_floats=floats_carried(model))
    return config, final, rows


def finished_runs(folder):
    """All finished runs in the folders inside `folder`; of their eval rows those on test, if any."""
    results = []
    for path in sorted(Path(folder).glob("*/config.json")):
        rows = read_metrics(path.parent)
        config = Config(**{**json.loads(path.read_text(encoding="utf-8")), "out_dir": str(path.parent)})
        results += [(config, row, final_rows(rows)) for row in rows if row["kind"] == "final"]
    if not results:
        raise ValueError(f"--table: there is no finished run in the folders inside {folder}")
    return results


def export(config, folder):
    """Write config and weights, float16, to `folder`: enough to use the model, not to train it on."""
    saved, model, _ = load(config.out_dir)
    saved.out_dir, saved.background, saved.init = "", file_names(saved.background), Path(saved.init).name
    saved.compile = 0                                        # who only asks it should not wait for minutes
    save(Path(folder), saved, dict(model={name: p.half() for name, p in model.state_dict().items()}))
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    print(f"{folder}: {size:,} bytes\nnext: python sample.py --out_dir {folder}")


def main(argv=None):
    """The program. `argv` is a list of arguments; None takes those of the command line."""
    switches, given = parse(argv)
    torch.set_flush_denormal(True)   # numbers below 1e-38 are 0: with them a CPU trains 3 times slower
    try:
        if switches.table:
            return table(finished_runs(switches.table))
        configs, results = grid(switches.preset, given), []
        if switches.export and len(configs) > 1:
            raise ValueError("--export: one folder holds one run, and these flags name several")
        for config in configs:
            if switches.export:
                export(config, switches.export)
            elif switches.eval_only:
                results.append(evaluate_only(config, given, switches.resume))
            else:
                results.append(one_run(config, given, switches.resume, alone=len(configs) == 1))
            if None in results:
                sys.exit(130)
        if results:
            table(results)
            print(f"\nnext: python sample.py --out_dir {results[0][0].out_dir}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command with --resume goes on")
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: {e}")


if __name__ == "__main__":
    main()
