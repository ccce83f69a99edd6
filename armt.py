"""
A small GPT that reads text segment by segment, with seven choices of what to carry from one to the next.

    memory  carried from one segment to the next     who writes it               cost
    none    nothing                                  -                           T^2
    full    keys and values of the whole past        every token, every layer    T (P + T)
    bswa    keys and values of the last W segments   every token, every layer    T (W + 1) T
    rmt     M vectors, one set for the model         the last layer              (T + 2M)^2
    armt    a matrix A (and z) in each layer         memory tokens, every layer  (T + M)^2 + (T + 3M) D / 2
    fam     M rows in each layer (and bswa's cache)  FAM rows, every layer       (T + M) (W T + M + T)
    lm2     a bank of M slots in each layer          slots, every layer          T^2 + 2 T M

Cost: multiply-adds of attention and memory, for a layer and segment, over 2 C. The linear layers of a block
add 6 C for each token that passes through it; LM2 has 2 C more for its bank.

Everything hangs on two loops and one value. Time is the loop in `GPT.forward`, one segment after another.
Depth is the loop in `Layered.forward`, one block after another (RMT has its own: its memory goes from the top
of one segment to the bottom of the next). The memory is a value: it goes into a call as `state` and comes out
as a new `state`, and no module keeps anything for itself. So an empty memory is `state=None`, two questions
about one book use one state twice, and `torch.save(state, file)` saves a memory.

Letters:  B batch, N tokens in a call, T tokens in a segment, M memory tokens, FAM rows or slots (n_mem),
          C width (n_embd), L layers, H heads, d = C / H features of a head, W cached segments (window),
          P tokens in a cache, D features of a key after phi, V words in the vocabulary,
          R and S any number of rows, u memory tokens that write

Sources:  RMT   Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881
          ARMT  Rodkin, Kuratov, Bulatov, Burtsev 2024, arXiv 2407.04841
          FAM   Hwang, Wang, Huo, Sim, Moreno Mengibar 2024, arXiv 2404.09173
          LM2   Kang et al. 2025, arXiv 2502.06049
          the backbone is GPT-2 without dropout, without tied embeddings and without biases of linear layers;
          its positions are rotary: Su et al. 2021, arXiv 2104.09864

A comment that starts with `differs:` marks a departure from a paper, with its reason. To read the code, begin
at the end, with `GPT.forward`, and then pick a memory.
"""
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """A model and its memory. None stands for the memory's default; `GPT(config).config` has it filled in."""
    vocab_size: int = 128          # V, different tokens; set by the task
    segment_len: int = 64          # T, tokens that the model reads at once
    n_layer: int = 2               # L, blocks
    n_head: int = 4                # H, attention heads in a block
    n_embd: int = 64               # C, width of the residual stream
    memory: str = "armt"           # what crosses a segment boundary: a name in MEMORIES
    n_mem: int | None = None       # M: memory tokens (rmt, armt), rows (fam), slots (lm2)
    d_mem: int | None = None       # armt: width of queries and keys before phi
    nu: int | None = None          # armt: order of the feature map DPFP-nu
    rule: str | None = None        # armt: published, or delta (unit-norm keys, no normaliser)
    gate: str | None = None        # armt: sigmoid, or hardsigmoid, which can shut completely
    window: int | None = None      # bswa, fam: W, segments in the cache
    mem_layers: int | None = None  # armt, lm2: layers, from the first, that have a memory; 0 means all
    ablate: str = "nothing"        # what to leave out or change: words of the memory, joined by +


EMBEDDING_STD = 0.5                # embeddings and memory tokens start near the scale of a block's update


# ------------------------------------------------------------------------------------------------------------
# The backbone: a pre-LN GPT block with rotary positions

@lru_cache(maxsize=8)
def rotary_angles(n, d, device, dtype):
    """[cos, cos] and [-sin, sin], (n, d) each, of p / 10000^(2i/d) for position p and feature pair i."""
    with torch.inference_mode(False):      # a table made for inference could not serve training later
        made_on = "cpu" if device.type == "mps" else device                       # MPS has no float64
        frequency = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64, device=made_on) / (d // 2))
        angle = torch.arange(n, dtype=torch.float64, device=made_on)[:, None] * frequency        # (n, d/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), 1).to(device, dtype), torch.cat((-sin, sin), 1).to(device, dtype)


def rotary(x, start=0):
    """
    Rotate features i and i + d/2 together, by an angle that grows with the position (Su et al. 2021, eq. 34,
    in another order of features). Positions enter the product of a query and a key through their distance
    alone, so no learned table ties a model to a length.
    x (B, H, T, d), whose first row stands at position `start` -> (B, H, T, d)
    """
    cos, sin = rotary_angles(start + x.size(2), x.size(3), x.device, x.dtype)
    return torch.addcmul(x * cos[start:], x.roll(x.size(3) // 2, dims=-1), sin[start:])


def split_heads(x, n_head):
    """(B, T, C) -> (B, H, T, d)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def merge_heads(y):
    """(B, H, T, d) -> (B, T, C)"""
    return y.transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and at those before it, in its segment and in a cache of the past."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def project(self, x):
        """x (B, T, C) -> q, k, v, (B, H, T, d) each, not yet rotated"""
        return [split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1)]

    def attend(self, q, k, v, mask):
        """q (B, H, T, d), k and v (B, H, S, d), mask bool (T, S), or None for a causal one -> y (B, T, C)"""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(merge_heads(y))

    def forward(self, x, past=None, mask=None):
        """
        x (B, T, C), past None or (k, v) of (B, H, P, d) each, mask None (causal) or, where there is no past,
        bool (T, T) -> y (B, T, C), (k, v) of P + T. Keys are cached before rotation, so no cache depends on
        positions.
        """
        q, k, v = self.project(x)                                                 # (B, H, T, d)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)     # (B, H, P + T, d)
        T, S = q.size(2), k.size(2)
        if S > T:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        return self.attend(rotary(q, start=S - T), rotary(k), v, mask), (k, v)


class MLP(nn.Module):
    """Position-wise MLP with a hidden layer of 4 C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))                                  # (B, T, C)


class Block(nn.Module):
    """A pre-LN transformer block. Memories build on it and give it a state."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.ablate = set(config.ablate.split("+"))

    def forward(self, x, past=None, mask=None):
        """x (B, T, C), past and mask as in CausalSelfAttention -> x (B, T, C), past"""
        y, past = self.attn(self.ln_1(x), past, mask)
        x = x + y
        return x + self.mlp(self.ln_2(x)), past


class Layered(nn.Module):
    """
    Blocks, and the depth loop for memories whose state stays in its layer. Such a memory is a `block` with
    `init_state(batch_size) -> s` and `forward(x, s) -> (x, s)`. `options` are the fields of GPTConfig that
    the memory has, with their defaults; `ablations` are the words that `ablate` may name.
    """
    block, options, ablations = Block, {}, ()

    def __init__(self, config):
        super().__init__()
        with_memory = config.mem_layers or config.n_layer
        self.blocks = nn.ModuleList((self.block if layer < with_memory else NoneBlock)(config)
                                    for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def init_state(self, batch_size):
        return tuple(block.init_state(batch_size) for block in self.blocks)

    def forward(self, x, state):
        """One segment through all layers: x (B, T, C), state -> h (B, T, C) after ln_f, new state"""
        new = []
        for block, s in zip(self.blocks, state):                 # depth: each layer owns its memory
            x, s = block(x, s)
            new.append(s)
        return self.ln_f(x), tuple(new)

    def ask(self, x, state):
        """The same for a question, which is read but not written: blocks that have an `ask` save time"""
        for block, s in zip(self.blocks, state):
            x, _ = getattr(block, "ask", block)(x, s)
        return self.ln_f(x), state


# ------------------------------------------------------------------------------------------------------------
# none: the lower control. Nothing crosses a segment boundary; beyond one segment it can only guess.
#
#   carried: nothing      cost: T^2

class NoneBlock(Block):
    def init_state(self, batch_size):
        return ()

    def forward(self, x, state):
        return super().forward(x)[0], state


class NoMemory(Layered):
    block = NoneBlock


# ------------------------------------------------------------------------------------------------------------
# full: the other control, one causal attention over the whole past. It forgets nothing and pays for it: the
# state grows by 2 C floats a token in each layer, and each segment attends to everything read before it.
#
#   carried: k, v (B, H, P, d) of the P past tokens, per layer; P is 0 at first      cost: T (P + T)
#   Positions count from the first token; only distances matter, so this equals one long segment.

class FullBlock(Block):                              # it inherits forward(x, past)
    def init_state(self, batch_size):
        weight, H = self.attn.c_attn.weight, self.attn.n_head
        empty = weight.new_zeros(batch_size, H, 0, weight.size(1) // H)           # (B, H, 0, d)
        return empty, empty


class FullAttention(Layered):
    block = FullBlock


# ------------------------------------------------------------------------------------------------------------
# bswa: block sliding window attention (Hwang et al. 2024, algorithm 1), FAM's baseline.
#
#   A token sees its segment up to itself, and all of the W segments before. One layer reaches back W
#   segments, so L layers reach L W segments and no further.
#
#   carried: k, v (B, H, P, d) of the last P <= W T tokens, per layer; P is 0 at first
#   cost: T (W + 1) T
#   ablate  stop_gradient: the cache is a constant, as in Transformer-XL, so a segment cannot learn to be
#           useful to the next

class BSWABlock(FullBlock):
    """Full attention that forgets: only W T tokens stay in its cache."""

    def __init__(self, config):
        super().__init__(config)
        self.max_cache = config.window * config.segment_len                      # W T tokens

    def truncate(self, *cache):
        """k and v (B, H, P, d) -> copies of their last W T tokens"""
        cache = tuple(x[:, :, max(0, x.size(2) - self.max_cache):].clone() for x in cache)
        return state_map(torch.Tensor.detach, cache) if "stop_gradient" in self.ablate else cache

    def forward(self, x, past):
        """x (B, T, C) and past (k, v) of (B, H, P, d) each -> x (B, T, C), past of at most W T tokens"""
        x, cache = super().forward(x, past)
        return x, self.truncate(*cache)


class BSWA(Layered):
    block, options, ablations = BSWABlock, dict(window=1), ("stop_gradient",)


# ------------------------------------------------------------------------------------------------------------
# rmt: the Recurrent Memory Transformer (Bulatov et al. 2022, section 3, decoder form).
#
#   A segment is read between two copies of the memory. Its tokens see the first copy; the second copy sees
#   the tokens, and what it has become at the top is the memory of the next segment, which has to wait for it.
#
#       [read; h; write] = Transformer([mem_s; x_s; mem_s])        mem_{s+1} = write
#
#   carried: mem (B, M, C), one set for all layers; the first is learned      cost: (T + 2M)^2
#   Memory tokens of a copy see each other both ways, as in the authors' code of 2022.
#   ablate  one_way: they see only those before them, as in the code of 2024
#           stop_gradient: the memory is a constant for the next segment, the paper's BPTT of depth 0
#   The write tokens are taken after the final LayerNorm, as in the authors' code.

class RMT(Layered):
    """Blocks without a state of their own; the top layer's output is the next segment's memory."""
    options, ablations = dict(n_mem=16), ("one_way", "stop_gradient")

    def __init__(self, config):
        super().__init__(config)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)    # (M, C)

    def init_state(self, batch_size):
        return self.mem.expand(batch_size, -1, -1)                                # (B, M, C)

    def transform(self, mem, x, *write):
        """[mem; x; write], or [mem; x] for a question, through all layers: the same shape after ln_f"""
        M = mem.size(1)
        x = torch.cat((mem, x, *write), dim=1)
        mask = None
        if "one_way" not in self.blocks[0].ablate:
            mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
            mask[:M, :M] = True
            if write:
                mask[-M:, -M:] = True
        for block in self.blocks:
            x, _ = block(x, mask=mask)
        return self.ln_f(x)

    def forward(self, x, mem):
        """One segment between two copies of the memory: x (B, T, C), mem (B, M, C) -> h (B, T, C), new mem"""
        M, h = mem.size(1), self.transform(mem, x, mem)
        new = h[:, -M:].clone()                                                   # (B, M, C)
        return h[:, M:-M], new.detach() if "stop_gradient" in self.blocks[0].ablate else new

    def ask(self, x, mem):
        """A question x (B, T, C) after one copy, mem (B, M, C) -> h (B, T, C), the same mem"""
        return self.transform(mem, x)[:, mem.size(1):], mem


# ------------------------------------------------------------------------------------------------------------
# armt: the Associative Recurrent Memory Transformer (Rodkin et al. 2024, section 2, eqs. 1-4).
#
#   Each layer owns a matrix A that answers "what belongs to this key?". All tokens query it before the
#   layer; M memory tokens after the segment write to it after the layer. To write is to correct: only what A
#   does not yet answer is added (the delta rule), so that a key that is written again keeps its last value
#   alone, if beta = 1. z adds up the keys; division by q . z brings an answer to the size of one value.
#
#       read    q = phi(x W_Q)      y = q A / (q . z)      x <- x + y
#       write   k = phi(u W_K)      v = u W_V      beta = sigmoid(u w_beta)
#               vbar = k A / (k . z)                   what A answers for k so far
#               gamma = 1 - (k . z) / |k|^2            how much of k is new to z
#               A <- A + sum_i beta_i k_i (v_i - vbar_i)^T
#               z <- z + sum_i gamma_i k_i             (1e-5 is added to each q . z, k . z and |k|^2)
#       phi     DPFP-nu: r = [relu(x), relu(-x)], phi(x) = [r * roll(r, 1), ..., r * roll(r, nu)]
#
#   carried: A (B, D, C), z (B, D) per layer, zero at first; D = 2 nu d_mem
#   cost: (T + M)^2 + (T + 3M) D / 2
#   rule    published: the equations above. delta: |phi(x)| = 1 and no z, so y = q A and vbar = k A, which is
#           the authors' later form (`use_denom=False` in their code)
#   gate    sigmoid as published, or hardsigmoid, relu6(x + 3) / 6: a sigmoid never reaches 0, so every
#           unimportant segment adds a little to A, and older content fades
#   ablate  no_delta: vbar is 0; no_gamma: gamma is 1; gated_z: z <- z + beta gamma k, so that a gate that is
#           shut leaves both A and z unchanged
#   The memory tokens stand last and attention is causal: no text sees them, so the past comes through A.

class ARMTBlock(Block):
    """A block with an associative matrix: it reads before attention and writes after the MLP."""
    eps = 1e-5

    def __init__(self, config):
        super().__init__(config)
        C, d_mem = config.n_embd, config.d_mem
        self.n_mem, self.nu, self.rule, self.D = config.n_mem, config.nu, config.rule, 2 * config.nu * d_mem
        self.gate = F.hardsigmoid if config.gate == "hardsigmoid" else torch.sigmoid
        self.W_Q, self.W_K = nn.Linear(C, d_mem, bias=False), nn.Linear(C, d_mem, bias=False)
        # differs: the authors start W_V at 0. Drawn like the rest it learns sooner; but the gradient of the
        # published rule with several memory tokens then grows with each segment.
        self.W_V, self.w_beta = nn.Linear(C, C, bias=False), nn.Linear(C, 1)

    def init_state(self, batch_size):
        weight = self.W_V.weight                                                  # (C, C)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A = weight.new_zeros(batch_size, self.D, len(weight), dtype=dtype)
        return (A,) if self.rule == "delta" else (A, A.new_zeros(batch_size, self.D))

    def phi(self, x):
        """Features >= 0, of which two inputs share few: (B, R, d_mem) -> (B, R, D), at least float32"""
        r = F.relu(torch.cat((x, -x), dim=-1).to(torch.promote_types(x.dtype, torch.float32)))
        f = torch.cat([r * r.roll(j, dims=-1) for j in range(1, self.nu + 1)], dim=-1)
        return F.normalize(f, dim=-1, eps=self.eps) if self.rule == "delta" else f

    def lookup(self, q, A, z=None):
        """What A answers for queries or keys q (B, R, D): (B, R, C), and q . z + eps (B, R, 1), or None"""
        if z is None:
            return q @ A, None
        overlap = q @ z.unsqueeze(-1) + self.eps
        return q @ A / overlap, overlap

    def write(self, u, A, z=None):
        """Memory tokens u (B, M, C), which all see the same A and z -> (A, z), or (A,) without z"""
        k, beta = self.phi(self.W_K(u)), self.gate(self.w_beta(u))                # (B, M, D) (B, M, 1)
        v = self.W_V(u).to(k.dtype)                                               # (B, M, C)
        vbar, overlap = self.lookup(k, A, z)                                      # (B, M, C) (B, M, 1)
        if "no_delta" not in self.ablate:
            v = v - vbar
        # without gradient A, GPT.forward's own copy, is written in place; a CUDA graph cannot capture that
        in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        add = torch.Tensor.baddbmm_ if in_place else torch.baddbmm
        A = add(A, k.mT, beta * v)                                                # (B, D, C)
        if z is None:
            return (A,)
        # differs: the paper's gamma has no clip. Tokens of a segment that share a key all add it to z, and
        # without the clip the next segment overcorrects (z with four tokens of key k: 4k, -8k, 28k, ...). The
        # authors' code clips it, too, and stops its gradient. In the first segment z is 0, and gamma is 1.
        gamma = (1 - overlap / (k.square().sum(-1, keepdim=True) + self.eps)).clamp(0, 1).detach()
        counted = (z != 0).any(-1)[:, None, None] & ("no_gamma" not in self.ablate)      # (B, 1, 1)
        gamma = gamma.where(counted, 1.0)                                         # (B, M, 1)
        return A, z + ((beta * gamma if "gated_z" in self.ablate else gamma) * k).sum(1)

    def ask(self, x, state):
        """Tokens, with or without memory tokens, x (B, R, C), state (A, z) or (A,) -> x, the same state"""
        with torch.autocast(x.device.type, enabled=False):       # A and z add up many terms: float32
            y, _ = self.lookup(self.phi(self.W_Q(x)), *state)    # memory tokens read, too
            x = x + y.to(x.dtype)                                # no LayerNorm, as published
        return super().forward(x)[0], state

    def forward(self, x, state):
        """Tokens and memory tokens x (B, T + M, C), state (A, z) or (A,) -> x, state"""
        x, _ = self.ask(x, state)                                                 # (B, T + M, C)
        with torch.autocast(x.device.type, enabled=False):
            return x, self.write(x[:, -self.n_mem:], *state)


class ARMT(Layered):
    """Blocks that remember, and the memory tokens (M, C) at the end of every segment; a question has none."""
    block, ablations = ARMTBlock, ("no_gamma", "no_delta", "gated_z")
    options = dict(n_mem=4, d_mem=16, nu=3, rule="published", gate="sigmoid", mem_layers=0)

    def __init__(self, config):
        super().__init__(config)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)    # (M, C)

    def forward(self, x, state):
        mem = self.mem.expand(len(x), -1, -1)                    # the same M vectors in every segment
        h, state = super().forward(torch.cat((x, mem), dim=1), state)             # (B, T + M, C)
        return h[:, :x.size(1)], state


# ------------------------------------------------------------------------------------------------------------
# fam: TransformerFAM, Feedback Attention Memory (Hwang et al. 2024, algorithm 2 and appendix B.1).
#
#   Each layer owns M rows that live in the same space as its tokens and go through the same weights. Tokens
#   see the rows of the segment before. The rows see themselves and the whole segment, and what attention and
#   MLP make of them are the rows of the next: the layer's own output is fed back to it.
#
#       tokens  a_t = Attention(q_t, [K_cache; K_F; K_{:t}]) + x_t       out = FF(a) + a
#       rows    a_F = Attention(Q_F, [K_F; K]) + F                       F  <- FF(a_F) + a_F
#       (pre-LN throughout; in the first segment a_F has no + F, since F has nothing to keep yet)
#
#   carried: F (B, M, C); 0 or 1 (B, 1, 1), was F ever written?; bswa's cache k, v; per layer
#   cost: (T + M) (W T + M + T); new parameters: M C for the prompt; with sum_fam, M C more in each layer
#   ablate  no_copy        rows have no residual around attention
#           sum_fam        rows query with a learned vector each, and have no residual around attention
#           stop_gradient  as in bswa: the cache is a constant; needs a window of at least one segment
#           norm_rows      rows are normalised before they are carried (not in the paper). Without it each
#                          segment adds to them, so they grow, and what a late segment adds counts ever less
#   The first F of the first layer is the learned prompt; that of a higher one is what the layers below make
#   of the prompt alone: had it seen the segment, tokens would see their future. Rows stand at the last M
#   positions before the segment, as queries and as keys (the paper leaves open where the queries stand).
#   differs: the paper adds rows to a window; here it is 0 unless asked for, so that rows alone remember. The
#   paper's random position offset is left out: rotary scores do not depend on it.
#   differs: a short last segment changes the rows, too. Random state passing is an option of train.py.

class FAMBlock(BSWABlock):
    """Rows go through it beside the tokens, with the same weights. Its state: FAM.init_state."""

    def __init__(self, config):
        super().__init__(config)
        if "sum_fam" in self.ablate:
            self.query = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)

    def forward(self, x, state):
        """Tokens x (B, T, C), state (F, written, k, v) -> x, state: one pass for rows and tokens"""
        fam, written, old_k, old_v = state               # (B, M, C) (B, 1, 1) (B, H, P, d) (B, H, P, d)
        M, T, P = fam.size(1), x.size(1), old_k.size(2)
        q, k, v = self.attn.project(self.ln_1(torch.cat((fam, x), dim=1)))        # (B, H, M + T, d)
        if "sum_fam" in self.ablate:
            q_fam, _, _ = self.attn.project(self.ln_1(self.query.expand_as(fam)))
            q = torch.cat((q_fam, q[:, :, M:]), dim=2)
        start = max(P, M)                # where the segment starts; cache and rows both end just before
        keys = torch.cat((rotary(old_k, start - P), rotary(k, start - M)), dim=2)      # P + M + T of them
        values = torch.cat((old_v, v), dim=2)
        mask = torch.ones(M + T, P + M + T, dtype=torch.bool, device=x.device).tril(P)     # for tokens
        mask[:M], mask[:M, :P] = True, False             # for rows: all of F and of the segment, no cache
        y = self.attn.attend(rotary(q, start - M), keys, values, mask)            # (B, M + T, C)
        copied = 0.0 if self.ablate & {"no_copy", "sum_fam"} else written
        a = torch.cat((copied * fam, x), dim=1) + y                               # (B, M + T, C)
        out = a + self.mlp(self.ln_2(a))
        cache = self.truncate(torch.cat((old_k, k[:, :, M:]), dim=2), torch.cat((old_v, v[:, :, M:]), dim=2))
        new = out[:, :M].clone()
        if "norm_rows" in self.ablate:
            new = EMBEDDING_STD * F.layer_norm(new, new.shape[-1:])
        return out[:, M:], (new, torch.ones_like(written), *cache)


class FAM(Layered):
    """Blocks that feed M rows back to themselves, and the prompt (M, C) that these rows start from."""
    block, options = FAMBlock, dict(n_mem=8, window=0)
    ablations = ("no_copy", "sum_fam", "stop_gradient", "norm_rows")

    def __init__(self, config):
        super().__init__(config)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)    # (M, C)

    def init_state(self, batch_size):
        state, prompt = [], self.mem[None]                                        # (1, M, C)
        everything = torch.ones(len(self.mem), len(self.mem), dtype=torch.bool, device=prompt.device)
        for block in self.blocks:
            fam = prompt.expand(batch_size, -1, -1)
            state.append((fam, fam.new_zeros(batch_size, 1, 1), *block.init_state(batch_size)))
            prompt, _ = Block.forward(block, prompt, mask=everything)    # one layer up: rows see each other
        return tuple(state)


# ------------------------------------------------------------------------------------------------------------
# lm2: Large Memory Models (Kang et al. 2025, section 2), in a form that reads segment by segment.
#
#   Each layer owns a bank of M slots. Tokens query the bank that the segment before has left; a gate decides
#   how much of the answer they take. Then the slots query the tokens, and as in an LSTM an input and a forget
#   gate, with a value for each feature, decide what is written and what is kept. Both also see the bank.
#
#       read    E = Attention(a W_Q, bank W_K, bank W_V)          a: this layer's self-attention
#               x <- x + a + g_out * E                            g_out = sigmoid(E W_out + b_out)
#       write   U = Attention(bank W_Q', a W_K', a W_V')
#               bank <- g_in * tanh(U) + g_forget * bank          g = sigmoid(U W_g + tanh(bank) W_g' + b_g)
#
#   carried: bank (B, M, C) per layer with a memory; at first M rows of an identity, so that slots differ
#   cost: T^2 + 2 T M
#   ablate  no_output_gate, no_input_gate, no_forget_gate: the gate is 1
#   differs: the paper writes E itself: slot t of its bank belongs to token t, and one bank goes through all
#   layers. Here slots query tokens (as in the first author's earlier code), in a bank of their layer.
#   differs: in the paper the layer's input is the query, the output gate multiplies the bank, and the input
#   gate looks at tokens. Here a is the query (as in the published code), and gates are as written above.
#   differs: gradient crosses segments, and tokens read what the segment before has written: the gates of the
#   published code show a token its future (a test builds a similar leak). So no mask is needed here.
#   Heads and biases of gates are as in the published code; its memory MLP and norms are left out.

class CrossAttention(nn.Module):
    """Each row of x looks at all rows of m, without positions and without an output projection."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.W_Q, self.W_K, self.W_V = (nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x, m):
        """x (B, R, C), m (B, S, C) -> (B, R, C)"""
        q, k, v = (split_heads(h, self.n_head) for h in (self.W_Q(x), self.W_K(m), self.W_V(m)))
        return merge_heads(F.scaled_dot_product_attention(q, k, v))


class Gate(nn.Module):
    """sigmoid(x W_x + tanh(bank) W_bank + b): from 0 to 1 for each feature, around sigmoid(b) at first."""

    def __init__(self, config, bias, with_bank):
        super().__init__()
        self.W_x = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.W_bank = nn.Linear(config.n_embd, config.n_embd, bias=False) if with_bank else None
        self.b = nn.Parameter(torch.tensor(float(bias)))         # one number, as in the authors' code

    def forward(self, x, bank=None):
        h = self.W_x(x) if bank is None else self.W_x(x) + self.W_bank(torch.tanh(bank))
        return torch.sigmoid(h + self.b)                                          # (B, R, C)


class LM2Block(Block):
    """A block whose tokens read a bank of slots after attention, and whose slots then read them."""

    def __init__(self, config):
        super().__init__(config)
        self.n_mem = config.n_mem
        self.read, self.write = CrossAttention(config), CrossAttention(config)
        self.gates = nn.ModuleDict({name: Gate(config, bias, with_bank=name != "output")
                                    for name, bias in dict(output=0.0, input=0.0, forget=1.0).items()
                                    if f"no_{name}_gate" not in self.ablate})

    def init_state(self, batch_size):
        weight = self.read.W_K.weight                                             # (C, C)
        bank = torch.eye(self.n_mem, len(weight), dtype=weight.dtype, device=weight.device)      # (M, C)
        return bank.expand(batch_size, -1, -1)

    def gate(self, name, *x):
        return self.gates[name](*x) if name in self.gates else 1.0

    def ask(self, x, bank):
        """Tokens x (B, T, C) read the bank (B, M, C) -> x (B, T, C), their self-attention a (B, T, C)"""
        a, _ = self.attn(self.ln_1(x))                                            # (B, T, C)
        E = self.read(a, bank)                                                    # (B, T, C)
        x = x + (a + self.gate("output", E) * E)
        return x + self.mlp(self.ln_2(x)), a

    def forward(self, x, bank):
        """Tokens x (B, T, C) and bank (B, M, C) -> x (B, T, C), the bank for the next segment"""
        x, a = self.ask(x, bank)
        U = self.write(bank, a)                                                   # (B, M, C)
        return x, self.gate("input", U, bank) * torch.tanh(U) + self.gate("forget", U, bank) * bank


class LM2(Layered):
    block, options = LM2Block, dict(n_mem=16, mem_layers=0)
    ablations = ("no_output_gate", "no_input_gate", "no_forget_gate")


# ------------------------------------------------------------------------------------------------------------
# The model: embedding, time loop, head

# Add yours: MEMORIES["mine"] = Mine. A Mine(config) is a module with init_state(batch_size) -> nested tuples
# of tensors, and forward(x, state) -> (h, state), which takes one segment through all layers and the final
# LayerNorm. The class has options and ablations, as Layered does. It may have `ask`, a faster forward for
# questions, which need no new state.
MEMORIES = dict(none=NoMemory, full=FullAttention, bswa=BSWA, rmt=RMT, armt=ARMT, fam=FAM, lm2=LM2)
CHOICES = dict(rule=("published", "delta"), gate=("sigmoid", "hardsigmoid"))
SIZES = [f.name for f in fields(GPTConfig) if f.type in (int, int | None)]
OPTIONAL = [f.name for f in fields(GPTConfig) if f.default is None]             # only some memories have them


def state_map(f, *states):
    """f of each tensor of a state (nested tuples of tensors), or of the same tensors of several states."""
    if torch.is_tensor(states[0]):
        return f(*states)
    return tuple(state_map(f, *parts) for parts in zip(*states))


def tensors(state):
    """The tensors of a state, as a list."""
    return [state] if torch.is_tensor(state) else [t for part in state for t in tensors(part)]


def state_floats(state):
    """How many numbers a state holds, in all rows of the batch together."""
    return sum(t.numel() for t in tensors(state))


def checked(config):
    """The config with its memory's defaults in place of None. ValueError names a field that does not fit."""
    if config.memory not in MEMORIES:
        raise ValueError(f"memory: there is no '{config.memory}'; choose one of {', '.join(MEMORIES)}")
    options, words = MEMORIES[config.memory].options, MEMORIES[config.memory].ablations
    for name in OPTIONAL:
        if getattr(config, name) is not None and name not in options:
            raise ValueError(f"{name}: memory '{config.memory}' has none; it has "
                             f"{', '.join(options) or 'no options'}")
    config = replace(config, **{k: v for k, v in options.items() if getattr(config, k) is None})
    for name, known in CHOICES.items():
        if getattr(config, name) not in (None, *known):
            raise ValueError(f"{name}: there is no '{getattr(config, name)}'; choose {' or '.join(known)}")
    for name, value in vars(config).items():
        least = 0 if name in ("window", "mem_layers") or (name, config.memory) == ("n_mem", "fam") else 1
        if name in SIZES and value is not None and not least <= value <= 65536:
            raise ValueError(f"{name}: {value} is not between {least} and 65,536")
    if (config.mem_layers or 0) > config.n_layer:
        raise ValueError(f"mem_layers: {config.mem_layers} is more than n_layer = {config.n_layer}")
    if config.memory == "lm2" and config.n_mem > config.n_embd:
        raise ValueError(f"n_mem: {config.n_mem} is above n_embd = {config.n_embd}: slots would start alike")
    if config.n_embd % (2 * config.n_head):
        raise ValueError(f"n_embd: {config.n_embd} does not split into {config.n_head} heads of even width")
    delta = config.rule == "delta"
    idle = dict(no_gamma=delta, gated_z=delta, stop_gradient=config.window == 0)     # would change nothing
    words = ["nothing", *(word for word in words if not idle.get(word))]
    for word in config.ablate.split("+"):
        if word not in words:
            raise ValueError(f"ablate: with these settings '{config.memory}' has no '{word}'; it has "
                             f"{', '.join(words)}")
    return config


class GPT(nn.Module):
    """A GPT with a memory, made from a GPTConfig; ValueError names a field that does not fit."""

    def __init__(self, config):
        super().__init__()
        self.config = config = checked(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.memory = MEMORIES[config.memory](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, module in self.named_modules():
            # differs: GPT-2 draws all weights with a deviation of 0.02 at width 768, too little here.
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            if name.endswith("c_proj"):                # as in GPT-2: 2 L branches add up
                module.weight.data /= (2 * config.n_layer) ** 0.5
            # differs: queries and keys of self-attention start small, so it starts flat. Drawn like the rest
            # they look at some tokens from the start, and a random choice is slow to unlearn.
            if name.endswith("c_attn"):
                module.weight.data[:2 * config.n_embd] *= 0.1

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def init_state(self, batch_size):
        """The empty memory for a batch of B: nested tuples of tensors, with gradient where it is learned."""
        return self.memory.init_state(batch_size)

    def forward(self, idx, targets=None, state=None, write=True):
        """
        Read idx (B, N), N >= 1, cut from the left into segments of T tokens, starting from `state` (None: the
        empty one). Returns logits, loss, state.

          targets None     logits (B, 1, V) of the last position; loss None
          targets (B, N)   the target of each position, -1 to ignore it: logits (B, n, V) of the n columns
                           with a target in some row; loss is the mean over all targets, 0 if none

        A short last segment reads and writes like any other; the next call begins a new one. With write=False
        the last segment is a question: it is not written (where there is an `ask`, this saves time), and no
        state is returned.
        """
        if idx.numel() == 0 or targets is not None and targets.shape != idx.shape:
            raise ValueError(f"idx {tuple(idx.shape)} needs at least one token, and targets of its own shape")
        state = self.init_state(len(idx)) if state is None else state
        if not torch.is_grad_enabled():
            state = state_map(torch.clone, state)                 # armt writes into it
        segments, hidden = idx.split(self.config.segment_len, dim=1), []
        for segment in segments:                                  # time: one segment after another
            question = not write and segment is segments[-1]
            step = getattr(self.memory, "ask", self.memory) if question else self.memory
            h, state = step(self.wte(segment), state)                             # (B, T, C)
            hidden += [h] if targets is not None else []
        state = state if write else None
        if targets is None:
            return self.lm_head(h[:, -1:]), None, state
        columns = (targets != -1).any(0).nonzero()[:, 0]                          # (n,)
        logits, targets = self.lm_head(torch.cat(hidden, dim=1)[:, columns]), targets[:, columns]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, loss / (targets != -1).sum().clamp(min=1), state

    @torch.no_grad()
    def read(self, idx, state=None, tail=None):
        """
        Read text that comes in pieces of any size, idx (B, n) each. Returns (state, tail): the last 1 to T
        tokens wait as `tail`, since what comes next is predicted from them; the state is the one before them.
        """
        text = idx if tail is None else torch.cat((tail, idx), dim=1)
        full = max(text.size(1) - 1, 0) // self.config.segment_len * self.config.segment_len
        if full:
            _, _, state = self(text[:, :full], state=state)
        return self.init_state(len(text)) if state is None else state, text[:, full:]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, state=None, temperature=1.0):
        """
        Continue a text: idx (B, n), n >= 1 -> (B, n + max_new_tokens). The prompt is streamed, so its length
        costs time but no space beyond the state. temperature 0 takes the likeliest token.
        """
        state, tail = self.read(idx, state)
        for _ in range(max_new_tokens):
            logits = self(tail, state=state)[0][:, -1]           # (B, V): the tail again, from `state`
            token = logits.argmax(-1, keepdim=True) if temperature == 0 else torch.multinomial(
                F.softmax(logits / temperature, dim=-1), 1)                       # (B, 1)
            idx = torch.cat((idx, token), dim=1)
            state, tail = self.read(token, state, tail)
        return idx
