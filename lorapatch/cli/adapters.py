"""verify, merge: what a run left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

__all__ = ["merge", "verify"]

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("directory", type=FOLDER)
@click.option("--base", type=FOLDER, help="The base model's folder (default: the one that the adapter names).")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Held-out samples: loss and exact match before and after."
)
@click.option("--tier", "tiers", type=click.Choice(["1", "2", "3"]), multiple=True, help="1 files, 2 loaded, 3 merged.")
@click.option("--peers", is_flag=True, help="Compare with what PEFT itself computes, tensor by tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(
    directory: Path, base: Path | None, data: Path | None, tiers: tuple[str, ...], peers: bool, as_json: bool
) -> None:
    """Prove the adapter that a run left."""
    from lorapatch.adapter.verify import verify as look

    chosen = tuple(int(tier) for tier in tiers) or (1, 2, 3)
    found = look(directory, base=base, data=data, peers=peers, tiers=chosen)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
    else:
        colours = {"pass": "green", "fail": "red"}
        for finding in found.findings:
            state = click.style(f"{finding.state:11}", fg=colours.get(finding.state, "yellow"))
            click.echo(f"{state}  {finding.sentence}")
    sys.exit(0 if found.passed else 1)


@click.command()
@click.argument("directory", type=FOLDER)
@click.option(
    "-o", "--output", type=FOLDER, required=True, help="Where the merged model goes; may be DIRECTORY itself."
)
@click.option("--base", type=FOLDER, help="The base model's folder (default: the one that the adapter names).")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Default: the base's own.")
@click.option("--shard-size", default="2GB", show_default=True)
def merge(directory: Path, output: Path, base: Path | None, dtype: str | None, shard_size: str) -> None:
    """Merge an adapter into its base model."""
    from lorapatch.adapter.merge import merge as write

    done = write(directory, output, base=base, dtype=dtype, shard_size=shard_size)
    click.echo(
        f"{done.output}: merged, {done.changed} of {done.tensors} tensors changed, {done.bytes / 2**30:.2f} GiB of"
        f" {done.dtype} in {done.shards} shard{'s' if done.shards > 1 else ''}, {done.seconds:.1f} s"
    )
    if done.kept is not None:
        click.echo(f"{done.kept}: the adapter")
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
