"""
The tasks. Every batch is a function of (seed, split, stage, step) and of nothing else: evaluation never disturbs
training, a resumed run sees the batches that the uninterrupted one would have seen, every device sees the same data.

    recall.py     associative retrieval: remember pairs, or the last value of keys that are rewritten
    babi.py       bAbI: the words, a simulator of qa1, a reader and writer of the published files
    babilong.py   BABILong: facts scattered through background text of any length
    passkey.py    five digits, told once in a long text
    text.py       bytes of any file
"""
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "val", "test")


class Batch(NamedTuple):
    """B rows to read, and Q questions about each. Rows and questions are filled in front with id 0."""
    context: np.ndarray      # (B, N) ids, or (B, F, N) where each of F facts is to be a segment of its own
    questions: np.ndarray    # (B, Q, n) ids; the answer is due after the last one
    answers: np.ndarray      # (B, Q) ids, or (B, Q, A) of answers with A ids; -1 where nothing is to be asked
    stories: list = None     # what each row was told so far, in lists, for a batch that goes on from this one


class Question(NamedTuple):
    """One question to evaluate on. The context is a list of arrays, views of longer ones, so it may be very long."""
    context: list            # arrays of ids, to be read one after another
    question: list           # ids
    answer: int              # the id that is right, or an array of A ids that all have to be
    depth: float = None      # where the oldest fact that it needs stands: 0 is the beginning of the context, 1 its end


def generator(seed, split, *place):
    """A numpy generator for one batch: seed and what follows are integers >= 0, split is train, val or test."""
    return np.random.default_rng((seed, SPLITS.index(split), *place))


def fill(rows, length=None):
    """Ragged rows of ids -> one array (len(rows), length or the longest), filled in front with 0."""
    length = max(map(len, rows)) if length is None else length
    out = np.zeros((len(rows), length), dtype=np.int64)
    for row, ids in zip(out, rows):
        row[length - len(ids):] = ids
    return out


def chunks(rows, size):
    """
    Rows of pieces (lists of arrays) -> arrays (len(rows), size), the last one shorter: all rows side by side, filled in
    front to the length of the longest. Nothing longer than a chunk is ever copied.
    """
    longest = max(sum(map(len, row)) for row in rows)
    readers = [_blocks([np.zeros(longest - sum(map(len, row)), dtype=np.int64), *row], size) for row in rows]
    return map(np.stack, zip(*readers))


def _blocks(pieces, size):
    """Cut a row of pieces into blocks of `size` ids."""
    block, have = [], 0
    for piece in pieces:
        while have + len(piece) >= size:
            block.append(piece[:size - have])
            piece = piece[size - have:]
            yield np.concatenate(block)
            block, have = [], 0
        block.append(piece)
        have += len(piece)
    if have:
        yield np.concatenate(block)
