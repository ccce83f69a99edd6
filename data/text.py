"""
Plain text, byte by byte: any UTF-8 file is a data set, and there are 256 tokens. The last tenth of each file is kept
back for evaluation.
"""
import numpy as np

from . import babilong


def load(files, part):
    """The bytes of the files' train or val part, as one array of ids. `prose` is the built-in text."""
    parts = []
    for file in files:
        ids = np.frombuffer(babilong.read_text(file, part).encode("utf-8"), dtype=np.uint8)
        if str(file) != babilong.PROSE:
            cut = len(ids) * 9 // 10
            ids = ids[:cut] if part == "train" else ids[cut:]
        parts.append(ids)
    return np.concatenate(parts)


class Text:
    """The task as train.py uses it. A stage is (bytes,), and so is the length of an evaluation."""
    vocab_size = 256
    unit = "bytes"

    def __init__(self, files):
        self.files, self.ids = files, {}

    def batch(self, rng, size, stage, earlier=None, part="train"):
        """`size` passages from random places -> (inputs, the bytes that follow), both (B, n)."""
        ids = self.ids.setdefault(part, None)
        if ids is None:
            ids = self.ids[part] = load(self.files, part)
        (length,) = stage
        if len(ids) <= length:
            raise ValueError(f"background: {len(ids)} bytes of {part} text are too few for passages of {length}")
        start = rng.integers(len(ids) - length, size=size)
        windows = np.stack([ids[s:s + length + 1] for s in start]).astype(np.int64)                 # (B, n + 1)
        return windows[:, :-1], windows[:, 1:]

    def show(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")
