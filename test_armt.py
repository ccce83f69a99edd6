"""
The proofs: what this repository claims, shown on models and texts so small that all of it runs on a CPU.

A name is the sentence that its test proves. A test of `every_variant` runs for all of MEMORIES (a new one
joins by itself), with each of their ablation words, and for the memory that the README adds. Where a paper or
a plain GPT can be written down once more, slowly and without looking at armt.py, the two are compared in
float64.
"""
import hashlib
import http.server
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections import defaultdict
from functools import cache
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
from data import (SPLITS, babi, babilong, chunks, download, fill, files, generator, make_task, passkey,
                  recall, segments)
from results import table
from results.forget import forget

torch.set_num_threads(1)         # nothing here is large enough to be worth a second thread
TOP = Path(train.__file__).parent
README = (TOP / "README.md").read_text(encoding="utf-8")
FADE = re.search(r"```python\n(.*?class Fade.*?)```", README, re.S)[1]            # a memory of one's own
exec(FADE.split("program = ")[0], {})                                             # from here on in MEMORIES


# --- 1. The model: what holds for every memory --------------------------------------------------------------

V, T, C, L = 20, 4, 16, 2                                  # words, segment, width, layers of the models below


# all memories as they are, with each ablation word, and with ARMT's other rule, which is a word for `tiny`
every_variant = pytest.mark.parametrize("memory, ablate", [
    ("armt", "delta"),
    *((name, word) for name, Memory in MEMORIES.items() for word in ("nothing", *Memory.ablations))])


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


def assert_close(a, b, tolerance=1e-9):
    """Tensors or states: equal in float64, whatever the order of sums, or with tolerance 0 bit for bit."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_variant
def test_the_future_is_invisible(memory, ablate):
    model, idx = tiny(memory, ablate), some_text(19)                      # four full segments and a short one
    before = model(idx, idx)[0]
    reach = dict(none=0, bswa=L).get(memory, math.inf)           # each layer of bswa adds its window of one
    for edit in (1, 3, 4, 6, 12):
        other = idx.clone()
        other[:, edit] = (other[:, edit] + 1) % V
        after = model(other, other)[0]
        assert torch.equal(after[:, :edit], before[:, :edit]), f"token {edit} was seen before it was read"
        assert not torch.equal(after[:, edit], before[:, edit])
        for start in range(edit // T * T + T, 19, T):                      # the segments that follow
            segment, distance = slice(start, start + T), start // T - edit // T
            assert torch.equal(after[:, segment], before[:, segment]) == (distance > reach)


@every_variant
def test_the_state_is_the_whole_past_and_a_question_leaves_it_as_it_was(memory, ablate, tmp_path):
    model, book = tiny(memory, ablate).double(), some_text(8)
    before, weights = model(book, book), {name: w.clone() for name, w in model.state_dict().items()}
    for gradient in (True, False):                                # in-place work is tempting without gradient
        with torch.set_grad_enabled(gradient):
            empty = model.init_state(2)
            _, _, state = model(book, state=empty)
            torch.save(state, tmp_path / "state.pt")
            for question in (some_text(3, seed=2), some_text(6, seed=3)):
                text = torch.cat((book, question), dim=1)
                whole, _, end = model(text, text)
                *answer, after = model(question, question, state)
                assert_close(answer[0], whole[:, 8:])
                assert_close(after, end)
                *asked, nothing = model(question, question, state, write=False)
                assert_close(asked, answer)
                assert nothing is None
                model.generate(question, 5, state)
                assert_close(state, torch.load(tmp_path / "state.pt", weights_only=True), 0)
            assert_close(empty, model.init_state(2), 0)
    assert_close(model(book, book), before, 0)                                 # no module has kept anything
    assert_close(dict(model.state_dict()), weights, 0)


@every_variant
def test_the_gradient_of_the_last_segment_reaches_the_first_and_every_parameter_learns(memory, ablate):
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
        cut_off = memory == "none" or memory in ("bswa", "rmt") and ablate == "stop_gradient"
        assert reached == 0 if cut_off else reached > 1e-9
    model(idx, idx)[1].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_was_read_long_ago_can_be_learned(memory):
    model = tiny(memory)
    idx = torch.zeros(4, 3 * T, dtype=torch.long)
    idx[:, 1] = torch.arange(1, 5)                   # four books that differ in one word of the first segment
    targets = torch.full_like(idx, -1)
    targets[:, -1] = idx[:, 1]                               # which was it? asked at the end of the third
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(60 if memory == "none" else 400):
        _, loss, _ = model(idx[:, T:], targets[:, T:], model(idx[:, :T])[2])                   # in two calls
        if loss < 0.3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess = math.log(4) - 1e-4                                        # one of four: all that none can say
    assert loss >= guess if memory == "none" else loss < 0.3
    assert model(idx[:, -T:], targets[:, -T:])[1] >= guess            # so it was in the state, and only there


@every_variant
def test_rows_of_a_batch_do_not_mix(memory, ablate):
    model, idx = tiny(memory, ablate).double(), some_text(10)
    other = idx.clone()
    other[1] = (other[1] + 1 + some_text(10, rows=1, seed=2)[0] % (V - 1)) % V    # other words in row 1
    logits, _, state = model(idx, idx)
    changed, _, changed_state = model(other, other)
    assert torch.equal(changed[0], logits[0]) and not torch.equal(changed[1], logits[1])
    assert_close(armt.state_map(lambda s: s[0], changed_state), armt.state_map(lambda s: s[0], state), 0)
    for row in (0, 1):
        alone, _, alone_state = model(idx[row:row + 1], idx[row:row + 1])
        assert_close(alone[0], logits[row])
        assert_close(alone_state, armt.state_map(lambda s: s[row:row + 1], state))


def test_logits_are_those_of_the_supervised_columns_and_minus_one_is_ignored():
    model, idx, columns = tiny("armt").double(), some_text(14), [1, 2, 9, 11, 13]             # none in 4 to 7
    targets = torch.full_like(idx, -1)
    targets[:, columns] = some_text(5, seed=2)
    targets[0, 9] = targets[1, 2] = -1                           # these columns have a target in one row only
    everything = model(idx, idx)[0]
    logits, loss, _ = model(idx, targets)
    assert_close(logits, everything[:, columns])
    assert_close(loss, nn.functional.cross_entropy(everything.mT, targets, ignore_index=-1))
    logits, loss, _ = model(idx, torch.full_like(idx, -1))
    assert logits.shape == (2, 0, V) and loss == 0
    logits, loss, _ = model(idx)
    assert loss is None
    assert_close(logits, everything[:, -1:])


# --- 1. The model: a plain GPT and the papers, written once more and slowly ---------------------------------

BLOCKS = [f"memory.blocks.{layer}" for layer in range(L)]             # p below: {name of a parameter: tensor}


def norm(p, name, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]


def turned(x, position):
    """Rotary positions as in books, x (d,): features i and i + d/2 are one complex number, and it turns."""
    half = len(x) // 2
    angle = position / 10000 ** (torch.arange(half) / half).double()
    z = torch.complex(x[:half], x[half:]) * torch.exp(1j * angle)
    return torch.cat((z.real, z.imag))


def look(q, seen, position=None, n_head=2):
    """One query (C,) at a position (None: no positions) looks at a list of (position, key, value): (C,)."""
    heads = []
    for part in torch.arange(C).chunk(n_head):
        place = (lambda x, at: x[part]) if position is None else (lambda x, at: turned(x[part], at))
        weight = [torch.exp(place(q, position) @ place(k, at) / math.sqrt(len(part))) for at, k, _ in seen]
        heads.append(sum(w * v[part] for w, (_, _, v) in zip(weight, seen)) / sum(weight))
    return torch.cat(heads)


def project(p, name, rows):
    """Query, key and value, not yet turned, of each row (C,)."""
    return [(p[name + ".attn.c_attn.weight"] @ norm(p, name + ".ln_1", x)).chunk(3) for x in rows]


def attention(p, name, rows, sees=lambda i, j: j <= i):
    """Row i, at position i, looks at the rows j with sees(i, j)."""
    qkv = project(p, name, rows)
    seen = [[(j, k, v) for j, (_, k, v) in enumerate(qkv) if sees(i, j)] for i in range(len(rows))]
    return [p[name + ".attn.c_proj.weight"] @ look(q, seen[i], i) for i, (q, _, _) in enumerate(qkv)]


def feed(p, name, x):
    """The MLP and its residual, for one row (C,)."""
    h = p[name + ".mlp.c_fc.weight"] @ norm(p, name + ".ln_2", x)
    return x + p[name + ".mlp.c_proj.weight"] @ (h * (1 + torch.erf(h / math.sqrt(2))) / 2)


def plain_block(p, name, rows, *sees):
    return [feed(p, name, x + a) for x, a in zip(rows, attention(p, name, rows, *sees))]


def rmt_by_hand(p, row, words, config):
    """The memory is what the write tokens have become after the final LayerNorm."""
    mem, M, top = list(p["memory.mem"]), config.n_mem, []
    for part in row.split(T):

        def sees(i, j):
            both_read, both_write = max(i, j) < M, min(i, j) >= M + len(part)
            return j <= i or (both_read or both_write) and "one_way" not in words

        x = [*mem, *p["wte.weight"][part], *mem]
        for name in BLOCKS:
            x = plain_block(p, name, x, sees)
        top += x[M:-M]
        mem = [norm(p, "memory.ln_f", m) for m in x[-M:]]
        if "stop_gradient" in words:
            mem = [m.detach() for m in mem]
    return top


def phi(x, nu, unit):
    """DPFP-nu one number at a time: x is a list of numbers (tensors without axes), and so is the result."""
    r = [n.clamp(min=0) for n in x] + [(-n).clamp(min=0) for n in x]
    f = [r[i] * r[i - j] for j in range(1, nu + 1) for i in range(len(r))]   # r[-1] is the last one: it rolls
    size = sum(n * n for n in f) ** 0.5
    return [n / size for n in f] if unit else f


def armt_by_hand(p, row, words, config):
    """A is a list of D vectors, z a list of D numbers; all are 0 at first, so nothing is read, vbar = 0."""
    delta, D, top = config.rule == "delta", 2 * config.nu * config.d_mem, []
    state = [([torch.zeros(C).double()] * D, [torch.zeros(()).double()] * D)] * L

    def ask(f, A, z):
        answer, overlap = sum(n * a for n, a in zip(f, A)), sum(n * b for n, b in zip(f, z)) + 1e-5
        return answer if delta else answer / overlap, overlap

    for part in row.split(T):
        x = [*p["wte.weight"][part], *p["memory.mem"]]
        for layer, name in enumerate(BLOCKS):
            W_Q, W_K, W_V, w_beta = (p[f"{name}.{W}.weight"] for W in ("W_Q", "W_K", "W_V", "w_beta"))
            A, z = old = state[layer]
            x = [t + ask(phi(W_Q @ t, config.nu, delta), *old)[0] for t in x]
            x = plain_block(p, name, x)
            for u in x[-config.n_mem:]:                   # all memory tokens of a segment see the old A and z
                k, v = phi(W_K @ u, config.nu, delta), W_V @ u
                beta = w_beta[0] @ u + p[name + ".w_beta.bias"][0]
                beta = beta.sigmoid() if config.gate == "sigmoid" else (beta / 6 + 0.5).clamp(0, 1)
                vbar, overlap = ask(k, *old)
                gamma = 1 - overlap.item() / (sum(n.item() ** 2 for n in k) + 1e-5)           # a constant
                gamma = min(max(gamma, 0), 1) if any(n != 0 for n in old[1]) else 1
                vbar, gamma = 0 if "no_delta" in words else vbar, 1 if "no_gamma" in words else gamma
                A = [a + beta * n * (v - vbar) for a, n in zip(A, k)]
                z = [b + (beta if "gated_z" in words else 1) * gamma * n for b, n in zip(z, k)]
            state[layer] = A, z
        top += x[:len(part)]
    return top


def fam_by_hand(p, row, words, config):
    """Algorithm 2; without rows it is algorithm 1, and with a window of nothing or everything a plain GPT."""
    M, fam, rows = config.n_mem or 0, [], list(p.get("memory.mem", ()))
    window = dict(none=0, full=len(row)).get(config.memory, config.window)
    for name in BLOCKS:                                     # the prompt climbs alone, its rows see each other
        fam.append(rows)
        rows = plain_block(p, name, rows, lambda i, j: True)
    caches, top = [[] for _ in BLOCKS], []
    for start in range(0, len(row), T):
        x = list(p["wte.weight"][row[start:start + T]])
        for layer, name in enumerate(BLOCKS):
            W_O, cache = p[name + ".attn.c_proj.weight"], caches[layer]
            rows, tokens = project(p, name, fam[layer]), project(p, name, x)
            before = [(start - M + i, k, v) for i, (_, k, v) in enumerate(rows)]      # the last places before
            now = [(start + t, k, v) for t, (_, k, v) in enumerate(tokens)]
            if "sum_fam" in words:
                rows = project(p, name, p[name + ".query"])
            said = [look(q, cache + before + now[:t + 1], start + t) for t, (q, _, _) in enumerate(tokens)]
            kept = [W_O @ look(q, before + now, start - M + i) for i, (q, _, _) in enumerate(rows)]
            if start and not words & {"no_copy", "sum_fam"}:
                kept = [a + f for a, f in zip(kept, fam[layer])]
            fam[layer] = [feed(p, name, a) for a in kept]
            if "norm_rows" in words:
                fam[layer] = [(f - f.mean()) / (f.var(correction=0) + 1e-5).sqrt() / 2 for f in fam[layer]]
            x = [feed(p, name, t + W_O @ a) for t, a in zip(x, said)]
            caches[layer] = (cache + now)[-window * T:] if window else []
            if "stop_gradient" in words:
                caches[layer] = [(at, k.detach(), v.detach()) for at, k, v in caches[layer]]
        top += x
    return top


def lm2_by_hand(p, row, words, config):
    """The equations of the banner, slot by slot."""
    banks, top = [list(torch.eye(config.n_mem, C).double())] * L, []
    for part in row.split(T):
        x = list(p["wte.weight"][part])
        for layer, name in enumerate(BLOCKS):

            def ask(which, asking, asked):
                W_Q, W_K, W_V = (p[f"{name}.{which}.W_{letter}.weight"] for letter in "QKV")
                return [look(W_Q @ a, [(None, W_K @ b, W_V @ b) for b in asked]) for a in asking]

            def gate(which, h, slot=None):
                if f"no_{which}_gate" in words:
                    return 1
                W, b = p[f"{name}.gates.{which}.W_x.weight"], p[f"{name}.gates.{which}.b"]
                seen = 0 if slot is None else p[f"{name}.gates.{which}.W_bank.weight"] @ torch.tanh(slot)
                return 1 / (1 + torch.exp(-(W @ h + seen + b)))

            y = a = attention(p, name, x)
            if layer < (config.mem_layers or L):
                bank = banks[layer]
                y = [t + gate("output", e) * e for t, e in zip(a, ask("read", a, bank))]
                banks[layer] = [gate("input", u, slot) * torch.tanh(u) + gate("forget", u, slot) * slot
                                for u, slot in zip(ask("write", bank, a), bank)]
            x = [feed(p, name, t + b) for t, b in zip(x, y)]
        top += x
    return top


BY_HAND = dict(none=fam_by_hand, full=fam_by_hand, bswa=fam_by_hand, rmt=rmt_by_hand, armt=armt_by_hand,
               fam=fam_by_hand, lm2=lm2_by_hand)


@pytest.mark.parametrize("memory, ablate, options", [
    *((memory, word, {}) for memory in BY_HAND for word in ("nothing", *MEMORIES[memory].ablations)),
    ("bswa", "nothing", dict(window=0)), ("bswa", "nothing", dict(window=2)),
    ("rmt", "nothing", dict(n_mem=3)), ("armt", "nothing", dict(nu=1)), ("armt", "delta", dict(nu=2)),
    *(("armt", word, dict(gate="hardsigmoid")) for word in ("nothing", "delta", "gated_z")),
    ("armt", "no_gamma+no_delta", {}), ("fam", "nothing", dict(window=0)), ("fam", "nothing", dict(n_mem=0)),
    ("fam", "nothing", dict(window=2, n_mem=3)), ("fam", "nothing", dict(n_mem=6)),
    ("lm2", "nothing", dict(mem_layers=1))])
def test_every_memory_is_its_paper_written_by_hand_forward_and_backward(memory, ablate, options):
    model, idx = tiny(memory, ablate, **options).double(), some_text(3 * T + 2)
    for block, bias in zip(model.memory.blocks if memory == "armt" else (), (1.0, -3.0)):
        nn.init.constant_(block.w_beta.bias, bias)                   # gates half open, and some almost shut
    logits, loss, _ = model(idx, idx)
    loss.backward()
    p = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    words = set(ablate.split("+"))
    top = torch.stack([torch.stack(BY_HAND[memory](p, row, words, model.config)) for row in idx])
    expected = norm(p, "memory.ln_f", top) @ p["lm_head.weight"].T
    tolerance = 1e-8 if "gate" in options else 1e-9              # the hardsigmoid of torch has fewer digits
    assert_close(logits, expected, tolerance)
    (-expected.log_softmax(-1).gather(2, idx[..., None]).mean()).backward()
    for name, w in model.named_parameters():
        if w.numel():                                                   # fam without rows has an empty prompt
            assert_close(w.grad, p[name].grad, tolerance)


@torch.no_grad()
def test_a_late_segment_counts_ever_less_for_fam_unless_its_rows_are_normalised():
    share = {}                                                  # of the rows of a layer, changed by a segment
    for words in ("nothing", "norm_rows"):
        model = tiny("fam", ablate=words)
        state = model.init_state(4)
        for n, segment in enumerate(torch.randint(V, (4, 64 * T)).split(T, dim=1), start=1):
            _, _, new = model(segment, state=state)
            share[words, n] = [((b[0] - a[0]).norm() / b[0].norm()).item() for a, b in zip(state, new)]
            state = new
    for n in (16, 64):
        assert share["nothing", n] == pytest.approx([1 / n] * L, rel=0.3)     # as if each added the same
        assert min(share["norm_rows", n]) > 0.1


def test_tokens_that_read_what_was_just_written_would_see_their_future(monkeypatch):
    """In LM2's published code gates look ahead in a similar way: the proof of causality finds this kind."""
    causal = armt.LM2Block.forward

    def leaky(block, x, bank):
        return causal(block, x, causal(block, x, bank)[1])
    monkeypatch.setattr(armt.LM2Block, "forward", leaky)
    with pytest.raises(AssertionError, match="was seen before it was read"):
        test_the_future_is_invisible("lm2", "nothing")


# --- 1. The model: how ARMT writes, on keys and values made by hand -----------------------------------------

VALUES = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, -6.0]


@torch.no_grad()
def rewritten(n_mem=1, beta=1.0, ablate="nothing"):
    """
    Write VALUES, one segment each, under one key, with an ARMTBlock whose memory tokens are [key, value].
    What it answers for the key after each write, and how often the key is in z: z . phi / |phi|^2.
    """
    config = armt.checked(GPTConfig(n_embd=4, n_head=1, n_mem=n_mem, d_mem=2, ablate=ablate))
    block = armt.ARMTBlock(config).double()
    block.W_K.weight.data = torch.tensor([[1., 0, 0, 0], [0, 1, 0, 0]]).double()
    block.W_V.weight.data = torch.diag(torch.tensor([0., 0, 1, 1])).double()
    block.w_beta.weight.data.zero_()
    block.w_beta.bias.data.fill_(torch.tensor(beta).logit())                          # sigmoid(infinity) is 1
    (A, z), answers, amounts = block.init_state(1), [], []
    for value in VALUES:
        token = torch.tensor([[[30, 20, value, -value]]]).double()        # a key so long that 1e-5 is nothing
        A, z = block.write(token.expand(1, n_mem, 4), A, z)
        k = block.phi(block.W_K(token))                                                           # (1, 1, D)
        answers.append(block.lookup(k, A, z)[0][0, 0, 2].item())
        amounts.append((k[0, 0] @ z[0] / k.square().sum()).item())
    return answers, amounts


def test_a_key_written_again_keeps_its_last_value_alone():
    assert rewritten() == (pytest.approx(VALUES), pytest.approx([1] * 8))                 # z stays phi(k)
    # four writers at once: without the clip of gamma z would be 4, -8, 28, -80, 244 times phi(k)
    assert rewritten(n_mem=4) == (pytest.approx(VALUES), pytest.approx([4] * 8))
    answers, _ = rewritten(beta=0.5)                                      # half of the old value stays
    assert answers[-1] == pytest.approx(sum(v / 2 ** n for n, v in enumerate(reversed(VALUES), start=1)))
    answers, _ = rewritten(ablate="no_delta")
    assert answers == pytest.approx(list(itertools.accumulate(VALUES)))


def test_without_gamma_the_newest_of_t_values_weighs_one_in_t():
    answers, amounts = rewritten(ablate="no_gamma")
    for t in range(1, 8):
        assert answers[t] == pytest.approx(((t - 1) * answers[t - 1] + VALUES[t]) / (t + 1))
    assert amounts == pytest.approx(range(1, 9))                                # every write is counted again


def shut(model):
    """Give an ARMT with a hardsigmoid gates that never open."""
    for block in model.memory.blocks:
        nn.init.zeros_(block.w_beta.weight)
        nn.init.constant_(block.w_beta.bias, -3.0)


@pytest.mark.parametrize("ablate", ["nothing", "delta", "gated_z"])
def test_a_gate_that_is_shut_leaves_every_bit_of_A_and_but_for_the_published_rule_of_z(ablate):
    model = tiny("armt", ablate, gate="hardsigmoid")
    _, _, told = model(some_text(T))
    shut(model)
    _, _, later = model(some_text(20 * T), state=told)
    same = [torch.equal(a, b) for a, b in zip(armt.tensors(told), armt.tensors(later))]
    assert same == [True, False] * L if ablate == "nothing" else all(same)


# --- 1. The model: generation, sizes and number formats -----------------------------------------------------

@every_variant
def test_greedy_generation_is_the_model_called_again_and_again_and_streams_its_prompt(memory, ablate):
    model, read = tiny(memory, ablate).double(), []
    for n in (1, T - 1, T, T + 1, 2 * T + 3):
        idx = by_hand = some_text(n, rows=3)
        for _ in range(2 * T + 1):
            by_hand = torch.cat((by_hand, model(by_hand)[0].argmax(-1)), dim=1)
        assert torch.equal(model.generate(idx, 2 * T + 1, temperature=0), by_hand)
    model.memory.register_forward_pre_hook(lambda module, args: read.append(args[0].size(1)))
    model.generate(some_text(40 * T + 1), 3)
    assert read == [T] * 40 + [1, 2, 3]                                      # the prompt, then the short tail


def test_memories_have_the_parameters_and_states_that_they_say():
    B, N, M, H, d_mem, D = 3, 7, 2, 2, 3, 2 * 3 * 3
    params = {memory: tiny(memory).n_params() for memory in MEMORIES}
    block = 12 * C * C + 4 * C                                                # attention, MLP, two LayerNorms
    assert params["none"] == params["full"] == params["bswa"] == 2 * V * C + L * block + 2 * C
    assert params["rmt"] == params["fam"] == params["none"] + M * C
    assert params["armt"] == params["none"] + L * (2 * C * d_mem + C * C + C + 1) + M * C
    assert tiny("lm2", mem_layers=1).n_params() == params["none"] + 11 * C * C + 3
    state = {memory: tiny(memory)(some_text(N, rows=B))[2] for memory in MEMORIES}
    shapes = {memory: [tuple(t.shape) for t in armt.tensors(s)] for memory, s in state.items()}
    cache = [(B, H, T, C // H)] * 2
    assert shapes == dict(none=[], full=[(B, H, N, C // H)] * 2 * L, bswa=cache * L, rmt=[(B, M, C)],
                          armt=[(B, D, C), (B, D)] * L, fam=[(B, M, C), (B, 1, 1), *cache] * L,
                          lm2=[(B, M, C)] * L, fade=[(B, C)] * L)
    assert armt.state_floats(state["armt"]) == L * B * (D * C + D)


@every_variant
def test_bfloat16_keeps_memories_in_float32_and_means_what_float32_means(memory, ablate):
    model, idx = tiny(memory, ablate), some_text(5 * T)
    exact = model(idx, idx)[0].softmax(-1)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16):
            logits, loss, state = model(idx, idx)
            _, _, state = model(idx, state=state)
        assert all(t.dtype == torch.float32 for t in armt.tensors(state))
        assert (logits.float().softmax(-1) - exact).abs().max() < 0.1
    if memory == "armt":                                         # with float16 weights, too
        assert all(t.dtype == torch.float32 for t in armt.tensors(model.half()(idx)[2]))


# --- 2. The data: batches, and associative retrieval --------------------------------------------------------

def task_of(**settings):
    """The task of a run with these settings."""
    return make_task(train.Config(**settings))


def fingerprint():
    """A number for a batch of each task, and for built-in text."""
    stages = {"remember": (5,), "rewrite": (30,), "qa1+qa2+qa4+qa5": (6, 200), "passkey-decoys": (4,)}
    settings = dict(align=8, segment_len=8, background=[TOP / "README.md"])
    batches = [task_of(task=task, **settings).batch(generator(3, "train", 1, 5), 8, stage)
               for task, stage in stages.items()]
    made = [part.tobytes() for batch in batches for part in batch]
    return hashlib.sha256(b"".join(made) + babilong.prose(50, seed="train").encode()).hexdigest()


def test_batches_are_equal_in_every_process():
    code = "import test_armt; print(test_armt.fingerprint())"
    there = subprocess.run([sys.executable, "-c", code], cwd=TOP, stdout=subprocess.PIPE, text=True,
                           env=os.environ | dict(PYTHONHASHSEED="4321"))
    assert there.stdout.strip() == fingerprint()
    places = list(itertools.product(range(3), SPLITS, range(3), range(3)))
    batches = {task_of(segment_len=4).batch(generator(*place), 4, (8,)).context.tobytes() for place in places}
    assert len(batches) == len(places) == 81               # other seeds, splits, stages, steps: other batches


@pytest.mark.parametrize("task, key_size, n_pairs, n_questions", [
    ("remember", 1, 16, 3), ("remember", 1, 5, 16), ("remember", 2, 256, 1), ("rewrite", 1, 30, 1),
    ("rewrite", 1, 3, 9), ("rewrite", 1, 50, 5), ("rewrite", 1, 1, 1)])
def test_a_slow_replay_gives_the_answers_of_recall(task, key_size, n_pairs, n_questions):
    made = task_of(task=task, stages=str(n_pairs), questions=n_questions, segment_len=key_size + 3)
    batch = made.samples(generator(0, "train"), 30, n_pairs)
    assert batch.context.shape == (30, n_pairs, key_size + 3)                        # one pair is one segment
    for context, questions, answers in zip(*batch):
        told = {}
        for *key, colon, value, end in context.tolist():
            assert (colon, end) == (recall.TELL, recall.END) and {*key, value} <= {*range(1, 17)}
            assert task == "rewrite" or tuple(key) not in told
            told[tuple(key)] = value
        asked = [tuple(key) for *key, _ in questions.tolist()]
        assert set(questions[:, -1]) == {recall.ASK} and len(set(asked)) == len(asked) == n_questions
        assert answers[:, 0].tolist() == [told.get(key, -1) for key in asked]
        assert (answers >= 0).sum() == min(n_questions, len(told))                      # never asked in vain


def test_recall_asks_for_every_pair_alike():
    batch = task_of(segment_len=4, questions=1).samples(generator(0, "train"), 4000, 4)
    age = (batch.context[..., 0] == batch.questions[:, :, 0]).argmax(1)
    assert np.abs(np.bincount(age) / 4000 - 1 / 4).max() < 0.03
    assert np.abs(np.bincount(batch.answers[:, 0, 0])[1:] / 4000 - 1 / 16).max() < 0.02
    batch = task_of(task="rewrite", segment_len=4, questions=1).samples(generator(0, "train"), 4000, 20)
    keys = batch.context[..., 0]
    written = (keys == batch.questions[:, :, 0]).sum(1)                          # how often the asked key was
    fair = [20 / len(set(row)) for row in keys.tolist()]                          # were keys drawn, not pairs
    assert abs(written.mean() - np.mean(fair)) < 0.05


def test_half_of_the_batches_of_recall_have_the_length_of_their_stage_and_the_others_any_up_to_it():
    made, rng = task_of(segment_len=4), generator(0, "train")
    n = np.array([made.batch(rng, 1, (8,)).context.shape[1] for _ in range(4000)])
    expected = [1 / 16] * 7 + [9 / 16]
    assert np.abs(np.bincount(n, minlength=9)[1:] / 4000 - expected).max() < 0.03


@pytest.mark.parametrize("size", [1, 3, 7, 64, 1000])
def test_chunks_are_the_rows_side_by_side(size):
    rng = generator(0, "train")
    for sizes in (((5, 0, 1, 13), (7,), (2, 2, 2)), ((3, 4), (7,)), ((64, 64), (63, 1, 65)), ((1,),)):
        rows = [[rng.integers(1, 100, size=n) for n in row] for row in sizes]
        whole = [np.concatenate(row) for row in rows]
        cut = list(chunks(rows, size))
        assert np.array_equal(np.concatenate(cut, axis=1), fill(whole))
        assert all(chunk.shape[1] == size for chunk in cut[:-1]) and 0 < cut[-1].shape[1] <= size
        by_six = np.concatenate(list(chunks(rows, 6 * size, 6)), axis=1)      # a segment begins with each row
        assert np.array_equal(by_six, fill([segments([row], 6).ravel() for row in whole]))
    assert fill([[1, 2], [3], []]).tolist() == [[1, 2], [0, 3], [0, 0]]
    assert segments([[1, 2, 3], [4]], 2).tolist() == [[[1, 2], [3, 0]], [[0, 0], [4, 0]]]


# --- 2. The data: bAbI --------------------------------------------------------------------------------------

PUBLISHED = (     # its quirks: a blank after a question mark, or none; support in any order; lists as answers
    "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    "4 Mary got the milk there.\n5 Where is the milk? \tbathroom\t4 1\n"
    "1 The office is north of the kitchen.\n2 What is north of the kitchen?\toffice\t1\n"
    "1 Mary took the apple.\n2 Mary took the milk.\n3 What is Mary carrying? \tapple,milk\t1 2\n")


def write_stories(stories):
    """The text of a bAbI file, the exact inverse of read_stories."""
    lines = []
    for story in stories:
        for n, (text, answer, support) in enumerate(story, start=1):
            lines.append(f"{n} {text}\n" if answer is None else
                         f"{n} {text}\t{answer}\t{' '.join(map(str, support))}\n")
    return "".join(lines)


def test_the_reader_gives_back_published_stories_byte_for_byte(tmp_path):
    path = tmp_path / "qa.txt"
    made = (write_stories(babi.simulate(random.Random(0), task, 10)) for task in babi.TASKS)
    for written in (*made, PUBLISHED):
        for saved in (written.replace("\n", "\r\n"), "\ufeff" + written, written):     # as some systems save
            path.write_bytes(saved.encode())
            assert write_stories(stories := babi.read_stories(path)) == written
    assert [sample.question for sample in babi.spread(stories)] == [
        "Where is Mary?", "What is north of the kitchen?", "What is Mary carrying?", "Where is the milk?"]
    told = ["Mary moved to the bathroom.", "John went to the hallway."]
    assert babi.story_samples(stories[0]) == [
        (told, "Where is Mary?", "bathroom"),
        ([*told, "Mary got the milk there."], "Where is the milk?", "bathroom")]


@pytest.mark.parametrize("line, published, broken", [
    (1, "1 Mary moved", "2 Mary moved"), (1, "1 Mary moved", "\n1 Mary moved"), (2, "2 John", "3 John"),
    (2, "2 John", "02 John"), (3, "Mary? \tbathroom\t1", "Mary? \tbathroom"),
    (3, "\tbathroom\t1", "\t\t1"), (3, "\tbathroom\t1", "\tbathroom\tone"),
    (3, "\tbathroom\t1", "\tbathroom\t4"), (5, "\tbathroom\t4 1", "\tbathroom\t4 3"), (2, "John", "Jos\xe9")])
def test_a_malformed_line_is_refused_with_file_and_line(line, published, broken, tmp_path):
    path = tmp_path / "broken_qa1.txt"
    path.write_bytes(PUBLISHED.replace(published, broken, 1).encode("latin-1"))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line {line}: "):
        babi.read_stories(path)


def parse(fact):
    """A published sentence -> Event, read off its words alone."""
    words = fact.removesuffix(".").removesuffix(" there").split()
    if words[0] == "The":
        return babi.Event("lies", words[1], words[3], words[6], text=fact)
    who, rest = words[0], " ".join(words[1:])
    (action,) = {a for a, verbs in babi.VERBS.items() for verb in verbs if rest.startswith(f"{verb} ")}
    if action == "move":
        return babi.Event("move", who, place=words[-1], text=fact)
    what, to = (words[-3], words[-1]) if action == "give" else (words[-1], "")
    return babi.Event(action, who, what, to=to, text=fact)


def describe(stories):
    """What MEASURED has of the published files, of any stories: {name: number}, shares in per cent."""
    seen = defaultdict(list)                      # name, in which {} stands for what was counted -> all of it
    for story in stories:
        events = {n: parse(line.text) for n, line in enumerate(story, start=1) if line.answer is None}
        asked = [(n, line.text, line.support) for n, line in enumerate(story, start=1) if line.answer]
        before = [sum(i < n for i in events) for n, _, _ in asked]
        causes = [events[support[0]] for _, _, support in asked]
        seen["lines of a story"].append(len(story))
        seen["{} %"] += [e.action for e in events.values()]
        seen["went %"] += [" went " in e.text for e in events.values() if e.action == "move"]
        seen["there %"] += [e.text.endswith("there.") for e in events.values() if e.action in ("get", "drop")]
        seen["gets by somebody not yet placed %"] += [
            not any(e.action == "move" and e.who == get.who for i, e in events.items() if i < n)
            for n, get in events.items() if get.action == "get"]
        told, about = [e.who for e in events.values()], [text.split()[2] for _, text, _ in asked]
        seen["told of the same person again %"] += [a == b for a, b in itertools.pairwise(told)]
        seen["asked for the same person again %"] += [a == b for a, b in itertools.pairwise(about)]
        seen["asked: {} %"] += [text.split()[0] + " to" * (" to" in text) for _, text, _ in asked]
        seen["facts before a question"] += before
        seen["next question after {} facts %"] += [b - a for a, b in itertools.pairwise(before)]
        seen["support {} back %"] += [sum(support[0] < i < n for i in events) for n, _, support in asked]
        seen["dropped %"] += [cause.action == "drop" for cause in causes]
        for (n, _, support), cause in zip(asked, causes):
            if len(support) == 3:                      # qa3: moves of the thing after the place asked for
                end = support[0] if cause.action == "drop" else n
                seen["carried on {} times %"].append(sum(
                    support[1] < i < end and e[:2] == ("move", cause.who) for i, e in events.items()))
        if causes[0].action == "lies":
            pair = list(events.values())
            (centre,) = {pair[0].who, pair[0].place} & {pair[1].who, pair[1].place}
            a, b = (e.what if e.place == centre else babi.OPPOSITE[e.what] for e in pair)
            seen["on opposite sides of a third %"].append(a == babi.OPPOSITE[b])
            seen["{} told from the centre %"].append(sum(e.place == centre for e in pair))
    found = {f"{p} of 100 questions within": np.percentile(seen["facts before a question"], p)
             for p in (50, 95, 99)}
    for name, values in seen.items():
        if "{}" in name:
            found |= {name.format(value): 100 * values.count(value) / len(values) for value in set(values)}
        elif values:
            found[name] = np.mean(values) * (100 if name.endswith("%") else 1)
    return found


MEASURED = {     # in the published files, train and test; the means of qa3 in 385 + 200 stories
    "qa1": {"move %": 100, "facts before a question": 6.0, "lines of a story": 15, "support 0 back %": 45.2,
            "support 1 back %": 29.0, "support 2 back %": 13.3, "support 3 back %": 8.6, "went %": 40,
            "support 4 back %": 4.0, "told of the same person again %": 25.2,
            "asked for the same person again %": 36},
    "qa2": {"move %": 65.1, "get %": 19.8, "drop %": 15.2, "facts before a question": 15.6,
            "lines of a story": 27.0, "50 of 100 questions within": 14, "dropped %": 68.8, "went %": 40,
            "next question after 2 facts %": 71.3, "gets by somebody not yet placed %": 28.0,
            "95 of 100 questions within": 30, "99 of 100 questions within": 40},
    "qa3": {"move %": 63.5, "get %": 19.0, "drop %": 17.6, "facts before a question": 51.0,
            "lines of a story": 78.8, "50 of 100 questions within": 44, "dropped %": 79.5, "there %": 20,
            "next question after 2 facts %": 55.1, "gets by somebody not yet placed %": 9.0,
            "95 of 100 questions within": 116, "99 of 100 questions within": 158,
            "carried on 0 times %": 79.6, "carried on 1 times %": 15.6, "carried on 2 times %": 3.6},
    "qa4": {"facts before a question": 2, "lines of a story": 3, "support 0 back %": 50,
            "support 1 back %": 50, "on opposite sides of a third %": 100, "2 told from the centre %": 44.4,
            "0 told from the centre %": 11.1},
    "qa5": {"move %": 56.0, "get %": 16.9, "drop %": 11.7, "give %": 15.5, "facts before a question": 20.0,
            "lines of a story": 32.2, "50 of 100 questions within": 16, "asked: What to %": 33.6,
            "asked: Who %": 17.0 + 16.5, "asked: Who to %": 16.7 + 16.3,
            "next question after 2 facts %": 87.4, "gets by somebody not yet placed %": 23.3,
            "95 of 100 questions within": 46, "99 of 100 questions within": 64}}


@cache
def simulated(task):
    """2,000 stories. With the seeds 0, 2 and 4 facts of qa3 are not within 3% (in 20,000 stories: 52.5)."""
    return babi.simulate(random.Random(6), task, 2000)


@pytest.mark.parametrize("task", babi.TASKS)
def test_a_simulated_world_has_the_statistics_of_the_published_files(task):
    """Percentages within 2 points, means within 3%: Weston et al. 2015, files en-10k of version 1.2."""
    found = describe(simulated(task))
    for name, measured in MEASURED[task].items():
        tolerance = 2 if name[-1] == "%" or name[0] == "9" else 0.03 * measured          # facts come in twos
        assert found.get(name, 0) == pytest.approx(measured, abs=tolerance * (measured != 100)), name
    asked = babi.spread(simulated(task))
    assert len(asked) == len(simulated(task)) * (1 if task == "qa4" else 5)
    assert babi.is_published(["John travelled to the hallway.", "Mary journeyed to the bathroom."])
    known = np.mean([babi.is_published(sample.facts) for sample in asked])
    assert known < dict(qa1=0.05, qa4=0.5).get(task, 0.01)               # qa4 has but 1,920 stories


def solve(facts):
    """{question: right answers, the latest last}, by replaying the facts: data/babi.py lends only names."""
    places, holder, way, right = {}, {}, {}, defaultdict(list)
    opposite = dict(north="south", south="north", east="west", west="east")
    for action, who, what, place, to, _ in map(parse, facts):
        if action == "lies":
            for a, side, b in ((who, what, place), (place, opposite[what], who)):
                right[f"What is {side} of the {b}?"].append(a)
                right[f"What is the {b} {opposite[side]} of?"].append(a)
        elif action == "move":
            places[who] = place
            for thing in holder:
                way[thing] += [place] if holder[thing] == who else []
        elif action == "give":
            holder[what] = to
            right[f"What did {who} give to {to}?"].append(what)
            right[f"Who gave the {what}?"].append(who)
            right[f"Who gave the {what} to {to}?"].append(who)
            right[f"Who did {who} give the {what} to?"].append(to)
            right[f"Who received the {what}?"].append(to)
        else:
            holder[what] = who if action == "get" else None
            been = way.setdefault(what, [None])
            if action == "drop" and places.get(who) not in (None, been[-1]):
                been.append(places[who])                     # he had moved before anybody saw him carry it
    for who, place in places.items():
        right[f"Where is {who}?"] = [place]
    for thing, been in way.items():
        right[f"Where is the {thing}?"] = [places.get(holder[thing]) if holder[thing] else been[-1]]
        for before, place in itertools.pairwise(been):
            right[f"Where was the {thing} before the {place}?"] = [before]
    return right


@pytest.mark.parametrize("task", babi.TASKS)
def test_an_independent_solver_finds_the_same_answers(task):
    asked, ambiguous = babi.spread(simulated(task)[:400]), 0
    for sample in asked:
        right = solve(sample.facts)[sample.question]
        assert sample.answer in right
        ambiguous += right[-1] != sample.answer
    assert ambiguous <= (0.01 * len(asked) if task == "qa5" else 0)    # two gifts of one person to another


def worlds(facts):
    """{question: set of answers}, one answer for each way in which things can have been at first."""
    events, answers = list(map(parse, facts)), defaultdict(set)
    names = list(dict.fromkeys(name for e in events for name in (e.who, e.to, e.what) if name))
    for start in itertools.product(babi.PLACES, repeat=len(names)):
        at, holder, been, possible = dict(zip(names, start)), {}, defaultdict(list), True
        for action, who, what, place, to, _ in events:
            if action == "get":
                possible &= holder.get(what) is not None or at[what] == at[who]
            if action == "give":
                possible &= at[who] == at[to]
            if action == "move":
                at[who] = place
            else:
                holder[what], at[what] = dict(get=who, drop=None, give=to)[action], at[who]
            for thing, owner in holder.items():
                at[thing] = at[owner or thing]
                been[thing] += [at[thing]] if been[thing][-1:] != [at[thing]] else []
        for name in names if possible else ():
            answers[f"Where is {'the ' * (name in babi.THINGS)}{name}? "].add(at[name])
            latest = {here: before for before, here in itertools.pairwise(["nowhere", *been[name]])}
            for place, before in latest.items():
                answers[f"Where was the {name} before the {place}? "].add(before)
    return answers


def test_everything_that_a_short_text_answers_is_asked_and_nothing_else_is_known():
    dice, known = random.Random(1), 0
    for _ in range(200):
        task = dice.choice(babi.TASKS)
        events = list(itertools.islice(babi.world(dice, task), dice.randint(1, 6)))
        told, asked = [e.text for e in events], babi.everything(events)
        right = solve(told)
        for question, answer in {**asked["qa4"], **asked["qa5"]}.items():
            assert answer == [babi.UNKNOWN, *right[question.strip()]][-1], (told, question)
        if task == "qa4" or len({name for e in events for name in (e.who, e.what, e.to) if name}) > 4:
            continue
        by_hand = worlds(told)
        for question, answer in {**asked["qa1"], **asked["qa2"], **asked["qa3"]}.items():
            found = by_hand[question]
            right = min(found) if len(found) == 1 and found != {"nowhere"} else babi.UNKNOWN
            assert answer == right, (told, question)
            known += answer != babi.UNKNOWN
    assert known > 300


@pytest.mark.parametrize("task", babi.TASKS)
def test_the_question_rule_explains_every_story(task):
    """Each question can be asked, and where one can, it is: in the published files, too, if they are here."""
    folder = Path(os.environ.get("BABI_DIR") or TOP / "data" / "babi")
    published = [babi.read_stories(file) for file in folder.rglob(f"{task}_*_t*.txt")]
    for stories in [simulated(task)[:200], *published]:
        passed, asked = 0, 0
        for story in stories:
            events, numbers, fresh = [], [], 0
            for n, line in enumerate(story, start=1):
                recent = babi.subjects(task, events[-5:]) if fresh == 2 else []
                found = [ask for about in recent for ask in babi.asks(task, events, about)]
                if line.answer is None:
                    passed += len(found) > 0
                    events, numbers, fresh = [*events, parse(line.text)], [*numbers, n], fresh % 2 + 1
                else:
                    asked, fresh = asked + 1, 0
                    assert (line.text, line.answer, line.support) in [
                        (ask.question, ask.answer, tuple(numbers[i] for i in ask.support)) for ask in found]
        assert passed <= (0.005 * asked if task == "qa3" else 0)


# --- 2. The data: words, background, BABILong, pass key -----------------------------------------------------

WORDS = babilong.Words()
OWN_WORDS = len(WORDS.names)                                 # ids below are blanks, marks and words of bAbI


def test_words_of_bAbI_have_ids_that_are_fixed_for_good_and_any_other_falls_into_a_bucket():
    """A checkpoint knows words by number."""
    assert hashlib.sha256(" ".join(babi.WORDS).encode()).hexdigest()[:8] == "5a03585c"
    assert WORDS.encode("MARY moved to the BathRoom.") == [4, 5, 6, 7, 8, 1] and WORDS.name(8) == "bathroom"
    assert WORDS.split("Mrs-Bennet's _cat_ isn’t 4; 'a'!") == [
        "Mrs-Bennet's", "cat", "isn’t", "4", "a", "!"]
    assert WORDS.count(WORDS.encode("Mary moved to the garden. Where is she? Here!")) == 9    # without marks
    ids = {WORDS.id(f"ship{i}") for i in range(3000)}
    assert min(ids) >= OWN_WORDS and max(ids) < WORDS.size == OWN_WORDS + 1024 and len(ids) > 900
    assert WORDS.id("captain") == WORDS.id("CAPTAIN") and WORDS.name(WORDS.id("captain")) == "(another word)"
    assert WORDS.unknown("Mary saw the whale. Ahab saw the milk!") == ["saw", "whale", "Ahab"]
    stories = [story for task in babi.TASKS for story in babi.simulate(random.Random(0), task, 50)]
    assert not [line for story in stories for line in story if WORDS.unknown(line.text + (line.answer or ""))]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Two books in which no word occurs twice, and so many buckets that no two words share one."""
    monkeypatch.setattr(babilong, "BUCKETS", 2 ** 40)
    books = []
    for name, n_sentences in (("a", 60), ("b", 40)):
        sentences = [" ".join(f"{name}{i}x{j}" for j in range(9 + i % 4)) + ".?!"[i % 3]
                     for i in range(n_sentences)]
        books.append(tmp_path / f"{name}.txt")
        books[-1].write_text("\n".join(sentences))
    return books


def test_train_and_val_share_no_sentence_and_miss_none(library, tmp_path):
    parts = {part: babilong.Background(library, part, babilong.Words()) for part in SPLITS}
    inked = {part: set(text.ids[text.ids >= OWN_WORDS].tolist()) for part, text in parts.items()}
    assert not inked["train"] & inked["val"] and inked["train"] | inked["val"] == inked["test"]
    assert len(parts["train"].begin) - 1 == 54 + 36 and len(parts["val"].begin) - 1 == 6 + 4     # nine tenths
    long, almost = "one two three four five six seven eight nine.", "one two three four five six seven eight."
    (tmp_path / "c.txt").write_text(f"Chapter one. {long} {almost} Hm! {long}")
    short = babilong.Background([tmp_path / "c.txt"], "test", words := babilong.Words())
    assert short.ids.tolist() == words.encode(f"{long} {long}") and short.begin.tolist() == [0, 10, 20]
    copies = babilong.Background([tmp_path / "c.txt"], "test", words, align=8, copies=8)
    cut = [words.pad(words.encode(long)[i:], 8) for i in range(8) for _ in "12"]     # copy i lacks i tokens
    assert copies.ids.tolist() == sum(cut, [])
    assert copies.begin.tolist() == [0, *itertools.accumulate(map(len, cut))]


FACTS = [WORDS.encode(fact) for fact in ("Mary moved to the bathroom.", "John went back to the hallway.",
                                         "Mary went to the garden.", "Mary went to the garden.")]
OWN = 5 + 6 + 5 + 5                                          # words in these facts


@pytest.mark.parametrize("align", [0, 8])
@pytest.mark.parametrize("length", [0, OWN, OWN + 1, OWN + 40, 500, 3000])      # the library holds 1050 words
def test_a_composed_sample_has_its_facts_in_order_and_the_exact_length(length, align, library):
    words, places, entered = babilong.Words(), [], set()
    text = babilong.Background(library, "test", words, align)
    facts, whole = [words.pad(fact, align) for fact in FACTS], text.ids[text.ids > 0]
    for seed in range(40):
        context = babilong.compose(generator(seed, "train"), facts, length, text)
        ids, begin = np.concatenate(context), np.cumsum([0, *map(len, context)])
        starts = [at for at, piece in zip(begin, context) if 3 < piece[0] < OWN_WORDS]
        assert [piece.tolist() for piece in context if 3 < piece[0] < OWN_WORDS] == facts
        assert words.count(ids) == max(length, OWN)
        assert all(np.shares_memory(piece, text.ids) for piece in context if piece[0] >= OWN_WORDS)
        # the rest is the text from some sentence on, round and round, so no passage is read twice before all
        # are read once; facts stand between sentences
        inked = np.concatenate([(piece > 0) & (piece[0] >= OWN_WORDS) for piece in context])
        book = ids[inked]
        first = whole.tolist().index(book[0]) if len(book) else 0
        entered.add(first)
        assert whole[first - 1] <= 3 and np.array_equal(book, np.resize(np.roll(whole, -first), len(book)))
        slots = [n for n in range(len(book)) if n == 0 or book[n - 1] <= 3] + [len(book)]
        places += [(slots.index(inked[:start].sum()) + 0.5) / len(slots) for start in starts]
        assert (len(slots) > 1) == (length > OWN)
        if align:                                    # nothing stands behind a mark or a blank in its segment
            rows = ids.reshape(-1, align)
            assert not (rows[:, 1:][rows[:, :-1] <= 3] > 0).any() and not any(n % align for n in starts)
    if length >= 500:
        assert abs(np.mean(places) - 0.5) < 0.08                                                  # uniform
        assert np.std(places) == pytest.approx(1 / 12 ** 0.5, abs=0.05) and len(entered) > 20


def test_a_million_words_of_a_long_enough_text_contain_no_passage_twice_and_fit_into_a_few_megabytes():
    prose = babilong.Background([babilong.PROSE], "train", WORDS)
    tracemalloc.start()
    context = babilong.compose(generator(0, "train"), FACTS, 5_000_000, prose)
    n_words = sum(WORDS.count(piece) for piece in chunks([context], 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_words == 5_000_000 and peak < 5e6
    for seed in range(20):                       # entered anywhere, and all of it is read before any is again
        runs = prose.runs(generator(seed, "train"), int(prose.n_words[-1]))
        read = [i for first, last, _ in runs for i in range(first, last)]
        assert sorted(read) == list(range(len(prose.begin) - 1))


def test_a_sentence_that_looks_like_a_fact_is_none(library):
    dice, kinds = random.Random(0), []
    facts, text = FACTS[:2], babilong.Background(library, "test", babilong.Words())
    known, sentence = {i for fact in facts for i in fact}, text.ids[:text.begin[3]].tolist()
    for _ in range(600):
        made = babilong.look_alike(dice, sentence, facts, known)
        spelled = f" {' '.join(map(str, made))} "
        assert not any(f" {' '.join(map(str, fact[:-1]))} " in spelled for fact in facts)   # without its dot
        assert set(made) <= known | set(sentence) and 0 < made[-1] <= 3
        changed = [n for n, (a, b) in enumerate(zip(made, sentence)) if a != b]
        kinds.append("front" if made[-len(sentence):] == sentence else
                     "inside" if changed and max(changed) - min(changed) < 6 else "words")
    assert all(kinds.count(kind) > 100 for kind in ("front", "words", "inside"))


def spoken(ids, end):
    """The sentences in a context as texts, read off its bAbI words alone; `end` is the mark behind each."""
    text = " ".join(WORDS.name(i) for i in ids if i == 1 or 3 < i < OWN_WORDS)
    return [f"{s.strip()[0].upper()}{s.strip()[1:]}{end}" for s in text.split(".") if s.strip()]


@pytest.mark.parametrize("align, length, stage", [
    (0, 64, (8, 160)), (8, 8, (8, 160)), (8, 64, (8, 160)), (8, 64, (8, 0, 32)), (8, 64, (8, 160, 32)),
    (8, 64, (8, 600, 64))])
@pytest.mark.parametrize("task", babi.TASKS)
def test_a_batch_asks_what_its_stories_tell(task, align, length, stage, library):
    made = task_of(task=task, background=library[:1], align=align, segment_len=length)
    assert made.words.name(made.unknown_id) == "unknown"
    passages = set(babilong.Background(library[:1], "train", made.words).ids.tolist())
    n_facts, lengths, kinds, read, words = set(), set(), [], [], {}
    for step in range(30):
        batch = made.batch(generator(0, "train", 0, step), 5, stage)
        assert batch.questions.shape[:2] == (5, 8)
        eights = batch.context.reshape(-1, 8)                # is there text behind a mark or a blank?
        lengths.add((batch.context.shape[2], bool(((eights[:, :-1] < 4) & (eights[:, 1:] > 3)).any())))
        for context, questions, answers in zip(*batch):
            ids = context.ravel().tolist()
            facts = spoken(ids, ".")
            asked = {question.strip(): answer for kind in babi.everything([*map(parse, facts)]).values()
                     for question, answer in kind.items()}
            assert not babi.is_published(facts)
            said = [WORDS.name(i) for i in answers[answers >= 0]]
            assert said == [asked[spoken(question, "?")[0]] for question in questions[answers[:, 0] >= 0]]
            kinds += said
            n_facts.add(len(facts))
            words.setdefault(batch.context.shape[2], []).append(WORDS.count(ids))
            read += [i in passages for i in ids if i >= OWN_WORDS]
    expected = ({(8, False)} if align else {(64, True)}) | {(T, stage[1] > 0) for T in stage[2:]}
    even = {(T, False) for T in stage[2:] or (length,)}                # facts of qa4 alone have 8 tokens each
    assert expected <= lengths <= expected | even
    assert [T for T, n in words.items() if max(n) > babilong.BRIEF] == [64] * (stage[1] == 600)
    assert n_facts == ({1, 2} if task == "qa4" else set(range(1, 9)))
    assert 0.1 < kinds.count("unknown") / len(kinds) < 0.4
    assert 0.65 < np.mean(read) < 0.75 if stage[1] else not read     # text of training, 3 words in 10 swapped


@pytest.mark.parametrize("align", [0, 8])
@pytest.mark.parametrize("task", babi.TASKS)
def test_an_evaluation_asks_what_the_files_ask_in_another_book(task, align, library, tmp_path):
    stories = babi.simulate(random.Random(7), task, 30)
    (tmp_path / f"{task}_some-name_test.txt").write_text(write_stories(stories))
    config = train.Config(task=task, align=align, segment_len=8, eval_lengths="0,30,2000", eval_samples="30",
                          background=library[:1], eval_text=library[1:], babi_dir=str(tmp_path))
    made, expected = make_task(config), dict(part=task, questions="published", split="test", text=["b.txt"])
    theirs = set(babilong.Background(library[1:], "test", made.words).ids.tolist())
    for cell in made.cells(config):
        questions, left_out = made.questions(cell)
        assert len(questions) + left_out == 30 and (left_out > 0) == (cell["length"] == 30 and task != "qa4")
        assert cell | expected == cell
        for question, asked in zip(questions, babi.spread(stories) if left_out == 0 else ()):
            ids = np.concatenate(question.context).tolist()
            assert question.answer == [WORDS.id(asked.answer)]
            assert spoken(question.question, "?") == [asked.question]
            assert not cell["length"] or WORDS.count(ids) == cell["length"]
            assert {i for i in ids if i >= OWN_WORDS} <= theirs
            assert spoken(ids, ".") == asked.facts


def told_keys(text):
    """All keys stated in a text: [(where its sentence starts, digits, is it true)]."""
    five = r"(\d \d \d \d \d)"
    stated = (rf"the pass key is {five} \. remember it \. \1 is the pass key \."
              rf"|a false key is {five} \. forget it \.")
    return [(m.start(), m[1] or m[2], m[1] is not None) for m in re.finditer(stated, text)]


@pytest.mark.parametrize("task", passkey.KINDS)
def test_a_pass_key_is_stated_as_its_kind_says_in_exactly_the_tokens_asked_for(task, library):
    made, starts, keys = task_of(task=task, background=library, segment_len=32), set(), set()
    questions, left_out = made.questions(dict(length=4, n=60))
    unseen = {*babilong.Background(library, "val", made.words).ids.tolist()}         # in training
    for question in questions:
        ids = np.concatenate(question.context)
        assert {i for i in ids.tolist() if i >= len(made.words.names)} <= unseen
        told, answer = told_keys(made.show(ids)), made.show(question.answer)
        true = [digits for _, digits, is_true in told if is_true]
        assert len(ids) == 4 * 32 and len(told) == {"passkey-decoys": 4, "passkey-rewritten": 3}.get(task, 1)
        assert told[0][2] and answer == true[-1 if task == "passkey-rewritten" else 0]
        starts.add(told[0][0])
        keys.add(answer)
    assert left_out == 0 and len(keys) > 50 and (starts == {0}) == (task == "passkey")
    batch = made.batch(generator(0, "train", 0), 5, (6,))
    assert batch.context.shape[2] == 32 and batch.answers.shape == (5, 1, 5)
    for context, answer in zip(batch.context, batch.answers[:, 0]):
        assert made.show(answer) in [digits for _, digits, _ in told_keys(made.show(context.ravel()))]


def test_an_answer_of_five_digits_asked_after_correct_ones_tells_the_same_as_letting_the_model_write_it():
    made = task_of(task="passkey", segment_len=32)
    model = tiny("fam", vocab_size=made.vocab_size, segment_len=32)
    questions, _ = made.questions(dict(length=2, n=5))
    for question, said in zip(questions, train.answer(model, questions, "cpu", tqdm(disable=True))):
        _, _, state = model(torch.tensor(np.concatenate(question.context))[None])
        right = [*question.question, *question.answer[:-1]]
        assert said == [model(torch.tensor(right[:n])[None], state=state)[0].argmax().item()
                        for n in range(10, 15)]
        asked, answer = torch.tensor([question.question]), torch.tensor([question.answer])
        logits, loss = train.ask(model, asked, answer, state)
        assert_close(loss, nn.functional.cross_entropy(logits[0], answer[0]))
        written = model.generate(torch.tensor(question.question)[None], 5, state, temperature=0)
        question = question._replace(answer=written[0, 10:].tolist())
        assert train.answer(model, [question], "cpu", tqdm(disable=True)) == [question.answer]


# --- 3. train.py: flags, folders, stopping and continuing ---------------------------------------------------

FAST = ("train --n_layer 1 --n_embd 16 --n_head 2 --batch_size 8 --stage_steps 30 --last_steps 12 "
        "--eval_samples 8 --device cpu")


def run(line):
    """A program and its arguments, as one would type them."""
    program, *argv = shlex.split(line)
    dict(train=train, sample=sample, download=download)[program].main(argv)


def fails(capsys, line):
    """Run a program that must stop with one line; return that line."""
    with pytest.raises(SystemExit) as stop:
        run(line)
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    return said


def rows_of(folder, *kinds):
    return [{k: v for k, v in row.items() if k != "seconds"}
            for row in files.read_rows(folder) if row["kind"] in (kinds or ("train", "eval", "final"))]


def test_there_are_at_most_forty_flags_and_help_lists_every_ablation_beside_its_memory(capsys):
    with pytest.raises(SystemExit):
        run("train --help")
    text = capsys.readouterr().out
    assert len(re.findall(r"^  --", text, re.M)) <= 40
    for name, Memory in MEMORIES.items():
        (line,) = re.findall(rf"^  {name} .*$", text, re.M)
        assert all(word in line for word in [*Memory.options, *Memory.ablations])


@pytest.mark.parametrize("flags, named", [
    ("--n_layer two", "n_layer"), ("--memory elephant", "memory"), ("--n_head 3", "n_embd"),
    ("--rule gamma", "published or delta"), ("--window 3", "window"), ("--mem_layers 2", "mem_layers"),
    ("--ablate no_gama", "nothing, no_gamma, no_delta"), ("--memory fam --ablate stop_gradient", "no_copy"),
    ("--memory none,rmt --ablate no_delta", "no_delta"), ("--memory lm2 --n_mem 17", "n_mem"),
    ("--memory none --price 1", "price"), ("--memory full --compile 1", "compile"), ("--lr nan", "lr"),
    ("--device tpu", "device"), ("--dtype float8", "dtype"), ("--eval_samples 0", "eval_samples"),
    ("--task qa21", "task"), ("--eval_lengths 17", "16 keys"), ("--align 8", "align"),
    ("--task qa1 --stages 2/0/8", "stages"), ("--task qa1 --segment_len 64 --stages 4/0/12", "stages"),
    ("--task babilong --stages 2/0 --batch_size 7", "batch_size"), ("--task qa1 --babi_dir no", "babi_dir"),
    ("--task qa1 --background nowhere.txt", "nowhere"), ("--task qa1 --background .gitignore", "no sentence"),
    ("--eval_only", "holds no run"), ("--eval_only --like nowhere", "--like"), ("--stages 2,x", "stages"),
    ("--stages 257", "stages"), ("--task qa1 --stages 4/0/32", "stages"), ("--device cpu:1", "device"),
    ("--layers 2", "--layers"), ("--like nowhere", "nowhere")])
def test_a_wrong_value_is_answered_in_one_line_and_leaves_nothing_behind(flags, named, capsys, tmp_path):
    assert named in fails(capsys, f"{FAST} {flags} --out_dir {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_the_price_is_zero_where_nothing_changes_and_else_the_documented_sum():
    made = task_of(task="qa1", align=8, segment_len=8)
    batch = made.batch(generator(0, "train"), 4, (3, 20))
    sizes = dict(vocab_size=made.vocab_size, segment_len=8)
    shut(still := tiny("armt", "delta", gate="hardsigmoid", **sizes))
    for model in (still, *(tiny(name, **sizes) for name in ("none", "full", "bswa"))):     # caches are free
        assert train.BatchLoss(model, "cpu")(batch, 1.0)[1] == 0
    model = tiny("armt", **sizes)
    loss, written, row, correct, _ = train.BatchLoss(model, "cpu")(batch, 0.5)
    state, by_hand = model.init_state(4), 0.0
    for segment in torch.from_numpy(batch.context).unbind(1):
        _, _, new = model(segment, state=state)
        for old, now in zip(armt.tensors(state), armt.tensors(new)):
            moved = torch.stack([(b - a).norm() / (1 + a.norm()) for a, b in zip(old, now)])         # (4,)
            by_hand += (0.5 * moved / (0.1 + moved)).mean().item()
        state = new
    assert written.item() == pytest.approx(by_hand, rel=1e-4) and by_hand > 0.1
    assert len(row) == len(correct) == (batch.answers >= 0).sum()
    assert train.BatchLoss(model, "cpu")(batch)[0] == loss
    new = train.BatchLoss(model, "cpu")(batch, state=state)[-1]            # --pass_state: it is read on
    assert_close(new, model(torch.from_numpy(batch.context).flatten(1), state=state)[2], 0)


@pytest.mark.slow
@pytest.mark.parametrize("memory, low, high", [("armt", 0.97, 1.01), ("none --stage_steps 90", 0, 0.15)])
def test_armt_learns_four_pairs_from_scratch_and_none_does_not(memory, low, high, tmp_path, capsys):
    run(f"train --memory {memory} --n_layer 1 --stages 4,4 --last_steps 50 --eval_lengths 4 "
        f"--eval_samples 1000 --device cpu --out_dir {tmp_path}")
    assert low < rows_of(tmp_path, "eval")[0]["accuracy"] < high                        # chance is 1/16
    guess = re.search(r"as of a guess among ([\d.]+) answers", capsys.readouterr().out)
    assert 16 < float(guess[1]) < 24 if memory.startswith("none") else guess is None


def test_in_the_last_stage_the_price_rises_and_memories_are_passed_on_and_autocast_is_always_on(
        tmp_path, monkeypatch):
    steps, forward = [], train.BatchLoss.forward

    def watched(self, batch, price, state):
        out = forward(self, batch, price, state)
        steps.append((price, state, out[-1], torch.is_autocast_enabled("cpu")))
        return out
    monkeypatch.setattr(train.BatchLoss, "forward", watched)
    run(f"{FAST} --stages 2,3 --learned 0 --price 0.6 --pass_state 1 --dtype bfloat16 --eval_lengths 2 "
        f"--out_dir {tmp_path}")
    prices, given, left, autocast = zip(*steps)
    assert prices == pytest.approx([0] * 25 + [0.6 * i / 12 for i in range(12)]) and all(autocast)
    assert given[:25] == (None,) * 25
    assert_close(given[25:], left[24:-1], 0)


def test_a_stage_is_learned_when_the_worst_part_of_the_task_is(tmp_path, monkeypatch, capsys):
    forward = train.BatchLoss.forward

    def only_qa1(self, *given):                                  # rows of qa1 and qa4 take turns
        loss, written, row, correct, state = forward(self, *given)
        return loss, written, row, row % 2 == 0, state
    monkeypatch.setattr(train.BatchLoss, "forward", only_qa1)
    run(f"{FAST} --task qa1+qa4 --stages 2/0,4/0 --eval_lengths 0 --background {TOP}/README.md "
        f"--out_dir {tmp_path}")
    assert "stage 2/0 was not learned" in capsys.readouterr().out
    *_, last = rows_of(tmp_path, "train")
    assert last["step"] == 30 and last["accuracy"] == dict(qa1=1, qa4=0)


@pytest.mark.parametrize("extra", [
    "--muon_lr 0", "--memory fam --window 1 --pass_state 0.5",
    f"--task qa2+qa4 --stages 2/0,4/40 --price 0.1 --pass_state 0.5 --background {TOP}/README.md"])
def test_stop_and_resume_is_the_same_run(extra, tmp_path, monkeypatch, capsys):
    whole, parts, clip = tmp_path / "whole", tmp_path / "parts", torch.nn.utils.clip_grad_norm_
    command = f"{FAST} --stages 2,3 --learned 0 --eval_lengths 3 {extra} --out_dir"
    run(f"{command} {whole}")
    steps = itertools.count()

    def interrupted(*args):
        if next(steps) in (4, 28):
            os.kill(os.getpid(), signal.SIGINT)                            # Ctrl-C in the middle of a step
        return clip(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(f"{command} {parts}")
        assert "the same command continues" in capsys.readouterr().out
        run(f"train --eval_only --out_dir {parts}")                    # of a model halfway: it is made anew
    for _ in range(2):                                                     # the second time changes nothing
        run(f"{command} {parts}")
        one, two = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (whole, parts))
        one["progress"]["seconds"] = two["progress"]["seconds"]
        assert_close(one, two, 0)
        assert rows_of(whole) == rows_of(parts)
    assert next(steps) == 25 + 12                                          # no step was made twice
    assert "--seed" in fails(capsys, f"{command} {parts} --seed 7")


def test_a_run_that_was_killed_continues_even_where_its_last_row_is_half_written(tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = f"{FAST} --stages 2,2,2 --learned 0 --last_steps 40 --eval_lengths 2 --threads 1 --out_dir"
    run(f"{command} {whole}")
    process = subprocess.Popen([sys.executable, "train.py", *command.split()[1:], killed], cwd=TOP,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')                                # a power cut
    run(f"{command} {killed}")
    assert rows_of(whole) == rows_of(killed)
    good = (killed / "metrics.jsonl").read_bytes()
    for bad in (b"{\n", b"5\n", b"\xff\n"):
        (killed / "metrics.jsonl").write_bytes(bad + good)
        assert "metrics.jsonl, line 1: damaged" in fails(capsys, f"{command} {killed}")


def test_results_are_never_overwritten_and_a_folder_has_one_process(tmp_path, capsys):
    rows = tmp_path / "metrics.jsonl"
    rows.write_text('{"kind": "final"}\n')
    assert "no checkpoint" in fails(capsys, f"{FAST} --stages 2 --out_dir {tmp_path}")
    with files.only_user(tmp_path):
        assert f"process {os.getpid()} is working" in fails(capsys, f"{FAST} --stages 2 --out_dir {tmp_path}")
    with pytest.raises(OSError):
        files.write_atomically(rows, lambda path: path.write_text("half of it") and os.stat("nowhere"))
    with pytest.raises(OSError, match="metrics.jsonl"):                    # no folder, as with a full disk
        files.write_atomically(rows, lambda path: torch.save({}, "nowhere/x.pt"))
    assert rows.read_text() == '{"kind": "final"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "metrics.jsonl"]
    rows.unlink()
    (tmp_path / "config.json").write_text('{"name": "another program"}')
    assert "holds no run" in fails(capsys, f"{FAST} --stages 2 --out_dir {tmp_path}")


def test_a_loss_that_is_not_a_number_ends_the_run_with_the_flag_to_change(tmp_path, capsys):
    command = f"{FAST} --muon_lr 0 --stages 2 --last_steps 100 --eval_lengths 2"
    said = fails(capsys, f"{command} --lr 100 --out_dir {tmp_path / 'one'}")
    assert "--lr" in said and "step" in said and "in stage 2" in said
    said = fails(capsys, f"{command} --lr 100,0.001 --out_dir {tmp_path}")         # the second run goes on
    out = capsys.readouterr().out
    assert "1 of 2" in said and "--lr" in out and "in stage 2" in out
    assert rows_of(tmp_path / "remember-armt-lr0.001-seed0", "final")


def test_a_grid_trains_what_can_be_and_a_run_is_repeated_like_another(tmp_path, capsys):
    run(f"{FAST} --stages 2 --eval_lengths 2 --seed 0,1 --memory none,armt --ablate nothing,no_delta "
        f"--last_steps 2 --out_dir {tmp_path}")
    assert capsys.readouterr().out.count("skipped") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"remember-{name}-seed{s}" for name in (
        "armt-no_delta", "armt-nothing", "none-nothing") for s in (0, 1)]
    first, result = tmp_path / "remember-armt-no_delta-seed0", tmp_path / "result.json"
    result.write_text(json.dumps(dict(config=json.loads((first / "config.json").read_text()))))
    for like in (first, result):
        run(f"train --like {like} --out_dir {tmp_path / 'again'}{like.suffix}")
        assert rows_of(first) == rows_of(f"{tmp_path / 'again'}{like.suffix}")
    capsys.readouterr()
    run(f"sample --out_dir {first}")
    assert capsys.readouterr().out.count("->") == 5
    assert "--facts" in fails(capsys, f"sample --out_dir {first} --facts 'Mary left.'")
    assert "--task" in fails(capsys, f"train --like {first} --task qa1 --out_dir {tmp_path / 'a'}")
    assert "one folder" in fails(capsys, f"train --out_dir {tmp_path / 'a'},{tmp_path / 'b'}")
    other = "--task passkey --segment_len 32"
    assert "trained on" in fails(capsys, f"train --eval_only --out_dir {first} {other}")
    assert "trained on" in fails(capsys, f"train --eval_only --out_dir {first} --task rewrite")
    assert "segment_len" in fails(capsys, f"train --eval_only --out_dir {first} --segment_len 5")


def test_an_evaluation_adds_what_is_missing_and_none_of_no_question_is_not_zero(tmp_path, capsys):
    run(f"{FAST} --task qa1+qa3 --stages 4/0 --last_steps 2 --eval_lengths 0 --background {TOP}/README.md "
        f"--out_dir {tmp_path}")
    command = f"train --eval_only --out_dir {tmp_path}"
    for _ in range(2):
        run(f"{command} --task qa3 --eval_samples 3 --eval_lengths 30,300")
    rows = rows_of(tmp_path, "eval")
    assert [(row["cell"]["part"], row["cell"]["length"], row["n"], row.get("left_out")) for row in rows] == [
        ("qa1", 0, 8, 0), ("qa3", 0, 8, 0), ("qa3", 30, 0, 3), ("qa3", 300, 3, 0)]
    assert rows[2]["accuracy"] is None
    said = capsys.readouterr().out
    assert "qa3 30 words: - (3 questions are about longer stories, and left out)" in said
    assert "qa3 30 words: - (evaluated before)" in said and "% of 3 (evaluated before)" in said
    assert "trained on" in fails(capsys, f"{command} --task qa2")
    assert "--lr" in fails(capsys, f"{command} --lr 1")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, monkeypatch, capsys):
    command = (f"{FAST} --task qa1+qa4 --stages 2/0,4/20 --learned 0 --price 0.01 --eval_lengths 0 "
               f"--background {TOP}/README.md --out_dir {tmp_path}")
    launch = f"-m torch.distributed.run --standalone --nproc_per_node 2 train.py {command[6:]}/two"
    launch = [sys.executable, *launch.split()]
    process = subprocess.Popen(launch, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not (tmp_path / "two" / "ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    *_, last = subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()
    os.kill(int(last), signal.SIGINT)                                  # one stops: both do, at the same step
    assert b"and saved" in process.communicate(timeout=60)[0] and process.returncode != 0
    assert not rows_of(tmp_path / "two", "final")
    with subprocess.Popen(launch, cwd=TOP) as process:
        run(f"{command}/one")
    assert process.returncode == 0
    one, two = (rows_of(tmp_path / name, "train", "eval") for name in ("one", "two"))
    assert [row["accuracy"] for row in one] == [row["accuracy"] for row in two]
    one, two = ([row["loss"] for row in rows if "loss" in row] for rows in (one, two))
    assert one == pytest.approx(two, abs=2e-4)
    monkeypatch.setattr(train, "WORLD", 2)
    assert "torchrun" in fails(capsys, f"{FAST} --seed 0,1 --out_dir {tmp_path}")


def test_a_compiled_run_learns_what_the_usual_one_learns(tmp_path, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **how: compiler(f, backend="aot_eager", **how))
    for flag in "01":
        run(f"{FAST} --stages 2 --segment_len 4 --learned 0 --eval_lengths 3 --compile {flag} "
            f"--out_dir {tmp_path / flag}")
    assert_close(*(dict(train.load(tmp_path / flag)[1].state_dict()) for flag in "01"), 1e-3)


def test_segments_of_all_lengths_of_a_curriculum_are_compiled(tmp_path, monkeypatch):
    """Torch keeps eight versions of a function if it is not told otherwise, and then runs it uncompiled."""
    compiler, compiled = torch.compile, []

    def backend(graph, inputs):                                  # runs what it was given, uncompiled
        compiled.extend(x.shape for x in inputs)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, mode, **how: compiler(f, backend=backend, **how))
    for flag in "01":
        run(f"{FAST} --task qa1 --segment_len 10 --align 2 --stages 2/0/4,2/0/6,2/0/8,2/0/10 --learned 0 "
            f"--eval_lengths 0 --compile {flag} --out_dir {tmp_path / flag}")
    assert {(8, T, 16) for T in (2, 4, 6, 8, 10)} <= {*map(tuple, compiled)}
    assert_close(*(dict(train.load(tmp_path / flag)[1].state_dict()) for flag in "01"), 1e-3)


# --- 4. sample.py: a memory that is told, reads, and is asked -----------------------------------------------

@every_variant
def test_reading_fast_gives_the_state_of_reading_one_segment_after_another(memory, ablate):
    model, idx = tiny(memory, ablate).double(), some_text(20 * T, rows=1)
    for start in (model.init_state(1), model(idx[:, :T + 3])[2]):
        state, wrote = sample.read_fast(model, idx.view(-1, T), start)
        assert_close(state, model(idx, state=start)[2])
        assert [*wrote] == ([] if memory == "none" else [*range(20)])


def test_segments_that_write_nothing_are_read_side_by_side():
    empty, rows = torch.ones(1, 1).double(), []

    def model(idx, state):
        """A memory of one number, which only segments that begin with 0 change."""
        rows.append(len(idx))
        return None, None, torch.where(idx[:, :1] == 0, 3 * state + idx[:, 1:2], state)

    for loud, expected in (([], [1, 2, 4, 8, 16, 9]), ([0], [1, 1, 2, 4, 8, 16, 8]),
                           ([5, 6, 39], [1, 2, 4, 1, 1, 1, 2, 4, 8, 16, 2, 1]), (list(range(40)), [1] * 40)):
        segments, whole = 1 + some_text(40 * T, rows=1).view(-1, T) % (V - 1), empty
        segments[loud, 0] = 0
        for segment in segments:
            _, _, whole = model(segment[None], whole)
        rows.clear()
        state, wrote = sample.read_fast(model, segments, empty)
        assert state == whole and rows == expected and [*wrote] == loud


@pytest.fixture(scope="module")
def qa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    run(f"{FAST} --task qa1+qa4 --align 8 --stages 2/0 --eval_lengths 0 --out_dir {folder / 'run'}")
    (folder / "book.txt").write_text("Ä" * 7 + " " + babilong.prose(120, seed="a book"), encoding="utf-8")
    return folder


@pytest.mark.parametrize("align", [0, 8])
def test_telling_in_two_calls_equals_telling_in_one_and_asking_changes_nothing(align, qa):
    config, model, _ = train.load(qa / "run")
    config.align = align
    one, two, three = (sample.Reader(config, model, make_task(config), "cpu") for _ in range(3))
    text = (qa / "book.txt").read_text(encoding="utf-8")
    end = text.index(" ", 1111)
    one.tell(text)
    two.tell(text[:end])
    two.ask("Where is Mary?")
    two.tell(text[end:])
    (qa / "half.txt").write_bytes(b"Mary left. " + b" " * (1 << 17) + b"\xff")
    with pytest.raises(ValueError, match="half.txt is not UTF-8"):
        three.read(qa / "half.txt")                                        # none of it was read
    three.read(qa / "book.txt")
    for other in (two, three):
        assert one.words_read == other.words_read == WORDS.count(WORDS.encode(text))
        assert one.tail == other.tail
        assert_close(one.state, other.state, 1e-5)
        assert_close(one.ask("Where is Mary?"), other.ask("Where is Mary?"), 1e-6)


def test_a_saved_memory_answers_tomorrow_and_a_damaged_or_foreign_one_is_refused(qa, capsys):
    command, good = f"sample --json --out_dir {qa / 'run'}", qa / "good.pt"
    ask = "--ask 'Where is Mary?' 'Where is John?'"
    tell = f"--facts 'Mary went to the kitchen. John moved to the garden.' --read {qa / 'book.txt'}"
    said = []
    for line in (f"{tell} {ask}", f"{tell} --save_state {good}", f"--load_state {good} {ask}"):
        run(f"{command} {line}")
        said.append([json.loads(x) for x in capsys.readouterr().out.splitlines()])
    assert said[0] == said[2] and len(said[0]) == 2 and said[1] == []
    assert "good.pt" in fails(capsys, f"sample --json --load_state {good} {ask}")         # of another model
    good = torch.load(good, weights_only=True)
    state, tail, words_read = good["memory"]
    for change in (dict(seal="x"), dict(memory=()), dict(memory=((), tail, words_read)),
                   dict(memory=(state, tail, words_read + 1)), dict(memory=(state, "tail", words_read)),
                   *(dict(memory=(armt.state_map(f, state), tail, words_read))
                     for f in (torch.neg, lambda t: t * math.nan, lambda t: t[..., :-1], torch.Tensor.half))):
        torch.save(good | change, qa / "bad.pt")
        assert "bad.pt" in fails(capsys, f"{command} --load_state {qa / 'bad.pt'} {ask}")
    (qa / "binary.txt").write_bytes(bytes(range(256)))
    for flag, named in ((f"--read {qa / 'binary.txt'}", "binary.txt"),
                        (f"--facts 'Mary left.' --written x.no --save_state {qa / 'kept.pt'}", "--written"),
                        ("--load_state ''", "--load_state"),
                        (f"--save_state {qa / 'nowhere' / 'x.pt'}", "--save_state"),
                        (f"--save_state {qa}", "--save_state"),
                        ("--load_state nowhere.pt", "nowhere.pt")):
        assert named in fails(capsys, f"{command} {flag} {ask}")
    assert not (qa / "kept.pt").exists()                     # said before anything is read
    assert "one question" in fails(capsys, f"{command} --ask 'John left. Where is John?'")


def test_a_conversation_says_what_it_does_not_know_and_shows_what_was_written(qa, capsys, monkeypatch):
    lines = iter(["Napoleon went to the kitchen.", "Where is Mary?", f"read {qa / 'book.txt'}",
                  "Mary left. Where is John? Where is the milk?", "read nowhere.txt", "forget", "hm",
                  "Where is ?", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    run(f"sample --out_dir {qa / 'run'}")
    out, err = capsys.readouterr()
    assert "Where is Mary?  " in out and "words in" in out
    assert "Where is John?  " in out and "Where is the milk?  " in out
    assert "nowhere.txt" in out and "'Napoleon'" in err and "Mary" not in err
    run(f"sample --out_dir {qa / 'run'} --facts 'Mary left.' --read {qa / 'book.txt'} --written")
    strip, said, *most = capsys.readouterr().out.strip().splitlines()
    assert strip[0] == strip[-1] == "|" and len(strip) <= 74 and "segments" in said and len(most) == 5
    assert "--ask" in fails(capsys, f"sample --out_dir {qa / 'run'} --json")


# --- 5. Downloads, from a server on this machine ------------------------------------------------------------

class Shelf(http.server.BaseHTTPRequestHandler):
    """Serves `files`, and breaks off after `limit` bytes."""
    files, limit = {}, None

    def do_GET(self):
        if self.path not in self.files:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", len(self.files[self.path]))
        self.end_headers()
        self.wfile.write(self.files[self.path][:self.limit])


def test_a_download_is_whole_and_what_it_should_be_before_it_is_kept(tmp_path, monkeypatch, capsys):
    archive, name, digests = tmp_path / "babi.tar.gz", "en-10k/qa1_a_test.txt", tmp_path / "babi.sha256"
    (tmp_path / "qa.txt").write_text(PUBLISHED)
    with tarfile.open(archive, mode="w:gz") as tar:
        tar.add(tmp_path / "qa.txt", f"tasks_1-20_v1-2/{name}")
    book = "The eBook of A Book\r\n*** START OF IT ***\r\n" + "It goes on.\r\n" * 200 + "*** END OF IT ***"
    Shelf.files = {"/babi.tar.gz": archive.read_bytes(), "/1.txt": book.replace("A Book", "Another").encode()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shelf)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(download, "HERE", tmp_path)
    monkeypatch.setattr(download, "BABI", [f"{base}/nowhere.tar.gz", f"{base}/babi.tar.gz"])
    monkeypatch.setattr(download, "GUTENBERG", base + "/{number}.txt")
    monkeypatch.setattr(download, "TEXTS", {"books/a.txt": (1, "A Book", 2400)})
    out = tmp_path / "data"
    digests.write_text(f"{'0' * 64}  {name}\n")
    assert "is not the published file" in fails(capsys, f"download --out_dir {out}")
    Shelf.limit = len(archive.read_bytes()) // 3
    said = fails(capsys, f"download --out_dir {out}")
    assert "broke off after" in said and "the same command continues" in said
    assert not list(out.rglob("*"))
    digests.write_text(f"{hashlib.sha256(PUBLISHED.encode()).hexdigest()}  {name}\n")
    Shelf.limit = None
    assert "a.txt: its beginning does not say 'A Book'" in fails(capsys, f"download --out_dir {out}")
    Shelf.files = {"/1.txt": book.encode()}                          # what is there is not asked for again
    run(f"download --out_dir {out}")
    assert sorted(p for p in out.rglob("*") if p.is_file()) == [out / "babi" / name, out / "books" / "a.txt"]
    assert (out / "books" / "a.txt").read_text() == "It goes on.\n" * 200
    server.shutdown()


# --- 6. What is shipped, and the README ---------------------------------------------------------------------

def test_the_shipped_memory_answers_all_five_kinds_of_question_and_says_what_it_does_not_know(capsys):
    assert sum(path.stat().st_size for path in sample.PRETRAINED.iterdir()) < 1_000_000
    for facts, asked in (
            ("Mary got the milk there. Mary went to the kitchen. John moved to the office. "
             "Mary moved to the garden.",
             {"Where is Mary?": "garden", "Where is John?": "office", "Where is the milk?": "garden",
              "Where was the milk before the garden?": "kitchen", "Where is the football?": "unknown"}),
            ("The office is north of the kitchen. The garden is south of the kitchen.",
             {"What is north of the kitchen?": "office", "What is the kitchen north of?": "garden",
              "What is the office north of?": "kitchen"}),
            ("Fred picked up the milk there. Jeff went to the office. Fred passed the milk to Bill.",
             {"Who gave the milk to Bill?": "Fred", "What did Fred give to Bill?": "milk",
              "Who received the milk": "Bill"})):
        sample.main(["--json", "--facts", facts, "--ask", *asked])
        said = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["answer"] for line in said] == [*asked.values()]
    line = f"train --like {sample.PRETRAINED} --out_dir {sample.PRETRAINED} --background prose"
    assert "weights only" in fails(capsys, line)


def test_every_command_of_the_readme_parses_and_those_of_a_page_have_the_settings_of_its_rows(monkeypatch):
    monkeypatch.chdir(TOP)
    files = ("background", "eval_text", "babi_dir")                        # downloads: they may not be here
    free, found = {*train.FREE, "seed", "vocab"}, 0
    for page in [TOP / "README.md", *(TOP / "results").rglob("*.md")]:
        rows = [json.loads(path.read_text())["config"] for path in page.parent.rglob("*seed*.json")
                if page.parent != TOP]
        text = page.read_text(encoding="utf-8")
        for program, argv in re.findall(r"python (train|sample)\.py(.*?)(?:`|#|&&|;|$)", text, re.M):
            found += 1
            if program == "sample":
                sample.make_parser().parse_args(shlex.split(argv))
            elif "--help" not in argv:
                like, eval_only, runs = train.parse(shlex.split(argv))
                given = [{name: chosen.pop(name) for name in files if name in chosen} for chosen in runs][0]
                if like:
                    assert Path(like).exists(), like
                for c in train.grid(None, runs) if not like and not eval_only else ():
                    asked = {**vars(c), **given}
                    assert page.parent == TOP or any(
                        all(row[k] == asked[k] for k in row.keys() & asked.keys() - free) for row in rows), c
    assert found > 10


def test_links_into_armt_point_at_the_headings_of_memories():
    lines = Path(armt.__file__).read_text(encoding="utf-8").splitlines()
    linked = re.findall(r"^\| `(\w+)` .*armt\.py#L(\d+)", README, re.M)
    assert len(linked) == 5 and all(lines[int(n) - 1].startswith(f"# {name}: ") for name, n in linked)


def test_every_table_of_accuracies_is_that_of_the_rows(capsys):
    for folder in sorted({path.parent for path in (TOP / "results").rglob("*.json")}):
        print("\n".join(table.tables(table.read_runs(folder))))
    forget.print_table(TOP / "results" / "forget" / "read.jsonl")
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    shown = [line for page in (TOP / "README.md", *(TOP / "results").rglob("README.md"))
             for block in re.findall(r"```\n((?:accuracy, %|rule  ).*?)```", page.read_text("utf-8"), re.S)
             for line in block.splitlines() if line]
    assert len(shown) > 100 and not [line for line in shown if line not in printed]


def test_the_memory_in_the_readme_trains_and_can_be_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "fade.py").write_text(FADE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(MEMORIES, "fade")                                  # it registers itself
    for line in (f"{FAST} --memory fade --stages 2 --eval_lengths 2", "sample"):
        monkeypatch.setattr(sys, "argv", ["fade.py", *line.split(), "--out_dir", "run"])
        runpy.run_path("fade.py", run_name="__main__")
    assert rows_of(tmp_path / "run", "final") and capsys.readouterr().out.count(" -> ") == 1 + 5


def test_a_length_that_was_asked_twice_counts_once_and_seeds_with_other_settings_are_named(tmp_path):
    rows = [dict(cell=dict(length=2, n=n), n=n, left_out=0, accuracy=a) for n, a in ((9, 0.5), (8, 1.0))]
    final = dict(parameters=1, state_floats=1, seconds=60, learned=True, stage="2")
    for seed, lr in enumerate((1, 1, 2)):
        config = dict(task="remember", memory="armt", seed=seed, lr=lr)
        (tmp_path / f"a-seed{seed}.json").write_text(
            json.dumps(dict(config=config, final=final, eval=rows, curve=[])))
        line = table.tables(table.read_runs(tmp_path))[2]
        assert line.split()[1] == str(seed + 1) and " 50.0" in line
        assert line.endswith("(unlike: lr)") == (lr == 2)
