"""The examples of README and docs: find them, run them, compare what they print, rewrite it.

    python tests/docs/examples.py [--update [--fresh]] [PAGE ...]

A page is self-contained.  Its blocks run in order in an empty folder:

    ```python           runs, in one namespace for the page
    ```text             right after such a block: what it printed
    ```console          `$ command` lines run in a shell, the lines below are what they printed
    ```c title="x.c"    any language with a title: the block is written to that file instead

Words behind the language say more: `varies` compares with every number masked, `exit=3` is the
exit status of the block's last command, `qemu` needs the cross-compiler and QEMU, `norun` is only
read.  A line `...` in an output stands for any lines.  --update writes the real output into the
pages where they do not match, and what stands between `<!-- results: NAME -->` and `<!-- end: NAME
-->` from benchmarks/results; --fresh also renews the numbers that vary.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
PAGES = (REPO / "README.md", *sorted(REPO.glob("docs/*.md")))
RESULTS = REPO / "benchmarks" / "results"

TIMEOUT = 300
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")
MARKS = {"varies", "qemu", "norun", "exit", "title"}


@dataclass
class Block:
    """A fenced block: `first` and `end` are the lines of its text in the page, from 0."""

    page: Path
    first: int
    lines: list[str]
    language: str
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return self.first + len(self.lines)

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPO)}:{self.first + 1}"


@dataclass(frozen=True)
class Mismatch:
    """An example that did not print what the page shows."""

    where: str
    what: str
    shown: list[str]
    printed: list[str]

    def __str__(self) -> str:
        shown = "\n".join("    " + line for line in self.shown)
        printed = "\n".join("    " + line for line in self.printed)
        return f"{self.where}: {self.what}\n  the page shows\n{shown}\n  it printed\n{printed}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    i = 0
    while i < len(lines):
        if lines[i].startswith("```"):
            words = shlex.split(lines[i][3:])
            end = next(j for j in range(i + 1, len(lines)) if lines[j] == "```")
            marks = {k: v for k, _, v in (w.partition("=") for w in words[1:])}
            block = Block(page, i + 1, lines[i + 1 : end], words[0] if words else "", marks)
            if strays := set(marks) - MARKS:
                raise ValueError(f"{block.where}: unknown marks {sorted(strays)}")
            found.append(block)
            i = end
        i += 1
    return found


def needs_qemu(page: Path) -> bool:
    return any("qemu" in block.marks for block in blocks(page))


# ---- running ---------------------------------------------------------------------------------


def run_page(page: Path, qemu: bool, report: Callable[[Block, list[str]], None]) -> list[Mismatch]:
    """Run a page in the current folder, and list what it did not print as shown.

    `report` is called with every block that shows output and what should stand there.
    """
    wrong: list[Mismatch] = []
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(page)
    for i, block in enumerate(found):
        if "norun" in block.marks or ("qemu" in block.marks and not qemu):
            continue
        if "title" in block.marks:
            Path(block.marks["title"]).write_text(block.text)
        elif block.language == "python":
            try:
                printed = _python(block, namespace)
            except Exception:
                last = traceback.format_exc().splitlines()
                wrong.append(Mismatch(block.where, "raises; the page ends here", [], last))
                return wrong
            shown = _output_of(found, i)
            if shown is not None:
                wrong += _compared(shown, "the block above", shown.lines, printed)
                report(shown, _kept(shown.lines, printed))
            elif printed:
                wrong.append(Mismatch(block.where, "the page shows no output", [], printed))
        elif block.language == "console":
            wrong += _console(block, report)
    return wrong


def _python(block: Block, namespace: dict[str, Any]) -> list[str]:
    code = compile("\n" * block.first + block.text, str(block.page), "exec")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, namespace)
    return _lines(out.getvalue())


def _output_of(found: list[Block], i: int) -> Block | None:
    """The text block that directly follows block i."""
    if i + 1 == len(found) or found[i + 1].language != "text":
        return None
    between = found[i].page.read_text().splitlines()[found[i].end + 1 : found[i + 1].first - 1]
    return None if any(line.strip() for line in between) else found[i + 1]


def _console(block: Block, report: Callable[[Block, list[str]], None]) -> list[Mismatch]:
    wrong: list[Mismatch] = []
    text: list[str] = []
    parts = list(_commands(block))
    for n, (source, shown) in enumerate(parts):
        command = "\n".join(source)[2:]
        status, printed = _shell(command)
        wanted = int(block.marks.get("exit", "0")) if n + 1 == len(parts) else 0
        what = f"$ {command}"
        if status != wanted:
            what += f" (exit status {status}, not {wanted})"
            wrong.append(Mismatch(block.where, what, shown, printed))
        else:
            wrong += _compared(block, what, shown, printed)
        text += [*source, *_kept(shown, printed)]
    report(block, text)
    return wrong


def _commands(block: Block) -> Iterator[tuple[list[str], list[str]]]:
    """(the lines of a command, the lines shown below it)"""
    i = 0
    while i < len(block.lines):
        if not block.lines[i].startswith("$ "):
            raise ValueError(f"{block.where}: a console block begins with '$ '")
        end = i + 1
        while block.lines[end - 1].endswith("\\"):
            end += 1
        source, shown = block.lines[i:end], []
        while end < len(block.lines) and not block.lines[end].startswith("$ "):
            shown.append(block.lines[end])
            end += 1
        yield source, shown
        i = end


def _shell(command: str) -> tuple[int, list[str]]:
    """Run in sh, where `modicum` is the command line of the modicum under test."""
    define = 'modicum() { "$MODICUM_PYTHON" -m modicum.cli "$@"; }\n'
    path = os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "MODICUM_PYTHON": sys.executable, "PYTHONPATH": path}
    done = subprocess.run(
        ["sh", "-c", define + command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, _lines(done.stdout)


# ---- comparing -------------------------------------------------------------------------------


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def _compared(block: Block, what: str, shown: list[str], printed: list[str]) -> list[Mismatch]:
    shown = _lines("\n".join(shown))
    form = masked if "varies" in block.marks else str
    if _matches([form(s) for s in shown], [form(p) for p in printed]):
        return []
    return [Mismatch(block.where, what, shown, printed)]


def masked(line: str) -> str:
    """The line without its numbers, units of time, the blanks that line them up, and the star of a
    Pareto front, which is as variable as what it is the front of."""
    words = " ".join(NUMBER.sub("#", line).split()).removeprefix("* ")
    return re.sub(r"# (µs|ms|min # s)(?=[ ,;]|$)", "# s", words)


def _matches(shown: list[str], printed: list[str]) -> bool:
    if not shown:
        return not printed
    if shown[0].strip() == "...":
        return any(_matches(shown[1:], printed[i:]) for i in range(len(printed) + 1))
    return bool(printed) and shown[0] == printed[0] and _matches(shown[1:], printed[1:])


def _kept(shown: list[str], printed: list[str]) -> list[str]:
    """What to show of `printed`: the page's cut, `...`, stays where it is."""
    cuts = [i for i, line in enumerate(shown) if line.strip() == "..."]
    if len(cuts) != 1:
        return shown if cuts else printed
    head, tail = cuts[0], len(shown) - cuts[0] - 1
    return [*printed[:head], shown[head], *(printed[-tail:] if tail else [])]


# ---- what comes from benchmarks/results -------------------------------------------------------


_TASKS = (
    ("weights", "model", ""),
    ("method", "method", ""),
    ("traffic signs", "traffic_signs", ""),
    ("Omniglot", "omniglot", ""),
    ("CIFAR-10", "cifar10", ""),
    ("Tiny-ImageNet", "tiny_imagenet", ""),
    ("all", "all", ""),
    ("ahead, far domains", "ahead_far", ""),
    ("ahead, all", "ahead_all", ""),
    ("rate", "rate", "g"),
    ("backward memory, MB", "memory_mb", ".2f"),
    ("of one sample, MB", "memory_one_mb", ".2f"),
    ("RAM, KiB", "ram_kb", ",.0f"),
    ("backward, M MACs", "macs", "M"),
    ("selecting, s", "selection_s", ".2f"),
    ("learning, s", "learning_s", ".1f"),
)
_PAIRS = (
    ("method", "method", ""),
    ("less", "less", ""),
    ("ImageNet", "ImageNet", ""),
    ("meta-trained", "meta-trained", ""),
)
_SPEED = (
    ("what", "what", ""),
    ("an update, s", "seconds", ".3f"),
    ("tasks a second", "tasks_per_second", ".1f"),
    ("ratio", "ratio", ".2f"),
)
_RETURNS = (
    ("rule", "rule", ""),
    ("seeds", "seeds", ""),
    ("before", "after 0", ""),
    ("after 1 step", "after 1", ""),
    ("after 2", "after 2", ""),
    ("after 3", "after 3", ""),
    ("gain of 1 step", "gain", ""),
    ("way, %", "way, %", ""),
    ("dynamic memory of a step", "memory_share", ".0%"),
    ("MACs of a step", "macs_share", ".0%"),
)
_FEDERATED = (
    ("method", "method", ""),
    ("rounds", "rounds", ",d"),
    ("shared", "shared", ",d"),
    ("local", "local", ",d"),
    ("RAM, bytes", "ram", ",d"),
    ("diverged", "diverged", "d"),
    ("quality", "quality", ""),
    ("deviation", "deviation", ""),
    ("MB in all", "megabytes", ""),
    ("of these up", "up_share", ".0%"),
    ("J, modelled", "joules", ""),
    ("target reached", "reached", ""),
    ("MB to it", "to_target", ""),
    ("of TinyReptile's MB", "ratio", ""),
    ("FedAvg's MB to it, times", "of_fedavg", ""),
)
TABLES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "federated_scale": (
        ("clients", "clients", ",d"),
        ("clients per second", "clients_per_second", ".0f"),
        ("until the first round ends, s", "start_s", ".0f"),
        ("all 20 rounds, s", "wall_s", ".0f"),
        ("server process, end, MB", "server_end_bytes", "M"),
        ("all processes, peak, MB", "all_bytes", "M"),
    ),
    "federated_sines": _FEDERATED,
    "federated_characters": _FEDERATED,
    "federated_words": _FEDERATED,
    "host_step": (
        ("net", "net", ""),
        ("update", "update", ""),
        ("C, ms", "c_ms", ".2f"),
        ("PyTorch, ms", "torch_ms", ".2f"),
        ("ratio", "ratio", ".1f"),
        ("C, peak RSS, MB", "c_rss_mb", ".1f"),
        ("PyTorch, peak RSS, MB", "torch_rss_mb", ".0f"),
        ("arena, KiB", "arena_kib", ",.1f"),
        ("saved, KiB", "saved_kib", ",.1f"),
    ),
    "mcu_step": (
        ("net", "net", ""),
        ("update", "update", ""),
        ("core", "core", ""),
        ("M instructions per step", "train", "M"),
        ("M instructions per inference", "predict", "M"),
        ("instructions per MAC", "per_mac", ".2f"),
        ("RAM measured, KiB", "ram", "K"),
        ("RAM planned, KiB", "ram_planned", "K"),
    ),
    "mobiletl_blocks": (
        ("block", "block", ""),
        ("update", "update", ""),
        ("kept, planned, MB", "planned_mb", ".2f"),
        ("kept, measured, MB", "measured_mb", ".2f"),
        ("less", "less", ".1%"),
        ("paper, MB", "paper_mb", ".2f"),
        ("paper, less", "paper_less", ".1%"),
    ),
    "mobiletl_memory": (
        ("trained", "update", ""),
        ("method", "method", ""),
        ("forward, M FLOPs", "forward_m", ",.1f"),
        ("backward, M FLOPs", "backward_m", ",.1f"),
        ("FLOPs, less", "less", ".1%"),
        ("MACs alone, less", "macs_less", ".1%"),
        ("kept, MB", "kept_mb", ".1f"),
        ("kept, less", "kept_less", ".1%"),
        ("paper", "paper", ""),
    ),
    "mobiletl_accuracy": (
        ("net", "net", ""),
        ("update", "update", ""),
        ("accuracy, %", "accuracy", ".1f"),
        ("95 % interval, +-", "interval", ".1f"),
        ("below the best exact", "below_exact", ".1f"),
        ("kept, batch 8, MB", "saved_mb", ".2f"),
        ("kept by plain PyTorch, MB", "plain_saved_mb", ".2f"),
        ("step, ms", "step_ms", ".1f"),
        ("plain PyTorch, ms", "plain_ms", ".1f"),
        ("ratio", "ratio", ".2f"),
    ),
    "tinytrain_cost": (
        ("net", "net", ""),
        ("trained", "method", ""),
        ("parameters", "trained", ","),
        ("backward memory, plan, MB", "memory_mb", ".2f"),
        ("measured, MB", "measured_mb", ".2f"),
        ("paper, MB", "paper_mb", "g"),
        ("backward, M MACs", "macs", "M"),
        ("measured, M MACs", "macs_measured", "M"),
        ("paper, M MACs", "paper_macs", "g"),
        ("kept, KiB", "kept_kb", ",.1f"),
        ("dynamic, KiB", "dynamic_kb", ",.1f"),
        ("RAM, KiB", "ram_kb", ",.1f"),
    ),
    "tinytrain_steps": (
        ("net", "net", ""),
        ("PyTorch, all, ms", "torch_all_ms", ".1f"),
        ("TinyTrain, ms", "torch_tinytrain_ms", ".1f"),
        ("ratio", "torch_ratio", ".1f"),
        ("C, all, ms", "c_all_ms", ".2f"),
        ("TinyTrain, ms", "c_tinytrain_ms", ".2f"),
        ("ratio", "c_ratio", ".2f"),
        ("backward alone, ratio", "c_backward_ratio", ".1f"),
        ("MACs, ratio", "macs_ratio", ".2f"),
        ("backward MACs, ratio", "macs_backward_ratio", ".1f"),
    ),
    "pmeta": (
        ("setting", "setting", ""),
        ("rule", "rule", ""),
        ("updates", "updates", ",.0f"),
        ("accuracy", "accuracy", ".1%"),
        ("95 %, +-", "interval", ".1%"),
        ("backward, plan, KiB", "backward_kb", ",.0f"),
        ("measured", "measured_kb", ",.0f"),
        ("at once, plan, KiB", "at_once_kb", ",.0f"),
        ("measured", "measured_at_once_kb", ",.0f"),
        ("streamed, plan, KiB", "peak_kb", ",.0f"),
        ("measured", "measured_peak_kb", ",.0f"),
        ("G MACs, plan", "streamed_gmacs", ".4f"),
        ("measured", "measured_streamed_gmacs", ".4f"),
        ("layers by step", "steps", ""),
    ),
    "pmeta_ablation": (
        ("rule", "rule", ""),
        ("updates", "updates", ",.0f"),
        ("accuracy", "accuracy", ".1%"),
        ("95 %, +-", "interval", ".1%"),
        ("backward, plan, KiB", "backward_kb", ",.0f"),
        ("measured", "measured_kb", ",.0f"),
        ("streamed, plan, KiB", "peak_kb", ",.0f"),
        ("measured", "measured_peak_kb", ",.0f"),
        ("G MACs", "streamed_gmacs", ".4f"),
        ("layers by step", "steps", ""),
    ),
    "pmeta_costs": (
        ("setting", "setting", ""),
        ("norms", "norms", ""),
        ("held by", "held", ""),
        ("mean of four, plan, KiB", "four_plan_kb", ",.0f"),
        ("p-Meta", "ours_plan_kb", ",.0f"),
        ("ratio", "plan_kb_times", ".2f"),
        ("of predicting", "prediction_kb", ",.0f"),
        ("mean of four, measured, KiB", "four_measured_kb", ",.0f"),
        ("p-Meta", "ours_measured_kb", ",.0f"),
        ("ratio", "measured_kb_times", ".2f"),
        ("MACs, plan, ratio", "gmacs_times", ".2f"),
        ("measured, ratio", "measured_gmacs_times", ".2f"),
        ("layers by step", "steps", ""),
    ),
    "sines": (
        ("rule", "rule", ""),
        ("seeds", "seeds", ""),
        ("updates", "updates", ","),
        *((f"after {k}", f"after {k}", "") for k in (0, 1, 2, 5, 10)),
    ),
    "maml_speed": (*_SPEED, ("apart", "apart", ".0e")),
    "maml_speed_two": _SPEED,
    "tinytrain_selection": (
        ("method", "method", ""),
        ("tasks", "tasks", ""),
        ("selecting, s", "selection_s", ".3f"),
        ("learning, s", "learning_s", ".2f"),
        ("share", "share", ".1%"),
        ("median share", "median_share", ".1%"),
        ("of first tasks", "first_share", ".1%"),
    ),
    "rl_navigation": _RETURNS,
    "rl_cheetah": _RETURNS,
    "tinytrain_pairs": _PAIRS,
    "tinytrain_pairs_all": _PAIRS,
    "tinytrain_pairs_apart": _PAIRS,
    "tinytrain_pairs_ablation": _PAIRS,
    "tinytrain_pairs_wide": _PAIRS,
    "tinytrain_pairs_transductive": _PAIRS,
    "tinytrain_pairs_128": _PAIRS,
    "tinytrain_pairs_128_equal": _PAIRS,
    "tinytrain_128_equal": _TASKS,
    "tinytrain_128": _TASKS,
    "tinytrain_main": _TASKS,
    "tinytrain_wide": _TASKS,
    "tinytrain_ablation": _TASKS,
    "pareto": (
        ("method", "method", ""),
        ("accuracy, %", "accuracy", ".1f"),
        ("95 % interval, +-", "interval", ".1f"),
        ("kept, batch 8, KiB", "saved_kib", ",.0f"),
        ("added memory, KiB", "memory_kib", ",.0f"),
        ("dynamic, board, KiB", "dynamic_kib", ",.0f"),
        ("RAM, board, KiB", "ram_kib", ",.0f"),
        ("backward, M MACs", "backward", "M"),
        ("learning rate", "rate", "g"),
    ),
}
SOURCES = {
    "headline": ("host_step", "rows"),
    "mobiletl_blocks": ("mobiletl_memory", "blocks"),
    "tinytrain_steps": ("tinytrain_cost", "times"),
    "tinytrain_pairs": ("tinytrain_main", "pairs_far"),
    "tinytrain_pairs_all": ("tinytrain_main", "pairs_all"),
    "tinytrain_pairs_apart": ("tinytrain_apart", "pairs_far"),
    "tinytrain_pairs_ablation": ("tinytrain_ablation", "pairs_far"),
    "tinytrain_pairs_wide": ("tinytrain_wide", "pairs_far"),
    "tinytrain_pairs_transductive": ("tinytrain_transductive", "pairs_far"),
    "tinytrain_pairs_128": ("tinytrain_128", "pairs_far"),
    "tinytrain_pairs_128_equal": ("tinytrain_128_equal", "pairs_far"),
    "pmeta_ablation": ("pmeta", "ablation"),
    "maml_speed_two": ("maml_speed", "two_cores"),
    "rl_navigation": ("rl_navigation", "summary"),
    "rl_cheetah": ("rl_cheetah", "summary"),
}
"""Sections that are not the `rows` of the file of their name: file and key."""


def with_results(text: str) -> str:
    """A page with its generated sections as benchmarks/results has them."""
    for name in (*TABLES, "headline"):
        begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
        source, _ = SOURCES.get(name, (name, "rows"))
        if begin in text and (RESULTS / f"{source}.json").exists():
            before, _, rest = text.partition(begin)
            after = rest.partition(end)[2]
            section = _headline() if name == "headline" else _table(name)
            text = f"{before}{begin}\n\n{section}\n\n{end}{after}"
    begin, end = "<!-- generated: methods -->", "<!-- end: methods -->"
    if begin in text:
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{_methods()}\n\n{end}{rest.partition(end)[2]}"
    return text


def _methods() -> str:
    """The reference of all methods, from their docstrings and fields."""
    from modicum.methods import METHODS

    parts = []
    for kind, cls in METHODS.items():
        body = inspect.cleandoc(cls.__doc__ or "")
        fields = {k: f for k, f in cls.model_fields.items() if k != "kind"}
        lines = [f"### {kind}", "", f"`mo.{cls.__name__}`", "", _markdown(body)]
        if fields:
            schema = cls.model_json_schema()["properties"]
            lines += ["", "| field | default | values |", "|---|---|---|"]
            for name, f in fields.items():
                default = "required" if f.is_required() else f"`{json.dumps(_plain(f.default))}`"
                lines.append(f"| `{name}` | {default} | {_values(schema[name])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _markdown(text: str) -> str:
    """Doctest lines become a code block; bullets and paragraphs stay."""
    lines, code = [], False
    for line in text.splitlines():
        starts = line.startswith(">>> ")
        if starts and not code:
            lines.append("```python norun")
        if code and not line:
            lines.append("```")
        code = starts or (code and bool(line))
        lines.append(line.removeprefix(">>> "))
    return "\n".join([*lines, "```"] if code else lines)


def _values(schema: dict[str, Any]) -> str:
    """The values that a field takes, from its JSON schema."""
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_values(part) for part in schema[key])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(v)}`" for v in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    text = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "array": "list",
        "object": "mapping",
        "null": "null",
    }.get(schema.get("type", ""), "text")
    signs = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {schema[k]}" for k, word in signs.items() if k in schema]
    return " ".join([text, *bounds])


def _headline() -> str:
    """The bullets of README that are about mcunet-5fps."""
    data = json.loads((RESULTS / "host_step.json").read_text())
    rows = {r["update"]: r for r in data["rows"] if r["net"] == "mcunet-5fps"}
    bias, full = rows["bias"], rows["all"]
    return (
        "- **Memory.** To update the biases and the head of MCUNet (`mcunet-5fps`, 3x128x128, "
        f"float32), modicum keeps {bias['saved_kib']:.0f} KiB from the forward to the backward "
        "pass. PyTorch keeps 6,045 KiB for the same update.\n"
        "- **A CPU without PyTorch.** A full training step of that net takes "
        f"{full['c_ms']:.1f} ms in the emitted C and {full['torch_ms']:.1f} ms in PyTorch eager, "
        "on one x86-64 core in the same run. The peak RSS of the process is "
        f"{full['c_rss_mb']:.1f} MB against {full['torch_rss_mb']:.0f} MB."
    )


def _table(name: str) -> str:
    source, key = SOURCES.get(name, (name, "rows"))
    data = json.loads((RESULTS / f"{source}.json").read_text())
    columns = [c for c in TABLES[name] if any(row.get(c[1]) is not None for row in data[key])]
    lines = [f"`{data['command']}`", ""] if "command" in data else []
    lines.append("| " + " | ".join(title for title, _, _ in columns) + " |")
    lines.append("|" + "".join("---|" if not f else "---:|" for _, _, f in columns))
    for row in data[key]:
        cells = [_cell(row, k, form) for _, k, form in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    if row.get(key) is None:
        return "does not fit" if "why" in row and key == "train" else ""
    if form == "M":
        return f"{row[key] / 1e6:,.1f}"
    return f"{row[key] / 1024:,.1f}" if form == "K" else format(row[key], form)


# ---- the pages, rewritten ----------------------------------------------------------------------


def update(page: Path, qemu: bool, fresh: bool = False) -> list[Mismatch]:
    """Write what the examples of a page print into it, where it does not match."""
    new: list[tuple[Block, list[str]]] = []
    with tempfile.TemporaryDirectory() as scratch, in_folder(Path(scratch)):
        wrong = run_page(page, qemu, lambda block, text: new.append((block, text)))
    stale = {w.where for w in wrong}
    lines = page.read_text().splitlines()
    for block, text in reversed(new):
        if block.where in stale or fresh:
            lines[block.first : block.end] = text
    page.write_text(with_results("\n".join(lines) + "\n"))
    return wrong


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Work in a folder, import from it, and forget what was imported from it."""
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]


def main() -> None:
    import argparse
    import shutil

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--update", action="store_true", help="write the output into the pages")
    parser.add_argument("--fresh", action="store_true", help="also renew numbers that vary")
    parser.add_argument("--no-qemu", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(REPO / "src"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    qemu = not args.no_qemu and shutil.which("qemu-system-arm") is not None
    failed = False
    for page in [p.resolve() for p in args.pages] or PAGES:
        if args.update:
            wrong = update(page, qemu, args.fresh)
        else:
            with tempfile.TemporaryDirectory() as scratch, in_folder(Path(scratch)):
                wrong = run_page(page, qemu, lambda block, text: None)
        failed |= bool(wrong)
        print(f"{page.relative_to(REPO)}: {'rewritten' if wrong and args.update else len(wrong)}")
        for mismatch in wrong:
            print(mismatch)
    sys.exit(failed and not args.update)


if __name__ == "__main__":
    main()
