"""
A small GPT that reads its text one segment at a time, and the memories that carry something across the gap.

    memory   carried from one segment to the next      who writes it                     cost of a segment
    none     nothing                                   -                                 T^2
    full     keys and values of the whole past         every token, in every layer       T N
    rmt      M vectors, one set for the model          the last layer                    (T + 2M)^2
    armt     a matrix A and a normaliser z per layer   memory tokens, after each layer   (T + M)^2 + (T + M) D C

Everything hangs on two loops and one value. Time is the loop in `GPT.forward` (one segment after another), depth
is the loop in `Layered.forward` (one block after another), and the memory is a value: it goes into a call as
`state`, comes out as a new `state`, and no module keeps anything for itself. So "start afresh" is `state=None`,
"two questions about one book" is one state used twice, and a memory on disk is `torch.save(state)`.

Letters:  B batch, N tokens in a call, T tokens in a segment, M memory tokens (n_mem), C width (n_embd), L layers,
          H heads, d = C / H features of a head, D features of a key after phi, V words in the vocabulary.

Sources:  RMT   Bulatov, Kuratov, Burtsev 2022, "Recurrent Memory Transformer", arXiv 2207.06881
          ARMT  Rodkin, Kuratov, Bulatov, Burtsev 2024, "Associative Recurrent Memory Transformer", arXiv 2407.04841
          GPT-2 and nanoGPT for the backbone; Su et al. 2021 for rotary positions, arXiv 2104.09864

A line that starts with `differs:` marks a departure from a paper, with its reason. `python armt.py` prints what each
memory costs on this machine. To read the code, start at the end, with `GPT.forward`, then pick a memory.
"""
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 128        # V, how many different tokens there are
    segment_len: int = 64        # T, how many tokens the model sees at once
    n_layer: int = 2             # L, blocks
    n_head: int = 4              # H, attention heads in a block
    n_embd: int = 64             # C, width of the residual stream
    dropout: float = 0.0         # share of activations dropped in training
    memory: str = "armt"         # what crosses a segment boundary: none, full, rmt or armt
    n_mem: int | None = None     # M, memory tokens; left out, the memory's own default
    d_mem: int | None = None     # armt: width of queries and keys before phi; left out, its default
    nu: int = 3                  # armt: order of the feature map DPFP-nu
    ablate: str = "nothing"      # what to leave out, words joined by +, as in no_gamma+no_delta


def ablation_words(config, known):
    """The set of words in `config.ablate`. ValueError names a word that is not in `known` and lists those that are."""
    words = set(config.ablate.split("+")) - {"nothing"}
    for word in sorted(words - set(known)):
        raise ValueError(f"ablate: memory '{config.memory}' has no '{word}'; it knows {', '.join(['nothing', *known])}")
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The backbone: a pre-LN GPT block with rotary positions
# ---------------------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=32)
def rotary_angles(n, d, device, dtype):
    """cos and sin, each (n, d/2): position p turns pair i of a head's features by the angle p / 10000^(2i/d)."""
    frequency = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency                                    # (n, d/2)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotary(x, start=0):
    """
    Rotary positions (Su et al. 2021, eq. 34): turn feature pairs by an angle that grows with the position. The dot
    product of a turned query and a turned key depends on the distance between them alone, so nothing ties a model
    to a length. x (B, H, T, d); its first row stands at position `start`.
    """
    cos, sin = (table[start:] for table in rotary_angles(start + x.size(2), x.size(3), x.device, x.dtype))
    a, b = x.chunk(2, dim=-1)                                                                       # (B, H, T, d/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)                                # (B, H, T, d)


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and at the tokens before it: those of its segment, and of a cache if it has one."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, past=None):
        """
        x (B, T, C) and past, None or a pair (k, v) of (B, H, P, d) -> y (B, T, C) and the pair grown to P + T.
        Keys are kept as they were before rotation: a cache holds no clock, and its owner may count from anywhere.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)                 # (B, H, P + T, d)
        P = k.size(2) - T
        mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P) if P else None     # (T, P + T)
        y = F.scaled_dot_product_attention(rotary(q, start=P), rotary(k), v, attn_mask=mask, is_causal=P == 0,
                                           dropout_p=self.dropout if self.training else 0.0)      # (B, H, T, d)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)


class MLP(nn.Module):
    """Each token by itself: widen four times, bend, narrow."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))                                                        # (B, T, C)


class Block(nn.Module):
    """A pre-LN transformer block, x (B, T, C) -> (B, T, C). A memory builds on it and gives it a state."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        y, past = self.attn(self.ln_1(x), past)
        x = x + self.drop(y)
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x, past


class Layered(nn.Module):
    """The depth loop, for memories whose state never leaves its layer: a block has init_state and forward(x, s)."""

    def __init__(self, config, block):
        super().__init__()
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def init_state(self, batch_size):
        return tuple(block.init_state(batch_size) for block in self.blocks)

    def forward(self, x, state):
        """One segment through all layers: x (B, T, C), state -> h (B, T, C) after the final LayerNorm, new state."""
        new = []
        for block, s in zip(self.blocks, state):           # depth: each layer owns its memory
            x, s = block(x, s)
            new.append(s)
        return self.ln_f(x), tuple(new)


# ---------------------------------------------------------------------------------------------------------------------
# none: the control. Nothing crosses a segment boundary, so beyond one segment it can only guess.
#
#   carried: nothing        cost: T^2        defaults: -        ablate: -
# ---------------------------------------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------------------------------------
# full: the other control, one causal attention over the whole past. It forgets nothing, and pays for that: the
# state grows by 2 C floats a token in each layer, and the cost of a segment with all that was read before.
#
#   carried: k, v of every past token, per layer (they start with length 0)        cost: T N
#   defaults: -        ablate: -
#   Positions count from the first token of all; only distances matter, so this equals one long segment.
# ---------------------------------------------------------------------------------------------------------------------

class FullBlock(Block):
    def init_state(self, batch_size):
        weight, H = self.attn.c_attn.weight, self.attn.n_head
        empty = weight.new_zeros(batch_size, H, 0, weight.size(1) // H)                                 # (B, H, 0, d)
        return empty, empty

    # Block.forward(x, past) already is what we need: the state is the past


class FullAttention(Layered):
    def __init__(self, config):
        ablation_words(config, known=[])
        super().__init__(config, FullBlock)


# ---------------------------------------------------------------------------------------------------------------------
# rmt: the Recurrent Memory Transformer (Bulatov et al. 2022, section 3, decoder form).
#
#   A segment is read between two copies of the memory, and what the second copy has become is the memory of the
#   next segment. The tokens read from the copy in front; the copy behind sees the tokens and writes.
#
#       [read; h; write] = Transformer([mem_s; x_s; mem_s])        mem_{s+1} = write
#
#   carried: mem (B, M, C), one set for all layers; the first one is learned
#   cost: (T + 2M)^2        defaults: n_mem 16        ablate: -
#   The state leaves at the top of one segment and enters at the bottom of the next, so, unlike the memories that
#   stay in their layer, no layer of segment s + 1 can start before the last layer of segment s is done.
#   The write tokens are taken after the final LayerNorm, as in the authors' code: the memory keeps a fixed scale.
# ---------------------------------------------------------------------------------------------------------------------

class RMT(Layered):
    defaults = dict(n_mem=16)

    def __init__(self, config):
        ablation_words(config, known=[])
        super().__init__(config, Block)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)                # (M, C)

    def init_state(self, batch_size):
        return self.mem.expand(batch_size, -1, -1)                                                       # (B, M, C)

    def forward(self, x, mem):
        M = mem.size(1)
        x = torch.cat((mem, x, mem), dim=1)                                                         # (B, M + T + M, C)
        for block in self.blocks:
            x, _ = block(x)
        h = self.ln_f(x)
        return h[:, M:-M], h[:, -M:]                                                         # (B, T, C), (B, M, C)


# ---------------------------------------------------------------------------------------------------------------------
# armt: the Associative Recurrent Memory Transformer (Rodkin et al. 2024, section 2).
#
#   Each layer owns a matrix A that answers "what belongs to this key?". All tokens ask it before the layer; M memory
#   tokens, appended to the segment, write to it after the layer. To write is to correct: only what A does not
#   already answer for a key is added (the delta rule), so a key written twice keeps its last value.
#
#       read    q = phi(x W_Q)     y = q A / (q . z)     x <- x + y                                           (eq. 4)
#       write   k = phi(u W_K)     v = u W_V     beta = sigmoid(u w_beta)     vbar = k A / (k . z)          (eqs. 1-2)
#               A <- A + sum_i beta_i k_i (v_i - vbar_i)^T
#               z <- z + sum_i gamma_i k_i     gamma = 1 - (k . z) / |k|^2: only the part of k new to z       (eq. 3)
#       phi     DPFP-3: r = [relu(x), relu(-x)],  phi(x) = [r * roll(r, 1), r * roll(r, 2), r * roll(r, 3)]
#
#   carried: A (B, D, C) and z (B, D) per layer, zero at first; D = 2 nu d_mem
#   cost: (T + M)^2 + (T + M) D C        defaults: n_mem 4, d_mem 16
#   ablate: no_gamma (z adds up every key), no_delta (A adds up every value), elu (phi = elu + 1),
#           unit (|phi| = 1), no_denom (no z: y = q A and vbar = k A; meant to go with unit, the plain delta rule)
#   A memory token stands behind the text and attention is causal: no token sees one, so A is the only way through.
# ---------------------------------------------------------------------------------------------------------------------

class ARMTBlock(Block):
    eps = 1e-5

    def __init__(self, config):
        super().__init__(config)
        self.words = ablation_words(config, known=["no_gamma", "no_delta", "elu", "unit", "no_denom"])
        self.n_mem, self.nu = config.n_mem, config.nu
        C = config.n_embd
        self.D = config.d_mem if "elu" in self.words else 2 * config.nu * config.d_mem
        self.W_Q = nn.Linear(C, config.d_mem, bias=False)
        self.W_K = nn.Linear(C, config.d_mem, bias=False)
        self.W_V = nn.Linear(C, C, bias=False)     # differs: the authors start it at 0, to wrap a trained GPT unchanged;
        self.w_beta = nn.Linear(C, 1)              # from scratch that leaves the memory nothing to learn from for long

    def init_state(self, batch_size):
        kind = dict(dtype=torch.promote_types(self.W_V.weight.dtype, torch.float32))    # never below float32
        return (self.W_V.weight.new_zeros(batch_size, self.D, self.W_V.out_features, **kind),           # A (B, D, C)
                self.W_V.weight.new_zeros(batch_size, self.D, **kind))                                  # z (B, D)

    def phi(self, x):
        """Non-negative features whose overlaps are small: (B, M, d_mem) -> (B, M, D), at least float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if "elu" in self.words:
            f = F.elu(x) + 1
        else:
            r = F.relu(torch.cat((x, -x), dim=-1))                                              # (B, M, 2 d_mem)
            f = torch.cat([r * r.roll(j, dims=-1) for j in range(1, self.nu + 1)], dim=-1)      # (B, M, 2 nu d_mem)
        return F.normalize(f, dim=-1, eps=self.eps) if "unit" in self.words else f

    def recall(self, f, A, z):
        """What A answers for the features f (B, M, D): f A / (f . z), (B, M, C), and the denominator (B, M, 1)."""
        overlap = f @ z.unsqueeze(-1) + self.eps                                                        # (B, M, 1)
        return (f @ A if "no_denom" in self.words else f @ A / overlap), overlap

    def read(self, x, A, z):
        y, _ = self.recall(self.phi(self.W_Q(x)), A, z)
        return y.to(x.dtype)                                                                            # (B, T, C)

    def write(self, u, A, z):
        k, v, beta = self.phi(self.W_K(u)), self.W_V(u), torch.sigmoid(self.w_beta(u))  # (B, M, D) (B, M, C) (B, M, 1)
        # differs: the paper treats the first segment apart (vbar = 0, gamma = 1). Here A = z = 0 says the same: vbar is
        # exactly 0, and gamma is 1 - 1e-5 / (|k|^2 + 1e-5), short of 1 by rounding for any key worth the name.
        vbar, overlap = self.recall(k, A, z)
        if "no_delta" in self.words:
            vbar = 0.0
        # differs: eq. 3 has no clip. Two tokens of one segment with the same key both add to z, and without the clip
        # the next segment overcorrects, 4, -8, 28, ... The authors' code clips and stops the gradient; so do we.
        gamma = (1 - overlap / (k.square().sum(-1, keepdim=True) + self.eps)).clamp(0, 1).detach()      # (B, M, 1)
        if "no_gamma" in self.words:
            gamma = torch.ones_like(gamma)
        A = torch.baddbmm(A, k.mT, beta * (v - vbar))                                                   # (B, D, C)
        return A, z + (gamma * k).sum(1)

    def forward(self, x, state):
        A, z = state
        x = x + self.read(x, A, z)                   # all tokens, memory tokens too; no LayerNorm, as published
        x, _ = super().forward(x)                                                                       # (B, T + M, C)
        return x, self.write(x[:, -self.n_mem:], A, z)


class ARMT(Layered):
    defaults = dict(n_mem=4, d_mem=16)

    def __init__(self, config):
        super().__init__(config, ARMTBlock)
        self.mem = nn.Parameter(torch.randn(config.n_mem, config.n_embd) * EMBEDDING_STD)               # (M, C)

    def forward(self, x, state):
        B, T, _ = x.shape
        x = torch.cat((x, self.mem.expand(B, -1, -1)), dim=1)          # the same M vectors in every segment
        h, state = super().forward(x, state)                                                            # (B, T + M, C)
        return h[:, :T], state


# ---------------------------------------------------------------------------------------------------------------------
# The model: embedding, time loop, head
# ---------------------------------------------------------------------------------------------------------------------

MEMORIES = {"none": NoMemory, "full": FullAttention, "rmt": RMT, "armt": ARMT}     # add yours: MEMORIES["mine"] = Mine

EMBEDDING_STD = 0.5        # token embeddings and memory tokens start on the scale of what the blocks add to them


def state_map(f, *states):
    """Apply f to the tensors of one state (nested tuples of tensors), or to those of several that are alike."""
    if torch.is_tensor(states[0]):
        return f(*states)
    return tuple(state_map(f, *parts) for parts in zip(*states))


def state_floats(state):
    """How many numbers a state holds, all rows together."""
    return state.numel() if torch.is_tensor(state) else sum(map(state_floats, state))


def check_state(state, empty):
    """ValueError unless `state` could follow from `empty`: same nesting, same sizes; what starts with length 0 may grow."""
    if torch.is_tensor(state) and torch.is_tensor(empty):
        if state.dim() != empty.dim() or any(e not in (s, 0) for s, e in zip(state.shape, empty.shape)):
            raise ValueError(f"state: a tensor of shape {tuple(state.shape)} where this model and batch need "
                             f"{tuple(empty.shape)}; was it made by another model or batch size?")
    elif torch.is_tensor(state) or torch.is_tensor(empty) or len(state) != len(empty):
        raise ValueError("state: its nesting is not that of this model; was it made by another memory?")
    else:
        for s, e in zip(state, empty):
            check_state(s, e)


class GPT(nn.Module):
    """
    A GPT with a memory. `config` is a GPTConfig; what it leaves open (n_mem, d_mem) is filled in from the memory's
    defaults and can be read from `model.config`. ValueError names the field when a value does not fit.
    """

    def __init__(self, config):
        super().__init__()
        if config.memory not in MEMORIES:
            raise ValueError(f"memory: there is no '{config.memory}'; choose one of {', '.join(MEMORIES)}")
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd: {config.n_embd} does not split into {config.n_head} heads of even size (n_head)")
        for name in ("vocab_size", "segment_len", "n_layer", "n_head", "n_embd", "n_mem", "d_mem", "nu"):
            if getattr(config, name) is not None and getattr(config, name) < 1:
                raise ValueError(f"{name}: {getattr(config, name)} is too small, it starts at 1")
        Memory = MEMORIES[config.memory]
        filled = {k: v for k, v in getattr(Memory, "defaults", {}).items() if getattr(config, k) is None}
        self.config = config = replace(config, **filled)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.memory = Memory(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():            # as in GPT-2: keep the sum of 2 L residual branches tame
            if name.endswith("c_proj.weight"):
                p.data /= (2 * config.n_layer) ** 0.5

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):                  # differs: GPT-2's 0.02 is 1/sqrt(C) at its own width of 768 or so;
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)    # a narrow model with 0.02 never takes off
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def init_state(self, batch_size):
        """The empty memory for `batch_size` rows: nested tuples of tensors, made anew, with gradient where it is learned."""
        return self.memory.init_state(batch_size)

    def forward(self, idx, targets=None, state=None):
        """
        Read idx (B, N), any N >= 1, cut from the left into segments of config.segment_len, starting from `state`
        (None: the empty one). Returns logits, loss, state.
          targets None    logits of the last position only, (B, 1, V); loss is None
          targets (B, N)  what each position should say, -1 for "anything": logits of the columns in which some row
                          has a target, in order, (B, columns, V); loss is the mean over targets, 0 if there are none
        A last segment that is short reads and writes like any other, and the next call begins a new one.
        """
        B, N = idx.shape
        T = self.config.segment_len
        if N == 0:
            raise ValueError("idx: there is nothing to read, it needs at least one token")
        if state is None:
            state = self.init_state(B)
        else:
            with torch.no_grad():
                check_state(state, self.init_state(B))
        columns = [N - 1] if targets is None else (targets != -1).any(0).nonzero()[:, 0].tolist()
        hidden = []
        for start in range(0, N, T):                                       # time: one segment after another
            x = self.drop(self.wte(idx[:, start:start + T]))                                            # (B, T, C)
            h, state = self.memory(x, state)
            wanted = [c - start for c in columns if start <= c < start + T]
            hidden.append(h if len(wanted) == h.size(1) else h[:, wanted])
        logits = self.lm_head(torch.cat(hidden, dim=1))                                           # (B, columns, V)
        if targets is None:
            return logits, None, state
        wanted = targets[:, columns]                                                              # (B, columns)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum")
        return logits, loss / (wanted != -1).sum().clamp(min=1), state

    @torch.no_grad()
    def read(self, idx, state=None, tail=None):
        """
        Read text that arrives in pieces of any size, each idx (B, n). Returns (state, tail): the state after all full
        segments, and the 1 to T tokens behind them, which wait in case their segment goes on.
        """
        text = idx if tail is None else torch.cat((tail, idx), dim=1)
        full = max(text.size(1) - 1, 0) // self.config.segment_len * self.config.segment_len
        if full:
            _, _, state = self(text[:, :full], state=state)
        return self.init_state(len(text)) if state is None else state, text[:, full:]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, state=None, temperature=1.0, top_k=None):
        """
        idx (B, n), n >= 1 -> (B, n + max_new_tokens): go on writing, one token at a time. The prompt is streamed, so
        its length costs time but no memory. temperature 0 takes the likeliest token; top_k draws among the k likeliest.
        """
        if idx.size(1) == 0:
            raise ValueError("idx: generate needs at least one token to go on from")
        state, tail = self.read(idx, state)
        for _ in range(max_new_tokens):
            logits = self(tail, state=state)[0][:, -1]           # the tail again: its state is not final, and dropped
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1)))[0][:, -1:], -torch.inf)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)                                                 # (B, 1)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)                   # (B, 1)
            idx = torch.cat((idx, token), dim=1)
            state, tail = self.read(token, state, tail)
        return idx


def main():
    """Print what each memory costs on this machine: `python armt.py`."""
    from tqdm import tqdm                                     # not needed to use the model

    def tokens_per_second(work, n_tokens, seconds=1.0):
        work()                                                # the first time is slower
        began, times = time.time(), 0
        while time.time() - began < seconds:
            work()
            times += 1
            if device != "cpu":
                getattr(torch, device).synchronize()
        return times * n_tokens / (time.time() - began)

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    B, N, rows = 16, 512, []
    for name in tqdm(MEMORIES, desc="timing", leave=False):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=256, memory=name)).to(device)
        idx = torch.randint(256, (B, N), device=device)

        def read():
            with torch.no_grad():
                return model(idx)[2]

        def train():
            model(idx, idx)[1].backward()
        held = state_floats(read()) // B
        rows.append((name, model.n_params(), held, tokens_per_second(read, B * N), tokens_per_second(train, B * N)))
    print(f"{B} rows of {N} tokens, segments of {model.config.segment_len}, {model.config.n_layer} layers of width "
          f"{model.config.n_embd}; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'memory':8}{'parameters':>12}{'state floats':>14}{'tokens/s read':>15}{'trained':>10}")
    for name, n_params, held, reading, training in rows:
        print(f"{name:8}{n_params:12,}{held:14,}{reading:15,.0f}{training:10,.0f}"
              + (f"   (state after {N} tokens: it grows)" if name == "full" else ""))


if __name__ == "__main__":
    main()
