"""Trains a GPT within a fixed budget: the program under search, one file, to be read and edited from top to bottom.

The harness calls `train(run)`. Clock, order of the data and score are the harness's; all the rest is decided here.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ----------------------------------------------------------------------------------------------------------------------
# Knobs. A search moves the constants that have a range in their comment. The others gained less in published runs; they
# are left to people and agents, who may change anything.
# ----------------------------------------------------------------------------------------------------------------------

# Model
DEPTH = 8  # in [1, 24] log: transformer layers
MODEL_DIM = 512  # in [32, 1024] log: width of the residual stream, before it is rounded to whole heads
HEAD_DIM = 128  # in {16, 32, 64, 128}: width of an attention head
MLP_RATIO = 4  # in [1, 8] log: hidden width of the MLP over the residual stream's
SEQ_LEN = 2048  # in {64, 128, 256, 512, 1024, 2048}: tokens of a training row, and the longest look back
WINDOW_PATTERN = "SSSL"  # in {"L", "SL", "SSSL", "XL", "XXXL"}: layers look back SEQ_LEN (L), 1/2 (S) or 1/8 (X) of it
VALUE_EMBEDS = True  # in {True, False}: every other layer adds an embedding of the token to its values
SOFT_CAP = 15.0  # logits are squashed into ±SOFT_CAP
X0_INIT = 0.1  # how much of the token embedding each layer adds again, at first
ROPE_BASE = 10000.0  # the rotary embedding's longest wavelength, over 2π
# Batch
# rule: TOTAL_BATCH_SIZE % SEQ_LEN == 0
# rule: DEVICE_BATCH_SIZE == 0 or TOTAL_BATCH_SIZE % (DEVICE_BATCH_SIZE * SEQ_LEN) == 0
TOTAL_BATCH_SIZE = 2**19  # in {512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288}: tokens a step
DEVICE_BATCH_SIZE = 0  # rows at once; 0: the most that fit, as the harness finds
# Optimizer
LR_SCALE = 1.0  # in [0.25, 4.0] log: multiplies all learning rates
MATRIX_LR = 0.04  # in [0.01, 0.3] log: Muon, the matrices of the layers
EMBEDDING_LR = 0.6  # in [0.1, 3.0] log: Adam, token and value embeddings, at width 768
UNEMBEDDING_LR = 0.004  # in [0.002, 0.1] log: Adam, the output matrix, at width 768
SCALAR_LR = 0.5  # Adam, the scalars of the residual stream
WEIGHT_DECAY = 0.2  # in [0.0, 0.5]: of the matrices, where it agrees with the update's sign; falls to 0
MUON_MOMENTUM = 0.95  # reached after MOMENTUM_WARMUP
MOMENTUM_WARMUP = 0.3  # share of the budget in which the momentum rises from 0.85
MUON_BETA2 = 0.95  # mean of the squares of Muon's updates, a neuron
UNEMBEDDING_DECAY = 0.01  # the embeddings are better off without
ADAM_BETA1 = 0.8  # mean of Adam's gradients
ADAM_BETA2 = 0.95  # mean of their squares
# Schedule of the learning rates: up, flat, down
WARMUP_RATIO = 0.0  # in [0.0, 0.6]: share of the budget that goes up from 0
WARMDOWN_RATIO = 0.5  # in [0.0, 0.9]: share of the budget that goes down
FINAL_LR_FRAC = 0.0  # in [0.0, 1.0]: where it ends

# rule: WARMUP_RATIO + WARMDOWN_RATIO <= 1

HEADS = max(1, round(MODEL_DIM / HEAD_DIM))
WIDTH = HEADS * HEAD_DIM

# ----------------------------------------------------------------------------------------------------------------------
# What this machine can do
# ----------------------------------------------------------------------------------------------------------------------


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile pays: on a CPU the first compiled step takes longer than the whole budget."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the arithmetic units know it; emulated on an older CPU it is four times slower than float32."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


def visible(window: int, q: Tensor, k: Tensor) -> Tensor:
    """Whether the token at q sees the one at k: itself and the window - 1 tokens before it."""
    return (k <= q) & (q - k < window)


def attention_mask(T: int, window: int, device: torch.device):
    """How attention(…) is to look back `window` tokens in rows of T: a backend that this machine has, by its mask.

    Returns:
        None: everything before, SDPA's own causal kernels. A BlockMask: FlexAttention, which skips the blocks outside
        the window. A bool tensor (T, T): SDPA with a mask, which runs everywhere and skips nothing.
    """
    if window >= T:
        return None
    if can_compile(device) and torch.cuda.get_device_capability(device) >= (8, 0) and T % 128 == 0:
        from torch.nn.attention.flex_attention import create_block_mask  # noqa: PLC0415 - a second, on CUDA alone

        return create_block_mask(lambda b, h, q, k: visible(window, q, k), None, None, T, T, device=device)
    places = torch.arange(T, device=device)
    return visible(window, places[:, None], places[None, :])


# The first of these that can run is taken. On an H100 cuDNN needs 2.6 ms where flash needs 4.5 (docs/adr/0004).
SDPA_ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
    SDPA_ORDER.insert(0, SDPBackend.CUDNN_ATTENTION)


def attention(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """Softmax attention of (B, H, T, D) tensors under a mask of attention_mask(…): every backend is called here."""
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

        return flex_attention(q, k, v, block_mask=mask)
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    with sdpa_kernel(SDPA_ORDER, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of (B, T, H, D): turns the pairs (x[i], x[i + D/2])."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    return F.rms_norm(x, (x.size(-1),))


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, *, std: float) -> nn.Linear:
    """A matrix without bias, its weights uniform with this standard deviation."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.uniform_(layer.weight, -std * math.sqrt(3), std * math.sqrt(3))
    return layer


# Every layer starts as the identity: the matrices that write into the residual stream are zero.
STD = WIDTH**-0.5


class Attention(nn.Module):
    """Multi-head attention with rotary positions, normalised queries and keys, and gated value embeddings."""

    GATE_WIDTH = min(32, WIDTH)  # channels of the residual stream that a head's gate looks at

    def __init__(self, has_value_embed: bool):
        super().__init__()
        self.qkv = linear(WIDTH, 3 * WIDTH, std=STD)
        self.out = linear(WIDTH, WIDTH, std=0.0)
        self.gate = linear(self.GATE_WIDTH, HEADS, std=0.0) if has_value_embed else None

    def forward(self, x: Tensor, value_embed: Tensor | None, rotary: tuple[Tensor, Tensor], mask) -> Tensor:
        """Maps (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, HEADS, HEAD_DIM).unbind(2)
        if self.gate is not None and value_embed is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.GATE_WIDTH]))
            v = v + gate.unsqueeze(-1) * value_embed.view(B, T, HEADS, HEAD_DIM)
        q, k = norm(rotate(q, *rotary)).to(v.dtype), norm(rotate(k, *rotary)).to(v.dtype)
        y = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them (arXiv:2109.08668)."""

    def __init__(self):
        super().__init__()
        self.up = linear(WIDTH, MLP_RATIO * WIDTH, std=STD)
        self.down = linear(MLP_RATIO * WIDTH, WIDTH, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, C) to (B, T, C)."""
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """One layer."""

    def __init__(self, has_value_embed: bool):
        super().__init__()
        self.attention = Attention(has_value_embed)
        self.mlp = MLP()

    def forward(self, x: Tensor, value_embed: Tensor | None, rotary: tuple[Tensor, Tensor], mask) -> Tensor:
        """Maps (B, T, C) to (B, T, C)."""
        x = x + self.attention(norm(x), value_embed, rotary, mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Maps tokens (B, T) to logits (B, T, V), or with targets to the mean cross-entropy.

    A full window is SEQ_LEN tokens even in longer rows, so the evaluation never asks for a distance that training did
    not see.
    """

    def __init__(self, vocab_size: int, longest_row: int, device: torch.device):
        super().__init__()
        self.depth, self.dtype = DEPTH, compute_dtype(device)
        # every other layer, the last one included (arXiv:2410.17897)
        value_layers = [i for i in range(DEPTH) if VALUE_EMBEDS and i % 2 == (DEPTH - 1) % 2]
        self.embed = nn.Embedding(vocab_size, WIDTH)  # normal, standard deviation 1
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(vocab_size, WIDTH) for i in value_layers})
        for table in self.value_embeds.parameters():
            nn.init.uniform_(table, -STD * math.sqrt(3), STD * math.sqrt(3))
        self.blocks = nn.ModuleList(Block(i in value_layers) for i in range(DEPTH))
        self.unembed = linear(WIDTH, vocab_size, std=0.001)
        self.residual_scale = nn.Parameter(torch.ones(DEPTH))
        self.x0_scale = nn.Parameter(torch.full((DEPTH,), X0_INIT))
        # all that depends on a row's length alone is made now: nothing of it belongs into a compiled graph
        self.to(device)
        pattern = [WINDOW_PATTERN[i % len(WINDOW_PATTERN)] for i in range(DEPTH - 1)] + ["L"]
        self.windows = [SEQ_LEN // {"L": 1, "S": 2, "X": 8}[letter] for letter in pattern]
        self.rotaries = {T: self.rotary(T, device) for T in (SEQ_LEN, longest_row)}
        self.masks = {T: self.window_masks(T, device) for T in self.rotaries}
        # forward and backward; attention as if nothing were masked inside the window, which is how MFU is quoted
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        self.flops_per_token = 6 * weights + 12 * WIDTH * sum(min(window, SEQ_LEN) for window in self.windows)

    def rotary(self, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, (T, 1, HEAD_DIM / 2)."""
        frequency = ROPE_BASE ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
        angle = torch.outer(torch.arange(T, device=device).float(), frequency).unsqueeze(1)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def window_masks(self, T: int, device: torch.device) -> list:
        """One mask a layer; layers with the same window share it."""
        by_window = {window: attention_mask(T, window, device) for window in set(self.windows)}
        return [by_window[window] for window in self.windows]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Maps tokens (B, T) to float32 logits (B, T, V), or to a loss."""
        T, device = tokens.size(1), tokens.device
        if T not in self.masks:
            self.rotaries[T], self.masks[T] = self.rotary(T, device), self.window_masks(T, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x = x0 = norm(self.embed(tokens)).to(self.dtype)
            for i, block in enumerate(self.blocks):
                x = self.residual_scale[i].to(x.dtype) * x + self.x0_scale[i].to(x.dtype) * x0
                value_embed = self.value_embeds[str(i)](tokens).to(x.dtype) if str(i) in self.value_embeds else None
                x = block(x, value_embed, self.rotaries[T], self.masks[T][i])
            logits = self.unembed(norm(x))
        logits = SOFT_CAP * torch.tanh(logits.float() / SOFT_CAP)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer
# ----------------------------------------------------------------------------------------------------------------------

# Odd polynomials a·x + b·x³ + c·x⁵ that drive singular values to 1, best for each iteration: arXiv:2505.16932. As used
# for bfloat16: widened by 2%, so that a value which rounding pushed over 1 does not diverge.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(G: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthogonal factor of each matrix of G (N, rows, columns): same singular vectors, singular values near 1."""
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if tall else X).to(G.dtype)


def muon_update(
    W: Tensor,
    G: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    dtype: torch.dtype,
) -> None:
    """One step of Muon on matrices of one shape, in place.

    Nesterov momentum, orthogonalised; evened out between neurons by a running mean of their squares (NorMuon,
    arXiv:2510.05491); decay only where it goes the update's way (cautious, arXiv:2411.16085). What a schedule changes
    is a 0-d tensor, so that it compiles once.

    Args:
        W: Weights (N, rows, columns).
        G: Their gradients.
        mean: Of the gradients.
        square: Of the updates, one number a neuron: (N, rows, 1), or (N, 1, columns) for wide matrices.
        lr: Length of the step.
        momentum: Share of `mean` that stays.
        decay: Of the weights, times lr.
        dtype: Of the orthogonalisation.
    """
    mean.mul_(momentum).add_(G * (1 - momentum))
    update = orthogonalise(G * (1 - momentum) + mean * momentum, dtype)
    neuron = update.square().mean(-1 if square.size(-1) == 1 else -2, keepdim=True)
    square.lerp_(neuron, 1 - MUON_BETA2)
    even = update * square.clamp_min(1e-10).rsqrt()
    even = even * (update.norm(dim=(-2, -1), keepdim=True) / even.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    W.sub_(lr * (even + decay * W * (even * W > 0)))


def adam_update(
    W: Tensor, G: Tensor, mean: Tensor, square: Tensor, *, lr: Tensor, unbias: Tensor, decay: float
) -> None:
    """One step of AdamW in place; lr and unbias (0-d) carry the corrections of the two means for their start at 0."""
    mean.lerp_(G, 1 - ADAM_BETA1)
    square.lerp_(G.square(), 1 - ADAM_BETA2)
    W.sub_(lr * (mean / ((square * unbias).sqrt() + 1e-10) + decay * W))


class Optimizer:
    """Muon for the matrices of the layers, all of one shape in one call, and AdamW for everything else."""

    def __init__(self, model: GPT, device: torch.device):
        width = (WIDTH / 768) ** -0.5  # Adam's rates were tuned at width 768
        embeddings = [model.embed.weight, *model.value_embeds.parameters()]
        self.adam = [  # learning rate, decay, parameters
            (EMBEDDING_LR * width, 0.0, embeddings),
            (UNEMBEDDING_LR * width, UNEMBEDDING_DECAY, [model.unembed.weight]),
            (SCALAR_LR * 0.01, 0.0, [model.residual_scale]),  # it multiplies through all layers
            (SCALAR_LR, 0.0, [model.x0_scale]),
        ]
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for _, _, ps in self.adam for p in ps}
        self.muon = [MatrixBank(ps, shape) for shape, ps in matrices_by_shape(model).items()]
        self.lr, self.unbias, self.momentum, self.decay = (torch.zeros((), device=device) for _ in range(4))
        self.dtype, self.steps = compute_dtype(device), 0
        compiled = can_compile(device)
        self.muon_update = torch.compile(muon_update, dynamic=False, fullgraph=True) if compiled else muon_update
        self.adam_update = torch.compile(adam_update, dynamic=False, fullgraph=True) if compiled else adam_update

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Updates all parameters from their gradients, with the rates of this progress, and clears the gradients."""
        self.steps += 1
        scale = lr_scale(progress)
        self.unbias.fill_(1 / (1 - ADAM_BETA2**self.steps))
        for lr, decay, parameters in self.adam:
            self.lr.fill_(lr * scale / (1 - ADAM_BETA1**self.steps))
            for p in parameters:
                if p.grad is not None:  # an edit may leave a parameter without use
                    self.adam_update(p, p.grad, *self.moments[p], lr=self.lr, unbias=self.unbias, decay=decay)
                p.grad = None
        self.momentum.fill_(momentum(progress))
        self.decay.fill_(WEIGHT_DECAY * (1 - progress))
        for bank in self.muon:
            self.lr.fill_(MATRIX_LR * scale * bank.lr_factor)
            rates = {"lr": self.lr, "momentum": self.momentum, "decay": self.decay}
            self.muon_update(bank.weights, bank.gradients, bank.mean, bank.square, **rates, dtype=self.dtype)
            bank.gradients.zero_()


def matrices_by_shape(model: GPT) -> dict[tuple[int, int], list[nn.Parameter]]:
    """The matrices of the layers by their shape; queries, keys and values are three matrices in one parameter."""
    fused = {id(module.qkv.weight) for module in model.modules() if isinstance(module, Attention)}
    matrices: dict[tuple[int, int], list[nn.Parameter]] = {}
    for p in model.blocks.parameters():
        shape = (WIDTH, WIDTH) if id(p) in fused else (p.size(0), p.size(1))
        matrices.setdefault(shape, []).append(p)
    return matrices


class MatrixBank:
    """Matrices of one shape (rows, columns), moved into one tensor (N, rows, columns), and so their gradients."""

    def __init__(self, parameters: list[nn.Parameter], shape: tuple[int, int]):
        rows, columns = shape
        self.weights = torch.cat([p.detach().view(-1, rows, columns) for p in parameters])
        self.gradients, self.mean = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.square = self.weights.new_zeros(
            (len(self.weights), rows, 1) if rows >= columns else (len(self.weights), 1, columns)
        )
        self.lr_factor = (
            max(1.0, rows / columns) ** 0.5
        )  # so that a tall matrix changes its outputs as much as a square one
        sizes = [p.numel() // (rows * columns) for p in parameters]
        for p, weights, gradients in zip(
            parameters, self.weights.split(sizes), self.gradients.split(sizes), strict=True
        ):
            p.data, p.grad = weights.view_as(p), gradients.view_as(p)  # backward passes add to it in place


def lr_scale(progress: float) -> float:
    """The trapezoid: from 0 up to LR_SCALE, flat, down to FINAL_LR_FRAC of it."""
    up = progress / WARMUP_RATIO if progress < WARMUP_RATIO else 1.0
    left = (1 - progress) / WARMDOWN_RATIO if progress > 1 - WARMDOWN_RATIO else 1.0
    return LR_SCALE * up * (FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * left)


def momentum(progress: float) -> float:
    """Muon's momentum: low at first, when old gradients point elsewhere."""
    share = min(1.0, progress / MOMENTUM_WARMUP) if MOMENTUM_WARMUP else 1.0
    return min(0.85, MUON_MOMENTUM) * (1 - share) + MUON_MOMENTUM * share


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train(run) -> GPT:
    """Trains until the budget is spent; returns the model."""
    torch.set_float32_matmul_precision("high")
    model = GPT(run.vocab_size, run.row_tokens, run.device)
    optimizer = Optimizer(model, run.device)
    if can_compile(run.device):
        model.compile(dynamic=False)
    rows = run.micro_batch(
        model, total_tokens=TOTAL_BATCH_SIZE, seq_len=SEQ_LEN, at_most=DEVICE_BATCH_SIZE or None, loss=model
    )
    micro_batches = TOTAL_BATCH_SIZE // (rows * SEQ_LEN)
    while not run.done:
        total = torch.zeros((), device=run.device)
        for _ in range(micro_batches):
            x, y = run.batch(rows, SEQ_LEN)
            loss = model(x, y) / micro_batches
            loss.backward()
            total += loss.detach()
        optimizer.step(run.progress)
        run.step(total)
    return model
