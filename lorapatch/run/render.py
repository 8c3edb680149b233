"""Scripts that run one stage of a script alone, or all of it safely: Jinja templates, filled from what was read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lorapatch
from lorapatch.errors import Refused, UsageError
from lorapatch.launch import Launch, Script, read_source
from lorapatch.launch.options import module_option
from lorapatch.lora.plan import set_flags
from lorapatch.resources import resource_dir
from lorapatch.run.options import free_port, port_edit, set_options
from lorapatch.run.pin import pin_script_path
from lorapatch.run.slice import Slice, slice_launch
from lorapatch.shell.edit import Edit, apply_edits
from lorapatch.shell.syntax import syntax_error

__all__ = ["TEMPLATES", "Rendered", "about", "fill", "render"]

TEMPLATES = ("test_lora_minimal", "probe", "full", "sbatch", "multinode")
_NO = {"no", "none", "false", "0"}


@dataclass(frozen=True)
class Rendered:
    """A rendered script: its text, where it saves, and what was set or left out, with the reasons in ``notes``."""

    text: bytes
    template: str
    output_dir: Path | None  # the trainer's --output_dir; None: the script's own
    log: Path | None
    changed: Mapping[str, str]
    notes: tuple[str, ...]


def render(
    script: Script,
    launch: Launch,
    template: str = "test_lora_minimal",
    *,
    target: Path | None = None,
    folder: Path | None = None,
    max_steps: int | None = None,
    save_steps: int | None = None,
    logging_steps: int | None = None,
    flags: Mapping[str, str] | None = None,
    drop: Iterable[str] = (),
    hostfile: str | None = None,
    num_gpus: int | None = None,
    num_nodes: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> Rendered:
    """The stage that ``launch`` of ``script`` starts, as a script of its own.

    ``template`` is one of ``TEMPLATES`` or the path of a file of the user's. ``target`` is where the result will be
    written: beside the script, ``$(dirname "$0")`` in it stays as it is; elsewhere it is pinned to the script's folder.
    ``folder`` is where the test saves and logs (default: beside the target); ``max_steps`` 5, ``save_steps`` 2 and
    ``logging_steps`` 1 are the defaults of ``test_lora_minimal``, 1 step of ``probe``; the other templates leave the
    flags as they are. ``flags`` sets further ones, ``drop`` leaves some out. ``settings`` are further variables for the
    template. Nothing is written and nothing is run.

    The variables that a template may use: script_name, script (path), line, stage, launcher, version, changed (pairs of
    flag and value), notes, setup, launch, trainer, stdin, unset, positional, folder, output_dir, log, max_steps,
    save_steps, logging_steps, hostfile, num_gpus, num_nodes, node_launcher, job_name, job_log, cpus_per_task,
    time_limit; and the filters shellquote, oneline, sbatch.

    Raises Refused when the launch cannot be taken out of the script or a flag cannot be set safely, UsageError for a
    template that is missing, is wrong, or uses a variable there is not.
    """
    _check_numbers(
        max_steps=max_steps, save_steps=save_steps, logging_steps=logging_steps, num_gpus=num_gpus, num_nodes=num_nodes
    )
    kind = Path(template).name.removesuffix(".j2").removesuffix(".sh")
    target = target or _beside(script, kind)
    folder = folder or target.with_name(f"{target.stem}_output")
    steps = _steps(kind, max_steps, save_steps, logging_steps)
    alone = _alone(script, launch, target)
    notes: list[str] = []
    wanted = dict(flags or {})
    dropped = list(drop)
    if steps["max_steps"] is not None:
        wanted = {**_test_flags(alone, kind, steps, folder), **wanted}
        dropped += ["resume_from_checkpoint"]
    alone = _without_flags(alone, dropped, notes)
    alone = _with_flags(alone, wanted)
    alone = _with_options(alone, hostfile, num_gpus if kind != "sbatch" else None)
    part = slice_launch(alone, _last(alone))
    context = {
        **about(script),
        **_about_launch(launch),
        **_parts(part, alone),
        **steps,
        **_cluster(launch, kind, hostfile, num_gpus, num_nodes),
        "folder": str(folder),
        "output_dir": str(folder / "model"),
        "log": str(folder / "train.log"),
        "changed": [(f"--{name}", value) for name, value in wanted.items()],
        "notes": notes,
        **(settings or {}),
    }
    text = fill(template, context)
    output = folder / "model" if steps["max_steps"] is not None else None
    return Rendered(text, kind, output, folder / "train.log", wanted, tuple(notes))


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} has to be at least 1, not {number}")


def _beside(script: Script, kind: str) -> Path:
    return (script.path or Path.cwd() / "script.sh").with_name(f"{kind}.sh")


def _steps(
    kind: str, max_steps: int | None, save_steps: int | None, logging_steps: int | None
) -> dict[str, int | None]:
    """The numbers of a test; all None for a template that runs the stage whole."""
    known = {"probe": (1, 1, 1), "sbatch": (None, None, None), "multinode": (None, None, None)}
    given = (max_steps, save_steps, logging_steps)
    chosen = [own if own is not None else default for own, default in zip(given, known.get(kind, (5, 2, 1)))]
    if chosen[0] is not None:  # sbatch or multinode turned into a test
        chosen = [number if number is not None else default for number, default in zip(chosen, (5, 2, 1))]
    return dict(zip(("max_steps", "save_steps", "logging_steps"), chosen))


def _alone(script: Script, launch: Launch, target: Path) -> Script:
    """A script of the launch and what it depends on, ``$0`` pinned where that is needed."""
    part = slice_launch(script, launch)
    text = pin_script_path(part.text, script.path, target)
    alone = read_source(text, script.path)
    if not alone.launches:
        raise Refused(
            f"line {launch.line}: the launch cannot be taken out of the script; write it as a command of its own"
        )
    return _without_inner_redirects(alone)


def _last(script: Script) -> Launch:
    return script.launches[-1]


def _without_inner_redirects(script: Script) -> Script:
    """A launch that a string holds, without the log or pipe that the string holds behind it."""
    launch = _last(script)
    offsets = launch.text.offsets
    if offsets is None or launch.text.where != "string":
        return script
    words = [last for _, last in launch.command.words]
    text = launch.text.outline.source
    rest = text[words[-1] :]
    if not rest.strip():
        return script
    inside = [offset for offset in offsets[words[-1] : len(text.rstrip())] if offset >= 0]
    if not inside or inside[-1] - inside[0] != len(inside) - 1:
        return script  # put together from several strings: it stays as it is
    return read_source(apply_edits(script.source, [Edit(inside[0], inside[-1] + 1, b"")]), script.path)


def _test_flags(script: Script, kind: str, steps: Mapping[str, int | None], folder: Path) -> dict[str, str]:
    """What makes a short run of its own out of the real one, whatever the script asks for."""
    launch = _last(script)
    flags = {"max_steps": str(steps["max_steps"])}
    if kind == "probe":
        flags["save_strategy"] = "no"
    else:
        flags["save_steps"] = str(steps["save_steps"])
        if _value(launch, "save_strategy") not in (None, "steps"):
            flags["save_strategy"] = "steps"
    flags["logging_steps"] = str(steps["logging_steps"])
    if _value(launch, "logging_strategy") not in (None, "steps"):
        flags["logging_strategy"] = "steps"
    for name in ("evaluation_strategy", "eval_strategy", "report_to"):
        value = _value(launch, name)
        if value is not None and value.lower() not in _NO:
            flags[name] = "none" if name == "report_to" else "no"
            if name != "report_to" and (_value(launch, "load_best_model_at_end") or "false").lower() not in _NO:
                flags["load_best_model_at_end"] = "False"
    flags["output_dir"] = str(folder / "model")
    return flags


def _value(launch: Launch, name: str) -> str | None:
    flag = launch.flag(name)
    return None if flag is None else flag.value if flag.value is not None else flag.text


def _without_flags(script: Script, names: Iterable[str], notes: list[str]) -> Script:
    edits: list[Edit] = []
    for name in names:
        for flag in _last(script).all_flags(name):
            end = flag.values[-1].span[1] if flag.values else flag.word.span[1]
            start = flag.word.span[0]
            if start < 0 or end < start:
                raise Refused(f"{flag.name} is put together from several places and cannot be left out; write it out")
            # With the blanks and the continued line before it, so that no line with nothing but a backslash is left.
            before = re.search(rb"(?:[ \t]|\\\n)*\Z", script.source[:start])
            assert before is not None
            edits.append(Edit(before.start(), end, b""))
            notes.append(f"{flag.name} {flag.text} is left out")
    return read_source(apply_edits(script.source, edits), script.path) if edits else script


def _with_flags(script: Script, flags: Mapping[str, str]) -> Script:
    if not flags:
        return script
    try:
        return read_source(
            set_flags(script, _last(script), {name: (value,) for name, value in flags.items()}).text, script.path
        )
    except Refused:
        # The command stands at the end of a text of our own, and the last of two equal flags counts, also behind
        # `eval "$CMD"`.
        launch = _last(script)
        if launch.text.where == "command" or launch.use.heredocs or not _runs_by_eval(script, launch):
            raise
        words = "".join(f" --{name} {shlex.quote(value)}" for name, value in flags.items())
        edit = Edit(launch.use.words[-1][1], launch.use.words[-1][1], words.encode("utf-8", "surrogateescape"))
        return read_source(apply_edits(script.source, [edit]), script.path)


def _runs_by_eval(script: Script, launch: Launch) -> bool:
    first = script.source[slice(*launch.use.words[0])]
    return first == b"eval" or first.startswith((b"$", b'"$'))


def _with_options(script: Script, hostfile: str | None, num_gpus: int | None) -> Script:
    edits = set_options(_last(script), hostfile=hostfile, num_gpus=num_gpus)
    if edits:
        script = read_source(apply_edits(script.source, edits), script.path)
    edit = port_edit(_last(script), free_port())
    return read_source(apply_edits(script.source, [edit]), script.path) if edit else script


def about(script: Script) -> dict[str, Any]:
    """The variables that every template has."""
    path = script.path or Path("script.sh")
    return {
        "version": lorapatch.__version__,
        "script": str(path),
        "script_name": path.name,
        "job_name": path.stem,
        "job_log": f"{path.stem}-%j.log",
        "cpus_per_task": 8,
        "time_limit": "24:00:00",
    }


def _about_launch(launch: Launch) -> dict[str, Any]:
    names = {"finetune": "the fine-tuning", "pretrain": "the pre-training"}
    return {"line": launch.line, "launcher": launch.launcher, "stage": names.get(launch.stage.name or "", "the stage")}


def _parts(part: Slice, script: Script) -> dict[str, Any]:
    launch = _last(script)
    trainer = script.source[launch.program[0].span[0] : _end_of(launch)] if launch.text.offsets is None else b""
    if launch.runs_module:
        trainer = module_option(launch.launcher).encode() + b" " + trainer
    return {
        "setup": _decode(b"\n".join(part.setup)),
        "launch": _decode(part.command),
        "trainer": _decode(trainer),
        "stdin": _decode(part.stdin),
        "unset": part.unset,
        "positional": part.positional,
    }


def _end_of(launch: Launch) -> int:
    """The byte behind the last word of a launch that is a command of the script."""
    return max(last for _, last in launch.use.words)


def _cluster(launch: Launch, kind: str, hostfile: str | None, num_gpus: int | None, num_nodes: int) -> dict[str, Any]:
    if kind == "sbatch" and num_nodes > 1 and launch.text.offsets is not None:
        raise Refused(
            f"line {launch.line}: the launch is kept in a variable; write it as a command for a job of several nodes"
        )
    gpus = num_gpus or 1
    common = "--master_addr=$MASTER_ADDR --master_port=$MASTER_PORT"
    if launch.launcher == "deepspeed":
        runner = (
            rf"python -u -m deepspeed.launcher.launch --world_info=$lorapatch_world --node_rank=\$SLURM_NODEID {common}"
        )
    elif launch.launcher == "accelerate":
        runner = (
            rf"accelerate launch --num_machines={num_nodes} --num_processes={num_nodes * gpus}"
            rf" --machine_rank=\$SLURM_NODEID"
            " --main_process_ip=$MASTER_ADDR --main_process_port=$MASTER_PORT"
        )
    else:
        runner = (
            rf"python -m torch.distributed.run --nnodes={num_nodes} --nproc_per_node={gpus}"
            rf" --node_rank=\$SLURM_NODEID {common}"
        )
    return {
        "hostfile": hostfile or "hostfile",
        "num_gpus": gpus,
        "num_nodes": num_nodes,
        "node_launcher": runner,
    }


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


# -- Jinja -----------------------------------------------------------------------------------------------------------


def fill(template: str, context: Mapping[str, Any]) -> bytes:
    """The text of ``template`` with ``context``; bash has to accept it. Raises UsageError, Refused."""
    import jinja2  # 110 ms

    ours = resource_dir("templates")
    file = Path(template)
    name, folders = (f"{template}.sh.j2", [ours]) if template in TEMPLATES else (file.name, [file.parent, ours])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters.update(shellquote=_shellquote, oneline=_oneline, sbatch=_sbatch)
    try:
        text = environment.get_template(name).render(context)
    except jinja2.TemplateNotFound as error:
        known = ", ".join(TEMPLATES)
        raise UsageError(
            f"there is no template {error.name}; there are {known}, or the path of a file of your own"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"{error.filename or name}, line {error.lineno}: {error.message}") from error
    except jinja2.UndefinedError as error:
        names = ", ".join(sorted(context))
        raise UsageError(f"{name}: {error.message}; there are {names}") from error
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{template} cannot be read as a template ({error})") from error
    rendered = text.encode("utf-8", "surrogateescape")
    if (objection := syntax_error(rendered)) is not None:
        raise Refused(f"{name}: bash does not accept what it makes: {objection}")
    return rendered


def _shellquote(value: object) -> str:
    return shlex.quote(str(value))


def _oneline(value: object) -> str:
    """For comments: what would end the line is shown as what it is."""
    return str(value).replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def _sbatch(value: object) -> str:
    """A value in an ``#SBATCH`` line, which Slurm reads with double quotes and backslashes."""
    text = str(value)
    if "\n" in text:
        raise UsageError(f"{text!r} cannot stand in an #SBATCH line")
    return text if re.fullmatch(r"[\w./%:+-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
