"""A small program in the manner of karpathy/autoresearch for tests: the same imports and loop, on any device.

It holds no test.
"""

PROGRAM = """
import gc
import math
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from kernels import get_kernel

flash = get_kernel("some/flash-attention").flash_attn_interface

from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, evaluate_bpb, make_dataloader

DEPTH = 2
WIDTH = 32
HEADS = 2
TOTAL_BATCH_SIZE = 16 * MAX_SEQ_LEN
DEVICE_BATCH_SIZE = 8
LR = 0.01


@dataclass
class Config:
    vocab_size: int
    windows: tuple


class Layer(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.window = window
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(F.rms_norm(x, (C,))).view(B, T, 3, HEADS, C // HEADS).unbind(2)
        y = flash.flash_attn_func(q, k, v, causal=True, window_size=self.window)
        return x + self.out(y.contiguous().view(B, T, C))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.layers = nn.ModuleList(Layer(window) for window in config.windows)
        self.head = nn.Linear(WIDTH, config.vocab_size)

    def forward(self, idx, targets=None, reduction="mean"):
        x = self.embed(idx)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction=reduction)


t_start = time.time()
torch.manual_seed(42)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = Tokenizer.from_directory()
config = Config(tokenizer.get_vocab_size(), ((MAX_SEQ_LEN // 2, 0), (MAX_SEQ_LEN, 0)))
print(f"Model config: {asdict(config)}")
model = GPT(config).to(device)
num_params = sum(p.numel() for p in model.parameters())
num_flops_per_token = 6 * num_params
if device.type == "cuda":
    model = torch.compile(model, dynamic=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
grad_accum_steps = TOTAL_BATCH_SIZE // (DEVICE_BATCH_SIZE * MAX_SEQ_LEN)
train_loader = make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")
x, y, epoch = next(train_loader)
total_training_time, step = 0, 0

while True:
    t0 = time.time()
    for _ in range(grad_accum_steps):
        loss = model(x, y)
        (loss / grad_accum_steps).backward()
        x, y, epoch = next(train_loader)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    loss_f = loss.item()
    if math.isnan(loss_f) or loss_f > 100:
        print("FAIL")
        exit(1)
    if step > 10:
        total_training_time += time.time() - t0
    done = 100 * min(total_training_time / TIME_BUDGET, 1.0)
    print(f"\\rstep {step:05d} ({done:.1f}%) | loss: {loss_f:.6f} | epoch: {epoch}    ", end="", flush=True)
    if step == 0:
        gc.collect()
    step += 1
    if step > 10 and total_training_time >= TIME_BUDGET:
        break

print()
total_tokens = step * TOTAL_BATCH_SIZE
model.eval()
val_bpb = evaluate_bpb(model, tokenizer, DEVICE_BATCH_SIZE)
print("---")
print(f"val_bpb:          {val_bpb:.6f}")
print(f"training_seconds: {total_training_time:.1f}")
print(f"total_seconds:    {time.time() - t_start:.1f}")
print(f"total_tokens_M:   {total_tokens / 1e6:.1f}")
print(f"num_steps:        {step}")
print(f"num_params_M:     {num_params / 1e6:.1f}")
print(f"depth:            {DEPTH}")
"""
