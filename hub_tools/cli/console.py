"""What the `gpt2-value` command prints: tables, numbers coloured by size, errors.

Imports rich, and of hub_tools only the records that it prints. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..errors import GPT2ValueHubError
from ..errors import visible as visible_lines
from ..files import in_units
from ..package.record import diff_command

if TYPE_CHECKING:
    from sampler_audit import SamplerAudit

    from ..convert.convert import Conversion
    from ..convert.export import ExportedPolicy
    from ..package.inspect import PackageReport
    from ..package.save import SavedPackage
    from ..package.verify import VerificationReport
    from ..publish.push import PushReport

# markup and emoji off: names that come from a package are shown, not obeyed
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)

_LOW, _MIDDLE, _HIGH = (214, 72, 72), (200, 200, 200), (64, 160, 96)  # red, grey, green


def working(what: str) -> Status:
    """Show on stderr what is going on, as long as the context lasts and where stderr is a terminal."""
    return err.status(Text(visible(what)))


def show_json(value: Any) -> None:
    """Print a result for a script, alone on stdout."""
    print(json.dumps(value, indent=2))


def show_error(error: GPT2ValueHubError) -> None:
    """Print what was found, in red, then what was expected and what to do next."""
    err.print(Text.assemble(("error: ", "bold red"), (visible(error.found), "red")))
    if error.expected:
        err.print(Text.assemble(("expected: ", "bold"), visible(error.expected)))
    err.print(Text.assemble(("next: ", "bold"), visible(error.next_step)))


def show_saved(package: SavedPackage) -> None:
    done = "replaced" if package.replaced else "written"
    summary = f"{package.parameters:,} parameters, {len(package.files)} files, {in_units(package.size)}"
    out.print(Text.assemble((visible(str(package.folder)), "bold"), f" {done}: {summary}\n"))
    out.print(Text(visible_lines(package.load_lines), "cyan"))
    out.print(Text.assemble("\nnext: ", (command("gpt2-value", "verify", package.folder), "bold")))


def show_conversion(conversion: Conversion) -> None:
    table = _facts()
    table.add_row("read as", visible(f"{conversion.source_format}{', adapter merged' if conversion.adapter else ''}"))
    table.add_row("from", visible(", ".join(map(str, conversion.files))))
    table.add_row("dtype", f"{str(conversion.dtype).removeprefix('torch.')}, the head float32")
    table.add_row("tokenizer", visible(conversion.tokenizer or "none"))
    table.add_row("kept", f"{len(conversion.mapped)} tensors")
    for reason, names in _by_reason(conversion.dropped).items():
        table.add_row("not kept", visible(f"{reason}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"))
    for note in conversion.notes:
        table.add_row("note", visible(note))
    out.print(table)
    out.print(Text.assemble("\nnext: ", (command("gpt2-value", "verify", conversion.folder), "bold")))


def show_exported(exported: ExportedPolicy) -> None:
    total = in_units(sum(exported.files.values()))
    out.print(
        Text.assemble(
            (visible(str(exported.folder)), "bold"), f" written: {exported.parameters:,} parameters, {total}\n"
        )
    )
    out.print(Text(f"model = {exported.architecture}.from_pretrained({str(exported.folder)!r})", "cyan"))


def show_inspection(package: PackageReport, findings: Sequence[str]) -> None:
    table = _facts()
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in package.dtypes.items())
    table.add_row("parameters", f"{package.parameters:,} ({dtypes})")
    table.add_row(
        "body",
        f"{package.n_layer} layers, {package.n_embd} wide, {package.n_head} heads, "
        f"{package.n_positions:,} positions, {package.vocab_size:,} tokens",
    )
    table.add_row("embeddings", "tied" if package.tied_embeddings else "not tied")
    table.add_row("value head", package.head.describe() if package.head else Text("missing", "red"))
    table.add_row("weights", "\n".join(f"{name}  {in_units(bytes)}" for name, bytes in package.weight_files.items()))
    table.add_row("tokenizer", visible(package.tokenizer) if package.tokenizer else "none")
    table.add_row("generation config", "yes" if package.has_generation_config else "none")
    for file in package.code:
        released = f"version {', '.join(file.releases)}'s, not this version's" if file.releases else ""
        state = ("this version's", "green") if file.installed else (released or "NOT a released version's", "red")
        table.add_row("code", Text.assemble(visible(file.name), "  ", state))
    for name, fields in package.unknown_fields.items():
        table.add_row("not known", visible(f"{name}: {', '.join(fields)[:300]}; no library is shown these fields"))
    versions = ", ".join(f"{visible(name)} {visible(version)}" for name, version in package.versions.items())
    table.add_row("written with", versions or "not recorded")
    commit = f" at {visible(package.commit)}" if package.commit else ""
    out.print(Text.assemble((visible(package.source), "bold"), commit))
    out.print(table)
    for file in package.code:  # as `sha256sum` writes it, and not in the table, which would fold it
        out.print(Text.assemble((file.sha256, "dim"), "  ", visible(file.name)))
    for finding in findings:
        out.print(Text.assemble(("! ", "bold yellow"), visible(finding)))
    for file in package.code:
        if not file.installed:
            out.print(Text.assemble("read it: ", (visible(diff_command(package.folder / file.name)), "bold")))


def show_verification(report: VerificationReport) -> None:
    table = _facts()
    for what, difference, tolerance in (
        ("logits", report.max_logit_difference, report.logit_tolerance),
        ("values", report.max_value_difference, report.value_tolerance),
    ):
        table.add_row(what, f"differ by at most {difference:.2g} (allowed: {tolerance:.2g})")
    for what, versions in (("saved with", report.saved_with), ("loaded with", report.loaded_with)):
        table.add_row(what, ", ".join(f"{visible(name)} {visible(version)}" for name, version in versions.items()))
    table.add_row("time", f"{report.seconds:.1f} s, of which loading {report.load_seconds:.1f} s")
    if report.peak_memory_bytes is not None:
        table.add_row("peak memory", in_units(report.peak_memory_bytes))
    out.print(Text.assemble((visible(str(report.folder)), "bold"), (" verified", "bold green")))
    out.print(table)


def show_audit(audit: SamplerAudit, *, sampler: str, claim: str) -> None:
    table = _facts()
    table.add_row("sampler", visible(sampler))
    table.add_row("claim", visible(claim))
    table.add_row("tokens", f"{audit.tokens:,}" + (f", {audit.impossible:,} impossible" if audit.impossible else ""))
    for name, test in audit.tests.items():
        table.add_row(name, f"p = {test.p_value:.2g}" if test.was_made else "too few tokens to test")
    table.add_row("p-value", f"{audit.p_value:.2g} (dishonest below {audit.alpha:g})")
    table.add_row("KL bias", f"{audit.bias_nats:+.4f} ± {audit.standard_error:.4f} nats per token")
    out.print(Text(audit.verdict, "bold green" if audit.honest else "bold red"))
    out.print(table)


def show_push(report: PushReport) -> None:
    for line in str(report).splitlines():
        out.print(Text(visible(line)))


def show_responses(responses: Sequence[dict[str, Any]]) -> None:
    """Print each response, and a row for each of its tokens: log-probability, and value of the state before it.

    Colours run from red (lowest) to green (highest) over all the responses, so that they can be compared."""
    tokens = [token for response in responses for token in response["tokens"]]
    logprobs = [token["logprob"] for token in tokens]
    values = [token["value"] for token in tokens if token["value"] is not None]
    for response in responses:
        out.print(Text.assemble((visible(response["prompt"]), "bold"), visible(response["text"])))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("token")
        table.add_column("log-prob", justify="right")
        table.add_column("value", justify="right")
        for token in response["tokens"]:
            value = token["value"]
            table.add_row(
                visible(token["text"]).replace(" ", "·"),
                _coloured(token["logprob"], logprobs),
                "-" if value is None else _coloured(value, values),
            )
        out.print(table)
        if response["truncated"]:
            out.print(Text("stopped at --max-new-tokens", "dim"))
        out.print()


def visible(text: str) -> str:
    """Return `text` as it may be printed on one line: what a terminal would obey is written as its escape."""
    return visible_lines(text).replace("\n", "\\n")


def command(*words: object) -> str:
    """Return a line to type into a shell, quoted whatever is in the words."""
    return visible(shlex.join(map(str, words)))


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _facts() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _coloured(number: float, among: Sequence[float]) -> Text:
    low, high = min(among), max(among)
    place = 0.5 if high == low else (number - low) / (high - low)
    start, end, part = (_LOW, _MIDDLE, 2 * place) if place < 0.5 else (_MIDDLE, _HIGH, 2 * place - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return Text(f"{number:.3f}", f"rgb({red},{green},{blue})")
