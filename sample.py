"""
Use a trained model: tell it facts, let it read a book, ask.

    python sample.py --facts "Mary went to the kitchen." --read book.txt --ask "Where is Mary?"
    python sample.py                                          a small conversation at the prompt
    python sample.py --facts "..." --read book.txt --written written.png     which segments wrote
    python sample.py --read book.txt --save_state book.pt     read once ...
    python sample.py --load_state book.pt --ask "..."         ... ask tomorrow
    python sample.py --out_dir out/remember-armt-seed0        recall, passkey: samples, answers, the truth

Facts are told first, then files are read, then questions are asked. What was read is kept in one state, whose
size is fixed (unless the memory is `full`); a question is answered from it alone and leaves it as it was. The
model knows bAbI's sentences in bAbI's words, each with a full stop: who goes where, gets, drops and gives
what, and which place lies north, south, east or west of which. It does not understand pronouns, exclamation
marks or other names.
"""
import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                           # as in train.py

import numpy as np
import torch
from tqdm import tqdm

from armt import state_floats, state_map, tensors
from data import numbers
from data.files import one_line_errors, write_atomically
from train import Parser, answer, changes, load, make_task, pick_device

AHEAD = 64                          # segments read side by side, at most
PRETRAINED = Path(__file__).parent / "data" / "pretrained"
HELP = """tell     a sentence with a full stop: Mary went to the kitchen.
ask      a sentence with a question mark: Where is Mary?
read     read FILE
forget   start again with an empty memory
quit     or Ctrl-D"""


@torch.no_grad()
def read_fast(model, segments, state):
    """
    Read whole segments (S, T) from a state of one row -> (state, {index of a segment that wrote: change of
    memory}). Segments that leave the state unchanged, bit for bit, can be read side by side: read 1, 2, 4,
    ... rows from the same state, stop at the first that writes, and continue after it.
    """
    i, ahead, wrote = 0, 1, {}
    while i < len(segments):
        rows = segments[i:i + ahead]
        before = state_map(lambda s: s.expand(len(rows), *s.shape[1:]), state)
        _, _, after = model(rows, state=before)
        quiet = [*changed(before, after, len(rows)), True].index(True)    # rows before one that writes
        i, ahead = i + quiet, min(2 * ahead, AHEAD)
        if quiet < len(rows):
            if len(rows) > 1:                                        # beside others its last bits may differ
                _, _, after = model(segments[i:i + 1], state=state)
            wrote[i] = float(sum(changes(state, after))) or 1.0               # 1: only a cache changed
            state, i, ahead = after, i + 1, 1
    return state, wrote


def changed(before, after, rows):
    """Which rows of two states differ in any bit: a list of bool. A cache that has grown differs."""
    loud = torch.zeros(rows, dtype=torch.bool, device=next((t.device for t in tensors(after)), None))
    for a, b in zip(tensors(before), tensors(after)):
        loud |= (a != b).flatten(1).any(1) if a.shape == b.shape else True
    return loud.tolist()


class Reader:
    """A model and what it has read: the state after all whole segments, and the tail that is not yet one."""

    def __init__(self, config, model, task, device):
        self.model, self.task, self.words, self.device = model.eval(), task, task.words, device
        self.align, self.T = task.align, config.segment_len
        self.forget()

    def forget(self):
        """Begin again with an empty memory."""
        self.state, self.tail = self.model.init_state(1), []
        self.words_read, self.changes = 0, []              # and how much each segment changed the memory
        self.most = []                                     # the five largest changes: (change, which, ids)

    def warn(self, text):
        """Say which words of the text the task does not know."""
        for word in self.words.unknown(text):
            note = f"note: the task does not know '{word}'; it is read like any word of a book"
            print(note, file=sys.stderr)

    def tell(self, text):
        """Read a piece of text. It may stop anywhere between two words: two calls equal one."""
        ids = self.words.pad(self.words.encode(text), self.align, len(self.tail))
        self.words_read += self.words.count(ids)
        ids = self.tail + ids
        whole = len(ids) // self.T * self.T                              # the last segment may still continue
        segments = torch.tensor(ids[:whole], dtype=torch.long, device=self.device).view(-1, self.T)
        self.state, wrote = read_fast(self.model, segments, self.state)
        found = [(size, len(self.changes) + i, segments[i].tolist()) for i, size in wrote.items()]
        self.most, self.tail = sorted(self.most + found)[-5:], ids[whole:]
        self.changes.extend(wrote.get(i, 0.0) for i in range(len(segments)))

    def read(self, file):
        """Read a UTF-8 file of any size, piece by piece, with a bar. If it fails, nothing was read."""
        before, size = {**vars(self), "changes": self.changes[:]}, os.path.getsize(file)
        try:
            if not Path(file).is_file() or size == 0:
                raise ValueError(f"--read: {file} is empty or not a file")
            with open(file, encoding="utf-8-sig") as f, \
                    tqdm(total=size, desc=Path(file).name, unit="B", unit_scale=True, leave=False,
                         disable=None) as bar:
                rest = ""
                while block := f.read(1 << 16):
                    text = rest + block
                    end = max(text.rfind(" "), text.rfind("\n")) + 1 or len(text)      # not inside a word
                    self.tell(text[:end])
                    rest = text[end:]
                    bar.update(f.buffer.tell() - bar.n)
                self.tell(rest)
        except BaseException as e:
            vars(self).update(before)
            if isinstance(e, UnicodeDecodeError):
                raise ValueError(f"--read: {file} is not UTF-8 text") from None
            raise

    @torch.no_grad()
    def ask(self, question):
        """Probabilities of all words as the answer, (V,). What was read stays as it was."""
        question = question.rstrip(" .!?")
        ids, state = self.task.ask(question + "?"), self.state
        if not self.words.count(ids):
            raise ValueError("--ask: the question has no words")
        if set(question) & set(".!?"):
            raise ValueError("--ask: one question at a time, and nothing told in it")
        if self.tail:                            # its segment is filled with blanks, for this question only
            tail = self.tail + [0] * (self.T - len(self.tail))
            _, _, state = self.model(torch.tensor([tail], device=self.device), state=state)
        return self.model(torch.tensor([ids], device=self.device), state=state,
                          write=False)[0][0, -1].softmax(-1)

    def draw(self, file):
        """A figure in `file`: how much each segment changed the memory. Returns its name."""
        from results.figures import written                              # needs matplotlib
        return written(self.changes or [0.0], file)

    def seal(self, memory):
        """A hash of a memory and of the weights of its model."""
        parts = tensors((memory, tuple(self.model.parameters())))
        return hashlib.sha256(b"".join(t.detach().cpu().float().numpy().tobytes() for t in parts)).hexdigest()

    def save(self, file):
        """Write the memory, and the tail that is not yet a whole segment."""
        memory = self.state, torch.tensor(self.tail, dtype=torch.long), torch.tensor(self.words_read)
        write_atomically(file, lambda path: torch.save(dict(memory=memory, seal=self.seal(memory)), path))

    def load(self, file):
        """Continue from a memory that `save` wrote. ValueError if it is none, or another model's."""
        try:
            saved = torch.load(file, map_location=self.device, weights_only=True)
            if saved["seal"] != self.seal(saved["memory"]):
                raise ValueError
            self.state, tail, words_read = saved["memory"]
        except Exception:                                            # a broken file can raise nearly anything
            raise ValueError(f"--load_state: {file} is missing, damaged, or of another model") from None
        self.tail, self.words_read = tail.tolist(), words_read.item()


def show_written(reader, file):
    """Which segments wrote: a strip of text, or a figure in `file`, and the segments that wrote most."""
    changes, cached = np.array(reader.changes or [0.0]), reader.model.config.memory in ("full", "bswa")
    if file:
        print(reader.draw(file))
    cells, top = [part.max() for part in np.array_split(changes, min(72, len(changes)))], changes.max()
    print("".join("_.:-=+*#"[min(7, int(8 * cell / top))] if cell else " " for cell in cells).join("||"))
    print(f"{len(reader.changes):,} segments from left to right; {np.count_nonzero(changes):,} wrote, and "
          f"changed the memory by at most {top:.3g}{' (1: only a cache changed)' * cached}. "
          "Those that wrote most (~ is a word outside bAbI):")
    for size, i, ids in sorted(reader.most, key=lambda found: found[1]):
        print(f"{i + 1:9,}  {size:8.3g}  {reader.task.show(ids)[:100]}")


def try_to_write(flag, file, write):
    """ValueError if `write` cannot make `file`: known before a book is read."""
    try:
        if Path(file).is_dir():
            raise IsADirectoryError("it is a folder")
        with TemporaryDirectory(dir=Path(file).parent) as folder:
            write(Path(folder, Path(file).name))
    except (OSError, ValueError, ImportError) as e:
        raise ValueError(f"--{flag}: cannot write {file}: {getattr(e, 'strerror', None) or e}") from None


def reply(reader, question, as_json):
    """Ask and print."""
    reader.warn(question)
    probability, best = reader.ask(question).topk(4)
    names, shares = [reader.words.name(i) for i in best.tolist()], [round(p, 4) for p in probability.tolist()]
    if as_json:
        print(json.dumps(dict(question=question, answer=names[0], probability=shares[0],
                              alternatives=list(zip(names[1:], shares[1:])), words_read=reader.words_read,
                              state_floats=state_floats(reader.state))))
    else:
        others = ", ".join(f"{name} {share:.1%}" for name, share in zip(names[1:], shares[1:]))
        print(f"{question}  {names[0]}  ({shares[0]:.1%}; {others})")


def converse(reader):
    """A small conversation at the prompt, until the end of input."""
    print(f"A memory of {state_floats(reader.state):,} numbers listens.\n{HELP}")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            if line in ("quit", "exit"):
                return
            elif line == "forget":
                reader.forget()
            elif line.startswith("read "):
                began, before = time.time(), reader.words_read
                reader.read(line[5:].strip())
                print(f"read {reader.words_read - before:,} words in {time.time() - began:.1f} s")
            elif line.endswith((".", "?")):
                told, stop, asked = line.rpartition(".")
                reader.warn(told)
                reader.tell(told + stop)
                for question in asked.split("?")[:-1]:
                    reply(reader, question.strip() + "?", as_json=False)
            elif line:
                print(HELP)
        except (ValueError, OSError) as e:
            print(e)
        except KeyboardInterrupt:
            print("stopped; nothing of it was read")


def show_samples(config, model, task, device):
    """What is read, the question, the answer and the truth, of five fresh samples of the longest stage."""
    questions, _ = task.questions(dict(length=max(numbers("stages", config.stages))[0], n=5))
    for q, said in zip(questions, answer(model.eval(), questions, device, tqdm(disable=True))):
        context, truth = task.show(np.concatenate(q.context)), task.show(q.answer)
        truth = "correct" if said == list(q.answer) else f"wrong, it is {truth}"
        print(f"{context}  {task.show(q.question)} -> {task.show(said)}  ({truth})")


def make_parser():
    """The flags."""
    parser = Parser(prog="sample.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default=str(PRETRAINED), help="the run to use (the one that is shipped)")
    parser.add_argument("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    parser.add_argument("--facts", default="", help="qa: sentences to tell")
    parser.add_argument("--read", nargs="+", action="extend", default=[], metavar="FILE",
                        help="qa: UTF-8 files to read")
    parser.add_argument("--ask", nargs="+", action="extend", default=[], metavar="QUESTION",
                        help="qa: none starts a conversation")
    parser.add_argument("--written", nargs="?", const="", metavar="FILE.png", help="qa: which segments wrote")
    parser.add_argument("--json", action="store_true", help="qa: answers as JSON, one object a line")
    parser.add_argument("--save_state", type=Path, metavar="FILE", help="qa: keep the memory in a file")
    parser.add_argument("--load_state", type=Path, metavar="FILE", help="qa: begin with a memory from a file")
    return parser


def main(argv=None):
    """The program. `argv` is a list of arguments; None takes those of the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_line_errors("sample.py"):
        torch.set_flush_denormal(True)                                     # as in train.py
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(1)
        device = pick_device(args.device)
        config, model, _ = load(args.out_dir, device)
        task = make_task(config)
        if not hasattr(task, "ask"):
            for name in vars(args).keys() - {"out_dir", "device"}:
                if getattr(args, name) != parser.get_default(name):
                    raise ValueError(f"--{name}: {config.task} has no text to be told; leave it out")
            return show_samples(config, model, task, device)
        if args.json and not (args.ask or args.save_state):
            raise ValueError("--json: without --ask there are no answers to print")
        reader = Reader(config, model, task, device)
        for flag, write in (("save_state", reader.save), ("written", reader.draw)):
            if file := getattr(args, flag):
                try_to_write(flag, file, write)
        if args.load_state:
            reader.load(args.load_state)
        facts = args.facts.strip()
        reader.warn(facts)
        reader.tell(facts + "." if facts and facts[-1] not in ".?!" else facts)
        for file in args.read:
            reader.read(file)
        if args.save_state:
            reader.save(args.save_state)
        if args.written is not None:
            show_written(reader, args.written)
        for question in args.ask:
            reply(reader, question, args.json)
        if not args.ask and not args.save_state and args.written is None:
            converse(reader)


if __name__ == "__main__":
    main()
