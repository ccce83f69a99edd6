"""
What each memory costs on this machine. Times are medians of runs that take turns, so compare them by ratio.

    python results/cost.py                tokens a second, read and trained, and floats carried (recall size)
    python results/cost.py --size gpt2    the same at the size of GPT-2 small, reading only
    python results/cost.py --authors      ARMT beside a loop in the manner of the authors' module
    python results/cost.py --words 10k,1M,10M       seconds and memory of sample.py, per word read
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).parent.parent
sys.path.insert(0, str(TOP))
import torch                                                              # noqa: E402
from tqdm import tqdm                                                     # noqa: E402

from armt import GPT, MEMORIES, GPTConfig, state_floats                   # noqa: E402
from data import numbers                                                  # noqa: E402
from data.babilong import Words, prose                                    # noqa: E402
from data.files import one_line_errors                                    # noqa: E402

SIZES = dict(recall=(dict(n_layer=4, n_embd=128, n_head=4, segment_len=6, vocab_size=128), 64, 50),
             gpt2=(dict(n_layer=12, n_embd=768, n_head=12, segment_len=512, vocab_size=50257), 1, 4))


def medians(works, rounds=7):
    """{name: median seconds} of functions that take turns."""
    times = {name: [] for name in works}
    for i in tqdm(range(rounds + 1), desc="timing", leave=False):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - began] * (i > 0)
    return {name: statistics.median(values) for name, values in times.items()}


def models(size, device, memories):
    """The memories at one of SIZES, and tokens to read: {name: GPT}, idx (B, N)."""
    config, B, segments = SIZES[size]
    idx = torch.randint(100, (B, segments * config["segment_len"]), device=device)
    made = {}
    for name in memories:
        torch.manual_seed(0)
        own = dict(d_mem=32 if size == "recall" else 64) if name == "armt" else {}
        made[name] = GPT(GPTConfig(memory=name, **config, **own)).to(device)
    return made, idx


def kept(model, idx):
    """Bytes that a training step keeps for its backward pass, beside the parameters."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(idx, idx)
    for p in model.parameters():
        sizes.pop(p.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def costs(size, device):
    """Print a line for each memory."""
    made, idx = models(size, device, MEMORIES)
    with torch.no_grad():
        reading = medians({name: lambda m=m: m(idx) for name, m in made.items()}, rounds=5)
        floats = {name: state_floats(m(idx)[2]) // len(idx) for name, m in made.items()}
    training = {}
    if size == "recall":
        training = medians({name: lambda m=m: m(idx, idx)[1].backward() for name, m in made.items()},
                           rounds=3)
    print(f"{SIZES[size][0]}, {idx.size(0)} rows of {idx.size(1):,} tokens; {device}, "
          f"{torch.get_num_threads()} threads")
    print("memory   parameters  state floats  tokens/s reading  over none"
          + "  tokens/s training  over none  kB kept a token" * bool(training))
    for name, m in made.items():
        row = (f"{name:6}{m.n_params():13,}{floats[name]:14,}{idx.numel() / reading[name]:18,.0f}"
               f"{reading[name] / reading['none']:11.2f}")
        if training:
            row += (f"{idx.numel() / training[name]:19,.0f}{training[name] / training['none']:11.2f}"
                    f"{kept(m, idx) / idx.numel() / 1000:17.1f}")
        print(row + " (its state grows)" * (name == "full"))


class Authors(torch.nn.Module):
    """ARMT's equations in the manner of the published module: einsum over (B, M, D, C), all logits kept."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets=None):
        """As GPT.forward without a state: idx (B, N) -> logits (B, N, V), loss"""
        model, logits, memory = self.model, [], {}
        for segment in idx.split(model.config.segment_len, dim=1):
            x = torch.cat((model.wte(segment), model.memory.mem.expand(len(idx), -1, -1)), dim=1)
            for layer, block in enumerate(model.memory.blocks):
                if layer in memory:
                    A, z = memory[layer]
                    q = block.phi(block.W_Q(x))
                    x = x + (torch.einsum("btd,bdc->btc", q, A)
                             / (torch.einsum("btd,bd->bt", q, z)[..., None] + 1e-5))
                x, _ = super(type(block), block).forward(x)
                u = x[:, -block.n_mem:]
                k, v, beta = block.phi(block.W_K(u)), block.W_V(u), torch.sigmoid(block.w_beta(u))
                if layer in memory:
                    c = torch.einsum("bmd,bd->bm", k, z)[..., None] + 1e-5
                    v = v - torch.einsum("bmd,bdc->bmc", k, A) / c
                    gamma = (1 - c / (k.square().sum(-1, keepdim=True) + 1e-5)).clamp(0, 1).detach()
                else:
                    A, z, gamma = 0, 0, 1
                memory[layer] = A + torch.einsum("bmd,bmc->bmdc", k, beta * v).sum(1), z + (gamma * k).sum(1)
            logits.append(model.lm_head(model.memory.ln_f(x)[:, :segment.size(1)]))
        logits = torch.cat(logits, dim=1)
        return logits, None if targets is None else torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def against_authors(device):
    """
    Print how many times faster armt.py reads and trains than that: as it is, compiled, and the limit, a GPT
    that puts as many tokens and memory tokens through its blocks and has no matrix.
    """
    made, idx = models("recall", device, ["armt", "none"])
    again, _ = models("recall", device, ["armt"])                        # the same seed, so the same weights
    again["armt"].memory.forward = torch.compile(again["armt"].memory.forward, dynamic=False)
    T, M = made["armt"].config.segment_len, made["armt"].config.n_mem
    made["none"].config.segment_len = T + M
    more = idx.repeat(1, 2)[:, :idx.size(1) // T * (T + M)]              # as many segments of T + M tokens
    targets = torch.full_like(more, -1)
    targets[:, -1] = more[:, -1]
    works = dict(theirs=(Authors(made["armt"]), idx), ours=(made["armt"], idx),
                 compiled=(again["armt"], idx), limit=(made["none"], more))
    few = idx[:, :18]                      # at initialisation differences of rounding grow with the segments
    assert torch.allclose(made["armt"](few)[0], works["theirs"][0](few)[0][:, -1:], atol=1e-2)
    with torch.no_grad():
        reading = medians({name: lambda m=m, x=x: m(x) for name, (m, x) in works.items()})
    training = medians({name: lambda m=m, x=x: m(x, targets[:, -x.size(1):])[1].backward()
                        for name, (m, x) in works.items()})
    for what, times in (("reading", reading), ("training", training)):
        print(f"{what}: theirs {1000 * times['theirs']:.0f} ms; times as fast: "
              + ", ".join(f"{name} {times['theirs'] / times[name]:.2f}" for name in [*works][1:]))


def words(lengths):
    """Print seconds and peak memory of a process that reads the built-in prose with the shipped memory."""
    text = prose(20000, seed="cost")
    per = Words.count(Words().encode(text))
    print("words       microseconds a word   MB at most")
    for (n,) in numbers("words", lengths, 1, 1):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            for _ in range(n // per):              # not at once: Linux counts the peak of the parent, too
                file.write(text + "\n")
            file.write(text[:int(len(text) * (n % per) / per)])
            file.flush()
            code = ("import resource, sys, time; sys.argv = ['sample.py']; import sample; t = time.time(); "
                    f"sample.main(['--read', {file.name!r}, '--ask', 'Where is Mary?', '--json']); "
                    "print(time.time() - t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
            out = subprocess.check_output([sys.executable, "-c", code], cwd=TOP, stderr=subprocess.PIPE)
        seconds, peak = map(float, out.splitlines()[1].split())
        print(f"{n:<12,}{1e6 * seconds / n:18.1f}{peak:13,.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python results/cost.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--size", choices=SIZES, default="recall")
    what.add_argument("--authors", action="store_true")
    what.add_argument("--words", default="", metavar="LENGTHS")
    args = parser.parse_args()
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with one_line_errors("cost.py"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.authors:
            against_authors(device)
        elif args.words:
            words(args.words)
        else:
            costs(args.size, device)
