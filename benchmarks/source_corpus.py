"""Collects the source text on a machine's own disk into Parquet files, for machines that no network reaches.

    python benchmarks/source_corpus.py --out DIR [--root /] [--mb 780]
    python -m trainer.prepare --dataset files:DIR --vocab-size 8192 --row-tokens 2048 --data DATA

It neither divides, tokenises nor packs: that is `trainer.prepare`.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = frozenset(
    "." + name
    for names in (
        ("py", "pyi", "pyx", "c", "h", "cc", "cpp", "hpp", "cxx", "hxx", "inl", "cu", "cuh", "js", "ts", "java", "rs"),
        ("go", "jl", "r", "f", "f90", "sh", "pl", "pm", "tcl", "cmake", "sql", "proto", "txt", "md", "rst", "tex"),
        ("html", "css", "xml", "yaml", "yml", "toml", "cfg", "ini", "json", "ipynb"),
    )
    for name in names
)
SKIPPED = frozenset(("proc", "sys", "dev", "run", "tmp", ".git", "__pycache__", "node_modules"))
LARGEST_BYTES, SMALLEST_BYTES = 1_000_000, 64  # a longer file is a generated table
SHARD_BYTES = 64_000_000


def paths(root: Path) -> Iterator[str]:
    """Files that may be source text, in an order that depends on their names alone."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in SKIPPED)
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(folder, name)


def read(path: str) -> tuple[bytes, str] | None:
    """A file's digest and text; None for what is no text, too long or too short."""
    try:
        if os.path.islink(path) or not SMALLEST_BYTES <= os.path.getsize(path) <= LARGEST_BYTES:
            return None
        with open(path, "rb") as file:
            data = file.read()
        return hashlib.blake2b(data, digest_size=16).digest(), data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def main() -> None:
    """Writes DIR/NNN.parquet with one column, `text`; a text that occurs twice is written once."""
    parser = argparse.ArgumentParser(description="Collects the source text on this machine's disk into Parquet files.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("/"))
    parser.add_argument("--mb", type=float, default=780.0, help="stop after so many MB of text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    shard: list[str] = []
    total_bytes = shard_bytes = shards = 0

    def write() -> None:
        nonlocal shards, shard_bytes
        if shard:
            pq.write_table(pa.table({"text": shard}), args.out / f"{shards:03d}.parquet", compression="zstd")
            shards, shard_bytes = shards + 1, 0
            shard.clear()

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(read, paths(args.root), chunksize=64):
            if found is None or found[0] in seen:
                continue
            seen.add(found[0])
            shard.append(found[1])
            shard_bytes, total_bytes = shard_bytes + len(found[1]), total_bytes + len(found[1])
            if shard_bytes >= SHARD_BYTES:
                write()
            if total_bytes >= args.mb * 1e6:
                break
        write()
    if not seen:
        sys.exit(f"{args.root}: no source text there; name another folder with --root")
    print(f"{args.out}: {len(seen):,} texts, {total_bytes / 1e6:,.0f} MB in {shards} files")


if __name__ == "__main__":
    main()
