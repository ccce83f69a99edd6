"""
Use a trained memory: tell it facts, let it read a book, ask.

    python sample.py --facts "Mary went to the kitchen." --read book.txt --ask "Where is Mary?"
    python sample.py                                        a small conversation at the prompt
    python sample.py --read book.txt --quiz 100             100 times: three facts, the book, a question
    python sample.py --facts "..." --read book.txt --written  a strip: which segments wrote to memory
    python sample.py --read book.txt --save_state book.pt   read once ...
    python sample.py --load_state book.pt --ask "..."       ... ask tomorrow
    python sample.py --out_dir out/remember-armt-seed0      recall, passkey: a question, the answer and the truth
    python sample.py --out_dir out/text-armt-seed0 --prompt "The "    text: go on writing

Facts are told first, then files are read, then questions are asked. Whatever its length, what was read is kept in one
state of fixed size; a question is answered from that state alone and leaves it as it was.
"""
import argparse
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from armt import check_state, state_floats, tensors
from data import Question, babilong
from train import Parser, answer, load, make_task, numbers, pick_device, write_atomically

PRETRAINED = Path(__file__).parent / "data" / "pretrained" / "joint-armt-seed0"
HELP = """tell     a sentence with a full stop: Mary went to the kitchen.
ask      a sentence with a question mark: Where is Mary?
read     read FILE
forget   start again with an empty memory
quit     or Ctrl-D"""


class Reader:
    """A model and what it has read: the state after all full segments, and the tail that waits for its segment."""

    def __init__(self, model, task, device, watch=False):
        self.model, self.task, self.words, self.device = model.eval(), task, task.words, device
        self.known = task.vocabulary()
        self.watch = watch                                 # whether to note what each segment writes
        weights = b"".join(p.detach().cpu().float().numpy().tobytes() for p in model.parameters())
        self.fingerprint = hashlib.sha256(weights).hexdigest()
        self.forget()

    def forget(self):
        """Begin again with an empty memory."""
        self.state, self.words_read, self.seconds = self.model.init_state(1), 0, 0.0
        self.written = []                                  # (change of the memory, ids) of each segment
        self.tail = torch.zeros(1, 0, dtype=torch.long, device=self.device)

    def tensor(self, ids):
        return torch.tensor([ids], dtype=torch.long, device=self.device)                                # (1, n)

    def warn(self, text):
        """Say which words of the text the task does not know."""
        for word in self.words.unknown(text, self.known):
            print(f"note: the task does not know '{word}'; it is read like any word of a book", file=sys.stderr)

    def tell(self, text):
        """Read a piece of text. It may stop anywhere between two words: telling in two calls equals telling in one."""
        began, T = time.time(), self.model.config.segment_len
        idx = self.tensor(self.words.pad(self.words.encode(text), at=self.tail.size(1)))
        for piece in idx.split(T, dim=1) if self.watch else [idx]:                 # T tokens complete at most a segment
            before, text = self.state, torch.cat((self.tail, piece), dim=1)
            self.state, self.tail = self.model.read(piece, self.state, self.tail)
            if self.watch and text.size(1) > T:                                            # one was complete
                self.written.append((change(before, self.state), text[0, :T].tolist()))
        self.words_read += self.words.count(idx.cpu())
        self.seconds += time.time() - began

    def read(self, file):
        """Read a UTF-8 file of any size, piece by piece, with a progress bar. If it fails, nothing was read."""
        before = self.state, self.tail, self.words_read
        size = os.path.getsize(file)
        if size == 0:
            raise ValueError(f"--read: {file} is empty")
        try:
            with open(file, encoding="utf-8") as f, tqdm(total=size, desc=Path(file).name, unit="B", unit_scale=True,
                                                         leave=False) as bar:
                rest = ""
                while block := f.read(1 << 16):
                    text = rest + block
                    cut = max(text.rfind(" "), text.rfind("\n")) + 1 or len(text)         # not inside a word
                    self.tell(text[:cut])
                    rest = text[cut:]
                    bar.update(f.buffer.tell() - bar.n)
                self.tell(rest)
        except BaseException as e:
            self.state, self.tail, self.words_read = before
            if isinstance(e, UnicodeDecodeError):
                raise ValueError(f"--read: {file} is not UTF-8 text") from None
            raise

    @torch.no_grad()
    def ask(self, question):
        """Probabilities of all words as the answer, (V,). What was read stays as it was."""
        idx = self.tensor(self.task.ask(question))
        if not idx.any():                                                        # blanks alone, or nothing
            raise ValueError("--ask: the question has no words")
        state = self.state
        if self.tail.size(1):
            _, _, state = self.model(self.tail, state=state)                     # the tail as a short segment, for now
        return self.model(idx, state=state)[0][0, -1].softmax(-1)

    def save(self, file):
        """Write the memory and the tail that waits, with the mark of the model that made them."""
        memory = dict(fingerprint=self.fingerprint, state=self.state, tail=self.tail, words_read=self.words_read)
        write_atomically(Path(file), lambda p: torch.save(memory, p))

    def load(self, file):
        """Go on from a memory that `save` wrote. ValueError if it is none, or another model's."""
        try:
            memory = torch.load(file, map_location=self.device, weights_only=True)
            fingerprint, state, tail, words_read = (memory[k] for k in ("fingerprint", "state", "tail", "words_read"))
        except FileNotFoundError:
            raise ValueError(f"--load_state: there is no file {file}") from None
        except Exception:                                              # a broken file can raise nearly anything
            raise ValueError(f"--load_state: {file} is not a memory saved by --save_state") from None
        if fingerprint != self.fingerprint:
            raise ValueError(f"--load_state: the memory in {file} was made by another model")
        check_state(state, self.state)
        self.state, self.tail, self.words_read = state, tail, words_read


def change(before, after):
    """How far a memory has moved: the length of the difference of two states. ValueError if they are caches."""
    pairs = list(zip(tensors(before), tensors(after)))
    if any(a.shape != b.shape for a, b in pairs):
        raise ValueError("--written: this memory keeps a cache of all that it reads; every segment writes to it")
    return sum((b - a).square().sum().item() for a, b in pairs) ** 0.5


def show_written(reader, task, width=72, most=5):
    """A strip of text: what wrote to memory, and the segments that wrote most."""
    if not reader.written:
        return print("not a segment was completed, so nothing is in memory yet")
    changes = np.array([size for size, _ in reader.written])
    if not changes.any():
        return print("nothing was written: no segment changed the memory")
    cells = [part.max() for part in np.array_split(changes, min(width, len(changes)))]
    print("".join("▁▂▃▄▅▆▇█"[min(7, int(8 * cell / changes.max()))] for cell in cells))
    wrote = (changes > 0).sum()
    print(f"{len(changes):,} segments, from left to right; {wrote:,} changed the memory, by at most {changes.max():.3g} "
          f"(the height). Those that wrote most, of other words only their place (~):")
    for i in sorted(np.argsort(-changes)[:min(most, wrote)]):
        print(f"{i + 1:7,}  {changes[i]:8.3g}  {task.show(reader.written[i][1])[:200]}")


def peak_mb():
    """The most memory this process (on Linux also what started it) has held, in MB; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024                                # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 1_000_000


def reply(reader, question, as_json):
    """Ask and print. The seconds are those of reading and answering."""
    began = time.time()
    reader.warn(question)
    probability, best = reader.ask(question).topk(4)
    names = [reader.words.name(i) for i in best.tolist()]
    others = dict(zip(names[1:], (round(p, 4) for p in probability[1:].tolist())))
    if as_json:
        print(json.dumps(dict(question=question, answer=names[0], alternatives=others,
                              probability=round(probability[0].item(), 4), words_read=reader.words_read,
                              state_floats=state_floats(reader.state),
                              seconds=round(reader.seconds + time.time() - began, 4), peak_mb=peak_mb())))
    else:
        print(f"{question}  {names[0]}  ({probability[0].item():.1%}; "
              f"{', '.join(f'{name} {p:.1%}' for name, p in others.items())})")


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
            elif line.endswith("?"):
                reply(reader, line, as_json=False)
            elif line.endswith("."):
                reader.warn(line)
                reader.tell(line)
            elif line:
                print(HELP)
        except (ValueError, OSError) as e:
            print(e)
        except KeyboardInterrupt:
            print("stopped; nothing of it was read")


def quiz(reader, task, files, n):
    """n rows side by side: each is told a short story of its own, then all read the files, then each is asked."""
    text = [np.array(task.words.pad(task.words.encode(babilong.read_text(file))), dtype=np.int32) for file in files]
    dice, questions = random.Random(f"quiz {n}"), []
    for i in range(n):
        facts, found, _ = task.story(dice, task.rows[i % len(task.rows)], 3, [])
        question, right = dice.choice(found)
        questions.append(Question([*task.tell(facts), *text], task.ask(question), task.words.id(right)))
    tokens = sum(len(piece) for q in questions for piece in q.context)
    with tqdm(total=tokens, desc="reading", unit="tok", unit_scale=True) as bar:
        said = answer(reader.model, questions, reader.device, bar)
    right = sum(a == [q.answer] for a, q in zip(said, questions))
    print(f"{right} of {n} right after {sum(map(task.words.count, text)):,} words")


def show_recall(model, task, config, device, n):
    """Pairs or text with a pass key, question, answer and truth of n fresh samples of the longest stage."""
    questions, _ = task.questions(max(numbers("stages", config.stages))[0], n)
    for q, said in zip(questions, answer(model.eval(), questions, device, tqdm(disable=True))):
        truth = np.atleast_1d(q.answer)
        print(f"{task.show(np.concatenate(q.context))}  {task.show(q.question)} -> {task.show(said)}  "
              f"({'right' if np.array_equal(said, truth) else f'wrong, it is {task.show(truth)}'})")


def write_text(model, task, args, device):
    """Go on from the prompt, byte by byte."""
    prompt = args.prompt.encode("utf-8") or b"\n"
    torch.manual_seed(args.seed)
    idx = torch.tensor([list(prompt)], device=device)
    print(task.show(model.eval().generate(idx, args.tokens, temperature=args.temperature, top_k=args.top_k)[0].tolist()))


def make_parser():
    """The flags; help says which kind of run each is for."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--out_dir", default=str(PRETRAINED), help="the run to use; left out, the one that is shipped")
    parser.add_argument("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    parser.add_argument("--facts", default="", help="qa: sentences to tell")
    parser.add_argument("--read", nargs="+", default=[], metavar="FILE", help="qa: UTF-8 files to read")
    parser.add_argument("--ask", nargs="+", default=[], metavar="QUESTION", help="qa: questions; none, a conversation")
    parser.add_argument("--quiz", type=int, metavar="N", help="qa: N times three facts, the files, one question")
    parser.add_argument("--written", action="store_true", help="qa: show which segments wrote to memory")
    parser.add_argument("--json", action="store_true", help="qa: answers as JSON, one object a line")
    parser.add_argument("--save_state", metavar="FILE", help="qa: keep the memory in a file")
    parser.add_argument("--load_state", metavar="FILE", help="qa: begin with a memory from a file")
    parser.add_argument("--samples", type=int, default=5, help="recall, passkey: how many samples to show (5)")
    parser.add_argument("--prompt", default="", help="text: what to go on from")
    parser.add_argument("--tokens", type=int, default=300, help="text: how many bytes to write (300)")
    parser.add_argument("--temperature", type=float, default=0.8, help="text: 0 takes the likeliest byte (0.8)")
    parser.add_argument("--top_k", type=int, help="text: draw among the k likeliest bytes")
    parser.add_argument("--seed", type=int, default=0, help="text: seed of the dice (0)")
    return parser


def main(argv=None):
    """The program. `argv` is a list of arguments; None takes those of the command line."""
    args = make_parser().parse_args(argv)
    torch.set_flush_denormal(True)                                     # as in train.py
    try:
        device, _ = pick_device(args.device)
        config, model, _ = load(args.out_dir, device)
        task = make_task(config)
        if config.task in ("remember", "rewrite", "passkey"):
            return show_recall(model, task, config, device, args.samples)
        if config.task == "text":
            return write_text(model, task, args, device)
        if args.save_state and not Path(args.save_state).parent.is_dir():
            raise ValueError(f"--save_state: there is no folder {Path(args.save_state).parent}")
        reader = Reader(model, task, device, args.written)
        if args.load_state:
            reader.load(args.load_state)
        if args.facts:
            reader.warn(args.facts)
            reader.tell(args.facts)
        if args.quiz:
            return quiz(reader, task, args.read, args.quiz)
        for file in args.read:
            reader.read(file)
        if args.written:
            show_written(reader, task)
        if args.save_state:
            reader.save(args.save_state)
        for question in args.ask:
            reply(reader, question, args.json)
        if not (args.ask or args.save_state or args.written):
            converse(reader)
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: {e}")


if __name__ == "__main__":
    main()
