"""What a program of the study has to do and what it gets, in words for models, agents and people who write one.

It runs nothing; what is said of the bundled trainer is the contract that its harness enforces (docs/adr/0004).
"""

from __future__ import annotations

from raysearch.model import Direction
from raysearch.objective import TRAIN_FILE, Objective

# Facts alone: what a proposal may do is the proposer's to say. Every attribute of `run` here is held by a test.
_TRAINER = f"""\
`{TRAIN_FILE}` is one file that trains a language model. It defines `train(run)`, which returns an `nn.Module`: tokens,
int64 (B, T), to logits (B, T, V). A harness outside of it owns the clock, the seed, the order of the data and the
evaluation. `run` is all that passes between the two:
- `run.device`, `run.vocab_size` (V), `run.row_tokens` (T of the evaluation), `run.seed`, `run.budget_s` (None if the
  budget is in tokens) and `run.budget_tokens`.
- `run.batch(rows, seq_len)`: the next rows * seq_len training tokens and their successors, x and y, int64
  (rows, seq_len) on the device.
- `run.micro_batch(model, total_tokens=, seq_len=, at_most=, loss=)`: how many rows fit this card at once, a divisor of
  total_tokens / seq_len.
- `run.step(loss)`: ends an optimizer step. A loss that is not finite ends the trial.
- `run.progress` (0 to 1) and `run.done`: how much of the budget is spent, and whether all of it is. A step after
  `run.done` makes the trial invalid.
- `run.model`: what is scored at half of the budget, as `run.micro_batch` was called with; a program that returns
  another model sets it to that one, or to None.

What counts:
- The budget is wall-clock seconds of training, unless it is given in tokens: a faster step is more steps. Seconds count
  from the end of the first step: compilation is free, work is not. A first step with more tokens than the later ones
  makes the trial invalid.
- The evaluation is fixed: the harness computes the cross-entropy in float32 on rows of its own. It checks that logits
  do not depend on later tokens, on other rows or on earlier calls, and refuses the model if they do.
- Whatever is random comes from the seed, which the harness has set; trials have different ones.
- A trial that runs out of memory, crashes, or is far behind at half of the budget gives no score.
- The program may import what is installed: torch, triton where there is a GPU, and the standard library."""
_KNOBS = """\
Knobs are constants at the top of the module, alone on a line, with their range in the comment:
`NAME = 8  # in [1, 24]: text`, `# in [0.001, 0.3] log: text` (ratios matter), `# in {64, 128, 256}: text` (choices).
A value outside of its range is refused; the range may be changed with it. A line `# rule: A % B == 0` states a
condition on knobs that searchers keep. Values that are computed have no range."""


def task(objective: Objective, *, budget: str) -> str:
    """Says what is wanted: the metric, the files, the command and the budget.

    Args:
        objective: The study's.
        budget: Of a trial, with its unit; empty for an objective that has none.
    """
    better = "lower" if objective.direction is Direction.MINIMIZE else "higher"
    wanted = f"The metric is `{objective.metric}`: {better} is better."
    lines = [wanted, f"Files that may be changed: {_named(objective.editable)}. No other file may be changed or made."]
    if objective.has_presets:
        return "\n".join([*lines, f"The budget of a trial is {budget}.", "", _TRAINER, "", _KNOBS])
    if objective.protected:
        lines.append(f"Files that are there and stay as they are: {_named(objective.protected)}.")
    lines.append(f"The command of a trial: `{' '.join(objective.command)}`. It prints `{objective.metric}: NUMBER`.")
    lines.append(f"A trial may take {objective.timeout_s:g} s.")
    return "\n".join([*lines, "", _KNOBS])


def _named(paths: tuple[str, ...]) -> str:
    return ", ".join(f"`{path}`" for path in paths)
