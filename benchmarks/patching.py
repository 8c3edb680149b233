"""How fast reading and patching is, beside Python's own start and beside bashlex, measured in one run.

    python benchmarks/patching.py [FOLDER]

FOLDER: scripts to read instead of those in tests/cases.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bashlex

from lorapatch.errors import UsageError
from lorapatch.launch import Launch, Script, read_source
from lorapatch.lora import PatchOptions, plan_patch
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.dialect import flags_for
from lorapatch.lora.plan import _plan as edits_for
from lorapatch.shell.command import check_words
from lorapatch.shell.edit import apply_edits

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "original_scripts" / "train_mgm_2b_stage_1_10k_baseline.sh"


class Cost(NamedTuple):
    """Seconds by the clock, and of processor time, that of child processes included: less moved by what else runs."""

    wall: float
    cpu: float

    def beside(self, other: Cost) -> str:
        return f"bashlex takes {other.wall / self.wall:.1f} times as long, {other.cpu / self.cpu:.1f} times the processor time"


def cost(work: Callable[[], object]) -> Cost:
    begin, before = time.perf_counter(), os.times()
    work()
    wall, after = time.perf_counter() - begin, os.times()
    return Cost(wall, sum(after[:4]) - sum(before[:4]))


def seconds(work: Callable[[], object]) -> float:
    return cost(work).wall


def middle(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(values) for values in zip(*costs)))


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
            imports.append(cost(lambda peer=peer: subprocess.run(peer, check=True)))
            ours = [program, "patch", str(copy)]
            patch.append(cost(lambda ours=ours: subprocess.run(ours, check=True, capture_output=True)))
    one, other = middle(patch), middle(imports)
    print(f"lorapatch patch, whole process     {one.wall * 1e3:7.0f} ms    {one.cpu * 1e3:5.0f} ms of processor time")
    print(f"import click, bashlex, tree_sitter {other.wall * 1e3:7.0f} ms    {other.cpu * 1e3:5.0f} ms", end="")
    print(f"    ratio {one.wall / other.wall:.2f}, {one.cpu / other.cpu:.2f}")


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
    """Reading and patching in one process against bashlex on the whole files, of which it must understand each."""
    parsed = [source for source in scripts if quietly(lambda source: bashlex.parse(source.decode()), source)]
    patched = [source for source in parsed if quietly(plan_edits, source)]
    print(f"{len(scripts)} scripts; bashlex parses {len(parsed)} of them, {sum(map(len, parsed)) / 1e6:.2f} MB:")
    compare(parsed, {"read": read_source})
    print(f"of these, {len(patched)} have a launch to patch, {sum(map(len, patched)) / 1e6:.2f} MB:")
    levels = {
        "read": read_source,
        "read and plan the edits": plan_edits,
        "… and read what they make": read_edited,
        "… and ask bash, twice": lambda source: plan_patch(read_source(source)),
        "nothing but two starts of bash": start_bash,
    }
    compare(patched, levels)


def compare(scripts: list[bytes], levels: dict[str, Callable[[bytes], object]]) -> None:
    """Each level on all scripts, next to bashlex.parse on the same; in turn, fifty scripts at a time."""
    works = {"bashlex.parse, whole files": lambda source: bashlex.parse(source.decode()), **levels}
    spent: dict[str, list[Cost]] = {name: [] for name in works}
    for at in range(0, len(scripts), 50):
        for name, work in works.items():
            some = scripts[at : at + 50]
            spent[name].append(cost(lambda work=work, some=some: [quietly(work, source) for source in some]))
    total = {name: Cost(*map(sum, zip(*costs))) for name, costs in spent.items()}
    peer = next(iter(total.values()))
    for name, ours in total.items():
        comparison = "" if ours is peer else ours.beside(peer)
        print(f"  {name:34} {ours.wall / len(scripts) * 1e3:6.2f} ms a script    {comparison}".rstrip())


def quietly(work: Callable[[bytes], object], source: bytes) -> bool:
    """Whether ``work`` can do anything with ``source``; bashlex raises many kinds."""
    try:
        work(source)
    except Exception:
        return False
    return True


def plan_edits(source: bytes) -> tuple[Script, Launch, bytes]:
    """The patched text, bytes to bytes: what a patch is before anything is proved of it."""
    script = read_source(source)
    launch = choose_launch(script, None)
    check_words(launch.text.outline, launch.command)
    flags = flags_for(None, PatchOptions())[0]
    text = apply_edits(source, edits_for(script, launch, flags)[0])
    if text == source:
        raise UsageError("nothing to patch")
    return script, launch, text


def read_edited(source: bytes) -> None:
    """Both parsers on the patched text as well."""
    script, launch, text = plan_edits(source)
    now = read_source(text).launches[launch.number - 1]
    check_words(now.text.outline, now.command)


def start_bash(source: bytes) -> None:
    """Two processes at a time, as a patch has them."""
    both = [subprocess.Popen(["bash", "--norc", "-n"], stdin=subprocess.DEVNULL) for _ in range(2)]
    for one in both:
        one.wait()


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
