"""
The tasks. Every batch is a function of (seed, split, stage, step) and of nothing else: evaluation never
disturbs training, a resumed run sees the batches that the uninterrupted one would have seen, every device
sees the same data.

    recall.py     associative retrieval: remember pairs, or the last value of keys that are rewritten
    babi.py       bAbI: the words, a simulator of qa1 to qa5, a reader of the published files
    babilong.py   BABILong: facts scattered through background text of any length
    passkey.py    five digits, stated once in a long text
    files.py      atomic writes, damage reported by name, one process in a folder
    download.py   the files of bAbI, books and novels

A task has these attributes and methods, which train.py and sample.py use:

    vocab_size, vocab            the number of ids, and the words that have one of their own
    rows                         row i of a batch is of the part rows[i % len(rows)] of the task
    check(config, training)      ValueError, naming the flag, for settings that it cannot serve
    batch(rng, size, stage)      a Batch
    cells(config)                what to evaluate: a list of dicts with a length, a number of questions n, ...
    questions(cell)              a list of Question, and how many were left out because they do not fit
    show(ids)                    ids as text
    kind, unit                   names: of the tasks that share flags, and of what a length counts
    unknown_id                   the id that answers what a text does not say, or -1
    ask(text), words             of tasks that can be told and asked: ids of a question, Words
"""
import re
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "val", "test")


class Batch(NamedTuple):
    """B rows to read, and Q questions about each. Id 0 is the blank, which pads shorter ones."""
    context: np.ndarray      # (B, S, T) ids: S segments of T tokens
    questions: np.ndarray    # (B, Q, n) ids; the answer is due after the last one
    answers: np.ndarray      # (B, Q, A) ids, A to an answer; -1 where nothing is to be asked


class Question(NamedTuple):
    """One question to evaluate on. Its context may be very long: the arrays are views of the background."""
    context: list            # arrays of ids, to be read one after another
    question: list           # ids
    answer: list             # ids


def generator(seed, split, *place):
    """A numpy generator for one batch: seed and what follows are integers >= 0, split is one of SPLITS."""
    return np.random.default_rng((seed, SPLITS.index(split), *place))


def numbers(flag, text, most=3, least=0):
    """'0,1k,2/64' -> [(0,), (1000,), (2, 64)]: at most `most` each, the first >= `least`; else ValueError."""
    found = [re.findall(r"(\d{1,9})([kM]?)", part) for part in text.split(",")]
    values = [tuple(int(n) * dict(k=1000, M=1000000).get(unit, 1) for n, unit in part) for part in found]
    whole = re.fullmatch(r"\d{1,9}[kM]?([/,]\d{1,9}[kM]?)*", text)
    if not whole or any(len(value) > most or value[0] < least for value in values):
        raise ValueError(f"--{flag}: '{text}' is not a list of numbers from {least} on, such as 2,4,8 or 1,1k"
                         + " or 10/128,10/256" * (most > 1))
    return values


def eval_points(config, least=1):
    """[(length, number of questions)] of --eval_lengths and --eval_samples. ValueError names the flag."""
    counts = numbers("eval_samples", config.eval_samples, 1, 1)
    lengths = numbers("eval_lengths", config.eval_lengths, 1, least)
    return [(length, counts[min(i, len(counts) - 1)][0]) for i, (length,) in enumerate(lengths)]


def fill(rows):
    """Ragged rows of ids -> one array (len(rows), the longest), left-padded with 0."""
    out = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, ids in zip(out, rows):
        row[len(row) - len(ids):] = ids
    return out


def segments(rows, T):
    """Rows of ids -> (B, S, T): left-padded to the longest, then right-padded to whole segments."""
    flat = fill(rows)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % T))).reshape(len(rows), -1, T)


def chunks(rows, size, T=1):
    """
    Rows of pieces (lists of arrays) -> arrays (len(rows), size), the last one shorter: all rows side by side.
    They end together: each is filled with blanks to whole segments of T tokens, and blank segments, which are
    read, too, stand before shorter rows. Nothing longer than a chunk is ever copied.
    """
    blanks = lambda n: np.zeros(n, dtype=np.int64)
    whole = [[*row, blanks(-sum(map(len, row)) % T)] for row in rows]
    lengths = [sum(map(len, row)) for row in whole]
    readers = [_blocks([blanks(max(lengths) - n), *row], size) for n, row in zip(lengths, whole)]
    return map(np.stack, zip(*readers))


def _blocks(pieces, size):
    """Cut a row of pieces into blocks of `size` ids."""
    begin = np.cumsum([0, *map(len, pieces)])             # where pieces begin, and the last one ends
    for start in range(0, begin[-1], size):
        first, end = np.searchsorted(begin, start, "right") - 1, np.searchsorted(begin, start + size)
        yield np.concatenate([piece[max(0, start - at):start + size - at]
                              for at, piece in zip(begin[first:end], pieces[first:end])])


def find(task):
    """A task's class, and its settings where no flag says otherwise. ValueError if there is none."""
    from . import babi, babilong, passkey, recall        # they import this file
    tasks = {**dict.fromkeys(recall.TASKS, recall.Recall), **dict.fromkeys(passkey.TASKS, passkey.PassKey)}
    if task not in [*tasks, "babilong"] and not set(task.split("+")) <= set(babi.TASKS):
        raise ValueError(f"--task: there is no '{task}'; choose {', '.join(tasks)}, babilong (qa1 to qa5 in "
                         f"one model), or some of qa1 to qa5, as in qa1+qa2")
    settings = recall.TASKS | passkey.TASKS | babilong.TASKS
    return tasks.get(task, babilong.BABILong), dict(settings.get(task, settings["babilong"]), task=task)


def make_task(config):
    return find(config.task)[0](config)
