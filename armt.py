"""
A small GPT that reads its text one segment at a time, and memories that reach across the gap.

    memory  carried from one segment to the next      who writes it              cost of a segment
    none    nothing                                   -                          T^2
    full    keys and values of the whole past         every token, every layer   T N
    rmt     M vectors, one set for the model          the last layer             (T + 2M)^2
    armt    a matrix A, a normaliser z, per layer     memory tokens, each layer  (T + M)^2 + (T + M) D C

Everything hangs on two loops and one value. Time is the loop in `GPT.forward`, one segment after
another. Depth is the loop in `Layered.forward`, one block after another. The memory is a value: it
goes into a call as `state` and comes out as a new `state`, and no module keeps anything for itself.
So "start afresh" is `state=None`, "two questions about one book" is one state used twice, and a
memory on disk is `torch.save(state)`.

Letters:  B batch, N tokens in a call, T tokens in a segment, M memory tokens (n_mem),
          C width (n_embd), L layers, H heads, d = C / H features of a head,
          D features of a key after phi, V words in the vocabulary

Sources:  RMT   Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881
          ARMT  Rodkin, Kuratov, Bulatov, Burtsev 2024, arXiv 2407.04841
          the backbone follows GPT-2, with the rotary positions of Su et al. 2021, arXiv 2104.09864

A line that starts with `differs:` marks a departure from a paper, with its reason.
`python armt.py` prints what each memory costs on this machine. To read the code, begin at the end,
with `GPT.forward`, and then pick a memory.
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


SIZES = ("vocab_size", "segment_len", "n_layer", "n_head", "n_embd", "n_mem", "d_mem", "nu")
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
    frequency = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    angle = torch.arange(n, dtype=torch.float64)[:, None] * frequency                # (n, d/2)
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


class CausalSelfAttention(nn.Module):
    """Each token looks at itself and at those before it, in its segment and in a cache of the past."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, past=None):
        """
        x (B, T, C) and past, None or (k, v) of (B, H, P, d) each -> y (B, T, C), (k, v) grown to P + T.
        Keys are cached before rotation: a cache holds no clock, its owner may count from anywhere.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                         # (B, H, T, d)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)    # (B, H, P + T, d)
        P = k.size(2) - T
        mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P) if P else None
        y = F.scaled_dot_product_attention(
            rotary(q, start=P), rotary(k), v, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0)                        # (B, H, T, d)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)


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
    than a block with `init_state(batch_size) -> s` and `forward(x, s) -> (x, s)`.
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
        return h[:, M:-M], h[:, -M:].clone()                                         # (B, T, C), (B, M, C)


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
#           no_denom  no z at all: y = q A, vbar = k A; with unit this is the plain delta rule
#   The memory tokens stand last and attention is causal: no text sees them, A is the only way through.
# --------------------------------------------------------------------------------------------------

class ARMTBlock(Block):
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
        k, v, beta = self.phi(self.W_K(u)), self.W_V(u), torch.sigmoid(self.w_beta(u))
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
        return A, z + (gamma * k).sum(1)

    def forward(self, x, state):
        A, z = state
        y, _ = self.recall(self.phi(self.W_Q(x)), A, z)
        x = x + y.to(x.dtype)            # memory tokens read too; no LayerNorm first, as published
        x, _ = super().forward(x)                                                    # (B, T + M, C)
        return x, self.write(x[:, -self.n_mem:], A, z)


class ARMT(Layered):
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
# The model: embedding, time loop, head
# --------------------------------------------------------------------------------------------------

# Add yours: MEMORIES["mine"] = Mine, a module Mine(config) with init_state(batch_size) and
# forward(x, state) -> (h, state): one segment through all layers, final LayerNorm included.
MEMORIES = {"none": NoMemory, "full": FullAttention, "rmt": RMT, "armt": ARMT}


def state_map(f, *states):
    """Apply f to each tensor of a state (nested tuples of tensors), or of several states alike."""
    if torch.is_tensor(states[0]):
        return f(*states)
    return tuple(state_map(f, *parts) for parts in zip(*states))


def state_floats(state):
    """How many numbers a state holds, all rows together."""
    return state.numel() if torch.is_tensor(state) else sum(map(state_floats, state))


def check_state(state, empty):
    """ValueError unless `state` can have grown from `empty`: same nesting, same sizes but for 0s."""
    if torch.is_tensor(state) != torch.is_tensor(empty):
        raise ValueError("state: its nesting is not that of this model; was it made by another memory?")
    if torch.is_tensor(state):
        fits = state.dim() == empty.dim() and all(e in (s, 0) for s, e in zip(state.shape, empty.shape))
        if not fits:
            raise ValueError(f"state: {tuple(state.shape)} where this model and batch need "
                             f"{tuple(empty.shape)}; was it made by another model or batch size?")
    elif len(state) != len(empty):
        raise ValueError(f"state: {len(state)} parts where this model has {len(empty)}; "
                         f"was it made by another model?")
    else:
        for s, e in zip(state, empty):
            check_state(s, e)


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
            if name in SIZES and value is not None and value < 1:
                raise ValueError(f"{name}: {value} is too small, it starts at 1")
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd: {config.n_embd} does not split into n_head = {config.n_head} "
                             f"heads of even size")
        Memory = MEMORIES[config.memory]
        defaults = getattr(Memory, "defaults", {})
        left_open = {name: value for name, value in defaults.items() if getattr(config, name) is None}
        self.config = config = replace(config, **left_open)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.memory = Memory(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):         # as in GPT-2: 2 L branches add up in the end
                p.data /= (2 * config.n_layer) ** 0.5

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
        ValueError for an empty idx, or for a state of another model or batch size.
        """
        (B, N), T = idx.shape, self.config.segment_len
        if N == 0:
            raise ValueError("idx: there is nothing to read, it needs at least one token")
        if state is None:
            state = self.init_state(B)
        else:
            with torch.no_grad():
                check_state(state, self.init_state(B))
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
    def read(self, idx, state=None, tail=None):
        """
        Read text that comes in pieces of any size, idx (B, n) each. Returns (state, tail): the state
        after all full segments, and the last 1 to T tokens, which wait in case their segment goes on.
        """
        text = idx if tail is None else torch.cat((tail, idx), dim=1)
        T = self.config.segment_len
        full = max(text.size(1) - 1, 0) // T * T
        if full:
            _, _, state = self(text[:, :full], state=state)
        return self.init_state(len(text)) if state is None else state, text[:, full:]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, state=None, temperature=1.0, top_k=None):
        """
        Go on writing: idx (B, n), n >= 1 -> (B, n + max_new_tokens). The prompt is streamed, so its
        length costs time but no memory. temperature 0 takes the likeliest token, top_k draws among
        the k likeliest.
        """
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
