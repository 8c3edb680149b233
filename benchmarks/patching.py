"""How fast reading and patching is, beside Python's own start and beside bashlex, measured in one run.

    python benchmarks/patching.py [FOLDER]

FOLDER: scripts to read instead of those in tests/cases.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bashlex

from lorapatch.errors import LorapatchError
from lorapatch.launch import read_source
from lorapatch.lora import plan_patch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "original_scripts" / "train_mgm_2b_stage_1_10k_baseline.sh"


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def whole_process(rounds: int = 15) -> None:
    """`lorapatch patch` as a process against the imports alone, in turn; the medians."""
    program = str(Path(sys.executable).with_name("lorapatch"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(ROOT / "lorapatch")], check=True)
    imports, patch = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for old in Path(folder).iterdir():
                old.unlink()
            copy = Path(shutil.copy(SCRIPT, folder))
            peer = [sys.executable, "-c", "import click, bashlex, tree_sitter_bash"]
            imports.append(seconds(lambda peer=peer: subprocess.run(peer, check=True)))
            ours = [program, "patch", str(copy)]
            patch.append(seconds(lambda ours=ours: subprocess.run(ours, check=True, capture_output=True)))
    one, other = statistics.median(patch), statistics.median(imports)
    print(f"lorapatch patch, whole process     {one * 1e3:7.0f} ms")
    print(f"import click, bashlex, tree_sitter {other * 1e3:7.0f} ms    ratio {one / other:.2f}")


def hundred_checks(rounds: int = 3) -> None:
    """`lorapatch check` of a hundred scripts as one process, for each script, against a start with the same imports."""
    program = str(Path(sys.executable).with_name("lorapatch"))
    starts, checks = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"run{number}.sh") for number in range(100)]
        for number, path in enumerate(paths):
            path.write_bytes(SCRIPT.read_bytes().replace(b"2e-5", b"%de-5" % (number + 1)))
        for _ in range(rounds):
            peer = [sys.executable, "-c", "import click, tree_sitter, tree_sitter_bash"]
            starts.append(seconds(lambda peer=peer: subprocess.run(peer, check=True)))
            ours = [program, "check", *map(str, paths)]
            checks.append(seconds(lambda ours=ours: subprocess.run(ours, capture_output=True)) / len(paths))
    one, start = statistics.median(checks), statistics.median(starts)
    print(f"lorapatch check, each of 100       {one * 1e3:7.0f} ms")
    print(f"import click, tree_sitter          {start * 1e3:7.0f} ms    ratio {one / start:.2f}")


def corpus(folder: Path | None) -> list[bytes]:
    """A thousand scripts: those of the folder, again and again, each with a line of its own."""
    files = sorted((folder or ROOT / "tests" / "cases").rglob("*.sh"))
    found = [path.read_bytes() for path in files if ".patched" not in path.name]
    return [found[i % len(found)] + b"\n# %d\n" % i for i in range(1000)]


def many_scripts(scripts: list[bytes]) -> None:
    parsed, bashlex_s = [], 0.0
    for source in scripts:
        begin = time.perf_counter()
        try:
            bashlex.parse(source.decode())
        except Exception:
            continue
        bashlex_s += time.perf_counter() - begin
        parsed.append(source)

    def read() -> None:
        for source in parsed:
            read_source(source)

    def patch() -> None:
        for source in parsed:
            try:
                plan_patch(read_source(source))
            except LorapatchError:
                pass

    read_s, patch_s = seconds(read), seconds(patch)
    print(f"{len(scripts)} scripts; bashlex parses {len(parsed)} of them, {sum(map(len, parsed)) / 1e6:.2f} MB:")
    print(f"  bashlex.parse, whole files        {bashlex_s:7.2f} s")
    print(
        f"  read                              {read_s:7.2f} s    bashlex takes {bashlex_s / read_s:.1f} times as long"
    )
    print(
        f"  read, patch and prove             {patch_s:7.2f} s    bashlex takes {bashlex_s / patch_s:.1f} times as long"
    )


def long_scripts() -> None:
    body = SCRIPT.read_bytes()
    for megabytes in (2.5, 5, 10):
        text = body * round(megabytes * 1e6 / len(body))
        taken = seconds(lambda text=text: read_source(text))
        print(
            f"a script of {len(text) / 1e6:4.1f} MB is read in      {taken:7.2f} s    {taken / len(text) * 1e9:.0f} ns a byte"
        )


if __name__ == "__main__":
    whole_process()
    hundred_checks()
    many_scripts(corpus(Path(sys.argv[1]) if sys.argv[1:] else None))
    long_scripts()
