"""What people see while a command works (stderr), and the tables at its end (stdout)."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from dream.generate import Progress as DreamProgress
    from dream.judge.combined import Quality
    from train.evals import Evaluation
    from train.rounds import RoundResult

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


class Terminal:
    """Progress on stderr: a live bar on a terminal, plain lines elsewhere. Use it as a context manager."""

    PLAIN_SECONDS = 15.0
    """Between plain lines of one stage, where there is no live bar."""

    def __init__(self, intro: str = "") -> None:
        """`intro` is a line to show when the first stage begins, so that a refusal stays one line."""
        self._intro = intro
        self._console = Console(stderr=True, soft_wrap=True)
        self._live = self._console.is_terminal
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, rate="", visible=False)
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> "Terminal":
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"[dim]{time.monotonic() - self._began:5.0f} s[/dim]  {escape(text)}", highlight=False)

    def stage(self, text: str) -> None:
        """A stage begins."""
        if self._intro:
            self.line(self._intro)
            self._intro = ""
        self.line(text)
        self._bar.reset(self._task, total=None, description=text, rate="", visible=True)
        self._last_line = time.monotonic()

    def judge(self, quality: "Quality") -> None:
        """How good the judge is."""
        self.line(
            f"judge: AUC {quality.auc:.2f} [{quality.auc_ci[0]:.2f}, {quality.auc_ci[1]:.2f}], "
            f"error {quality.error_rate:.0%}, unsure on {quality.abstained} of {quality.n} known replies"
        )

    def dreaming(self, progress: "DreamProgress") -> None:
        """A scenario ended."""
        rate = progress.tokens / max(progress.seconds, 0.001)
        left = (progress.wanted - progress.accepted) * progress.seconds / max(progress.accepted, 1)
        text = f"{rate:.0f} tok/s, about {left:.0f} s left" if progress.accepted else f"{rate:.0f} tok/s"
        self._bar.update(self._task, total=progress.wanted, completed=progress.accepted, rate=text)
        self._plain(f"  {progress.accepted} of {progress.wanted} pairs, {progress.scenarios} scenarios, {text}")

    def training(self, step: dict[str, Any]) -> None:
        """An optimiser step ended."""
        text = f"loss {step['loss']:.3f}, margin {step['margin']:+.3f}, accuracy {step['accuracy']:.2f}"
        self._bar.update(self._task, total=step["steps"], completed=step["step"], rate=text)
        self._plain(f"  step {step['step']} of {step['steps']}: {text}")

    def trained(self, line: str) -> None:
        """The ledger's line on a finished training step."""
        self.line(f"ledger: {line}")

    def ended(self, result: "RoundResult") -> None:
        """A round ended."""
        word = "promoted" if result.decision.decision == "promote" else "rolled back"
        self.line(f"round {result.round} {word}: {result.decision.reason}")

    def _plain(self, text: str) -> None:
        now = time.monotonic()
        if not self._live and now - self._last_line >= self.PLAIN_SECONDS:
            self._last_line = now
            self.line(text)


def generate_table(summary: dict[str, Any]) -> None:
    """What a `dream generate` brought."""
    out.print(
        f"{summary['accepted']} of {summary['wanted']} contrast pairs and {summary['general']} general pairs from "
        f"{summary['scenarios']} scenarios, {summary['tokens']} tokens in {summary['seconds']:.0f} s"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("dropped because")
    table.add_column("scenarios", justify="right")
    for reason, count in summary["dropped"].items():
        table.add_row(reason, str(count))
    if summary["dropped"]:
        out.print(table)
    if summary["starving"]:
        out.print(f"kinds of flaw without a pair: {', '.join(summary['starving'])}")


def rounds_table(baseline: dict[str, Any] | None, results: "Sequence[RoundResult]", title: str) -> None:
    """The table of rounds that `dream train` and `dream runs show` end with."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for name in (
        "round",
        "pairs",
        "pair accuracy [95 %]",
        "margin",
        "comply, clear",
        "push back, flawed",
        "retention",
        "result",
    ):
        table.add_column(name, justify="left" if name in ("round", "result") else "right")
    if baseline is not None:
        table.add_row("0", "", *_figures(baseline), "as it came")
    for result in results:
        word = "promoted" if result.decision.decision == "promote" else "rolled back"
        table.add_row(str(result.round), str(result.accepted), *_figures(result.summary), word)
    out.print(table)
    for result in results:
        if result.decision.decision == "roll_back":
            out.print(f"round {result.round} was rolled back: {result.decision.reason}", highlight=False)


def _figures(summary: dict[str, Any]) -> list[str]:
    low, high = summary["pair_accuracy_ci"]
    shares = [summary[name] for name in ("comply_on_clear", "push_back_on_flawed", "retention")]
    return [
        f"{summary['pair_accuracy']:.2f} [{low:.2f}, {high:.2f}]",
        f"{summary['margin']:+.3f}",
        *("-" if share is None else f"{share:.2f}" for share in shares),
    ]


def evaluation_table(evaluation: "Evaluation") -> None:
    """The figures of `dream eval`."""
    table = Table(box=None, pad_edge=False, show_header=False)
    ci, margin = evaluation.pair_accuracy_ci, evaluation.margin_ci
    table.add_row("pairs", str(evaluation.pairs))
    table.add_row("pair accuracy (strict, crossed)", f"{evaluation.pair_accuracy:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]")
    table.add_row("ranked accuracy (crossed)", f"{evaluation.ranked_accuracy:.3f}")
    table.add_row("own-pair accuracy (wording can win it)", f"{evaluation.own_pair_accuracy:.3f}")
    table.add_row("margin (crossed, nats a token)", f"{evaluation.margin:+.3f} [{margin[0]:+.3f}, {margin[1]:+.3f}]")
    for name, side in (("clear", evaluation.clear), ("flawed", evaluation.flawed)):
        table.add_row(f"{name}: own replies right", f"{side.accuracy:.3f} (margin {side.margin:+.3f})")
        if side.stance_rates:
            said = ", ".join(f"{stance} {share:.2f}" for stance, share in side.stance_rates.items())
            table.add_row(f"{name}: sampled replies", said)
    out.print(table)
