"""
The proofs: what this repository claims, shown on models and texts so small that all of it runs on a CPU.

A name is the sentence that its test proves. A test that takes `memory` runs for all of MEMORIES (a new one
joins by itself) and for `mine`, a memory written below as a reader would write one; with `ablate`, for all
ablation words, too. Where a paper or a plain GPT can be written down once more, slowly and without looking at
armt.py, the two are compared in float64.

    pytest                      everything
    pytest -k future            the tests with this word in their name
    pytest -m "not slow"        without those that train a model
"""
import hashlib
import http.server
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import armt
import sample
import train
from armt import GPT, GPTConfig, MEMORIES
from results import table
from data import (SPLITS, babi, babilong, chunks, download, fill, files, generator, make_task, passkey,
                  recall, segments)

torch.set_num_threads(1)         # nothing here is large enough to be worth a second thread
TOP = Path(train.__file__).parent

# ------------------------------------------------------------------------------------------------------------
# 1. The model: tools
# ------------------------------------------------------------------------------------------------------------

V, T, C, L = 20, 4, 16, 2                                  # words, segment, width, layers of the models below


class MineBlock(armt.Block):
    """A memory of one's own: a running mean of what the block said, for all tokens of the next segment."""

    def __init__(self, config):
        super().__init__(config)
        self.rate = nn.Parameter(torch.zeros(config.n_embd))                                            # (C,)

    def init_state(self, batch_size):
        return self.rate.new_zeros(batch_size, 1, len(self.rate))                                  # (B, 1, C)

    def forward(self, x, mean):
        x, _ = super().forward(x + mean)                                                           # (B, T, C)
        keep = torch.sigmoid(self.rate)                                            # learned, for each feature
        return x, keep * mean + (1 - keep) * x.mean(1, keepdim=True)                               # (B, 1, C)


class Mine(armt.Layered):
    block = MineBlock


@pytest.fixture
def mine(monkeypatch):
    """Registers `mine` for one test; nobody else shall find it in MEMORIES."""
    monkeypatch.setitem(MEMORIES, "mine", Mine)


def every_memory(test):
    return pytest.mark.usefixtures("mine")(pytest.mark.parametrize("memory", [*MEMORIES, "mine"])(test))


def every_variant(test):
    """All memories as they are, with each ablation word, and ARMT's other rule, a word for `tiny`, too."""
    cases = [(memory, "nothing") for memory in [*MEMORIES, "mine"]] + [("armt", "delta")]
    cases += [(name, word) for name, Memory in MEMORIES.items() for word in Memory.ablations]
    return pytest.mark.usefixtures("mine")(pytest.mark.parametrize("memory, ablate", cases)(test))


def tiny(memory, ablate="nothing", **other):
    """A seeded model of 2 layers, in which no weight sits at a 0 or a 1 where it could not be missed."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, segment_len=T, n_layer=L, n_head=2, n_embd=C)
    own = {k: v for k, v in dict(n_mem=2, d_mem=3, window=1).items() if k in MEMORIES[memory].options}
    if ablate == "delta":
        own, ablate = own | dict(rule="delta"), "nothing"
    model = GPT(GPTConfig(memory=memory, ablate=ablate, **sizes | own | other))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def some_text(n, rows=2, seed=1):
    return torch.randint(V, (rows, n), generator=torch.Generator().manual_seed(seed))


def reach(memory):
    """How many segments back a memory of `tiny` can see: in bswa each of L layers adds its window of one."""
    return dict(none=0, bswa=L).get(memory, math.inf)


def all_logits(model, idx, state=None):
    """The logits of every position: each has a target."""
    return model(idx, targets=idx, state=state)[0]


def assert_close(a, b, tolerance=1e-9):
    """Equal in float64, whatever the order of the sums."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same(a, b):
    """Bit for bit: tensors, or states."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------
# 1. The model: what holds for every memory
# ------------------------------------------------------------------------------------------------------------

@every_variant
def test_the_future_is_invisible(memory, ablate):
    model, idx = tiny(memory, ablate), some_text(19)                      # four full segments and a short one
    before = all_logits(model, idx)
    for edit in (1, 3, 4, 6, 12):
        other = idx.clone()
        other[:, edit] = (other[:, edit] + 1) % V
        after = all_logits(model, other)
        assert torch.equal(after[:, :edit], before[:, :edit]), f"token {edit} was seen before it was read"
        assert not torch.equal(after[:, edit], before[:, edit])
        for start in range(edit // T * T + T, 19, T):                      # the segments that follow
            segment, distance = slice(start, start + T), start // T - edit // T
            assert torch.equal(after[:, segment], before[:, segment]) == (distance > reach(memory))


@every_variant
def test_the_state_is_the_whole_past(memory, ablate, tmp_path):
    model, idx = tiny(memory, ablate).double(), some_text(12)
    whole, _, end = model(idx, idx)
    first, _, state = model(idx[:, :8], idx[:, :8])
    torch.save(state, tmp_path / "state.pt")
    for state in (state, torch.load(tmp_path / "state.pt", weights_only=True)):
        rest, _, state = model(idx[:, 8:], idx[:, 8:], state)
        assert_close(torch.cat((first, rest), dim=1), whole)
        assert_close(state, end)


@every_variant
def test_two_questions_from_one_state_are_two_separate_reads(memory, ablate):
    model, book = tiny(memory, ablate).double(), some_text(8)
    for gradient in (True, False):                                # in-place work is tempting without gradient
        with torch.set_grad_enabled(gradient):
            empty = model.init_state(2)
            state = model(book, state=empty)[2]
            untouched = armt.state_map(torch.clone, state)
            for question in (some_text(3, seed=2), some_text(6, seed=3)):
                answer = all_logits(model, question, state)
                assert_close(answer, all_logits(model, torch.cat((book, question), dim=1))[:, 8:])
                model.generate(question, 5, state)
                assert_same(state, untouched)
            assert_same(empty, model.init_state(2))


@every_variant
def test_no_module_keeps_anything_for_itself(memory, ablate):
    model, idx = tiny(memory, ablate), some_text(10)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    before = model(idx, idx)
    model(some_text(9, rows=3, seed=2))
    model.generate(some_text(5, seed=3), 4)
    assert_same(model(idx, idx), before)
    assert_same(dict(model.state_dict()), weights)


@every_variant
def test_the_gradient_of_the_last_segment_reaches_the_first(memory, ablate):
    model, idx = tiny(memory, ablate), some_text(11) % (V - 1)
    idx[:, 1] = V - 1                                            # this word occurs in the first segment alone
    targets = idx.clone()
    targets[:, :8] = -1
    _, in_one_call, _ = model(idx, targets)
    _, in_two_calls, _ = model(idx[:, 4:], targets[:, 4:], model(idx[:, :4])[2])
    for loss in (in_one_call, in_two_calls):
        (gradient,) = torch.autograd.grad(loss, model.wte.weight)
        assert gradient.abs().sum() > 0
        reached = gradient[V - 1].abs().max()
        cut_off = memory == "none" or (memory, ablate) == ("bswa", "stop_gradient")
        assert reached == 0 if cut_off else reached > 1e-9


@every_variant
def test_every_parameter_has_something_to_learn(memory, ablate):
    model, idx = tiny(memory, ablate), some_text(12)
    model(idx, idx)[1].backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert not idle


@every_memory
def test_what_was_read_long_ago_can_be_learned(memory):
    model = tiny(memory)
    idx = torch.zeros(4, 3 * T, dtype=torch.long)
    idx[:, 1] = torch.arange(1, 5)                   # four books that differ in one word of the first segment
    targets = torch.full_like(idx, -1)
    targets[:, -1] = idx[:, 1]                               # which was it? asked at the end of the third
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(60 if memory == "none" else 400):
        _, loss, _ = model(idx, targets)
        if loss < 0.3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # one of four: all that none can say
    assert loss >= math.log(4) - 1e-4 if memory == "none" else loss < 0.3
    _, loss, _ = model(idx[:, -T:], targets[:, -T:])
    assert loss >= math.log(4) - 1e-4                                 # so it was in the state, and only there


@every_variant
def test_rows_of_a_batch_do_not_mix(memory, ablate):
    model, idx = tiny(memory, ablate).double(), some_text(10)
    other = idx.clone()
    other[1] = (other[1] + 1 + some_text(10, rows=1, seed=2)[0] % (V - 1)) % V    # other words in row 1
    logits, _, state = model(idx, idx)
    changed, _, changed_state = model(other, other)
    assert torch.equal(changed[0], logits[0]) and not torch.equal(changed[1], logits[1])
    assert_same(armt.state_map(lambda s: s[0], changed_state), armt.state_map(lambda s: s[0], state))
    for row in (0, 1):
        alone, _, alone_state = model(idx[row:row + 1], idx[row:row + 1])
        assert_close(alone[0], logits[row])
        assert_close(alone_state, armt.state_map(lambda s: s[row:row + 1], state))


@every_variant
def test_logits_are_those_of_the_supervised_columns_and_minus_one_is_ignored(memory, ablate):
    model, idx, columns = tiny(memory, ablate).double(), some_text(14), [1, 2, 9, 11, 13]     # none in 4 to 7
    targets = torch.full_like(idx, -1)
    targets[:, columns] = some_text(5, seed=2)
    targets[0, 9] = targets[1, 2] = -1                           # these columns have a target in one row only
    everything = all_logits(model, idx)
    logits, loss, _ = model(idx, targets)
    assert_close(logits, everything[:, columns])
    said = [-everything[row, c].log_softmax(-1)[targets[row, c]]
            for row in (0, 1) for c in columns if targets[row, c] >= 0]
    assert len(said) == 8
    assert_close(loss, torch.stack(said).mean())

    logits, loss, _ = model(idx, torch.full_like(idx, -1))
    assert logits.shape == (2, 0, V) and loss == 0
    logits, loss, _ = model(idx)
    assert logits.shape == (2, 1, V) and loss is None
    assert_close(logits, everything[:, -1:])


# ------------------------------------------------------------------------------------------------------------
# 1. The model: against a plain GPT, and against the papers, written once more and slowly
# ------------------------------------------------------------------------------------------------------------

def norm(p, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]


def turn(x):
    """Rotary positions as in books: features i and i + d/2 are one complex number, and it is turned."""
    n, d = x.shape
    angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(d // 2) / (d // 2)).double()          # (n, d/2)
    z = torch.complex(x[:, :d // 2], x[:, d // 2:]) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag), dim=1)


def plain_block(p, name, x, n_head, hidden=None):
    """One block over one row x (n, C): a token looks at itself and back, or at all not `hidden` (n, n)."""
    future = torch.ones(len(x), len(x)).triu(1).bool() if hidden is None else hidden
    qkv = norm(p, name + ".ln_1", x) @ p[name + ".attn.c_attn.weight"].T
    heads = []
    for q, k, v in zip(*(part.chunk(n_head, dim=1) for part in qkv.chunk(3, dim=1))):
        weight = torch.exp(turn(q) @ turn(k).T / math.sqrt(q.size(1))).masked_fill(future, 0)         # (n, n)
        heads.append(weight / weight.sum(1, keepdim=True) @ v)
    x = x + torch.cat(heads, dim=1) @ p[name + ".attn.c_proj.weight"].T
    h = norm(p, name + ".ln_2", x) @ p[name + ".mlp.c_fc.weight"].T
    return x + (h * (1 + torch.erf(h / math.sqrt(2))) / 2) @ p[name + ".mlp.c_proj.weight"].T


def plain_gpt(p, x, n_head=2, hidden=None):
    """Embeddings x (n, C) -> (n, C) after the final LayerNorm."""
    for layer in range(L):
        x = plain_block(p, f"memory.blocks.{layer}", x, n_head, hidden)
    return norm(p, "memory.ln_f", x)


@pytest.mark.parametrize("memory, span", [("none", T), ("full", 15)])
def test_none_and_full_are_a_plain_gpt(memory, span):
    """none reads each segment as if it were alone, full reads all as one."""
    model, idx = tiny(memory).double(), some_text(15)
    p = model.state_dict()
    for row, logits in zip(idx, all_logits(model, idx)):
        by_hand = [plain_gpt(p, p["wte.weight"][part]) @ p["lm_head.weight"].T for part in row.split(span)]
        assert_close(logits, torch.cat(by_hand), 1e-10)


@pytest.mark.parametrize("ablate", ["nothing", *MEMORIES["rmt"].ablations])
def test_the_state_of_rmt_is_its_write_tokens_after_the_final_layernorm(ablate):
    model, idx, M = tiny("rmt", ablate, n_mem=3).double(), some_text(11), 3
    p = model.state_dict()
    logits, _, state = model(idx, idx)
    for row in (0, 1):
        mem, by_hand = p["memory.mem"], []
        for part in idx[row].split(T):
            n = len(part) + 2 * M
            where = lambda i: "mem" if i < M else "text" if i < M + len(part) else "write"
            hidden = [[j > i and not (where(i) == where(j) != "text" and ablate != "two_way")
                       for j in range(n)]
                      for i in range(n)]
            out = plain_gpt(p, torch.cat((mem, p["wte.weight"][part], mem)), hidden=torch.tensor(hidden))
            mem = out[-M:]                                                                  # [read; h; write]
            by_hand.append(out[M:-M] @ p["lm_head.weight"].T)
        assert_close(logits[row], torch.cat(by_hand), 1e-10)
        assert_close(state[row], mem, 1e-10)


def phi(x, words, nu):
    """DPFP-nu one number at a time: x is a list of numbers (tensors without axes), and so is the result."""
    r = [n.clamp(min=0) for n in x] + [(-n).clamp(min=0) for n in x]
    f = [r[i] * r[i - j] for j in range(1, nu + 1) for i in range(len(r))]   # r[-1] is the last one: it rolls
    size = sum(n * n for n in f) ** 0.5
    return [n / size for n in f] if "delta" in words else f


def armt_by_hand(p, row, words, nu=3, gate="sigmoid"):
    """
    The paper, token by token: row (N,) -> logits (N, V). A is a list of D vectors, z a list of D numbers. The
    first segment goes apart, as in the paper: nothing is read, vbar = 0, gamma = 1.
    """
    D = p["memory.blocks.0.W_K.weight"].size(0) * 2 * nu
    n_mem, state, logits = len(p["memory.mem"]), [None] * L, []

    def ask(f, A, z):
        answer, overlap = sum(n * a for n, a in zip(f, A)), sum(n * b for n, b in zip(f, z)) + 1e-5
        return answer if "delta" in words else answer / overlap, overlap

    for part in row.split(T):
        x = torch.cat((p["wte.weight"][part], p["memory.mem"]))
        for layer in range(L):
            name = f"memory.blocks.{layer}"
            if state[layer] is not None:
                x = torch.stack([t + ask(phi(p[name + ".W_Q.weight"] @ t, words, nu), *state[layer])[0]
                                 for t in x])
            x = plain_block(p, name, x, n_head=2)
            old = state[layer] or ([torch.zeros(C).double()] * D, [torch.zeros(()).double()] * D)
            A, z = list(old[0]), list(old[1])
            for u in x[-n_mem:]:                          # all memory tokens of a segment see the old A and z
                k, v = phi(p[name + ".W_K.weight"] @ u, words, nu), p[name + ".W_V.weight"] @ u
                beta = p[name + ".w_beta.weight"][0] @ u + p[name + ".w_beta.bias"][0]
                beta = 1 / (1 + torch.exp(-beta)) if gate == "sigmoid" else (beta / 6 + 0.5).clamp(0, 1)
                vbar, gamma = 0, 1
                if state[layer] is not None and any(n != 0 for n in old[1]):
                    vbar, overlap = ask(k, *old)
                    gamma = 1 - overlap.item() / (sum(n.item() ** 2 for n in k) + 1e-5)
                    gamma = min(max(gamma, 0), 1)    # a constant
                vbar, gamma = 0 if "no_delta" in words else vbar, 1 if "no_gamma" in words else gamma
                A = [a + beta * n * (v - vbar) for a, n in zip(A, k)]
                z = [b + (beta if "gated_z" in words else 1) * gamma * n for b, n in zip(z, k)]
            state[layer] = A, z
        logits.append(norm(p, "memory.ln_f", x)[:len(part)] @ p["lm_head.weight"].T)
    return torch.cat(logits)


def turned(x, position):
    """One vector (d,) at one position."""
    angle = position / 10000 ** (torch.arange(len(x) // 2) / (len(x) // 2)).double()
    z = torch.complex(x[:len(x) // 2], x[len(x) // 2:]) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag))


def look(q, seen, position=None, n_head=2):
    """One query (C,) at a position (None: no positions) looks at a list of (position, key, value): (C,)."""
    heads = []
    for part in torch.arange(C).chunk(n_head):
        place = (lambda x, at: x[part]) if position is None else (lambda x, at: turned(x[part], at))
        weight = [torch.exp(place(q, position) @ place(k, at) / math.sqrt(len(part))) for at, k, _ in seen]
        heads.append(sum(w * v[part] for w, (_, _, v) in zip(weight, seen)) / sum(weight))
    return torch.cat(heads)


def feed(p, name, x):
    """The MLP and its residual, for one token (C,)."""
    h = p[name + ".mlp.c_fc.weight"] @ norm(p, name + ".ln_2", x)
    return x + p[name + ".mlp.c_proj.weight"] @ (h * (1 + torch.erf(h / math.sqrt(2))) / 2)


def fam_by_hand(p, row, words, n_mem, window):
    """Algorithm 2, row by row, with a clock that never stops: row (N,) -> logits (N, V)"""
    names = [f"memory.blocks.{layer}" for layer in range(L)]

    def project(name, rows):
        return [(p[name + ".attn.c_attn.weight"] @ norm(p, name + ".ln_1", x)).chunk(3) for x in rows]

    def out(name, y):
        return p[name + ".attn.c_proj.weight"] @ y

    fam, prompt = [], list(p["memory.mem"])
    for name in names:                                      # the prompt climbs alone, its rows see each other
        fam.append(prompt)
        rows = project(name, prompt)
        seen = [(i, k, v) for i, (_, k, v) in enumerate(rows)]
        prompt = [feed(p, name, x + out(name, look(q, seen, i)))
                  for i, (x, (q, _, _)) in enumerate(zip(prompt, rows))]
    caches, logits = [[] for _ in names], []
    for start in range(0, len(row), T):
        x = list(p["wte.weight"][row[start:start + T]])
        for layer, name in enumerate(names):
            cache, rows, tokens = caches[layer], project(name, fam[layer]), project(name, x)
            before = [(start - n_mem + i, k, v) for i, (_, k, v) in enumerate(rows)]  # the last places before
            now = [(start + t, k, v) for t, (_, k, v) in enumerate(tokens)]
            if "sum_fam" in words:
                rows = project(name, p[name + ".query"])
            said = [out(name, look(q, cache + before + now[:t + 1], start + t))
                    for t, (q, _, _) in enumerate(tokens)]
            kept = [out(name, look(q, before + now, start - n_mem + i)) for i, (q, _, _) in enumerate(rows)]
            if start and not words & {"no_copy", "sum_fam"}:
                kept = [a + f for a, f in zip(kept, fam[layer])]
            fam[layer] = [feed(p, name, a) for a in kept]
            x = [feed(p, name, i + a) for i, a in zip(x, said)]
            caches[layer] = (cache + now)[-window * T:] if window else []
            if "stop_gradient" in words:
                caches[layer] = [(at, k.detach(), v.detach()) for at, k, v in caches[layer]]
        logits += [p["lm_head.weight"] @ norm(p, "memory.ln_f", t) for t in x]
    return torch.stack(logits)


def lm2_by_hand(p, row, words, n_mem, mem_layers):
    """The equations of the banner, token by token and slot by slot: row (N,) -> logits (N, V)"""
    banks, logits = [list(torch.eye(n_mem, C).double())] * L, []
    for part in row.split(T):
        x = list(p["wte.weight"][part])
        for layer, name in enumerate(f"memory.blocks.{layer}" for layer in range(L)):

            def ask(which, asking, asked):
                W_Q, W_K, W_V = (p[f"{name}.{which}.W_{letter}.weight"] for letter in "QKV")
                return [look(W_Q @ a, [(None, W_K @ b, W_V @ b) for b in asked]) for a in asking]

            def gate(which, h, slot=None):
                if f"no_{which}_gate" in words:
                    return 1
                W, b = p[f"{name}.gates.{which}.W.weight"], p[f"{name}.gates.{which}.b"]
                seen = 0 if slot is None else p[f"{name}.gates.{which}.W_bank.weight"] @ torch.tanh(slot)
                return 1 / (1 + torch.exp(-(W @ h + seen + b)))

            qkv = [(p[name + ".attn.c_attn.weight"] @ norm(p, name + ".ln_1", t)).chunk(3) for t in x]
            seen = [(i, k, v) for i, (_, k, v) in enumerate(qkv)]
            a = [p[name + ".attn.c_proj.weight"] @ look(q, seen[:i + 1], i)
                 for i, (q, _, _) in enumerate(qkv)]
            y = a
            if layer < mem_layers:
                bank = banks[layer]
                y = [t + gate("output", e) * e for t, e in zip(a, ask("read", a, bank))]
                banks[layer] = [gate("input", u, slot) * torch.tanh(u) + gate("forget", u, slot) * slot
                                for u, slot in zip(ask("write", bank, a), bank)]
            x = [feed(p, name, i + t) for i, t in zip(x, y)]
        logits += [p["lm_head.weight"] @ norm(p, "memory.ln_f", t) for t in x]
    return torch.stack(logits)


def assert_equal_by_hand(model, by_hand, tolerance=1e-9):
    """Logits, and the gradient of the loss for every parameter, of the model and of by_hand(p, row)."""
    idx = some_text(3 * T + 2)
    logits, loss, _ = model(idx, idx)
    loss.backward()
    p = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    expected = torch.stack([by_hand(p, row) for row in idx])
    assert_close(logits, expected, tolerance)
    (-expected.log_softmax(-1).gather(2, idx[..., None]).mean()).backward()
    for name, w in model.named_parameters():
        assert_close(w.grad, p[name].grad, tolerance)


@pytest.mark.parametrize("ablate, nu", [
    ("nothing", 3), ("nothing", 1), ("delta", 2), ("no_gamma+no_delta", 3),
    *((word, 3) for word in MEMORIES["armt"].ablations)])
def test_armt_is_the_paper_token_by_token(ablate, nu):
    model = tiny("armt", ablate, nu=nu).double()
    assert_equal_by_hand(model, lambda p, row: armt_by_hand(p, row, ablate.split("+"), nu))


@pytest.mark.parametrize("ablate", ["nothing", "delta", "gated_z"])
def test_a_gate_that_can_shut_is_the_paper_but_for_the_gate_and_leaves_every_bit_where_it_is_shut(ablate):
    model = tiny("armt", ablate, gate="hardsigmoid").double()
    for block, bias in zip(model.memory.blocks, (1.0, -3.0)):        # gates half open, and some that are shut
        nn.init.constant_(block.w_beta.bias, bias)
    assert_equal_by_hand(model, lambda p, row: armt_by_hand(p, row, [ablate], gate="hardsigmoid"), 1e-8)
    _, _, told = model(some_text(T))
    for block in model.memory.blocks:
        nn.init.zeros_(block.w_beta.weight)
        nn.init.constant_(block.w_beta.bias, -3.0)
    _, _, later = model(some_text(20 * T), state=told)
    same = [torch.equal(a, b) for old, new in zip(told, later) for a, b in zip(old, new)]
    assert all(same) if ablate != "nothing" else same == [True, False] * L    # the published z takes from all
    _, _, other = tiny("armt", ablate).double()(some_text(T), state=told)
    assert not any(torch.equal(a, b) for a, b in zip(told[0], other[0]))


@pytest.mark.parametrize("ablate, n_mem, window", [
    ("nothing", 2, 0), ("nothing", 2, 1), ("nothing", 6, 1), ("nothing", 3, 3),
    *((word, 2, 1) for word in MEMORIES["fam"].ablations)])
def test_fam_is_algorithm_2_row_by_row(ablate, n_mem, window):
    model = tiny("fam", ablate, n_mem=n_mem, window=window).double()
    assert_equal_by_hand(model, lambda p, row: fam_by_hand(p, row, {ablate}, n_mem, window))


@pytest.mark.parametrize("ablate, mem_layers", [
    ("nothing", L), ("nothing", 1), *((word, L) for word in MEMORIES["lm2"].ablations)])
def test_lm2_is_its_equations_slot_by_slot(ablate, mem_layers):
    model = tiny("lm2", ablate, n_mem=3, mem_layers=mem_layers).double()
    assert_equal_by_hand(model, lambda p, row: lm2_by_hand(p, row, ablate, 3, mem_layers))


@pytest.mark.parametrize("window", [0, 1, 3])
def test_fam_without_rows_is_bswa_and_bswa_without_a_window_is_none(window):
    idx = some_text(5 * T + 1)
    models = [tiny("fam", n_mem=0, window=window).double(), tiny("bswa", window=window).double(),
              tiny("none").double()]
    for model in models[1:]:
        model.load_state_dict({name: w for name, w in models[0].state_dict().items() if name != "memory.mem"})
    fam, bswa, none = (all_logits(model, idx) for model in models)
    assert_close(fam, bswa)
    assert torch.equal(bswa[:, :T], none[:, :T])
    assert ((bswa[:, T:] - none[:, T:]).abs().max() < 1e-9) == (window == 0)


def test_caches_hold_keys_before_rotation_and_scores_know_distances_only():
    model, idx = tiny("bswa").double(), some_text(T)
    block = model.memory.blocks[0]
    _, k, v = block.attn.project(block.ln_1(model.wte(idx)))
    assert_close(model(idx)[2][0], (k, v))                  # no clock in it: the same wherever the text stood
    q = torch.randn_like(k)
    for shift in (1, 1000, 12345):
        assert_close(armt.rotary(q, shift) @ armt.rotary(k, shift).mT, armt.rotary(q) @ armt.rotary(k).mT)


class Leaky(armt.LM2Block):
    """Its tokens read a bank that was just written from their whole segment, future included."""

    def forward(self, x, bank):
        _, bank = super().forward(x, bank)
        x, _ = super().forward(x, bank)
        return x, bank


@pytest.mark.slow
def test_lm2_cannot_predict_random_tokens_but_a_twin_that_reads_what_it_just_wrote_can(monkeypatch):
    losses = {}
    for name in ("lm2", "leaky"):
        model = tiny("lm2", vocab_size=8, segment_len=16, n_embd=32, n_mem=16)
        if name == "leaky":
            for block in model.memory.blocks:
                block.__class__ = Leaky
        optimizer, numbers = torch.optim.AdamW(model.parameters(), lr=4e-3), torch.Generator().manual_seed(0)
        for _ in range(600):
            idx = torch.randint(8, (32, 33), generator=numbers)
            optimizer.zero_grad()
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            optimizer.step()
        idx = torch.randint(8, (3125, 33), generator=numbers)                           # 100,000 fresh tokens
        with torch.no_grad():
            losses[name] = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert losses["lm2"] >= math.log(8) - 0.005
    assert losses["leaky"] < math.log(8) - 0.1


# ------------------------------------------------------------------------------------------------------------
# 1. The model: how ARMT writes, on keys and values made by hand
# ------------------------------------------------------------------------------------------------------------

def rewritten(values, n_mem=1, beta=1.0, ablate="nothing"):
    """
    Write the values, one segment each, under one key, with an ARMTBlock whose memory tokens are [key, value].
    What it answers for the key after each write, and how often the key is in z: z . phi / |phi|^2.
    """
    config = armt.checked(GPTConfig(n_embd=4, n_head=1, n_mem=n_mem, d_mem=2, ablate=ablate))
    block = armt.ARMTBlock(config).double()
    block.W_Q.weight.data = block.W_K.weight.data = torch.tensor([[1., 0, 0, 0], [0, 1, 0, 0]]).double()
    block.W_V.weight.data = torch.diag(torch.tensor([0., 0, 1, 1])).double()
    block.w_beta.weight.data.zero_()
    block.w_beta.bias.data.fill_(torch.tensor(beta).logit())                          # sigmoid(infinity) is 1
    A, z = block.init_state(1)
    answers, amounts = [], []
    with torch.no_grad():
        for value in values:
            token = torch.tensor([30, 20, value, -value]).double()        # a key so long that 1e-5 is nothing
            A, z = block.write(token.expand(1, n_mem, 4), A, z)
            f = block.phi(block.W_K(token.view(1, 1, 4)))                                          # (1, 1, D)
            answer = block.read(token.view(1, 1, 4), A, z)[0, 0]
            assert answer[2] == -answer[3] and answer[:2].abs().max() == 0
            answers.append(answer[2].item())
            amounts.append((f[0, 0] @ z[0] / f.square().sum()).item())
    return answers, amounts


VALUES = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, -6.0]


def test_phi_multiplies_each_feature_with_its_neighbours():
    block = armt.ARMTBlock(armt.checked(GPTConfig(n_embd=4, n_head=1, n_mem=1, d_mem=2)))
    f = block.phi(torch.tensor([[[2., -3.]]])).flatten().tolist()
    assert f == [6, 0, 0, 0] + [0, 0, 0, 0] + [0, 0, 0, 6]       # r = 2 0 0 3 times 3 2 0 0, 0 3 2 0, 0 0 3 2


def test_a_key_written_again_keeps_its_last_value_alone():
    answers, amounts = rewritten(VALUES)
    assert answers == pytest.approx(VALUES)
    assert amounts == pytest.approx([1] * len(VALUES))                                  # z stays phi(k)


def test_without_gamma_the_newest_of_t_values_weighs_one_in_t():
    answers, amounts = rewritten(VALUES, ablate="no_gamma")
    r = 0
    for t, (value, answer) in enumerate(zip(VALUES, answers), start=1):
        r = ((t - 2) * r + value) / t if t > 1 else value
        assert answer == pytest.approx(r)
    assert amounts == pytest.approx(range(1, len(VALUES) + 1))                  # every write is counted again


def test_with_half_a_beta_half_of_the_old_value_stays():
    answers, _ = rewritten(VALUES, beta=0.5)
    weights = [0.5 ** (len(VALUES) - i) for i in range(len(VALUES))]                    # ..., .125, .25, .5
    assert answers[-1] == pytest.approx(sum(w * v for w, v in zip(weights, VALUES)))


def test_without_delta_the_values_add_up():
    answers, _ = rewritten(VALUES, ablate="no_delta")
    assert answers == pytest.approx(list(itertools.accumulate(VALUES)))


def test_the_clip_of_gamma_keeps_four_writers_of_one_key_from_exploding():
    amount, unclipped = 0, []
    for _ in range(5):
        amount += 4 * (1 - amount)                                                   # equation 3 as it stands
        unclipped.append(amount)
    assert unclipped == [4, -8, 28, -80, 244]
    answers, amounts = rewritten(VALUES, n_mem=4)
    assert amounts == pytest.approx([4] * len(VALUES))
    assert answers == pytest.approx(VALUES)


# ------------------------------------------------------------------------------------------------------------
# 1. The model: reading in pieces, writing, sizes, and what is refused
# ------------------------------------------------------------------------------------------------------------

@every_variant
def test_text_may_arrive_in_pieces_of_any_size(memory, ablate):
    model, idx = tiny(memory, ablate).double(), some_text(24)
    for sizes, waiting in (((1, 5, 4, 1, 12), 3), ((8, 8), 4), ((3,), 3), ((4, 1), 1), ((24,), 4)):
        state, tail = None, None
        for piece in idx[:, :sum(sizes)].split(sizes, dim=1):
            state, tail = model.read(piece, state, tail)
        full = sum(sizes) - waiting
        assert torch.equal(tail, idx[:, full:sum(sizes)])
        assert_close(state, model(idx[:, :full])[2] if full else model.init_state(2))


@every_variant
def test_greedy_generation_is_the_model_called_again_and_again(memory, ablate):
    model = tiny(memory, ablate).double()
    for n in (1, T - 1, T, T + 1, 2 * T + 3):
        idx = some_text(n, rows=3)
        by_hand = idx
        for _ in range(2 * T + 1):
            by_hand = torch.cat((by_hand, model(by_hand)[0].argmax(-1)), dim=1)
        assert torch.equal(model.generate(idx, 2 * T + 1, temperature=0), by_hand)
        state = model(idx[:, :T])[2]
        if n > T:
            assert torch.equal(model.generate(idx[:, T:], 2 * T + 1, state, temperature=0), by_hand[:, T:])


@every_variant
def test_a_long_prompt_is_streamed(memory, ablate):
    """Each segment is read once, and what was computed for it is let go before the next but one."""
    model, seen, alive = tiny(memory, ablate), [], []

    def watch(module, inputs, output):
        seen.append(inputs[0].size(1))
        alive.append(weakref.ref(output[0]))
        assert sum(h() is not None for h in alive) <= 2

    model.memory.register_forward_hook(watch)
    model.generate(some_text(40 * T + 1), 3, temperature=0)
    assert max(seen) == T and len(seen) == 40 + 3                            # the prompt, then the short tail


def test_memories_cost_the_parameters_and_the_floats_they_say():
    M, d_mem, D = 5, 3, 2 * 3 * 3
    models = {memory: tiny(memory, **{k: v for k, v in dict(n_mem=M, d_mem=d_mem).items()
                                      if k in MEMORIES[memory].options}) for memory in MEMORIES}
    params = {memory: model.n_params() for memory, model in models.items()}
    floats = {memory: armt.state_floats(model(some_text(7, rows=1))[2]) for memory, model in models.items()}
    block = 12 * C * C + 4 * C                                                # attention, MLP, two LayerNorms
    assert params["none"] == params["full"] == params["bswa"] == 2 * V * C + L * block + 2 * C
    assert params["rmt"] == params["fam"] == params["none"] + M * C
    assert params["armt"] == params["none"] + L * (2 * C * d_mem + C * C + C + 1) + M * C
    assert params["lm2"] == params["none"] + L * (11 * C * C + 3)
    assert tiny("lm2", mem_layers=1).n_params() == params["none"] + 11 * C * C + 3
    assert floats == {"none": 0, "full": L * 2 * 7 * C, "bswa": L * 2 * T * C, "rmt": M * C,
                      "armt": L * (D * C + D), "fam": L * (M * C + 1 + 2 * T * C), "lm2": L * M * C}


def test_the_shapes_named_in_comments_hold():
    B, N, M, H, d_mem, D = 3, 7, 2, 2, 3, 18
    state = {memory: tiny(memory)(some_text(N, rows=B))[2] for memory in MEMORIES}
    assert state["none"] == ((), ())
    assert [t.shape for layer in state["full"] for t in layer] == [(B, H, N, C // H)] * 4
    assert [t.shape for layer in state["bswa"] for t in layer] == [(B, H, T, C // H)] * 4
    assert [t.shape for t in state["fam"][1]] == [(B, M, C), (B, 1, 1), (B, H, T, C // H), (B, H, T, C // H)]
    assert [t.shape for t in state["lm2"]] == [(B, M, C)] * 2
    assert state["rmt"].shape == (B, M, C)
    assert [t.shape for layer in state["armt"] for t in layer] == [(B, D, C), (B, D)] * 2
    block = tiny("armt").memory.blocks[0]
    assert block.phi(torch.zeros(B, M, d_mem)).shape == (B, M, D)
    assert block.read(torch.zeros(B, T, C), *state["armt"][0]).shape == (B, T, C)
    assert [t.shape for t in tiny("armt", "delta").init_state(B)[0]] == [(B, D, C)]
    assert armt.rotary_angles(N, 8, torch.device("cpu"), torch.float32)[0].shape == (N, 8)
    assert armt.state_map(lambda a, b: a + b, state["armt"], state["armt"])[1][1].shape == (B, D)

@every_variant
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_autocast_keeps_memories_in_float32_and_means_what_float32_means(memory, ablate, kind):
    model, idx = tiny(memory, ablate), some_text(5 * T)
    exact = model(idx, idx)[0].softmax(-1)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), torch.autocast("cpu", kind):
            logits, loss, state = model(idx, idx)
            _, _, state = model(idx, state=state)
        assert all(t.dtype == torch.float32 for t in armt.tensors(state))
        assert (logits.float().softmax(-1) - exact).abs().max() < 0.1


def test_half_a_model_keeps_its_associative_state_in_float32():
    for kind in (torch.float16, torch.bfloat16):
        model = tiny("armt").to(kind)
        assert all(t.dtype == torch.float32 for t in armt.tensors(model(some_text(9))[2]))
        assert model(some_text(9))[0].dtype == kind


@pytest.mark.parametrize("field, wrong, memory", [
    ("memory", "elephant", "armt"), ("n_layer", 0, "armt"), ("segment_len", 10 ** 9, "armt"),
    ("n_head", 3, "armt"), ("n_mem", 0, "armt"), ("rule", "gamma", "armt"), ("gate", "soft", "armt"),
    ("window", 3, "armt"), ("rule", "delta", "rmt"), ("n_mem", 17, "lm2"), ("ablate", "no_gama", "armt"),
    ("ablate", "no_delta", "rmt"), ("window", -1, "bswa")])
def test_a_size_or_a_word_that_does_not_fit_is_refused_by_name(field, wrong, memory):
    with pytest.raises(ValueError, match=f"^({field}|n_embd): "):
        GPT(GPTConfig(**dict(memory=memory, n_embd=C) | {field: wrong}))
    if field == "ablate":
        with pytest.raises(ValueError, match=", ".join(["nothing", *MEMORIES[memory].ablations])):
            GPT(GPTConfig(memory=memory, ablate=wrong))


# ------------------------------------------------------------------------------------------------------------
# 2. The data: batches, and associative retrieval
# ------------------------------------------------------------------------------------------------------------

def task_of(**settings):
    """The task of a run with these settings."""
    return make_task(train.Config(**settings))


def fingerprint():
    """A number for a batch of each task. It also runs in another process, so it brings its own imports."""
    import hashlib
    import train
    from data import generator, make_task
    total = hashlib.sha256()
    for task, stage in (("remember", (5,)), ("rewrite", (30,)), ("qa1+qa2+qa4+qa5", (6, 200)),
                        ("passkey-decoys", (4,))):
        made = make_task(train.Config(task=task, align=8))
        for part in made.batch(generator(3, "train", 1, 5), 8, stage):
            total.update(part.astype("<i8").tobytes())
    return total.hexdigest()


def test_batches_are_equal_in_every_process():
    script = inspect.getsource(fingerprint) + "print(fingerprint())"
    there = subprocess.run([sys.executable, "-c", script], cwd=TOP, capture_output=True, text=True,
                           check=True, env=os.environ | dict(PYTHONHASHSEED="4321")).stdout
    assert there.strip() == fingerprint()
    places = list(itertools.product(range(3), SPLITS, range(3), range(3)))
    batches = {task_of(segment_len=4).batch(generator(*place), 4, (8,)).context.tobytes() for place in places}
    assert len(batches) == len(places) == 81               # other seeds, splits, stages, steps: other batches


@pytest.mark.parametrize("rewrite, key_size, n_pairs, n_questions", [
    (False, 1, 4, 1), (False, 1, 16, 3), (False, 1, 5, 8), (False, 1, 5, 16), (False, 2, 40, 7),
    (False, 2, 256, 1), (True, 1, 30, 1), (True, 1, 6, 16), (True, 1, 3, 9), (True, 2, 50, 5),
    (True, 1, 1, 1)])
def test_a_slow_replay_gives_the_answers_of_recall(rewrite, key_size, n_pairs, n_questions):
    made = task_of(task="rewrite" if rewrite else "remember", key_size=key_size, questions=n_questions,
                   segment_len=key_size + 3)
    batch = made.batch(generator(0, "train"), 30, (n_pairs,))
    every_key = list(itertools.product(range(1, 17), repeat=key_size))
    assert batch.context.shape == (30, n_pairs, key_size + 3)                        # one pair is one segment
    assert batch.questions.shape == (30, n_questions, key_size + 1)
    for context, questions, answers in zip(*batch):
        told = {}
        for *key, colon, value, end in context.tolist():
            assert (colon, end) == (recall.TELL, recall.END) and 1 <= value <= 16
            assert tuple(key) in every_key and (rewrite or tuple(key) not in told)
            told[tuple(key)] = value
        asked = [tuple(key) for *key, _ in questions.tolist()]
        assert set(questions[:, -1]) == {recall.ASK} and len(set(asked)) == n_questions
        assert answers[:, 0].tolist() == [told.get(key, -1) for key in asked]
        if n_questions == 16 ** key_size:
            assert sorted(asked) == every_key
        else:
            assert (answers >= 0).sum() == min(n_questions, len(told))                  # never asked in vain


def test_recall_asks_for_every_pair_alike():
    batch = task_of(segment_len=4, questions=1).batch(generator(0, "train"), 4000, (4,))
    age = (batch.context[..., 0] == batch.questions[:, :, 0]).argmax(1)
    assert np.abs(np.bincount(age) / 4000 - 1 / 4).max() < 0.03
    assert np.abs(np.bincount(batch.answers[:, 0, 0])[1:] / 4000 - 1 / 16).max() < 0.02
    batch = task_of(task="rewrite", segment_len=4, questions=1).batch(generator(0, "train"), 4000, (20,))
    keys = batch.context[..., 0]
    written = (keys == batch.questions[:, :, 0]).sum(1)                          # how often the asked key was
    fair = [20 / len(set(row)) for row in keys.tolist()]                          # were keys drawn, not pairs
    assert abs(written.mean() - np.mean(fair)) < 0.05


@pytest.mark.parametrize("size", [1, 3, 7, 64, 1000])
def test_chunks_are_the_rows_side_by_side(size):
    rng = generator(0, "train")
    for sizes in (((5, 0, 1, 13), (7,), (2, 2, 2)), ((3, 4), (7,)), ((64, 64), (63, 1, 65)), ((1,),)):
        rows = [[rng.integers(1, 100, size=n) for n in row] for row in sizes]
        whole = [np.concatenate(row) for row in rows]
        cut = list(chunks(rows, size))
        assert np.array_equal(np.concatenate(cut, axis=1), fill(whole))
        assert all(chunk.shape[1] == size for chunk in cut[:-1]) and 0 < cut[-1].shape[1] <= size
        by_six = np.concatenate(list(chunks(rows, 6 * size, 6)), axis=1)              # and blanks behind, too
        assert np.array_equal(by_six.reshape(len(rows), -1, 6), segments(whole, 6))
    assert fill([[1, 2], [3], []]).tolist() == [[1, 2], [0, 3], [0, 0]]
    assert segments([[1, 2, 3], [4]], 2).tolist() == [[[1, 2], [3, 0]], [[0, 0], [4, 0]]]


# ------------------------------------------------------------------------------------------------------------
# 2. The data: bAbI
# ------------------------------------------------------------------------------------------------------------

PUBLISHED = (     # its quirks: a blank after a question mark, or none; support in any order; lists as answers
    "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    "4 Mary got the milk there.\n5 Where is the milk? \tbathroom\t4 1\n"
    "1 The office is north of the kitchen.\n2 What is north of the kitchen?\toffice\t1\n"
    "1 Mary took the apple.\n2 Mary took the milk.\n3 What is Mary carrying? \tapple,milk\t1 2\n")


def write_stories(stories):
    """The text of a bAbI file, the exact inverse of read_stories."""
    def show(line):
        support = " ".join(map(str, line.support))
        return line.text if line.answer is None else f"{line.text}\t{line.answer}\t{support}"
    return "".join(f"{n} {show(line)}\n" for story in stories for n, line in enumerate(story, start=1))


def test_the_reader_gives_back_published_stories_byte_for_byte(tmp_path):
    path = tmp_path / "qa.txt"
    made = (write_stories(babi.simulate(random.Random(0), task, 10)) for task in babi.TASKS)
    for written in (PUBLISHED, *made):
        for saved in (written, written.replace("\n", "\r\n"), "\ufeff" + written):  # as some systems save
            path.write_bytes(saved.encode())
            assert write_stories(babi.read_stories(path)) == written
    path.write_bytes(PUBLISHED.encode())
    stories = babi.read_stories(path)
    assert [len(story) for story in stories] == [5, 2, 3]
    assert stories[0][4] == babi.Line("Where is the milk? ", "bathroom", (4, 1))
    told = ["Mary moved to the bathroom.", "John went to the hallway."]
    assert babi.story_samples(stories[0]) == [
        (told, "Where is Mary?", "bathroom", (0,)),
        ([*told, "Mary got the milk there."], "Where is the milk?", "bathroom", (2, 0))]


@pytest.mark.parametrize("line, published, broken", [
    (1, "1 Mary moved", "2 Mary moved"), (1, "1 Mary moved", "Mary moved"),
    (1, "1 Mary moved", "\n1 Mary moved"), (2, "2 John went", "3 John went"),
    (2, "2 John went to the hallway.", "2 "), (2, "2 John", "02 John"),
    (3, "Mary? \tbathroom\t1", "Mary? bathroom 1?"), (3, "Mary? \tbathroom\t1", "Mary? \tbathroom"),
    (3, "Mary? \tbathroom\t1", "Mary? \tbathroom\t1\t1"), (3, "Mary? \tbathroom\t1", "Mary. \tbathroom\t1"),
    (3, "\tbathroom\t1", "\t\t1"), (3, "\tbathroom\t1", "\tbathroom\tone"),
    (3, "\tbathroom\t1", "\tbathroom\t0"), (3, "\tbathroom\t1", "\tbathroom\t4"),
    (5, "\tbathroom\t4 1", "\tbathroom\t5"), (5, "\tbathroom\t4 1", "\tbathroom\t4 3"),
    (6, "1 The office", "2 The office"), (2, "John", "Jos\xe9")])
def test_a_malformed_line_is_refused_with_file_and_line(line, published, broken, tmp_path):
    path = tmp_path / "broken_qa1.txt"
    path.write_bytes(PUBLISHED.replace(published, broken, 1).encode("latin-1"))
    with pytest.raises(ValueError) as error:
        babi.read_stories(path)
    assert published in PUBLISHED and str(error.value).startswith(f"{path}, line {line}: ")
    path.write_bytes(b"1 Mary moved to the bathroom.\n")
    with pytest.raises(ValueError, match="no question"):
        babi.read_stories(path)


def parse(fact):
    """A published sentence -> Event, read off its words alone."""
    words = fact.removesuffix(".").removesuffix(" there").split()
    if words[0] == "The":
        return babi.Event("lies", words[1], words[3], words[6], text=fact)
    who, rest = fact.split()[0], " ".join(words[1:])
    action = next(a for a, verbs in babi.VERBS.items() for verb in verbs if rest.startswith(f"{verb} "))
    if action == "move":
        return babi.Event("move", who, place=words[-1], text=fact)
    what, to = (words[-3], words[-1]) if action == "give" else (words[-1], "")
    return babi.Event(action, who, what, to=to, text=fact)


def samples(stories):
    return [sample for story in stories for sample in babi.story_samples(story)]


def shares(values):
    """[a, a, b] -> {a: 66.7, b: 33.3}, per cent."""
    return {value: 100 * values.count(value) / len(values) for value in set(values)}


def describe(task, stories):
    """What section 8 of our notes counted in the published files: {name: number}, shares in per cent."""
    actions, theres, verbs, before, gaps, words, kinds, back, nowhere = [], [], [], [], [], [], [], [], []
    for story in stories:
        events, last = [], None
        for n, line in enumerate(story):
            if line.answer is None:
                events.append(event := parse(line.text))
                actions.append(event.action)
                placed = any(e.action == "move" and e.who == event.who for e in events)
                nowhere += [not placed] if event.action == "get" else []
                verbs += [line.text.split()[1]] if event.action == "move" else []
                theres += [line.text.endswith("there.")] if event.action in ("get", "drop") else []
            else:
                before.append(len(events))
                gaps += [len(events) - last] if last is not None else []
                last = len(events)
                words.append(line.text.split()[0] + (" to" if " to" in line.text else ""))
                facts = [i for i, other in enumerate(story[:n], start=1) if other.answer is None]
                kinds.append(parse(story[line.support[0] - 1].text).action)
                back.append(len(facts) - 1 - facts.index(line.support[0]))
    found = {f"{action} %": share for action, share in shares(actions).items()}
    found |= {f"{words} %": share for words, share in shares(words).items()}
    found |= {"facts before a question": np.mean(before),
              "lines of a story": np.mean(list(map(len, stories))),
              "median of the facts": np.median(before),
              "99 of 100 questions within": np.percentile(before, 99),
              "95 of 100 questions within": np.percentile(before, 95),
              "gets by somebody not yet placed %": 100 * np.mean(nowhere or [0]),
              "dropped %": shares(kinds).get("drop", 0), "there %": 100 * np.mean(theres or [0]),
              "went %": 100 * np.mean([verb == "went" for verb in verbs or ["none"]])}
    found |= {f"support {age} back %": share for age, share in shares(back).items()}
    return found | ({"next question after two facts %": shares(gaps)[2]} if gaps else {})


MEASURED = {     # in the published files, train and test; the means of qa3 in 385 + 200 stories
    "qa1": {"move %": 100, "facts before a question": 6.0, "lines of a story": 15, "support 0 back %": 45.2,
            "went %": 40, "support 1 back %": 29.0, "support 2 back %": 13.3, "support 3 back %": 8.6,
            "support 4 back %": 4.0},
    "qa2": {"move %": 65.1, "get %": 19.8, "drop %": 15.2, "facts before a question": 15.6,
            "lines of a story": 27.0, "median of the facts": 14, "dropped %": 68.8,
            "next question after two facts %": 71.3, "went %": 40,
            "gets by somebody not yet placed %": 28.0, "95 of 100 questions within": 30,
            "99 of 100 questions within": 40},
    "qa3": {"move %": 63.5, "get %": 19.0, "drop %": 17.6, "facts before a question": 51.0,
            "lines of a story": 78.8, "median of the facts": 44, "dropped %": 79.5,
            "next question after two facts %": 55.1, "there %": 20,
            "gets by somebody not yet placed %": 9.0, "95 of 100 questions within": 116,
            "99 of 100 questions within": 158},
    "qa4": {"facts before a question": 2, "lines of a story": 3, "support 0 back %": 50,
            "support 1 back %": 50},
    "qa5": {"move %": 56.0, "get %": 16.9, "drop %": 11.7, "give %": 15.5, "facts before a question": 20.0,
            "lines of a story": 32.2, "median of the facts": 16, "What to %": 33.6,
            "Who %": 17.0 + 16.5, "Who to %": 16.7 + 16.3, "next question after two facts %": 87.4,
            "gets by somebody not yet placed %": 23.3, "95 of 100 questions within": 46,
            "99 of 100 questions within": 64}}


@pytest.fixture(scope="module")
def simulated():
    """
    2,000 stories of each task. In 20,000, a question of qa2, qa3, qa5 comes after 15.6, 52.5, 19.9 facts, and
    2,000 of qa3 are not always within 3% of the published 51.0 (585 stories): of the seeds 0 to 7 they are
    with 1, 3, 5, 6 and 7. With 6 every other number below is near its measured one, too.
    """
    return {task: babi.simulate(random.Random(6), task, 2000) for task in babi.TASKS}


@pytest.mark.parametrize("task", babi.TASKS)
def test_a_simulated_world_has_the_statistics_of_the_published_files(task, simulated):
    """Percentages within 2 points, means within 3%: Weston et al. 2015, files en-10k of version 1.2."""
    found = describe(task, simulated[task])
    for name, measured in MEASURED[task].items():
        tolerance = 2 if name.endswith("%") or name.startswith("9") else 0.03 * measured  # facts come in twos
        assert found.get(name, 0) == pytest.approx(measured, abs=tolerance), name
    assert sum(line.answer is not None for story in simulated[task] for line in story) == len(
        simulated[task]) * (1 if task == "qa4" else 5)


def test_qa1_tells_and_asks_about_people_at_random(simulated):
    told, asked = [], []
    for story in simulated["qa1"]:
        people = [line.text.split()[0 if line.answer is None else 2] for line in story]
        facts, questions = ([who for who, line in zip(people, story) if (line.answer is None) == fact]
                            for fact in (True, False))
        told += [a == b for a, b in zip(facts, facts[1:])]
        asked += [a == b for a, b in zip(questions, questions[1:])]
    assert 100 * np.mean(told) == pytest.approx(25.2, abs=2)
    assert 100 * np.mean(asked) == pytest.approx(36, abs=2)


def test_qa3_asks_for_late_places_and_qa4_tells_from_both_sides(simulated):
    steps, sides = [], []
    for story in simulated["qa3"]:
        for n, line in enumerate(story):
            if line.answer is not None:
                thing, last = line.text.split()[3], parse(story[line.support[0] - 1].text)
                end = line.support[0] if last.action == "drop" else n + 1
                moves = [i for i in range(line.support[1], end) if story[i].answer is None
                         and parse(story[i].text)[:2] == ("move", last.who)]
                steps.append(len(moves))            # how often the thing was carried on after the asked place
                assert thing == last.what
    for step, share in enumerate((79.6, 15.6, 3.6)):
        assert shares(steps)[step] == pytest.approx(share, abs=2)
    assert 100 * np.mean([step > 2 for step in steps]) == pytest.approx(1.2, abs=1)
    for story in simulated["qa4"]:
        (first, second), centre = map(parse, (story[0].text, story[1].text)), None
        centre = ({first.who, first.place} & {second.who, second.place}).pop()
        assert len({first.who, first.place, second.who, second.place}) == 3
        side = [e.what if e.place == centre else babi.OPPOSITE[e.what] for e in (first, second)]
        assert side[0] == babi.OPPOSITE[side[1]]             # the other two lie on opposite sides
        sides.append((first.place == centre) + (second.place == centre))
    assert shares(sides)[2] == pytest.approx(44.4, abs=2) and shares(sides)[0] == pytest.approx(11.1, abs=2)


def solve(task, facts, question):
    """Right answers to a question, the latest last, by replaying the facts: data/babi.py lends only names."""
    words, places, holder, history, gifts = question.removesuffix("?").split(), {}, {}, {}, []
    for event in map(parse, facts):
        if event.action == "lies":
            gifts.append((event.who, event.what, event.place))
            opposite = dict(n="south", s="north", e="west", w="east")[event.what[0]]
            gifts.append((event.place, opposite, event.who))
        elif event.action == "move":
            places[event.who] = event.place
            for thing, who in holder.items():
                if who == event.who:
                    history[thing].append(event.place)
        elif event.action == "give":
            holder[event.what] = event.to
            gifts = [gift for gift in gifts if gift[2] != event.what] + [(event.who, event.to, event.what)]
        else:
            holder[event.what] = event.who if event.action == "get" else None
            before = history.setdefault(event.what, [None])
            if event.action == "drop" and places.get(event.who) not in (None, before[-1]):
                before.append(places[event.who])             # he had moved before anybody saw him carry it
    # in training qa2 and qa3 ask for people, too
    if task == "qa1" or words[0] == "Where" and words[2] in places:
        return [places[words[2]]]
    if task == "qa2" or words[:2] == ["Where", "is"]:
        who = holder[words[3]]
        return [places[who] if who else history[words[3]][-1]]
    if task == "qa3":
        way = history[words[3]]
        last = max(i for i, place in enumerate(way) if place == words[6])
        return [way[last - 1]]
    if task == "qa4":
        side, known = (words[2], words[5]) if words[-1] != "of" else (
            dict(n="south", s="north", e="west", w="east")[words[4][0]], words[3])
        return [a for a, b, c in gifts if (b, c) == (side, known)]
    who, to, what = (next((w for w in words if w in names), None) for names in ((), (), babi.THINGS))
    if words[0] == "What":
        who, to = words[2], words[5]
    elif words[1] == "did":
        who, to = words[2], None
    elif "to" in words:
        who, to = None, words[-1]
    fitting = [g for g in gifts if (who or g[0], to or g[1], what or g[2]) == g]
    return [g[dict(What=2).get(words[0], 1 if words[1] in ("did", "received") else 0)] for g in fitting]


@pytest.mark.parametrize("task", babi.TASKS)
def test_an_independent_solver_finds_the_same_answers(task, simulated):
    asked, ambiguous = samples(simulated[task][:400]), 0
    for sample in asked:
        right = solve(task, sample.facts, sample.question)
        assert sample.answer in right
        ambiguous += right[-1] != sample.answer
    assert ambiguous <= (0.01 * len(asked) if task == "qa5" else 0)    # two gifts of one person to another

def worlds(facts):
    """
    What a short text says about persons and things, by trying everything: {question: set of answers}, one for
    each way in which the hidden start places can be such that the facts are possible.
    """
    events, answers = list(map(parse, facts)), {}
    names = list(dict.fromkeys(name for e in events for name in (e.who, e.to, e.what) if name))
    for start in itertools.product(babi.PLACES, repeat=len(names)):
        at, holder, been, possible = dict(zip(names, start)), {}, {}, True
        for e in events:
            if e.action == "get":
                possible &= holder.get(e.what) is not None or at[e.what] == at[e.who]
            if e.action == "give":
                possible &= at[e.who] == at[e.to]
            if e.action == "move":
                at[e.who] = e.place
            else:
                holder[e.what] = dict(get=e.who, drop=None, give=e.to)[e.action]
                at[e.what] = at[e.who]
            for thing in holder:
                at[thing] = at[holder[thing]] if holder[thing] else at[thing]
                been.setdefault(thing, [])
                been[thing] += [at[thing]] if been[thing][-1:] != [at[thing]] else []
        for name in names if possible else ():
            question = f"Where is {'the ' * (name in babi.THINGS)}{name}? "
            answers.setdefault(question, set()).add(at[name])
            for i, place in enumerate(been.get(name, [])):
                last = i == len(been[name]) - 1 - been[name][::-1].index(place)
                if last:
                    question = f"Where was the {name} before the {place}? "
                    answers.setdefault(question, set()).add(been[name][i - 1] if i else "nowhere")
    return answers


def test_everything_that_a_short_text_answers_is_asked_and_nothing_else_is_known():
    dice, known, n = random.Random(1), 0, 0
    while n < 150:
        task = dice.choice(["qa1", "qa2", "qa3", "qa5"])
        events = list(itertools.islice(babi.world(dice, task), dice.randint(1, 6)))
        told = [e.text for e in events]
        names = {name for e in events for name in (e.who, e.what, e.to) if name}
        if len(names) > 4:
            continue
        n, by_hand, asked = n + 1, worlds(told), babi.everything(events)
        for question, answer in {**asked["qa1"], **asked["qa2"], **asked["qa3"]}.items():
            found = by_hand.get(question, {"nowhere"})
            right = found.pop() if len(found) == 1 and found != {"nowhere"} else babi.UNKNOWN
            assert answer == right, (told, question)
            known += answer != babi.UNKNOWN
        gave = [event for event in events if event.action == "give"]
        for question, answer in asked["qa5"].items():
            right = solve("qa5", told, question.strip()) if gave else []
            assert answer == babi.UNKNOWN or answer in right
            assert answer != babi.UNKNOWN or not right
    assert known > 300
    for question, right in (("What is north of the garden?", "office"),
                            ("What is the office north of?", "garden"),
                            ("What is the garden south of?", "office"),
                            ("What is south of the office?", "garden"),
                            ("What is the garden north of?", "unknown"),
                            ("What is east of the office?", "unknown")):
        assert babi.everything([parse("The office is north of the garden.")])["qa4"][question] == right


def published_files():
    folder = os.environ.get("BABI_DIR") or TOP / "data" / "babi"
    return Path(folder) if Path(folder).is_dir() else None


@pytest.fixture
def folder():
    """Of the published bAbI files."""
    if published_files() is None:
        pytest.skip("no published bAbI files: put them into data/babi, or name their folder in BABI_DIR")
    return published_files()


def unasked(task, stories, window):
    """(questions that the rule would not ask, share of pair ends that had something to ask and did not)"""
    wrong, passed, asked = 0, 0, 0
    for story in stories:
        events, numbers, fresh = [], [], 0
        for n, line in enumerate(story, start=1):
            found = [ask for about in babi.subjects(task, events[-window:])
                     for ask in babi.asks(task, events, about)] if fresh == 2 else []
            if line.answer is None:
                passed += bool(found)
                events, numbers, fresh = [*events, parse(line.text)], [*numbers, n], fresh % 2 + 1
            else:
                asked, fresh = asked + 1, 0
                wrong += (line.text, line.answer, line.support) not in [
                    (ask.question, ask.answer, tuple(numbers[i] for i in ask.support)) for ask in found]
    return wrong, passed / asked


@pytest.mark.parametrize("task", babi.TASKS)
def test_the_question_rule_explains_the_published_files(task, folder):
    """Every published question is askable, and where something could be asked, it was."""
    names = [babi.find_file(folder, task),
             *sorted(folder.rglob(f"{task}_*_train.txt"))[-1:]]    # of en-10k, or of en
    stories = [story for file in names for story in babi.read_stories(file)]
    wrong, passed = unasked(task, stories, window=5)
    assert wrong == 0 and passed <= (0.005 if task == "qa3" else 0)
    if task in ("qa2", "qa3", "qa5"):
        assert unasked(task, stories, window=6)[1] > 0.01               # a wider window would have asked more
    for sample in samples(babi.read_stories(names[0])):
        assert babi.is_published(sample.facts)


@pytest.mark.parametrize("task", babi.TASKS)
def test_the_question_rule_explains_the_simulated_stories(task, simulated):
    assert unasked(task, simulated[task][:200], window=5) == (0, 0)
    first = babi.spread(simulated[task][:20])[:20]           # one question of each story, early ones and late
    assert len({tuple(sample.facts[:2]) for sample in first}) >= 18
    known = np.mean([babi.is_published(sample.facts) for sample in samples(simulated[task])])
    assert known < dict(qa1=0.05, qa4=0.5).get(task, 0.01)               # qa4 has but 1,920 stories


# ------------------------------------------------------------------------------------------------------------
# 2. The data: words, background, BABILong
# ------------------------------------------------------------------------------------------------------------

def test_words_of_bAbI_have_ids_that_are_fixed_for_good_and_any_other_falls_into_a_bucket():
    """A checkpoint knows words by number; a run keeps its list in config.json."""
    words = babilong.Words()
    assert hashlib.sha256(" ".join(babi.WORDS).encode()).hexdigest()[:8] == "5a03585c"
    assert words.encode("MARY moved to the BathRoom.") == [4, 5, 6, 7, 8, 1] and words.name(8) == "bathroom"
    assert words.encode("Where is Mary?") == words.encode("  WHERE, is \n 'mary' ?")
    assert words.split("Mrs-Bennet's _cat_ isn’t 42; 'a'!") == [
        "Mrs-Bennet's", "cat", "isn’t", "42", "a", "!"]
    assert words.count(words.encode("Mary moved to the garden. Where is she? Here!")) == 9    # without marks
    first, ids = len(words.names), {words.id(f"ship{i}") for i in range(3000)}
    assert min(ids) >= first and max(ids) < words.size == first + 1024 and len(ids) > 900
    assert words.id("captain") == words.id("CAPTAIN") and words.name(words.id("captain")) == "(another word)"
    assert words.unknown("Mary saw the whale. Ahab saw the milk!") == ["saw", "whale", "Ahab"]
    told = {word for task in babi.TASKS for story in babi.simulate(random.Random(0), task, 50)
            for line in story for word in words.split(f"{line.text} {line.answer or ''}")}
    assert not words.unknown(" ".join(told))


def book(folder, name, sentences):
    """A book in which no word occurs twice: sentence i has 9 + i % 4 words and a mark."""
    path = folder / f"{name}.txt"
    path.write_text("\n".join(" ".join(f"{name}{i}x{j}" for j in range(9 + i % 4)) + ".?!"[i % 3]
                              for i in range(sentences)))
    return path


@pytest.fixture(autouse=True)
def many_buckets(monkeypatch, request):
    """In tests with a `library` of books there are so many buckets that no two words share one."""
    if "library" in request.fixturenames:
        monkeypatch.setattr(babilong, "BUCKETS", 2 ** 40)


@pytest.fixture
def library(tmp_path):
    return [book(tmp_path, "a", 60), book(tmp_path, "b", 40)]


OWN_WORDS = len(babilong.Words().names)                      # ids below are blanks, marks and words of bAbI


def test_train_and_val_share_no_sentence_and_miss_none(library, tmp_path):
    train_ids, val, whole = (babilong.Background(library, part, babilong.Words())
                             for part in ("train", "val", "test"))
    inked = [set(b.ids[b.ids >= OWN_WORDS].tolist()) for b in (train_ids, val, whole)]
    assert not inked[0] & inked[1] and inked[0] | inked[1] == inked[2] and len(inked[2]) == 630 + 420
    assert len(train_ids.begin) - 1 == 54 + 36 and len(val.begin) - 1 == 6 + 4      # nine tenths of each book
    long, almost = "one two three four five six seven eight nine.", "one two three four five six seven eight."
    (tmp_path / "c.txt").write_text(f"Chapter one. {long} {almost} Hm! {long}")
    short = babilong.Background([tmp_path / "c.txt"], "test", words := babilong.Words())
    assert short.ids.tolist() == words.encode(f"{long} {long}") and short.begin.tolist() == [0, 10, 20]


FACTS = ["Mary moved to the bathroom.", "John went back to the hallway.", "Mary went to the garden.",
         "Mary went to the garden."]
OWN = 5 + 6 + 5 + 5                                          # words in these facts


def take_apart(context, text):
    """
    A composed context -> its facts, the slot of each (how many sentences stand before it), and the number of
    slots. What is not a fact must be what the text says: sentence after sentence, the last one perhaps cut
    short.
    """
    facts, where, rest, fact = [], [], [], []
    for i in np.concatenate(context).tolist():
        if fact or 3 < i < OWN_WORDS:               # words of bAbI are in facts alone; a fact ends with a dot
            fact.append(i)
            if i == 1:
                facts, where, fact = [*facts, fact], [*where, len(rest)], []
        else:
            rest.append(i)
    begin = [n for n in range(len(rest)) if n == 0 or rest[n - 1] <= 3]
    assert not fact and all(n in begin or n == len(rest) for n in where), "a fact stands inside a sentence"
    known = [text.ids[a:b].tolist() for a, b in itertools.pairwise(text.begin)]
    number = {sentence[0]: n for n, sentence in enumerate(known)}
    read = [rest[a:b] for a, b in itertools.pairwise([*begin, len(rest)])]
    path = [number[sentence[0]] for sentence in read]
    assert all(sentence == known[n] for sentence, n in zip(read[:-1], path)), "not what the book says"
    assert not read or read[-1] == known[path[-1]][:len(read[-1])]
    assert all(b == (a + 1) % 100 for a, b in itertools.pairwise(path)), "not in the order of the book"
    return facts, [sum(b < n for b in begin) for n in where], len(begin) + 1


@pytest.mark.parametrize("length", [0, OWN, OWN + 1, OWN + 40, 500, 3000])      # the library holds 1050 words
def test_a_composed_sample_has_its_facts_in_order_and_the_exact_length(length, library):
    words, places = babilong.Words(), []
    facts = list(map(words.encode, FACTS))
    text, aligned = (babilong.Background(library, "test", words, align) for align in (0, 8))
    for seed in range(40):
        context, starts = babilong.compose(generator(seed, "train"), facts, length, text)
        told, slots, n_slots = take_apart(context, text)
        assert told == facts and slots == sorted(slots) and (n_slots > 1) == (length > OWN)
        assert sum(map(words.count, context)) == max(length, OWN)
        assert all(np.shares_memory(piece, text.ids) for piece in context if piece[0] >= OWN_WORDS)
        places += [(slot + 0.5) / n_slots for slot in slots]
        # aligned: the same, but for blanks, and every sentence begins a segment
        padded, at = babilong.compose(generator(seed, "train"), [words.pad(fact, 8) for fact in facts],
                                      length, aligned)
        ids, blanks = np.concatenate(context), np.concatenate(padded)
        assert np.array_equal(blanks[blanks > 0], ids) and len(blanks) % 8 == 0 and not any(n % 8 for n in at)
        begin = [n for n in range(len(ids)) if n == 0 or ids[n - 1] <= 3 or n in starts]
        first = [n for n in range(0, len(blanks), 8) if n == 0 or blanks[n - 1] <= 3 or n in at]
        assert blanks[first].tolist() == ids[begin].tolist()
        assert [ids[n] for n in starts] == [blanks[n] for n in at]
    if length >= 500:
        # uniform
        assert abs(np.mean(places) - 0.5) < 0.08
        assert np.std(places) == pytest.approx(1 / 12 ** 0.5, abs=0.05)


def test_a_million_words_of_a_long_enough_text_contain_no_passage_twice_and_fit_into_a_few_megabytes():
    words = babilong.Words()
    prose = babilong.Background([babilong.PROSE], "train", words)
    tracemalloc.start()
    context, _ = babilong.compose(generator(0, "train"), list(map(words.encode, FACTS)), 5_000_000, prose)
    n_words = sum(words.count(piece) for piece in chunks([context], 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_words == 5_000_000 and peak < 5e6
    for seed in range(20):                       # entered anywhere, and all of it is read before any is again
        runs = [(first, last)
                for first, last, _ in prose.runs(generator(seed, "train"), int(prose.n_words[-1]))]
        assert sum(last - first for first, last in runs) == len(prose.begin) - 1 + (runs[0][0] > 0) * 0


def test_a_sentence_that_looks_like_a_fact_is_none(library):
    words, dice, kinds = babilong.Words(), random.Random(0), []
    facts, text = list(map(words.encode, FACTS[:2])), babilong.Background(library, "test", words)
    known = {i for fact in facts for i in fact}
    sentence = text.ids[:text.begin[3]].tolist()
    for _ in range(600):
        made = babilong.look_alike(dice, sentence, facts, known)
        spelled = f" {' '.join(map(str, made))} "
        # not even without its dot
        assert not any(f" {' '.join(map(str, fact[:-1]))} " in spelled for fact in facts)
        assert set(made) <= known | set(sentence) and 0 < made[-1] <= 3
        if made[-len(sentence):] == sentence:
            kinds.append("front")
        else:
            changed = [n for n, (a, b) in enumerate(zip(made, sentence)) if a != b]
            kinds.append("inside" if changed and max(changed) - min(changed) < 6 else "words")
    assert all(kinds.count(kind) > 100 for kind in ("front", "words", "inside"))


def sentences(ids):
    """The facts of a context as texts, read off its bAbI words alone."""
    words = babilong.Words()
    told, facts, fact = [i for i in ids if 3 < i < OWN_WORDS or i == 1], [], []
    for i in told:
        if i == 1 and fact:
            facts.append(" ".join(words.name(word) for word in fact) + ".")
        fact = [] if i == 1 else [*fact, i]
    return [fact[0].upper() + fact[1:] for fact in facts]


def spoken(question):
    words = babilong.Words()
    text = " ".join(words.name(i) for i in question if i > 3)
    return text[0].upper() + text[1:] + "?"


@pytest.mark.parametrize("align", [0, 8])
@pytest.mark.parametrize("task", babi.TASKS)
def test_a_batch_asks_what_its_stories_tell_and_an_evaluation_what_the_files_ask(
        task, align, library, tmp_path):
    made, words = task_of(task=task, background=library[:1], align=align), babilong.Words()
    passages = set(babilong.Background(library[:1], "train", words).ids.tolist())
    n_facts, kinds, read = set(), [], []
    for step in range(30):
        batch = made.batch(generator(0, "train", 0, step), 5, (8, 160))
        assert batch.questions.shape[:2] == (5, 8) and batch.context.shape[2] == (align or 64)
        for context, questions, answers in zip(*batch):
            ids = context.ravel().tolist()
            facts, asked = sentences(ids), {}
            for kind in babi.everything(list(map(parse, facts))).values():
                asked |= {question.strip(): answer for question, answer in kind.items()}
            assert not babi.is_published(facts)
            read += [i in passages for i in ids if i >= OWN_WORDS]
            for question, answer in zip(questions, answers[:, 0]):
                if answer >= 0:
                    assert words.name(answer) == asked[spoken(question)]
                    kinds.append("unknown" if words.name(answer) == "unknown" else "known")
            n_facts.add(len(facts))
    assert n_facts == ({1, 2} if task == "qa4" else set(range(1, 9)))
    assert 0.1 < kinds.count("unknown") / len(kinds) < 0.4
    assert 0.65 < np.mean(read) < 0.75              # the text of training; three words in ten are swapped
    # evaluation: published questions, whole in another book, at the exact length
    path = tmp_path / f"{task}_some-name_test.txt"
    path.write_text(write_stories(stories := babi.simulate(random.Random(7), task, 30)))
    config = train.Config(task=task, align=align, background=library[:1], eval_text=library[1:],
                          babi_dir=str(tmp_path), eval_lengths="0,30,2000", eval_samples="30")
    theirs = {int(i) for i in babilong.Background(library[1:], "test", words).ids}
    for cell in (made := make_task(config)).cells(config):
        questions, left_out = made.questions(cell)
        assert len(questions) + left_out == 30 and (left_out > 0) == (cell["length"] == 30 and task != "qa4")
        expected = dict(part=task, questions="published", split="test", align=align, text=["b.txt"])
        assert cell | expected == cell
        for question, sample_ in zip(questions, babi.spread(stories) if cell["length"] != 30 else ()):
            ids = np.concatenate(question.context).tolist()
            assert [words.id(sample_.answer)] == question.answer
            assert spoken(question.question) == sample_.question
            assert not cell["length"] or words.count(ids) == cell["length"]
            assert {i for i in ids if i >= OWN_WORDS} <= theirs
            assert sentences(ids) == [f.replace("  ", " ") for f in sample_.facts]
            start = round(question.depth * len(ids))             # the depth is that of the oldest fact needed
            assert ids[start:start + 3] == words.encode(sample_.facts[min(sample_.support)])[:3]


def test_released_samples_are_read_and_asked_and_bad_ones_named(tmp_path):
    file = tmp_path / "qa1_1k.jsonl"
    good = dict(input="A line\u2028of text. Mary went to the office.", question="Where is Mary? ",
                target="office")
    lines = [json.dumps(good, ensure_ascii=False) for _ in range(3)]
    file.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    config = train.Config(task="qa1", eval_text=[str(file)])
    task = make_task(config)
    with pytest.raises(ValueError, match="--task"):
        task_of(task="qa1+qa2", eval_text=[str(file)]).cells(config)
    cells = task.cells(config)
    questions, left_out = task.questions(cells[0])
    assert len(questions) == 3 and left_out == 0 and spoken(questions[0].question) == "Where is Mary?"
    assert [cell["part"] for cell in cells] == ["qa1"] and "qa1_1k.jsonl" in cells[0]["length"]
    for bad in ("{", "[1, 2]", json.dumps({**good, "target": "moon"}), json.dumps({"input": "x"}),
                "[" * 100000):
        file.write_text(bad)
        with pytest.raises(ValueError, match="qa1_1k.jsonl"):
            task.released(file)


# ------------------------------------------------------------------------------------------------------------
# 2. The data: pass key
# ------------------------------------------------------------------------------------------------------------

KEYS = babilong.Words(passkey.WORDS)


def told_keys(ids):
    """All keys stated in a context, read off the words: [(digits, is it true, where its sentence starts)]."""
    text, five = " ".join(KEYS.name(i) for i in ids), r"(\d \d \d \d \d)"
    true = rf"the pass key is {five} \. remember it \. \1 is the pass key \."
    found = [(m[1], True, m.start()) for m in re.finditer(true, text)]
    found += [(m[1], False, m.start()) for m in re.finditer(rf"a false key is {five} \. forget it \.", text)]
    return sorted(found, key=lambda told: told[2])


@pytest.mark.parametrize("task", passkey.KINDS)
def test_a_pass_key_is_stated_as_its_kind_says_in_exactly_the_tokens_asked_for(task, library):
    made, starts, keys = task_of(task=task, background=library, segment_len=32), set(), set()
    questions, left_out = made.questions(dict(length=4, n=60))
    for question in questions:
        ids = np.concatenate(question.context)
        told, answer = told_keys(ids), " ".join(KEYS.name(i) for i in question.answer)
        start = round((question.depth or 0) * len(ids))
        true = [digits for digits, is_true, _ in told if is_true]
        assert told_keys(ids[start:])[0][::2] == (answer, 0)
        assert (question.depth is None) == (task == "passkey")
        assert len(ids) == 4 * 32 and len(told) == {"passkey-decoys": 4, "passkey-rewritten": 3}.get(task, 1)
        assert told[0][1] and answer == true[-1 if task == "passkey-rewritten" else 0]
        starts.add(told[0][2])
        keys.add(answer)
    assert left_out == 0 and len(keys) > 50 and (starts == {0}) == (task == "passkey")
    batch = made.batch(generator(0, "train", 0), 5, (6,))
    assert batch.context.shape[2] == 32
    assert batch.questions.shape == (5, 1, 10) and batch.answers.shape == (5, 1, 5)
    for context, answer in zip(batch.context, batch.answers[:, 0]):
        stated = [digits for digits, _, _ in told_keys(context.ravel())]
        assert " ".join(KEYS.name(i) for i in answer) in stated


def test_an_answer_is_correct_only_if_all_of_it_is():
    """And asking for five digits, each after correct ones, tells the same as letting the model write them."""
    made = task_of(task="passkey", segment_len=32)
    model = tiny("fam", vocab_size=KEYS.size, segment_len=32)
    questions, _ = made.questions(dict(length=2, n=5))
    said = np.array(train.answer(model, questions, "cpu", tqdm(disable=True)))
    for row, question in zip(said, questions):
        _, _, state = model(torch.tensor(np.concatenate(question.context))[None])
        right = [*question.question, *question.answer[:-1]]
        alone = [model(torch.tensor(right[:n])[None], state=state)[0].argmax().item() for n in range(10, 15)]
        assert row.tolist() == alone
        written = model.generate(torch.tensor(question.question)[None], 5, state, temperature=0)
        question = question._replace(answer=written[0, 10:].tolist())
        assert train.answer(model, [question], "cpu", tqdm(disable=True)) == [question.answer]


# ------------------------------------------------------------------------------------------------------------
# 3. train.py: flags, folders, stopping and continuing
# ------------------------------------------------------------------------------------------------------------

FAST = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--batch_size", "8", "--stage_steps", "30",
        "--last_steps", "12", "--eval_samples", "8", "--device", "cpu"]


def fails(capsys, main, *argv):
    """Run a program that must stop with one line; return that line."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    line = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert len(line.strip().splitlines()) == 1, line
    return line


def run(*argv):
    train.main([str(a) for a in argv])


def rows_of(folder, *kinds):
    return [{k: v for k, v in row.items() if k != "seconds"}
            for row in files.read_rows(folder) if row["kind"] in kinds]


def test_there_are_at_most_forty_flags_and_help_lists_every_ablation_beside_its_memory(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert len(re.findall(r"^  --", text, re.M)) <= 40
    for name, Memory in MEMORIES.items():
        (line,) = re.findall(rf"^  {name} .*$", text, re.M)
        assert all(word in line for word in [*Memory.options, *Memory.ablations])


@pytest.mark.parametrize("argv, flag", [
    (["--n_layer", "two"], "n_layer"), (["--layers", "2"], "--layers"), (["--memory", "elephant"], "memory"),
    (["--ablate", "no_gama"], "no_gama"), (["--task", "qa21"], "task"), (["--n_head", "3"], "n_head"),
    (["--lr", "nan"], "lr"), (["--stages", "2,x"], "stages"), (["--stages", "32"], "stages"),
    (["--stages", "2/3"], "stages"), (["--seed", 10 ** 30], "seed"), (["--device", "tpu"], "device"),
    (["--task", "qa1", "--background", "nowhere.txt"], "nowhere"), (["--price", "-1"], "price"),
    (["--task", "qa1", "--babi_dir", "nowhere"], "babi_dir"), (["--batch_size", "0"], "batch_size"),
    (["--window", "3"], "window"), (["--align", "8"], "align"),
    (["--task", "qa1", "--key_size", "2"], "key_size"), (["--dtype", "float8"], "dtype"),
    (["--memory", "lm2", "--n_mem", "99"], "n_mem"), (["--memory", "full", "--compile", "1"], "compile"),
    (["--eval_lengths", "2/3"], "eval_lengths"), (["--eval_samples", "0"], "eval_samples"),
    (["--like", "nowhere"], "nowhere"), (["--memory", "none,rmt", "--ablate", "no_delta"], "no_delta"),
    (["--eval_only"], "holds no run")])
def test_a_wrong_value_is_answered_in_one_line_and_leaves_nothing_behind(argv, flag, capsys, tmp_path):
    assert flag in fails(capsys, train.main, *FAST, *argv, "--out_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_price_is_zero_for_a_memory_that_nothing_changes_and_the_documented_sum_for_one_written_by_hand():
    rng, made = np.random.default_rng(0), task_of(task="qa1", align=8)
    for memory, options in (("armt", dict(rule="delta", gate="hardsigmoid")), ("none", {})):
        model = tiny(memory, vocab_size=made.vocab_size, segment_len=8, **options)
        for block in model.memory.blocks if memory == "armt" else ():
            nn.init.zeros_(block.w_beta.weight)
            nn.init.constant_(block.w_beta.bias, -3.0)
        _, written, _, _ = train.BatchLoss(model, "cpu")(made.batch(rng, 4, (3, 20)), 1.0)
        assert written == 0
    model = tiny("armt", vocab_size=made.vocab_size, segment_len=8)
    batch = made.batch(rng, 4, (3, 20))
    loss, written, row, correct = train.BatchLoss(model, "cpu")(batch, 0.5)
    state, by_hand = model.init_state(4), 0.0
    for segment in torch.from_numpy(batch.context).unbind(1):
        _, _, new = model(segment, state=state)
        for old, now in zip(armt.tensors(state), armt.tensors(new)):
            for b in range(4):
                size, way = (x.double().square().sum().sqrt().item() for x in (old[b], now[b] - old[b]))
                by_hand += 0.5 * way / (1 + size) / 4
        state = new
    assert written.item() == pytest.approx(by_hand, rel=1e-4) and by_hand > 0.1
    assert len(row) == len(correct) == (batch.answers >= 0).sum()
    assert train.BatchLoss(model, "cpu")(batch)[0].item() == pytest.approx(loss.item())


@pytest.mark.parametrize("extra", [["--muon_lr", "0"], ["--memory", "fam", "--window", "1", "--clip", "0"],
                                   ["--task", "qa2+qa4", "--stages", "2/0,4/40", "--price", "0.1"]])
def test_stop_and_resume_is_the_same_run(extra, tmp_path, monkeypatch, capsys):
    whole, parts, clip = tmp_path / "whole", tmp_path / "parts", torch.nn.utils.clip_grad_norm_
    argv = [*FAST, "--stages", "2,3", "--learned", "0", "--eval_lengths", "3", *extra, "--out_dir"]
    run(*argv, whole)
    steps = itertools.count()

    def interrupted(*args):
        if next(steps) in (4, 28):
            os.kill(os.getpid(), signal.SIGINT)                            # Ctrl-C in the middle of a step
        return clip(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(*argv, parts)
        assert "the same command continues" in capsys.readouterr().out
    run(*argv, parts)
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (whole, parts))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert rows_of(whole, "train", "eval", "final") == rows_of(parts, "train", "eval", "final")
    run(*argv, parts)                                                      # and once more changes nothing
    assert rows_of(whole, "train", "eval", "final") == rows_of(parts, "train", "eval", "final")
    assert "--seed" in fails(capsys, train.main, *argv, parts, "--seed", "7")


def test_a_run_that_was_killed_continues_even_where_its_last_row_is_half_written(tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = [*FAST, "--stages", "2,2,2", "--learned", "0", "--last_steps", "40", "--eval_lengths", "2",
            "--out_dir"]
    run(*argv, whole)
    code = f"import train; train.main({[*map(str, argv), str(killed)]!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=TOP, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not (killed / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')                                # a power cut
    run(*argv, killed)
    assert rows_of(whole, "train", "eval", "final") == rows_of(killed, "train", "eval", "final")
    rows = (killed / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(["{", *rows]) + "\n")
    assert "metrics.jsonl, line 1: damaged" in fails(capsys, train.main, *argv, killed)


def test_results_are_never_overwritten_and_a_folder_has_one_process(tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "metrics.jsonl").write_text('{"kind": "final"}\n')
    line = fails(capsys, train.main, *FAST, "--stages", "2", "--out_dir", tmp_path / "rows")
    assert "no checkpoint" in line
    assert (tmp_path / "rows" / "metrics.jsonl").read_text() == '{"kind": "final"}\n'
    with files.only_user(tmp_path / "rows"):
        line = fails(capsys, train.main, *FAST, "--stages", "2", "--out_dir", tmp_path / "rows")
        assert f"process {os.getpid()} is working" in line
    for damage in ("not a folder", "full"):
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(OSError):
            files.write_atomically(path, lambda temporary: (temporary.write_text("half"),
                                                            os.stat("/nowhere")))
        assert path.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["file", "rows"]


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_flag_to_change(tmp_path, capsys):
    line = fails(capsys, train.main, *FAST, "--lr", "100", "--muon_lr", "100", "--clip", "0", "--stages", "2",
                 "--last_steps", "500", "--out_dir", tmp_path / "run")
    assert "--lr" in line and "step" in line and "stage 2" in line


def test_a_grid_trains_what_can_be_and_a_run_is_repeated_like_another(tmp_path, capsys):
    argv = [*FAST, "--stages", "2", "--eval_lengths", "2", "--seed", "0,1", "--memory", "none,armt",
            "--ablate", "nothing,no_delta", "--last_steps", "2", "--out_dir", tmp_path]
    run(*argv)
    assert capsys.readouterr().out.count("skipped") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"remember-{name}-seed{s}" for name in (
        "armt-no_delta", "armt-nothing", "none-nothing") for s in (0, 1)]
    first = tmp_path / "remember-armt-no_delta-seed0"
    config = json.loads((first / "config.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps(dict(config=config)))
    for like in (first, tmp_path / "result.json"):
        run("--like", like, "--out_dir", tmp_path / f"again-{like.suffix}")
        again = rows_of(tmp_path / f"again-{like.suffix}", "train", "eval", "final")
        assert rows_of(first, "train", "eval", "final") == again


def test_an_evaluation_adds_what_is_missing_and_none_of_no_question_is_not_zero(tmp_path, capsys):
    run(*FAST, "--task", "qa1+qa3", "--stages", "4/0", "--last_steps", "2", "--eval_lengths", "0",
        "--out_dir", tmp_path)
    argv = ["--eval_only", "--out_dir", tmp_path, "--task", "qa3", "--eval_samples", "3"]
    run(*argv, "--eval_lengths", "30,300")
    run(*argv, "--eval_lengths", "30,300")
    rows = rows_of(tmp_path, "eval")
    assert [(row["cell"]["part"], row["cell"]["length"]) for row in rows] == [
        ("qa1", 0), ("qa3", 0), ("qa3", 30), ("qa3", 300)]
    assert rows[2]["accuracy"] is None and rows[2]["n"] == 0
    assert rows[2]["left_out"] == 3 and rows[3]["left_out"] == 0
    assert "qa3 30 words: - (3 stories are longer and left out)" in capsys.readouterr().out
    assert "trained on" in fails(capsys, train.main, "--eval_only", "--out_dir", tmp_path, "--task", "qa2")
    assert "--lr" in fails(capsys, train.main, "--eval_only", "--out_dir", tmp_path, "--lr", "1")


def test_two_processes_train_as_one_does(tmp_path):
    argv = [*FAST, "--task", "qa1+qa4", "--stages", "2/0,4/20", "--learned", "0", "--price", "0.01",
            "--eval_lengths", "0"]
    run(*argv, "--out_dir", tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
              "train.py"]
    done = subprocess.run([*launch, *argv, "--out_dir", str(tmp_path / "two")], cwd=TOP, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    one, two = (rows_of(tmp_path / name, "train", "eval") for name in ("one", "two"))
    assert len(one) == len(two) and [row["accuracy"] for row in one] == [row["accuracy"] for row in two]
    one, two = ([row["loss"] for row in rows if "loss" in row] for rows in (one, two))
    assert one == pytest.approx(two, abs=2e-4)


def test_a_compiled_run_learns_what_the_usual_one_learns(tmp_path, monkeypatch):
    compiler = torch.compile
    without_c = lambda f, mode=None, **how: compiler(f, backend="aot_eager", **how)     # no C++
    monkeypatch.setattr(torch, "compile", without_c)
    argv = [*FAST, "--stages", "2", "--segment_len", "4", "--learned", "0", "--eval_lengths", "3"]
    for flag in "01":
        run(*argv, "--compile", flag, "--out_dir", tmp_path / flag)
    a, b = (torch.load(tmp_path / flag / "ckpt.pt", weights_only=True)["model"] for flag in "01")
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


# ------------------------------------------------------------------------------------------------------------
# 4. sample.py: a memory that is told, reads, and is asked
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def qa(tmp_path_factory):
    """A folder with a run of qa1 and a book."""
    folder = tmp_path_factory.mktemp("qa")
    run(*FAST, "--task", "qa1+qa4", "--align", "8", "--stages", "2/0", "--eval_lengths", "0",
        "--out_dir", folder / "run")
    (folder / "book.txt").write_text("Ä" * 7 + " " + babilong.prose(400, seed="a book"), encoding="utf-8")
    return folder


def reader_of(folder, **change):
    config, model, _ = train.load(folder)
    config = train.replace(config, **change)
    return sample.Reader(config, model, make_task(config), "cpu")


@every_variant
def test_reading_fast_gives_the_state_of_reading_one_segment_after_another(memory, ablate):
    model, idx = tiny(memory, ablate).double(), some_text(20 * T, rows=1)
    for start in (model.init_state(1), model(idx[:, :T + 3])[2]):
        state, wrote = sample.read_fast(model, idx.view(-1, T), start, {})
        assert_close(state, model(idx, state=start)[2])
        assert [*wrote] == ([] if memory == "none" else [*range(20)])


def test_segments_that_write_nothing_are_read_side_by_side_and_not_again():
    """The gates are set so that only token 0 opens them: it is at the places that `loud` names."""
    model, rows = tiny("armt", "delta", gate="hardsigmoid").double(), []
    text = 1 + some_text(40 * T, rows=1) % (V - 1)
    for block in model.memory.blocks:
        block.register_forward_pre_hook(lambda block, args: setattr(block, "loud", args[0][:, :1, 0] > 50))
        block.gate = lambda x, block=block: block.loud[..., None] * torch.ones_like(x)
    model.wte.weight.data[0, 0] = 100.0                            # large enough to be seen above all layers
    inner = model.memory.forward
    model.memory.forward = lambda x, state: (rows.append(len(x)), inner(x, state))[1]
    for loud, expected in (([], [1, 2, 4, 8, 16, 9]), ([0], [1, 1, 2, 4, 8, 16, 8]),
                           ([5, 6, 39], [1, 2, 4, 1, 1, 1, 2, 4, 8, 16, 2, 1]), (list(range(40)), [1] * 40)):
        idx, quiet = text.clone(), {}
        idx[0, [T * i for i in loud]] = 0
        rows.clear()
        state, wrote = sample.read_fast(model, idx.view(-1, T), model.init_state(1), quiet)
        assert rows == expected and [*wrote] == loud and len(quiet) <= 64
        assert_close(state, model(idx)[2])
        rows.clear()
        assert_close(sample.read_fast(model, idx.view(-1, T), model.init_state(1), quiet)[0], state)
        assert len(rows) == len(loud)                            # what is known to be quiet is not read again


@pytest.mark.parametrize("align", [0, 8])
def test_telling_in_two_calls_equals_telling_in_one_and_asking_changes_nothing(align, qa):
    one, two, three = (reader_of(qa / "run", align=align) for _ in range(3))
    text = (qa / "book.txt").read_text(encoding="utf-8")
    end = text.index(" ", 1111)
    one.tell(text)
    two.tell(text[:end])
    two.ask("Where is Mary?")
    two.tell(text[end:])
    three.read(qa / "book.txt")
    for other in (two, three):
        assert one.words_read == other.words_read == babilong.Words.count(one.words.encode(text))
        assert one.tail == other.tail
        assert_close(one.state, other.state, 1e-5)
        assert torch.allclose(one.ask("Where is Mary?"), other.ask("Where is Mary?"), atol=1e-6)


def test_a_saved_memory_answers_tomorrow_and_a_damaged_or_foreign_one_is_refused(qa, capsys):
    base, ask = ["--out_dir", str(qa / "run"), "--json"], ["--ask", "Where is Mary?", "Where is John?"]
    told = ["--facts", "Mary went to the kitchen. John moved to the garden.", "--read", str(qa / "book.txt")]
    sample.main([*base, *told, *ask])
    today = capsys.readouterr().out
    sample.main([*base, *told, "--save_state", str(qa / "memory.pt")])
    sample.main([*base, "--load_state", str(qa / "memory.pt"), *ask])
    strip = lambda out: [{k: v for k, v in json.loads(line).items() if k != "segments_wrote"}
                         for line in out.splitlines()]
    assert strip(capsys.readouterr().out) == strip(today) and len(strip(today)) == 2
    good = torch.load(qa / "memory.pt", weights_only=True)
    for change in (dict(state=()), dict(fingerprint="x"), dict(tail=[10 ** 9]), dict(words_read="many"),
                   dict(tail=None),
                   dict(state=armt.state_map(lambda t: t * math.nan, good["state"])),
                   dict(state=armt.state_map(lambda t: t[..., :-1], good["state"])),
                   dict(state=armt.state_map(torch.Tensor.half, good["state"]))):
        torch.save(good | change, qa / "bad.pt")
        assert "bad.pt" in fails(capsys, sample.main, *base, "--load_state", qa / "bad.pt", *ask)
    for file in ("nowhere.pt", "book.txt"):
        assert file in fails(capsys, sample.main, *base, "--load_state", qa / file, *ask)
    assert "--save_state" in fails(capsys, sample.main, *base, *told, "--save_state", qa / "nowhere" / "x.pt")
    (qa / "empty.txt").write_bytes(b"")
    (qa / "binary.txt").write_bytes(bytes(range(256)))
    for name in ("empty.txt", "binary.txt", "nowhere.txt", "."):
        assert name in fails(capsys, sample.main, *base, "--read", qa / name, *ask)


def test_a_conversation_says_what_it_does_not_know(qa, capsys, monkeypatch):
    lines = iter(["Napoleon went to the kitchen.", "Where is Mary?", f"read {qa / 'book.txt'}",
                  "read nowhere.txt", "forget", "hm", "Where is ?", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    sample.main(["--out_dir", str(qa / "run")])
    out, err = capsys.readouterr()
    assert "Where is Mary?" in out and "words in" in out
    assert "nowhere.txt" in out and "'Napoleon'" in err and "Mary" not in err


def test_what_was_written_is_shown_segment_by_segment_and_other_tasks_show_samples(qa, tmp_path, capsys):
    sample.main(["--out_dir", str(qa / "run"), "--facts", "Mary went to the kitchen.",
                 "--read", str(qa / "book.txt"), "--written"])
    strip, said, *most = capsys.readouterr().out.strip().splitlines()
    assert strip[0] == strip[-1] == "|" and len(strip) <= 74 and strip.isascii()
    assert "segments" in said and len(most) == 5
    run(*FAST, "--stages", "2", "--eval_lengths", "2", "--out_dir", tmp_path)
    capsys.readouterr()
    sample.main(["--out_dir", str(tmp_path), "--samples", "3"])
    assert capsys.readouterr().out.count("->") == 3
    line = fails(capsys, sample.main, "--out_dir", tmp_path, "--facts", "Mary went to the office.")
    assert "--facts" in line
    assert "--samples" in fails(capsys, sample.main, "--out_dir", qa / "run", "--samples", "3")


# ------------------------------------------------------------------------------------------------------------
# 5. Downloads, from a server on this machine
# ------------------------------------------------------------------------------------------------------------

class Shelf(http.server.BaseHTTPRequestHandler):
    """Serves `files`; goes on where a client stopped if `ranges`; breaks off answers after `limit` bytes."""
    files, ranges, limit = {}, True, None

    def do_GET(self):
        content, start = self.files.get(self.path), 0
        if content is None:
            return self.send_error(404)
        if self.ranges and (wish := self.headers.get("Range")):
            start = int(re.fullmatch(r"bytes=(\d+)-", wish)[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(content) - start)
        self.end_headers()
        self.wfile.write(content[start:][:self.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A server with a small archive of bAbI and two small books, and download.py pointed to it."""
    wanted = {f"en-10k/{name}": PUBLISHED.replace("Mary", name).encode()
              for name in ("qa1_a_test.txt", "qa2_b_test.txt")}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for file, content in {**wanted, "en-10k/qa3_not_ours.txt": b"?", "en/qa1_a_test.txt": b"?"}.items():
            info = tarfile.TarInfo("tasks_1-20_v1-2/" + file)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "babi.sha256").write_text("".join(
        f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in wanted.items()))
    texts = {title: (f"The eBook of {title}\r\n*** START OF THE EBOOK ***\r\n"
                     + f"{title} goes on.\r\n" * 200 + "*** END OF IT ***").encode()
             for title in ("A Book", "The Other")}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shelf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    Shelf.files = {"/babi.tar.gz": archive.getvalue(), "/0.txt": texts["A Book"],
                   "/1.txt": texts["The Other"]}
    Shelf.ranges, Shelf.limit = True, None
    monkeypatch.setattr(download, "HERE", tmp_path / "code")
    monkeypatch.setattr(download, "BABI", [f"{base}/nowhere.tar.gz", f"{base}/babi.tar.gz"])
    monkeypatch.setattr(download, "GUTENBERG", base + "/{number}.txt")
    monkeypatch.setattr(download, "TEXTS", {f"books/{title[0].lower()}.txt": (n, title, len(text) - 270)
                                            for n, (title, text) in enumerate(texts.items())})
    yield tmp_path / "data"
    server.shutdown()
    server.server_close()


def test_a_download_brings_checked_files_and_clean_books_and_continues_where_it_broke_off(shelf, capsys):
    for limit in [len(Shelf.files["/babi.tar.gz"]) // 3] * 2:
        Shelf.limit = limit
        assert "continues" in fails(capsys, download.main, "--out_dir", shelf)
        assert not (shelf / "babi").exists() and not (shelf / "babi.tar.gz").exists()
    Shelf.limit, Shelf.ranges = None, False                     # from now on the server sends all of it again
    download.main(["--out_dir", str(shelf)])
    assert "next: python train.py" in capsys.readouterr().out
    assert sorted(str(p.relative_to(shelf)) for p in shelf.rglob("*") if p.is_file()) == [
        "babi/en-10k/qa1_a_test.txt", "babi/en-10k/qa2_b_test.txt", "books/a.txt", "books/t.txt"]
    assert (shelf / "books" / "a.txt").read_text() == "A Book goes on.\n" * 200
    Shelf.files = {}
    download.main(["--out_dir", str(shelf)])                       # all is there: nothing is asked for again


def test_a_wrong_download_is_refused_by_name_and_leaves_nothing(shelf, capsys):
    good, digests = dict(Shelf.files), (download.HERE / "babi.sha256").read_text()
    (download.HERE / "babi.sha256").write_text(digests.replace(digests[:5], "00000", 1))
    assert "qa1_a_test.txt is not the published file" in fails(capsys, download.main, "--out_dir", shelf)
    (download.HERE / "babi.sha256").write_text(digests)
    Shelf.files = good | {"/babi.tar.gz": b"no archive"}
    assert "not a whole archive" in fails(capsys, download.main, "--out_dir", shelf)
    assert not list(shelf.iterdir())                               # so that the next try fetches it again
    Shelf.files = good | {"/0.txt": good["/1.txt"]}
    assert "does not say 'A Book'" in fails(capsys, download.main, "--out_dir", shelf)
    Shelf.files = good | {"/0.txt": good["/0.txt"][:1000]}
    assert "a.txt: expected about" in fails(capsys, download.main, "--out_dir", shelf)
    Shelf.files = {}
    assert "is there a network?" in fails(capsys, download.main, "--out_dir", shelf / "else")


# ------------------------------------------------------------------------------------------------------------
# 6. What is shipped, the README, and learning itself
# ------------------------------------------------------------------------------------------------------------

def test_the_shipped_memory_answers_all_five_kinds_of_question_and_says_what_it_does_not_know(capsys):
    assert sum(path.stat().st_size for path in sample.PRETRAINED.iterdir()) < 1_000_000
    for facts, asked in (
            ("Mary got the milk there. Mary went to the kitchen. John moved to the office. "
             "Mary moved to the garden.",
             {"Where is Mary?": "garden", "Where is John?": "office", "Where is the milk?": "garden",
              "Where was the milk before the garden?": "kitchen", "Where is the football?": "unknown"}),
            ("Mary went to the kitchen. Mary got the milk there.",
             {"Where is the milk?": "kitchen", "Where is Daniel?": "unknown"}),
            ("The office is north of the kitchen. The garden is south of the kitchen.",
             {"What is north of the kitchen?": "office", "What is the kitchen north of?": "garden",
              "What is the office north of?": "kitchen"}),
            ("Fred picked up the milk there. Jeff went to the office. Fred passed the milk to Bill.",
             {"Who gave the milk to Bill?": "Fred", "What did Fred give to Bill?": "milk",
              "Who received the milk?": "Bill"})):
        sample.main(["--json", "--facts", facts, "--ask", *asked])
        said = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["answer"] for line in said] == [*asked.values()]
    assert "weights only" in fails(capsys, train.main, "--like", sample.PRETRAINED,
                                   "--out_dir", sample.PRETRAINED, "--background", "prose")


def commands():
    """Every command of train.py and sample.py in the README and in results/, as (program, arguments)."""
    for path in [TOP / "README.md", *sorted((TOP / "results").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)
                           + re.findall(r"`(python [^`\n]+)`", text))
        for program, rest in re.findall(r"python (train|sample)\.py(.*?)(?:#.*|&&.*|;.*)?$", blocks, re.M):
            yield program, shlex.split(rest)


def test_every_command_of_the_readme_parses(monkeypatch):
    monkeypatch.chdir(TOP)
    found = list(commands())
    assert len(found) > 10
    for program, argv in found:
        if "--help" in argv:
            continue
        if program == "sample":
            sample.make_parser().parse_args(argv)
        else:
            like, eval_only, given = train.parse(argv)
            for name in ("background", "eval_text", "babi_dir"):         # downloaded, perhaps not here
                given.pop(name, None)
            if not eval_only and not like:
                train.grid(like, given)
            elif like:
                assert Path(like).exists(), like


def test_every_table_of_accuracies_is_that_of_the_rows(capsys):
    for folder in sorted({path.parent for path in (TOP / "results").rglob("*.json")}):
        table.print_table(table.read_runs(folder))
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    shown = [line for path in (TOP / "README.md", TOP / "results" / "README.md")
             for block in re.findall(r"```\n(accuracy, %.*?)```", path.read_text(encoding="utf-8"), re.S)
             for line in block.splitlines() if line]
    assert len(shown) > 30 and not [line for line in shown if line not in printed]


@pytest.mark.slow
def test_the_memory_in_the_readme_trains_and_can_be_used(tmp_path):
    text = (TOP / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class Fade" in block)
    (tmp_path / "fade.py").write_text(code)
    fade, env = [sys.executable, tmp_path / "fade.py"], os.environ | dict(PYTHONPATH=str(TOP))
    argv = [*FAST, "--memory", "fade", "--stages", "2", "--eval_lengths", "2",
            "--out_dir", str(tmp_path / "fade")]
    subprocess.run([*fade, "train", *argv], check=True, env=env)
    assert rows_of(tmp_path / "fade", "final")
    said = subprocess.run([*fade, "sample", "--out_dir", str(tmp_path / "fade")], check=True, env=env,
                          capture_output=True)
    assert said.stdout.count(b" -> ") == 5


@pytest.mark.slow
def test_armt_learns_four_pairs_from_scratch_and_none_does_not(tmp_path):
    argv = ["--device", "cpu", "--stages", "2,4", "--last_steps", "100", "--eval_lengths", "4",
            "--eval_samples", "1000", "--out_dir"]
    run(*argv, tmp_path / "armt")
    assert rows_of(tmp_path / "armt", "eval")[0]["accuracy"] > 0.97
    run(*argv, tmp_path / "none", "--memory", "none", "--stage_steps", "60")
    assert rows_of(tmp_path / "none", "eval")[0]["accuracy"] < 0.15          # chance is 1/16
