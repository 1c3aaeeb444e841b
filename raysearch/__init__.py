"""Autoresearch on every GPU that one owns: proposals, fixed-budget trials, a judge and a git ratchet."""

__version__ = "0.1.0"
