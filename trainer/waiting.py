"""A harness in waiting: a process that has torch loaded before its trial is there, and takes the trial by one order.

It reads nothing of a candidate, makes no CUDA context, and decides nothing: who started it gives the order, or ends it.
"""

import contextlib
import gc
import importlib
import io
import json
import os

HELP = """With --wait instead of all else it loads what any trial needs (with --compiler also what a first kernel of
Triton and a first torch.compile import), waits for one line of JSON on its standard input, and goes on as if started as
the line says: `arguments`, `folder` to work in, `log` to print to, `environment` to add. At the end of its input it
ends."""

# What a first `torch.compile`, `flex_attention` and kernel of Triton import beside torch itself. Each may be missing in
# another version of torch: then who needs it imports it. None of them makes a CUDA context or starts a process.
COMPILER = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.async_compile",
    "torch._inductor.codegen.triton",
    "torch._inductor.runtime.triton_heuristics",
    "torch._inductor.kernel.flex",
    "torch._functorch._aot_autograd.autograd_cache",
    "torch.nn.attention.flex_attention",
    "torch._inductor.compile_worker.subproc_pool",
    "torch._subclasses.schema_check_mode",
    "torch._dynamo.dce_extra_outputs",
    "torch._higher_order_ops.passes",
    "torch.export._unlift",
    "torch.export._trace",
    "sympy.combinatorics",
    "triton.language",
    "triton.compiler.compiler",
    "triton.backends.nvidia.compiler",
    "triton.tools.tensor_descriptor",
    "triton.experimental.gluon.nvidia.hopper",
)


def wanted(arguments: list[str]) -> bool:
    """Whether the command line asks for a process in waiting."""
    return arguments[:1] == ["--wait"]


def load(arguments: list[str]) -> None:
    """Imports what the command line asks for beside what the harness has imported."""
    for name in COMPILER if "--compiler" in arguments else ():
        # whatever is wrong with a module, the compile that needs it says so in its turn, in a trial's log
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if "--compiler" in arguments:
        with contextlib.suppress(Exception):
            # its own files are part of the key of everything that Triton compiles: it reads them once in a process
            importlib.import_module("triton.runtime.cache").triton_key()
    gc.collect()
    gc.freeze()  # collections during the trial's first step need not walk through all of this again


def take_order() -> list[str]:
    """Waits for the order and becomes the process that it describes; returns the trial's arguments.

    A pipe and no file: nothing has to be looked for again and again, nothing is left on a disk, and its end says that
    nobody is there any more who could give an order.
    """
    line = io.FileIO(0, closefd=False).readline()  # unbuffered: what follows the line is nobody's
    if not line:
        os._exit(0)
    order = json.loads(line)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    return order["arguments"]
