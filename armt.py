"""
A small GPT that reads its text one segment at a time, and memories that reach across the gap.

    memory  carried from one segment to the next      who writes it              cost of a segment
    none    nothing                                   -                          T^2
    full    keys and values of the whole past         every token, every layer   T N
    bswa    keys and values of the last W segments    every token, every layer   T (W + 1) T
    rmt     M vectors, one set for the model          the last layer             (T + 2M)^2
    armt    a matrix A, a normaliser z, per layer     memory tokens, each layer  (T + M)^2 + (T + M) D C
    fam     M vectors per layer (and bswa's cache)    FAM rows, each layer       (T + M) (W T + M + T)
    lm2     a bank of M slots per layer, gated        slots, each layer          T^2 + 2 T M

Everything hangs on two loops and one value. Time is the loop in `GPT.forward`, one segment after
another. Depth is the loop in `Layered.forward`, one block after another. The memory is a value: it
goes into a call as `state` and comes out as a new `state`, and no module keeps anything for itself.
So "start afresh" is `state=None`, "two questions about one book" is one state used twice, and a
memory on disk is `torch.save(state)`.

Letters:  B batch, N tokens in a call, T tokens in a segment, M memory tokens, rows or slots (n_mem),
          C width (n_embd), L layers, H heads, d = C / H features of a head, W cached segments (window),
          D features of a key after phi, V words in the vocabulary

Sources:  RMT   Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881
          ARMT  Rodkin, Kuratov, Bulatov, Burtsev 2024, arXiv 2407.04841
          FAM   Hwang, Wang, Huo, Sim, Moreno Mengibar 2024, arXiv 2404.09173
          LM2   Kang et al. 2025, arXiv 2502.06049
          the backbone follows GPT-2, with the rotary positions of Su et al. 2021, arXiv 2104.09864

A line that starts with `differs:` marks a departure from a paper, with its reason.
`python armt.py` prints what each memory costs on this machine. To read the code, begin at the end,
with `GPT.forward`, and then pick a memory.
"""
import hashlib
import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The sizes of a model, its memory, and what to leave out. GPT refuses what does not fit."""
    vocab_size: int = 128        # V, how many different tokens there are
    segment_len: int = 64        # T, how many tokens the model sees at once
    n_layer: int = 2             # L, blocks
    n_head: int = 4              # H, attention heads in a block
    n_embd: int = 64             # C, width of the residual stream
    dropout: float = 0.0         # share of activations dropped in training
    memory: str = "armt"         # what crosses a segment boundary: a name in MEMORIES
    n_mem: int | None = None     # M, memory tokens, FAM rows or slots; left out, the memory's default
    d_mem: int | None = None     # armt: width of queries and keys before phi; left out, its default
    nu: int = 3                  # armt: order of the feature map DPFP-nu
    beta: str = "sigmoid"        # armt: gate of a write: sigmoid, or hardsigmoid, which can shut
    window: int | None = None    # bswa, fam: W, segments in the cache; left out, the memory's default
    mem_layers: int | None = None  # lm2: how many layers, from the first, have a bank; left out, all
    forget_bias: float = 1.0     # lm2: what the forget gate starts from; sigmoid(1) = 0.73 is kept
    ablate: str = "nothing"      # what to leave out, words joined by +, as in no_gamma+no_delta


SIZES = ("vocab_size", "segment_len", "n_layer", "n_head", "n_embd", "n_mem", "d_mem", "nu", "window",
         "mem_layers")
EMBEDDING_STD = 0.5              # embeddings and memory tokens start on the scale of what blocks add


def ablation_words(config, known):
    """The set of words in `config.ablate`. ValueError for a word that is not in the list `known`."""
    words = set(config.ablate.split("+")) - {"nothing"}
    for word in sorted(words - set(known)):
        raise ValueError(f"ablate: memory '{config.memory}' has no '{word}'; "
                         f"it knows {', '.join(['nothing', *known])}")
    return words


# --------------------------------------------------------------------------------------------------
# The backbone: a pre-LN GPT block with rotary positions
# --------------------------------------------------------------------------------------------------

@lru_cache(maxsize=32)
def rotary_angles(n, d, device, dtype):
    """cos and sin, (n, d/2) each, of p / 10000^(2i/d) for position p and feature pair i."""
    with torch.inference_mode(False):    # a table made for inference could not serve training later
        frequency = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
        angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency            # (n, d/2)
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotary(x, start=0):
    """
    Turn each pair of features by an angle that grows with the position (Su et al. 2021, eq. 34).
    The product of a turned query and a turned key depends on their distance alone, so no learned
    table ties a model to a length. x (B, H, T, d); its first row stands at position `start`.
    """
    angles = rotary_angles(start + x.size(2), x.size(3), x.device, x.dtype)
    cos, sin = (table[start:] for table in angles)                                   # (T, d/2)
    a, b = x.chunk(2, dim=-1)                                                        # (B, H, T, d/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)                 # (B, H, T, d)


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
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def project(self, x):
        """x (B, T, C) -> q, k, v, (B, H, T, d) each, not yet rotated"""
        return [split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1)]

    def attend(self, q, k, v, **mask):
        """q (B, H, T, d), k and v (B, H, S, d), mask as scaled_dot_product_attention -> y (B, T, C)"""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **mask)       # (B, H, T, d)
        return self.c_proj(merge_heads(y))

    def forward(self, x, past=None):
        """
        x (B, T, C) and past, None or (k, v) of (B, H, P, d) each -> y (B, T, C), (k, v) grown to P + T.
        Keys are cached before rotation: a cache holds no clock, its owner may count from anywhere.
        """
        q, k, v = self.project(x)                                                    # (B, H, T, d)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)    # (B, H, P + T, d)
        T, S = q.size(2), k.size(2)
        mask = dict(is_causal=True)
        if S > T:
            mask = dict(attn_mask=torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T))
        return self.attend(rotary(q, start=S - T), rotary(k), v, **mask), (k, v)


class MLP(nn.Module):
    """Each token by itself: widen four times, bend, narrow."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))                                     # (B, T, C)


class Block(nn.Module):
    """A pre-LN transformer block. Memories build on it and give it a state."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        """x (B, T, C), past as in CausalSelfAttention -> x (B, T, C), past"""
        y, past = self.attn(self.ln_1(x), past)
        x = x + self.drop(y)
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x, past


class Layered(nn.Module):
    """
    The depth loop, for memories whose state never leaves its layer: a memory is then little more
    than a block with `init_state(batch_size) -> s` and `forward(x, s) -> (x, s)`. A layer needs
    nothing else to run, so layer l of segment s and layer l + 1 of segment s - 1 could run at once.
    """

    def __init__(self, config, block):
        super().__init__()
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layer))
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


# --------------------------------------------------------------------------------------------------
# none: the lower control. Nothing crosses a segment boundary; beyond one segment it can only guess.
#
#   carried: nothing      cost: T^2      defaults: -      ablate: -
# --------------------------------------------------------------------------------------------------

class NoneBlock(Block):
    def init_state(self, batch_size):
        return ()

    def forward(self, x, state):
        x, _ = super().forward(x)
        return x, state


class NoMemory(Layered):
    def __init__(self, config):
        ablation_words(config, known=[])
        super().__init__(config, NoneBlock)


# --------------------------------------------------------------------------------------------------
# full: the upper control, one causal attention over the whole past. It forgets nothing and pays for
# it: the state grows by 2 C floats a token in each layer, a segment costs all that was read before.
#
#   carried: k, v (B, H, P, d) of the P past tokens, per layer; P is 0 at first
#   cost: T N      defaults: -      ablate: -
#   Positions count from the first token; only distances matter, so this equals one long segment.
# --------------------------------------------------------------------------------------------------

class FullBlock(Block):                              # its forward(x, past) is just what is needed here
    def init_state(self, batch_size):
        weight, H = self.attn.c_attn.weight, self.attn.n_head
        empty = weight.new_zeros(batch_size, H, 0, weight.size(1) // H)              # (B, H, 0, d)
        return empty, empty


class FullAttention(Layered):
    def __init__(self, config):
        ablation_words(config, known=[])
        super().__init__(config, FullBlock)


# --------------------------------------------------------------------------------------------------
# bswa: block sliding window attention (Hwang et al. 2024, algorithm 1), FAM's baseline.
#
#   A token sees its segment up to itself, and all of the W segments before. One layer reaches back W
#   segments, so L layers reach L W; what lies further back is gone.
#
#   carried: k, v (B, H, P, d) of the last P <= W T tokens, per layer; P is 0 at first
#   cost: T (W + 1) T      defaults: window 1
#   ablate: stop_gradient  the cache is a constant, as in Transformer-XL, so that a segment cannot
#                          learn to be useful to the next (Transformer-XL also hides all but the last
#                          W T tokens from each token, no meaningful difference in the paper's table 8)
# --------------------------------------------------------------------------------------------------

class BSWABlock(FullBlock):
    """Full attention that forgets: only W T tokens stay in its cache."""
    known = ["stop_gradient"]

    def __init__(self, config):
        super().__init__(config)
        self.words = ablation_words(config, self.known)
        self.room = config.window * config.segment_len           # W T, the most that a cache may hold

    def cut(self, *cache):
        """k and v (B, H, P, d) -> their last W T tokens, in memory of their own"""
        cache = tuple(x[:, :, max(0, x.size(2) - self.room):].clone() for x in cache)
        return state_map(torch.Tensor.detach, cache) if "stop_gradient" in self.words else cache

    def forward(self, x, past):
        """x (B, T, C) and past (k, v) of (B, H, P, d) each -> x (B, T, C), past cut to W T"""
        x, cache = super().forward(x, past)
        return x, self.cut(*cache)


class BSWA(Layered):
    """Blocks with a cache of the last W segments."""
    defaults = dict(window=1)

    def __init__(self, config):
        super().__init__(config, BSWABlock)


# --------------------------------------------------------------------------------------------------
# rmt: the Recurrent Memory Transformer (Bulatov et al. 2022, section 3, decoder form).
#
#   A segment is read between two copies of the memory. Its tokens see the copy in front; the copy
#   behind sees the tokens, and what it has become at the top is the memory of the next segment.
#
#       [read; h; write] = Transformer([mem_s; x_s; mem_s])        mem_{s+1} = write
#
#   carried: mem (B, M, C), one set for all layers; the first is learned
#   cost: (T + 2M)^2      defaults: n_mem 16      ablate: -
#   The state leaves at the top of a segment and enters the next at the bottom. So, unlike with the
#   memories that stay in their layer, segment s + 1 cannot start before segment s is all done.
#   The write tokens are taken after the final LayerNorm, as in the authors' code.
# --------------------------------------------------------------------------------------------------

class RMT(Layered):
    """Blocks without a state of their own, around a memory that goes from top to bottom."""
    defaults = dict(n_mem=16)

    def __init__(self, config):
        ablation_words(config, known=[])
        super().__init__(config, Block)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)   # (M, C)

    def init_state(self, batch_size):
        return self.mem.expand(batch_size, -1, -1)                                   # (B, M, C)

    def forward(self, x, mem):
        M = mem.size(1)
        x = torch.cat((mem, x, mem), dim=1)                                          # (B, M + T + M, C)
        for block in self.blocks:
            x, _ = block(x)
        h = self.ln_f(x)
        return h[:, M:-M], h[:, -M:].clone()                                     # (B, T, C), (B, M, C)


# --------------------------------------------------------------------------------------------------
# armt: the Associative Recurrent Memory Transformer (Rodkin et al. 2024, section 2, eqs. 1-4).
#
#   Each layer owns a matrix A that answers "what belongs to this key?". All tokens ask it before the
#   layer; M memory tokens behind the segment write to it after the layer. To write is to correct:
#   only what A does not yet answer is added (the delta rule), so a key keeps its last value.
#
#       read    q = phi(x W_Q)      y = q A / (q . z)      x <- x + y
#       write   k = phi(u W_K)      v = u W_V      beta = sigmoid(u w_beta)
#               vbar = k A / (k . z)                   what A answers for k so far
#               gamma = 1 - (k . z) / |k|^2            how much of k is new to z
#               A <- A + sum_i beta_i k_i (v_i - vbar_i)^T
#               z <- z + sum_i gamma_i k_i
#       phi     DPFP-3: r = [relu(x), relu(-x)],
#               phi(x) = [r * roll(r, 1), r * roll(r, 2), r * roll(r, 3)]
#
#   carried: A (B, D, C) and z (B, D) per layer, zero at first; D = 2 nu d_mem
#   cost: (T + M)^2 + (T + M) D C      defaults: n_mem 4, d_mem 16
#   ablate: no_gamma  z adds up every key          no_delta  A adds up every value
#           elu       phi(x) = elu(x) + 1          unit      |phi(x)| = 1
#           no_denom  no z at all: y = q A, vbar = k A; with unit this is the plain delta rule (alone it
#                     diverges: a key of length r is corrected by r^2 times what is wrong)
#   beta    hardsigmoid is relu6(x + 3) / 6.  differs: a sigmoid is never 0, and what a million segments
#           of no importance add to A, little by little, buries what comes after them.
#   The memory tokens stand last and attention is causal: no text sees them, A is the only way through.
# --------------------------------------------------------------------------------------------------

class ARMTBlock(Block):
    """A block with an associative matrix: it reads in front of attention and writes behind the MLP."""
    eps = 1e-5

    def __init__(self, config):
        super().__init__(config)
        known = ["no_gamma", "no_delta", "elu", "unit", "no_denom"]
        self.words = ablation_words(config, known)
        self.n_mem, self.nu = config.n_mem, config.nu
        C, d_mem = config.n_embd, config.d_mem
        self.D = d_mem if "elu" in self.words else 2 * config.nu * d_mem
        self.W_Q = nn.Linear(C, d_mem, bias=False)
        self.W_K = nn.Linear(C, d_mem, bias=False)
        # differs: the authors start W_V at 0, which leaves the trained GPT that they wrap unchanged.
        # From scratch that would only delay the moment at which the memory has something to say.
        self.W_V = nn.Linear(C, C, bias=False)
        self.w_beta = nn.Linear(C, 1)
        gates = dict(sigmoid=torch.sigmoid, hardsigmoid=F.hardsigmoid)
        if config.beta not in gates:
            raise ValueError(f"beta: there is no '{config.beta}'; choose {' or '.join(gates)}")
        self.gate = gates[config.beta]

    def init_state(self, batch_size):
        W = self.W_V.weight
        dtype = torch.promote_types(W.dtype, torch.float32)      # sums of many: never below float32
        return (W.new_zeros(batch_size, self.D, len(W), dtype=dtype),                # A (B, D, C)
                W.new_zeros(batch_size, self.D, dtype=dtype))                        # z (B, D)

    def phi(self, x):
        """Features >= 0 of which few overlap: (B, M, d_mem) -> (B, M, D), at least float32"""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if "elu" in self.words:
            f = F.elu(x) + 1
        else:
            r = F.relu(torch.cat((x, -x), dim=-1))                                   # (B, M, 2 d_mem)
            f = torch.cat([r * r.roll(j, dims=-1) for j in range(1, self.nu + 1)], dim=-1)
        return F.normalize(f, dim=-1, eps=self.eps) if "unit" in self.words else f

    def recall(self, f, A, z):
        """What A answers for features f (B, M, D): (B, M, C), and the overlap f . z: (B, M, 1)"""
        overlap = f @ z.unsqueeze(-1) + self.eps
        return (f @ A if "no_denom" in self.words else f @ A / overlap), overlap

    def write(self, u, A, z):
        """Memory tokens u (B, M, C), all of which see the same A and z -> new A, z"""
        k, beta = self.phi(self.W_K(u)), self.gate(self.w_beta(u))           # (B, M, D) (B, M, 1)
        v = self.W_V(u).to(k.dtype)                                          # (B, M, C)
        # differs: the paper sets vbar = 0 and gamma = 1 in the first segment. A = z = 0 says nearly
        # the same by itself: vbar is exactly 0, gamma is 1 - 1e-5 / (|k|^2 + 1e-5).
        vbar, overlap = self.recall(k, A, z)                                 # (B, M, C) (B, M, 1)
        if "no_delta" in self.words:
            vbar = 0.0
        # differs: the paper's gamma has no clip. When two tokens of a segment share a key, both add
        # it to z, and without the clip the next segment overcorrects: 4, -8, 28, ... The authors'
        # code clips gamma and stops its gradient; so does this line.
        gamma = (1 - overlap / (k.square().sum(-1, keepdim=True) + self.eps)).clamp(0, 1).detach()
        if "no_gamma" in self.words:
            gamma = torch.ones_like(gamma)
        A = torch.baddbmm(A, k.mT, beta * (v - vbar))                                # (B, D, C)
        return A, z if "no_denom" in self.words else z + (gamma * k).sum(1)

    def forward(self, x, state):
        A, z = state
        y, _ = self.recall(self.phi(self.W_Q(x)), A, z)
        x = x + y.to(x.dtype)            # memory tokens read too; no LayerNorm first, as published
        x, _ = super().forward(x)                                                    # (B, T + M, C)
        return x, self.write(x[:, -self.n_mem:], A, z)


class ARMT(Layered):
    """Blocks that remember, and the memory tokens (M, C) that every segment ends with."""
    defaults = dict(n_mem=4, d_mem=16)

    def __init__(self, config):
        super().__init__(config, ARMTBlock)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)   # (M, C)

    def forward(self, x, state):
        B, T, _ = x.shape
        x = torch.cat((x, self.mem.expand(B, -1, -1)), dim=1)    # the same M vectors in every segment
        h, state = super().forward(x, state)                                         # (B, T + M, C)
        return h[:, :T], state


# --------------------------------------------------------------------------------------------------
# fam: TransformerFAM, Feedback Attention Memory (Hwang et al. 2024, algorithm 2 and appendix B.1).
#
#   Each layer owns M rows that live in the same space as its tokens and go through the same weights.
#   Tokens see the rows of the segment before. The rows see themselves and the whole segment, and what
#   attention and MLP make of them are the rows of the next: the layer's own output is fed back to it.
#
#       tokens  a_t = Attention(q_t, [K_cache; K_F; K_{:t}]) + x_t       out = FF(a) + a
#       rows    a_F = Attention(Q_F, [K_F; K]) + F                       F  <- FF(a_F) + a_F
#       (pre-LN throughout; in the first segment a_F has no + F, since F has nothing to keep yet)
#
#   carried: F (B, M, C); 0 or 1 (B, 1, 1), was F ever written?; bswa's cache k, v; per layer
#   cost: (T + M) (W T + M + T)      defaults: n_mem 8, window 0 (the paper: 64 rows for segments of
#   1024, window 3, but 0 for its pass key). The only new parameters are the prompt's M C.
#   ablate: no_ff          rows skip the MLP           no_copy      rows have no residual
#           keep_first     + F in the first segment, too
#           sum_fam        rows ask with a learned query, one per layer, and have no residual
#           stop_gradient  as in bswa: of the cache, so it does nothing where window is 0
#   F_0 of a layer is the learned prompt after the layers below it, run alone. The paper could also mean
#   what the layer below has made of the first segment; that would show tokens their own future.
#   Rows stand on the last M places before the segment, as queries and as keys (the paper leaves open
#   where the queries stand).
#   differs: a segment that is short, because the call ended, updates F, too, so that no text is lost;
#   the paper does not say. Its random position offset is left out: rotary scores do not depend on it.
#   differs: trained from scratch, and starting from another text's F (the paper does so in 80% of the
#   steps, after pretraining) is `--pass_state` of train.py, off unless asked for.
# --------------------------------------------------------------------------------------------------

class FAMBlock(BSWABlock):
    """A block that its rows go through, too, beside the tokens, and with the same weights."""
    known = ["no_ff", "no_copy", "keep_first", "sum_fam", "stop_gradient"]

    def __init__(self, config):
        super().__init__(config)
        if "sum_fam" in self.words:
            self.query = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)

    def climb(self, prompt):
        """The prompt one layer up: its rows (1, M, C) see each other and nothing else."""
        q, k, v = self.attn.project(self.ln_1(prompt))
        prompt = prompt + self.attn.attend(rotary(q), rotary(k), v)
        return prompt + self.mlp(self.ln_2(prompt))

    def forward(self, x, state):
        """Tokens x (B, T, C), state (F, written, k, v) -> x, state: one pass for rows and tokens"""
        fam, written, old_k, old_v = state               # (B, M, C) (B, 1, 1) (B, H, P, d) (B, H, P, d)
        M, T, P = fam.size(1), x.size(1), old_k.size(2)
        q, k, v = self.attn.project(self.ln_1(torch.cat((fam, x), dim=1)))           # (B, H, M + T, d)
        if "sum_fam" in self.words:
            q_fam, _, _ = self.attn.project(self.ln_1(self.query.expand_as(fam)))
            q = torch.cat((q_fam, q[:, :, M:]), dim=2)
        start = max(P, M)                # where the segment starts; cache and rows both end just before
        keys = torch.cat((rotary(old_k, start - P), rotary(k, start - M)), dim=2)    # P + M + T of them
        values = torch.cat((old_v, v), dim=2)
        mask = torch.ones(M + T, P + M + T, dtype=torch.bool, device=x.device).tril(P)     # for tokens
        mask[:M], mask[:M, :P] = True, False         # for rows: all of F and of the segment, no cache
        y = self.attn.attend(rotary(q, start - M), keys, values, attn_mask=mask)     # (B, M + T, C)
        if "no_copy" in self.words or "sum_fam" in self.words:
            written = torch.zeros_like(written)
        elif "keep_first" in self.words:
            written = torch.ones_like(written)
        a = torch.cat((written * fam, x), dim=1) + self.drop(y)
        out = a + self.drop(self.mlp(self.ln_2(a)))
        fam = (a if "no_ff" in self.words else out)[:, :M].clone()
        cache = self.cut(torch.cat((old_k, k[:, :, M:]), dim=2), torch.cat((old_v, v[:, :, M:]), dim=2))
        return out[:, M:], (fam, torch.ones_like(written), *cache)


class FAM(Layered):
    """Blocks that feed M rows back to themselves, and the prompt (M, C) that these rows start from."""
    defaults = dict(n_mem=8, window=0)

    def __init__(self, config):
        super().__init__(config, FAMBlock)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)   # (M, C)

    def init_state(self, batch_size):
        state, prompt = [], self.mem[None]                                           # (1, M, C)
        for block in self.blocks:
            fam = prompt.expand(batch_size, -1, -1)
            state.append((fam, fam.new_zeros(batch_size, 1, 1), *block.init_state(batch_size)))
            prompt = block.climb(prompt)
        return tuple(state)


# --------------------------------------------------------------------------------------------------
# lm2: Large Memory Models (Kang et al. 2025, section 2), in the form that reads segment by segment.
#
#   Each layer owns a bank of M slots. Tokens ask the bank that the segment before has left; a gate
#   decides how much of the answer they take. Then the slots ask the tokens, and as in an LSTM an input
#   and a forget gate, one for each number, decide what is written and what is kept.
#
#       read    E = Attention(a W_Q, bank W_K, bank W_V)          a: this layer's self-attention
#               x <- x + a + g_out * E                            g_out = sigmoid(E W_out + b_out)
#       write   U = Attention(bank W_Q', a W_K', a W_V')
#               bank <- g_in * tanh(U) + g_forget * bank          g_in, g_forget = sigmoid(U W + b)
#
#   carried: bank (B, M, C), at first M rows of an identity, in each of the first mem_layers layers
#   cost: T^2 + 2 T M      defaults: n_mem 16, forget_bias 1
#   ablate: no_output_gate, no_input_gate, no_forget_gate (the gate is 1)
#
#   What "LM2" is depends on where one looks.
#   * The paper's equations add up only when there are as many slots as tokens (its (3) and (6) multiply
#     T x C by M x C): slot i then belongs to position i, and a word can be recalled only at its own
#     position or later. The output gate multiplies the bank, the input gate looks at the tokens, and
#     what is written is a mixture of the bank itself. That literal form is not built here.
#   * The published code demands T = M = C, has no output gate, and computes both other gates from the
#     bank and a mean over all tokens of the segment: token 1 sees token T. On random tokens, of which
#     there are 8 and none can be predicted, it scores 1.65 where ln 8 = 2.08 is the floor (measured at
#     T = M = C = 32). Its memory is detached in every call and never emptied.
#   differs: here slots query tokens (as in the first author's earlier code), all gates but the output's
#   look at U, each layer has its own bank, only the previous bank is read, all of it by every token,
#   and gradient crosses segments. Heads (the paper has one) and gate biases are as in the code, which
#   also has a dropout of 0.9, LayerNorms and an MLP in the memory; they are left out.
#   differs: b_out starts at -2, which is our choice: the memory begins quiet, at 0.12 of E.
# --------------------------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """Rows of x ask rows of m, all of them, without positions and without an output projection."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.W_Q, self.W_K, self.W_V = (nn.Linear(C, C, bias=False) for _ in range(3))

    def forward(self, x, m):
        """x (B, R, C), m (B, S, C) -> (B, R, C)"""
        q, k, v = (split_heads(h, self.n_head) for h in (self.W_Q(x), self.W_K(m), self.W_V(m)))
        return merge_heads(F.scaled_dot_product_attention(q, k, v))


class Gate(nn.Module):
    """sigmoid(x W + b): a number between 0 and 1 for each feature, all near sigmoid(b) at first."""

    def __init__(self, config, bias):
        super().__init__()
        self.W = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.b = nn.Parameter(torch.tensor(float(bias)))         # one number, as in the authors' code

    def forward(self, x):
        return torch.sigmoid(self.W(x) + self.b)                                     # (B, R, C)


class LM2Block(Block):
    """A block whose tokens read a bank of slots after attention, and whose slots then read them."""
    def __init__(self, config):
        super().__init__(config)
        self.words = ablation_words(config, ["no_output_gate", "no_input_gate", "no_forget_gate"])
        self.n_mem = config.n_mem
        self.read, self.write = CrossAttention(config), CrossAttention(config)
        gates = dict(output=-2.0, input=0.0, forget=config.forget_bias)
        self.gates = nn.ModuleDict({name: Gate(config, bias) for name, bias in gates.items()
                                    if f"no_{name}_gate" not in self.words})

    def init_state(self, batch_size):
        W = self.read.W_K.weight
        bank = torch.eye(self.n_mem, len(W), dtype=W.dtype, device=W.device)         # (M, C)
        return bank.expand(batch_size, -1, -1)

    def gate(self, name, x):
        return self.gates[name](x) if name in self.gates else 1.0

    def forward(self, x, bank):
        """Tokens x (B, T, C) and bank (B, M, C) -> x (B, T, C), the bank for the next segment"""
        a, _ = self.attn(self.ln_1(x))                                               # (B, T, C)
        E = self.read(a, bank)                                                       # (B, T, C)
        U = self.write(bank, a)                                                      # (B, M, C)
        bank = self.gate("input", U) * torch.tanh(U) + self.gate("forget", U) * bank     # (B, M, C)
        x = x + self.drop(a + self.gate("output", E) * E)
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x, bank


class LM2(Layered):
    """Blocks with a bank of slots, in the first mem_layers layers."""
    defaults = dict(n_mem=16)

    def __init__(self, config):
        if config.n_mem > config.n_embd:
            raise ValueError(f"n_mem: {config.n_mem} slots are too many for n_embd = {config.n_embd}: "
                             f"slots that start alike, as zeros below an identity, stay alike")
        super().__init__(config, LM2Block)
        for layer in range(config.mem_layers or config.n_layer, config.n_layer):
            self.blocks[layer] = NoneBlock(config)


# --------------------------------------------------------------------------------------------------
# The model: embedding, time loop, head
# --------------------------------------------------------------------------------------------------

# Add yours: MEMORIES["mine"] = Mine, a module Mine(config) with init_state(batch_size) and
# forward(x, state) -> (h, state): one segment through all layers, final LayerNorm included.
MEMORIES = {"none": NoMemory, "full": FullAttention, "bswa": BSWA, "rmt": RMT, "armt": ARMT, "fam": FAM,
            "lm2": LM2}


def state_map(f, *states):
    """Apply f to each tensor of a state (nested tuples of tensors), or of several states alike."""
    if torch.is_tensor(states[0]):
        return f(*states)
    return tuple(state_map(f, *parts) for parts in zip(*states))


def tensors(state):
    """The tensors of a state, one after another."""
    if torch.is_tensor(state):
        yield state
    else:
        for part in state:
            yield from tensors(part)


def state_floats(state):
    """How many numbers a state holds, all rows together."""
    return sum(t.numel() for t in tensors(state))


def check_state(state, empty, room=math.inf):
    """
    ValueError unless `state` can have grown from `empty`: the same nesting, and the same sizes, but
    that what is 0 in `empty` may be anything up to `room`.
    """
    kind = torch.Tensor if torch.is_tensor(empty) else tuple
    if not isinstance(state, kind):
        raise ValueError("state: its nesting is not that of this model; was it made by another memory?")
    if torch.is_tensor(state):
        fits = state.dim() == empty.dim() and all(
            s == e or (e == 0 and s <= room) for s, e in zip(state.shape, empty.shape))
        if not fits:
            most = f" (0: it grows up to {room})" if 0 in empty.shape else ""
            raise ValueError(f"state: {tuple(state.shape)} where this model and batch need "
                             f"{tuple(empty.shape)}{most}; was it made by another model or batch size?")
    elif len(state) != len(empty):
        raise ValueError(f"state: {len(state)} parts where this model has {len(empty)}; "
                         f"was it made by another model?")
    else:
        for s, e in zip(state, empty):
            check_state(s, e, room)


def known_to(state, silent):
    """The segments that left `state` as it was: a set to add to, in the dict `silent` if one is given."""
    if silent is None:
        return set()
    key = hashlib.sha1(b"".join(t.cpu().numpy().tobytes() for t in tensors(state))).digest()
    known = silent[key] = silent.pop(key, set())                 # now the last one to be forgotten
    if len(silent) > 64:
        del silent[next(iter(silent))]
    return known


class GPT(nn.Module):
    """
    A GPT with a memory, made from a GPTConfig. What the config leaves open (n_mem, d_mem) takes the
    memory's defaults; `model.config` holds the result. ValueError names the field that does not fit.
    """

    def __init__(self, config):
        super().__init__()
        if config.memory not in MEMORIES:
            raise ValueError(f"memory: there is no '{config.memory}'; choose one of "
                             f"{', '.join(MEMORIES)}")
        for name, value in vars(config).items():
            least = 0 if name == "window" or (name == "n_mem" and config.memory == "fam") else 1
            if name in SIZES and value is not None and value < least:
                raise ValueError(f"{name}: {value} is too small, it starts at {least}")
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd: {config.n_embd} does not split into n_head = {config.n_head} "
                             f"heads of even size")
        Memory = MEMORIES[config.memory]
        defaults = getattr(Memory, "defaults", {})
        left_open = {name: value for name, value in defaults.items() if getattr(config, name) is None}
        self.config = config = replace(config, **left_open)
        # how many tokens a cache may hold
        self.room = config.window * config.segment_len if "window" in defaults else math.inf
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.memory = Memory(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):         # as in GPT-2: 2 L branches add up in the end
                p.data /= (2 * config.n_layer) ** 0.5
            # differs: queries and keys start small, so attention starts flat. Drawn like the rest they
            # look at some of the tokens from the start, and a random choice is slow to unlearn: `full`
            # needed 790, 1,320 and over 2,600 steps for its first two pairs, and needs 460 to 570 so.
            if name.endswith("c_attn.weight"):
                p.data[:2 * config.n_embd] *= 0.1

    def _init_weights(self, module):
        # differs: GPT-2 draws with 0.02, about 1/sqrt(C) at its width of 768 and far too little here.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def init_state(self, batch_size):
        """The empty memory for B rows: nested tuples of tensors, with gradient where it is learned."""
        return self.memory.init_state(batch_size)

    def forward(self, idx, targets=None, state=None):
        """
        Read idx (B, N), N >= 1, cut from the left into segments of T tokens, starting from `state`
        (None: the empty one). Returns logits, loss, state.

          targets None     logits (B, 1, V) of the last position; loss None
          targets (B, N)   what each position should say, -1 where anything goes: logits (B, n, V) of
                           the n columns with a target in some row; loss is their mean, 0 if n is 0

        A last segment that is short reads and writes like any other; the next call begins a new one.
        ValueError for an empty idx, targets of another shape, a state of another model or batch size.
        """
        (B, N), T = idx.shape, self.config.segment_len
        if N == 0:
            raise ValueError("idx: there is nothing to read, it needs at least one token")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets: {tuple(targets.shape)} is not the shape of idx, {(B, N)}")
        if state is None:
            state = self.init_state(B)
        else:
            with torch.no_grad():
                check_state(state, self.init_state(B), self.room)
        columns = [N - 1] if targets is None else (targets != -1).any(0).nonzero()[:, 0].tolist()
        hidden = []
        for start in range(0, N, T):                                # time: one segment after another
            x = self.drop(self.wte(idx[:, start:start + T]))                         # (B, T, C)
            h, state = self.memory(x, state)
            here = [c - start for c in columns if start <= c < start + T]
            hidden.append(h if len(here) == h.size(1) else h[:, here])
        logits = self.lm_head(torch.cat(hidden, dim=1))                              # (B, n, V)
        if targets is None:
            return logits, None, state
        targets = targets[:, columns]                                                # (B, n)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction="sum") / (targets != -1).sum().clamp(min=1)
        return logits, loss, state

    @torch.no_grad()
    def read(self, idx, state=None, tail=None, silent=None):
        """
        Read text that comes in pieces of any size, idx (B, n) each. Returns (state, tail): the state
        after all full segments, and the last 1 to T tokens, which wait in case their segment goes on.
        A single row is read ahead, with `silent`.
        """
        text = idx if tail is None else torch.cat((tail, idx), dim=1)
        T = self.config.segment_len
        full = max(text.size(1) - 1, 0) // T * T
        state = self.init_state(len(text)) if state is None else state
        if full and len(text) == 1:
            state = self.read_ahead(text[:, :full], state, silent=silent)
        elif full:
            _, _, state = self(text[:, :full], state=state)
        return state, text[:, full:]

    @torch.no_grad()
    def read_ahead(self, text, state, most=64, silent=None):
        """
        The state after whole segments, text (1, S T). Those that leave it as it is, to the last bit, can
        be read side by side, each from this same state, and need not be read again by it. So some are
        read, twice as many each time, until one has written; then reading goes on behind it. A memory
        that always writes is read one by one. The dict `silent`, given again with the next text, keeps
        which segments said nothing to which of the last 64 states.
        """
        segments = text.view(-1, self.config.segment_len)                            # (S, T)
        names = [segment.tobytes() for segment in segments.cpu().numpy()]
        at, ahead, known = 0, 1, known_to(state, silent)
        while at < len(names):
            new = {}                                             # segment -> where it first stands
            while at < len(names) and len(new) < ahead:
                if names[at] not in known:
                    new.setdefault(names[at], at)
                at += 1
            if not new:
                break
            before = state_map(lambda s: s.expand(len(new), *s.shape[1:]), state)
            _, _, after = self(segments[[*new.values()]], state=before)
            wrote = torch.zeros(len(new), dtype=torch.bool, device=text.device)          # (R,)
            for old, now in zip(tensors(before), tensors(after)):
                grown = old.shape != now.shape                                           # as caches do
                wrote |= True if grown else (old != now).flatten(1).any(1)
            known.update(name for name, loud in zip(new, wrote.tolist()) if not loud)
            quiet = int((wrote.cumsum(0) == 0).sum())            # rows in front of the first that wrote
            ahead = min(2 * ahead, most) if quiet == len(new) else 1
            if quiet < len(new):
                at = [*new.values()][quiet] + 1
                if len(new) > 1:                  # beside others its last bits may differ: read it alone
                    _, _, after = self(segments[at - 1:at], state=state)
                state, known = after, known_to(after, silent)
        return state

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, state=None, temperature=1.0, top_k=None):
        """
        Go on writing: idx (B, n), n >= 1 -> (B, n + max_new_tokens). The prompt is streamed, so its
        length costs time but no memory. temperature 0 takes the likeliest token, top_k draws among
        the k likeliest. ValueError for a top_k below 1.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: {top_k} is too small, it starts at 1")
        state, tail = self.read(idx, state)
        for _ in range(max_new_tokens):
            logits, _, _ = self(tail, state=state)     # the tail, again: its segment is not complete
            logits = logits[:, -1]                                                   # (B, V)
            if top_k is not None:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -torch.inf)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)                              # (B, 1)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, token), dim=1)
            state, tail = self.read(token, state, tail)
        return idx


def main():
    """Print what each memory costs on this machine: `python armt.py`."""
    from tqdm import tqdm                              # the model itself needs nothing but torch

    gpu = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()]
    device = (gpu + ["cpu"])[0]
    B, N, rows = 16, 512, []

    def tokens_per_second(work, seconds=1.5):
        """How many tokens a second `work` reads, which reads B N of them."""
        work()                                         # the first time is slower
        times, began = 0, time.time()
        while time.time() - began < seconds:
            work()
            times += 1
            if device != "cpu":
                getattr(torch, device).synchronize()
        return times * B * N / (time.time() - began)

    for name in tqdm(MEMORIES, desc="timing", leave=False):
        model = GPT(GPTConfig(vocab_size=256, memory=name)).to(device)
        idx = torch.randint(256, (B, N), device=device)
        with torch.no_grad():
            held = state_floats(model(idx)[2]) // B
            reading = tokens_per_second(lambda: model(idx))
        training = tokens_per_second(lambda: model(idx, targets=idx)[1].backward())
        rows.append((name, model.n_params(), held, reading, training))
    c = model.config
    print(f"{B} rows of {N} tokens in segments of {c.segment_len}, {c.n_layer} layers of width "
          f"{c.n_embd}; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'memory':8}{'parameters':>12}{'state floats':>14}{'tokens/s reading':>18}{'training':>10}")
    for name, n_params, held, reading, training in rows:
        note = f"   (after {N} tokens: its state grows)" if name == "full" else ""
        print(f"{name:8}{n_params:12,}{held:14,}{reading:18,.0f}{training:10,.0f}{note}")


if __name__ == "__main__":
    main()
