"""The program's fused kernels against their plain versions in float64: results and gradients, on random inputs."""

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trainer_kit import TINY, module_of

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # of what torch's compiler imports
CUDA = torch.device("cuda")
SHAPES = [  # knobs, rows, tokens of a row
    ({"MODEL_DIM": 512, "HEAD_DIM": 128, "MLP_RATIO": 4, "SEQ_LEN": 256}, 3, 256),
    ({"MODEL_DIM": 640, "HEAD_DIM": 128, "MLP_RATIO": 4, "SEQ_LEN": 512, "NGRAM_ROWS": 512}, 2, 512),
    ({"MODEL_DIM": 192, "HEAD_DIM": 64, "MLP_RATIO": 3, "SEQ_LEN": 128, "NGRAM_ROWS": 100}, 5, 128),
    ({"MODEL_DIM": 48, "HEAD_DIM": 16, "MLP_RATIO": 5, "SEQ_LEN": 64}, 3, 64),
]
ERROR = 8e-3  # bfloat16 has 8 bits: 2^-9 a rounding, and a few of them
ERROR8 = 0.1  # float8 has 4: 2^-5 a rounding, and a few of them
EIGHT = torch.float8_e4m3fn


def error(got: Tensor | None, wanted: Tensor | None) -> float:
    assert got is not None
    assert wanted is not None
    with torch.no_grad():
        return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(params=range(len(SHAPES)), ids=lambda i: str(SHAPES[i][0]["MODEL_DIM"]))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModuleType, int, int]:
    knobs, B, T = SHAPES[request.param]
    torch.manual_seed(request.param)
    return module_of(tmp_path, **TINY | knobs | {"FLOAT8": False}), B, T


def hopper(module: ModuleType) -> ModuleType:
    if not module.has_hopper_kernels():
        pytest.skip("needs compute capability 9 and cudnn-frontend")
    return module


def bias(got: Tensor | None, wanted: Tensor | None) -> float:
    """How much too long it is, in its own direction: rounding to the nearest favours neither."""
    assert got is not None
    assert wanted is not None
    with torch.no_grad():
        got, wanted = got.double().flatten(), wanted.double().flatten()
        return abs(float(got @ wanted / (wanted @ wanted)) - 1)


def randn(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, device=CUDA) * std).to(dtype).requires_grad_()


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def test_the_fused_loss_is_the_plain_one(case: tuple[ModuleType, int, int], monkeypatch: pytest.MonkeyPatch):
    module, B, T = case
    for V, chunk in [(8192, 2**27), (1000, 2**17)]:  # whole and in several chunks, the last one shorter
        monkeypatch.setattr(module.FusedLoss, "CHUNK_LOGITS", chunk)
        h, unembed = randn(B, T, module.WIDTH), randn(V, module.WIDTH, std=0.3, dtype=torch.float32)
        targets = torch.randint(0, V, (B, T), device=CUDA)
        got = 3 * module.cross_entropy(h, None, unembed, targets)
        got.backward()
        h64, unembed64 = h.detach().double().requires_grad_(), unembed.detach().bfloat16().double().requires_grad_()
        logits = (h64 @ unembed64.mT).flatten(0, 1)
        wanted = 3 * F.cross_entropy(module.SOFT_CAP * torch.tanh(logits / module.SOFT_CAP), targets.flatten())
        wanted.backward()
        assert h.grad is not None
        assert unembed.grad is not None
        assert got.item() == pytest.approx(wanted.item(), rel=1e-3)
        assert error(h.grad, h64.grad) < ERROR
        assert error(unembed.grad, unembed64.grad) < ERROR
        with torch.no_grad():
            assert module.cross_entropy(h, None, unembed, targets).item() == pytest.approx(got.item() / 3, rel=1e-5)


def test_the_fused_mlp_is_the_plain_one(case: tuple[ModuleType, int, int]):
    module, B, T = hopper(case[0]), case[1], case[2] - 3  # no multiple of a tile
    C, hidden = module.WIDTH, module.MLP_RATIO * module.WIDTH
    h, grad = randn(B, T, C), torch.randn(B, T, C, device=CUDA).bfloat16()
    up, down = (randn(*s, std=C**-0.5, dtype=torch.float32) for s in ((hidden, C), (C, hidden)))
    got = module.mlp(h, None, up, down)
    got.backward(grad)
    h64, up64, down64 = doubles(h, up.bfloat16(), down.bfloat16())
    wanted = F.relu(h64 @ up64.mT).square() @ down64.mT
    wanted.backward(grad.double())
    assert error(got, wanted) < ERROR
    for ours, theirs in [(h, h64), (up, up64), (down, down64)]:
        assert error(ours.grad, theirs.grad) < ERROR


def test_products_in_8_bits_are_the_plain_ones_within_their_rounding(case: tuple[ModuleType, int, int]):
    module, B, T = hopper(case[0]), case[1], case[2] - 3
    C, hidden, V = module.WIDTH, module.MLP_RATIO * module.WIDTH, 1008
    h, targets = randn(B, T, C), torch.randint(0, V, (B, T), device=CUDA)
    # gradients as small as those of a mean over many tokens, and some tokens' much smaller than others'
    grad = (torch.randn(B, T, C, device=CUDA) * torch.rand(B, T, 1, device=CUDA) * 1e-7).bfloat16()
    up, down = (randn(*s, std=C**-0.5, dtype=torch.float32) for s in ((hidden, C), (C, hidden)))
    qkv, unembed = (randn(n, C, std=C**-0.5, dtype=torch.float32) for n in (3 * C, V))
    h64, up64, down64, qkv64, unembed64 = doubles(h, up, down, qkv, unembed)
    wide = torch.cat([grad] * 3, -1)
    pairs = [
        (module.mlp(h, h.detach().to(EIGHT), up, down), F.relu(h64 @ up64.mT).square() @ down64.mT, grad),
        (module.project_norm(h, h.detach().to(EIGHT), qkv), h64 @ qkv64.mT, wide),
    ]
    for got, wanted, slope in pairs:
        h.grad = h64.grad = None
        got.backward(slope)
        wanted.backward(slope.double())
        for one, other in [(got, wanted), (h.grad, h64.grad)]:
            assert error(one, other) < ERROR8
            assert bias(one, other) < ERROR8 / 5
    loss = module.cross_entropy(h, h.detach().to(EIGHT), unembed, targets)
    logits = module.SOFT_CAP * torch.tanh(h64 @ unembed64.mT / module.SOFT_CAP)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-2)
    for ours, theirs in [(up, up64), (down, down64), (qkv, qkv64), (unembed, unembed64)]:
        assert error(ours.grad, theirs.grad) < ERROR8
        assert bias(ours.grad, theirs.grad) < ERROR8 / 5


def test_a_model_in_8_bits_is_nearly_the_one_in_16(tmp_path: Path):
    """Nothing but the layers' and the output's products differs, so that its gradients point the same way."""
    for name in ("16", "8"):
        (tmp_path / name).mkdir()
    knobs = TINY | {"MODEL_DIM": 512, "HEAD_DIM": 128, "MLP_RATIO": 4, "SEQ_LEN": 256, "DEPTH": 4}
    modules = [module_of(tmp_path / name, **knobs, FLOAT8=name == "8") for name in ("16", "8")]
    hopper(modules[1])
    models, (x, y) = [], torch.randint(0, 1008, (2, 4, 256), device=CUDA)
    for module in modules:
        torch.manual_seed(0)
        models.append(module.GPT(1008, 256, CUDA))
        for p in models[-1].parameters():
            torch.nn.init.normal_(p, std=0.7 if p.ndim < 2 else 0.3 * p.size(1) ** -0.5)
        models[-1](x, y).backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if p.ndim > 1 and p.grad is not None:
            assert error(q.grad, p.grad) < 3 * ERROR8, name
            assert bias(q.grad, p.grad) < ERROR8, name


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_the_fused_norm_is_the_plain_one(case: tuple[ModuleType, int, int], adds: bool, mixes: bool):
    module, B, T = case
    C, head = module.WIDTH, 32 if mixes else 0
    x, other, x0 = randn(B, T, C), randn(B, T, C) if adds else None, randn(B, T, C) if mixes else None
    keep, add = (torch.tensor(v, device=CUDA, requires_grad=True) if mixes else None for v in (0.9, 0.2))
    ours = [t for t in (x, other, x0, keep, add) if t is not None]
    theirs = iter(doubles(*ours))
    plain = [None if t is None else next(theirs) for t in (x, other, x0, keep, add)]
    grads = [torch.randn(B, T, C, device=CUDA).bfloat16() for _ in range(4)]

    def total(y: Tensor, h: Tensor, some: Tensor | None, passed: Tensor | None) -> Tensor:
        sums = [(y * grads[0]).sum(), (h * grads[1]).sum()]
        sums += [(some * grads[2][..., :head]).sum()] if head and some is not None else []
        sums += [(passed * grads[3]).sum()] if passed is not None else []
        return torch.stack([one.double() for one in sums]).sum()

    got = module.add_norm(x, other, x0, keep, add, head)
    total(*got[:4]).backward()
    assert got[4] is None
    wanted = module.plain_add_norm(*plain)
    total(wanted[0], wanted[1], wanted[1][..., :head], plain[2]).backward()
    assert error(got[0], wanted[0]) < ERROR
    assert error(got[1], wanted[1]) < ERROR
    for one, other_one in zip(ours, (t for t in plain if t is not None), strict=True):
        # those of keep and add are sums of random signs, in which rounding weighs more
        assert error(one.grad, other_one.grad) < (ERROR if one.ndim else 5 * ERROR)


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_the_fused_descent_is_the_plain_one(shape: tuple[int, int], tmp_path: Path):
    module = module_of(tmp_path, **TINY)
    rows, columns = shape
    W, update = torch.randn(3, *shape, device=CUDA), torch.randn(3, columns, rows, device=CUDA).bfloat16().mT
    factor = torch.rand(3, rows, 1, device=CUDA) if rows >= columns else torch.rand(3, 1, columns, device=CUDA)
    wanted = W.double()
    module.plain_descend(wanted, update.double(), factor.double(), 0.1, 0.2)
    module.descend(W, update, factor, 0.1, 0.2)
    torch.testing.assert_close(W, wanted.float())


@pytest.mark.parametrize("trains", [True, False])
def test_the_whole_model_is_that_of_a_cpu(case: tuple[ModuleType, int, int], trains: bool):
    """With rows that are a slice of longer ones, as the evaluation has them, and with and without gradients."""
    module, B, T = case
    V, cpu = 500, torch.device("cpu")
    torch.manual_seed(1)
    plain = module.GPT(V, T, cpu)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.7 if p.ndim < 2 else 0.3 * p.size(1) ** -0.5)
    plain.dtype, plain.rotaries = torch.float32, {}
    model = module.GPT(V, T, CUDA)
    model.load_state_dict(plain.state_dict())
    rows = torch.randint(0, V, (B, T + 1))
    with torch.set_grad_enabled(trains):
        got, wanted = model(rows.to(CUDA)[:, :-1]), plain(rows[:, :-1])
        assert error(got.cpu(), wanted) < 5 * ERROR
        if trains:
            model(rows.to(CUDA)[:, :-1], rows.to(CUDA)[:, 1:]).backward()
            plain(rows[:, :-1], rows[:, 1:]).backward()
            pairs = zip(model.parameters(), plain.parameters(), strict=True)
            worst = max(error(a.grad.cpu(), b.grad) for a, b in pairs if a.ndim > 1 and b.grad is not None)
            assert worst < 0.1


@pytest.mark.parametrize("window", [1, 2, 8])  # over the row's length
@pytest.mark.parametrize("gated", [True, False])
def test_the_fused_attention_is_the_plain_one(case: tuple[ModuleType, int, int], window: int, gated: bool):
    module, B, T = hopper(case[0]), case[1], case[2]
    H, D, C, V = module.HEADS, module.HEAD_DIM, module.WIDTH, 50
    qkv, gates = randn(B, T, 3 * C), randn(B, T, H)
    table, tokens = randn(V, C, dtype=torch.float32), torch.randint(0, V, (B, T), device=CUDA)
    place = torch.outer(torch.arange(T, device=CUDA), 100.0 ** -torch.linspace(0, 1, D // 2, device=CUDA))
    cos, sin = (t.unsqueeze(1).bfloat16() for t in (place.cos(), place.sin()))
    extra = (gates, table) if gated else (None, None)
    grad = torch.randn(B, T, C, device=CUDA).bfloat16()
    leaf = qkv.detach().clone().requires_grad_()
    got = module.attend(leaf * 1, *extra, tokens, (cos, sin), T // window)
    got.backward(grad)
    qkv64, gates64, table64 = doubles(qkv, gates, table)
    q, k, v = qkv64.view(B, T, 3, H, D).unbind(2)
    if gated:
        v = v + gates64.unsqueeze(-1) * table64[tokens].view(v.shape)
    q, k = (module.norm(module.rotate(t, cos.double(), sin.double())) for t in (q, k))
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(D)
    seen = module.visible(T // window, T, CUDA)
    y = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v.transpose(1, 2)
    wanted = y.transpose(1, 2).reshape(B, T, C)
    wanted.backward(grad.double())
    assert error(got, wanted) < ERROR
    assert error(leaf.grad, qkv64.grad) < 2 * ERROR
    if gated:
        assert error(gates.grad, gates64.grad) < 2 * ERROR
        assert error(table.grad, table64.grad) < 2 * ERROR


@pytest.mark.parametrize("window", [1, 2, 8])
def test_windows_without_hopper_are_the_masked_dense_attention(case: tuple[ModuleType, int, int], window: int):
    module, B, T = case
    q, k, v = (randn(B, T, module.HEADS, module.HEAD_DIM) for _ in range(3))
    got = module.attention(q, k, v, T // window)
    grad = torch.randn_like(got)
    got.backward(grad)
    dense = doubles(q, k, v)
    across = (t.transpose(1, 2) for t in dense)
    wanted = F.scaled_dot_product_attention(*across, attn_mask=module.visible(T // window, T, CUDA)).transpose(1, 2)
    wanted.backward(grad.double())
    assert error(got, wanted) < ERROR
    for ours, theirs in zip((q, k, v), dense, strict=True):
        assert error(ours.grad, theirs.grad) < 2 * ERROR
