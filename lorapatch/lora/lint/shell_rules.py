"""Rules about the shell script itself: what bash would do that its author did not mean."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lorapatch.errors import Refused
from lorapatch.lora.lint.facts import Facts
from lorapatch.lora.lint.rule import Found, rule
from lorapatch.shell.command import check_not_cut
from lorapatch.shell.outline import Command, Context
from lorapatch.shell.syntax import syntax_error

__all__: list[str] = []

_LINE = re.compile(r"\bline (\d+):? ?")
_PIPEFAIL = re.compile(rb"\bset\s+(?:[-+]\w+\s+)*-\w*o\s+pipefail|\bset\s+-o\s+pipefail|bash\s[^\n]*-o\s+pipefail")
_STATUS = re.compile(rb"\$\?|\$\{\?\}")
_SAME_PIPELINE = re.compile(rb"[\s\\]*(?:[0-9]*>&[0-9-]\s*)?\|&?[\s\\]*")
_AND_OR = re.compile(rb"[ \t\\\n]*(?:&&|\|\|)")
_USE = re.compile(r"\$(?:\{([A-Za-z_]\w*)(?![\w:+=?-])|([A-Za-z_]\w*))")
_SINGLE_QUOTED = re.compile(r"(?<![\\\w\"])'[^']*'")
_READERS = ("read", "mapfile", "readarray", "getopts", "printf")
# What the environment of a training script usually holds already.
_ENVIRONMENT = re.compile(
    r"(?:\w*PATH|HOME|USER|PWD|SHELL|TMPDIR|HOSTNAME|LANG|LC_\w+|CUDA_\w+|NCCL_\w+|GLOO_\w+|OMP_\w+|HF_\w+|WANDB_\w+|"
    r"MASTER_\w+|WORLD_SIZE|RANK|LOCAL_RANK|NODE_RANK|SLURM_\w+|PET_\w+|MLP_\w+|TRANSFORMERS_\w+|DS_\w+|PYTHON\w*|"
    r"VIRTUAL_ENV|CONDA_\w+|TOKENIZERS_\w+|RANDOM|SECONDS|LINENO|BASH\w*|UID|EUID|OSTYPE|PS\d|IFS|OPTARG|OPTIND)"
)


@rule("LP100", "unreadable", "error", "a script cannot be read at all", "give a bash script with plain line ends")
def _unreadable(facts: Facts) -> Iterator[Found]:
    yield from ()  # there are no facts of such a script: check_script itself says so


@rule("LP101", "syntax", "error", "bash finds a syntax error", "mend the line that bash names")
def _syntax(facts: Facts) -> Iterator[Found]:
    error = syntax_error(facts.source)
    if error:
        match = _LINE.search(error)
        yield Found(int(match[1]) if match else 1, f"bash -n: {_LINE.sub('', error)}")


@rule(
    "LP102",
    "cut-command",
    "error",
    "a command ends before its flags do",
    "let the backslash be the last character of the line, and put comments above the command",
)
def _cut(facts: Facts) -> Iterator[Found]:
    outline = facts.script.outline
    texts = [(outline, command) for command in outline.commands]
    texts += [(f.launch.text.outline, f.launch.command) for f in facts.launches if f.launch.text.offsets is not None]
    seen = set()
    for text, command in texts:
        try:
            check_not_cut(text, command)
        except Refused as refusal:
            match = _LINE.match(str(refusal))
            line = int(match[1]) if match and text is outline else outline.line(command.start)
            if line not in seen:
                seen.add(line)
                yield Found(line, _LINE.sub("", str(refusal), count=1))


@rule(
    "LP103",
    "status-behind-pipe",
    "warning",
    "the status that is tested is that of the last command of a pipe",
    "put `set -o pipefail` at the top of the script, or test ${PIPESTATUS[0]}",
)
def _status(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.launches:
        launch = facts_of.launch
        if not launch.piped or _PIPEFAIL.search(facts.source, 0, launch.start):
            continue
        last = _end_of_pipeline(facts, launch.use)
        tail = facts.source[last.end :]
        status = _STATUS.search(facts.source, last.end, _end_of_next(facts, last))
        program = facts.source[slice(*last.words[0])].decode("utf-8", "replace") if last.words else "the last command"
        if status:
            line = facts.script.line(status.start())
            yield Found(line, f"$? is the status of {program}, not of the training on line {launch.line}")
        elif _AND_OR.match(tail):
            line = facts.script.line(last.end)
            yield Found(line, f"&& and || test the status of {program}, not of the training on line {launch.line}")


def _end_of_pipeline(facts: Facts, command: Command) -> Command:
    """The last command of the pipe that a command feeds."""
    for other in facts.script.outline.commands:
        if other.start >= command.end and _SAME_PIPELINE.fullmatch(facts.source[command.end : other.start]):
            command = other
    return command


def _end_of_next(facts: Facts, command: Command) -> int:
    """The end of the first command or assignment behind a command; a ``[ … ]`` between the two counts with it."""
    outline = facts.script.outline
    spans = [(c.start, c.end) for c in outline.commands] + [a.statement for a in outline.assignments]
    return min((span for span in spans if span[0] >= command.end), default=(0, len(facts.source)))[1]


@rule(
    "LP104",
    "unset-variable",
    "error",
    "a variable is used above the line that sets it",
    "move the assignment above its first use",
)
def _unset(facts: Facts) -> Iterator[Found]:
    first_set = _first_set(facts)
    reported = set()
    for offset, name, context in sorted(_uses(facts)):
        if name in reported or name not in first_set or name in facts.environment or _ENVIRONMENT.fullmatch(name):
            continue
        where, set_context = first_set[name]
        if offset >= where or _shares_loop(context, set_context):
            continue
        reported.add(name)
        line, later = facts.script.line(offset), facts.script.line(where)
        yield Found(line, f"${name} is used here but set on line {later}, so it is empty")


def _first_set(facts: Facts) -> dict[str, tuple[int, Context]]:
    """Where each variable is first given a value; not those that take what the environment has for them."""
    outline = facts.script.outline
    found: dict[str, tuple[int, Context]] = {}
    given = set()
    for assignment in outline.assignments:
        value = facts.source[slice(*assignment.value)].decode("utf-8", "replace")
        first = assignment.name not in found
        if first and (assignment.append or re.search(rf"\$\{{?{re.escape(assignment.name)}\b", value)):
            given.add(assignment.name)
        found.setdefault(assignment.name, (assignment.start, assignment.context))
    for name, offset in outline.loop_variables:
        if name not in found or offset < found[name][0]:
            found[name] = (offset, ())
    for command in outline.commands:
        words = [facts.source[slice(*span)].decode("utf-8", "replace") for span in command.words]
        if words and words[0] in _READERS:
            given.update(word for word in words[1:] if word.isidentifier())
        elif words and words[0] in ("source", "."):  # may set anything
            found = {name: where for name, where in found.items() if where[0] < command.start}
    return {name: where for name, where in found.items() if name not in given}


def _uses(facts: Facts) -> Iterator[tuple[int, str, Context]]:
    outline = facts.script.outline
    for command in outline.commands:
        if not _in_function(command.context):
            for span in (*command.words, *command.redirects):
                yield from _uses_in(facts, span, command.context)
    for assignment in outline.assignments:
        if not _in_function(assignment.context):
            for offset, name, context in _uses_in(facts, assignment.value, assignment.context):
                if name != assignment.name:
                    yield offset, name, context


def _uses_in(facts: Facts, span: tuple[int, int], context: Context) -> Iterator[tuple[int, str, Context]]:
    text = facts.source[slice(*span)].decode("latin-1")
    text = _SINGLE_QUOTED.sub(lambda match: " " * len(match[0]), text)
    for match in _USE.finditer(text):
        if match.start() == 0 or text[match.start() - 1] != "\\":
            yield span[0] + match.start(), match[1] or match[2], context


def _in_function(context: Context) -> bool:
    return any(kind == "function" for kind, _ in context)


def _shares_loop(one: Context, other: Context) -> bool:
    """Set further down in the same loop: from its second turn on it is set."""
    loops = {where for where in one if where[0] in ("for", "while")}
    return any(where in loops for where in other)


@rule("LP105", "flag-twice", "warning", "a flag is given twice", "take one of them out: the last one counts")
def _twice(facts: Facts) -> Iterator[Found]:
    for facts_of in facts.launches:
        seen: dict[str, int] = {}
        for flag in facts_of.launch.flags:
            name = flag.name.lstrip("-").replace("-", "_")
            if name in seen and flag.name.startswith("--"):
                yield Found(
                    flag.line, f"{flag.name} is given a second time (first on line {seen[name]}); this one counts"
                )
            seen.setdefault(name, flag.line)
