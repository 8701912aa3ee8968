"""What people see while a command works (stderr), and the tables at its end (stdout)."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from dream.audit import Audit
    from dream.diversity import Diversity
    from dream.engine import EngineStats
    from dream.generate import Progress as DreamProgress
    from dream.judge.check import JudgeCheck
    from dream.judge.quality import Quality
    from dream.logs import ImportSummary
    from train.evals import Evaluation
    from train.history import RoundResult
    from train.undo import UndoResult

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

    def run(self, folder: Path, continued: bool) -> None:
        """Which folder is worked in."""
        self.line(f"run {folder}: {'continued' if continued else f'the same command with --out {folder} continues it'}")

    def served(self, stats: "EngineStats") -> None:
        """What an engine did until now; nothing where it counts nothing."""
        if stats.prompt_tokens:
            self.line(
                f"engine: {stats.generated_tokens:,} tokens generated; {stats.hit_rate:.0%} of {stats.prompt_tokens:,} "
                "prompt tokens came from the prefix cache"
            )

    def judge(self, quality: "Quality", planted: "Quality") -> None:
        """How good the judge is on the gold set's test half, and on known replies of the run's own templates."""
        self.line(
            f"judge: AUC {quality.auc:.2f} [{quality.auc_ci[0]:.2f}, {quality.auc_ci[1]:.2f}], error "
            f"{quality.error_rate:.1%}, unsure on {quality.abstained} of {quality.n} gold replies; on planted ones "
            f"error {planted.error_rate:.1%}, unsure on {planted.abstained} of {planted.n}"
        )

    def audited(self, audit: "Audit") -> None:
        """What the audit of a round's pairs found."""
        from dream.audit import lines

        for text in lines(audit):
            self.line(text)

    def dreaming(self, progress: "DreamProgress") -> None:
        """A scenario ended."""
        rate = progress.tokens / max(progress.seconds, 0.001)
        left = (progress.wanted - progress.accepted) * progress.seconds / max(progress.accepted, 1)
        text = f"{rate:.0f} tok/s, about {left:.0f} s left" if progress.accepted else f"{rate:.0f} tok/s"
        self._bar.update(self._task, total=progress.wanted, completed=progress.accepted, rate=text)
        self._plain(f"  {progress.accepted} of {progress.wanted} pairs, {progress.scenarios} scenarios, {text}")

    def training(self, step: dict[str, Any]) -> None:
        """An optimiser step ended."""
        if "repair_kl" in step:
            what, text = "repair", f"KL {step['repair_kl']:.3f}"
        else:
            what = "step"
            text = f"loss {step['loss']:.3f}, margin {step['margin']:+.3f}, accuracy {step['accuracy']:.2f}"
        self._bar.update(self._task, total=step["steps"], completed=step["step"], rate=text)
        self._plain(f"  {what} {step['step']} of {step['steps']}: {text}")

    def trained(self, line: str) -> None:
        """The ledger's line on a finished training step."""
        self.line(f"ledger: {line}")

    def undoing(self, measured: dict[str, Any]) -> None:
        """The margin was measured in an undo test."""
        text = f"margin {measured['margin']:+.3f}"
        self._bar.update(self._task, total=measured["limit"], completed=measured["examples"], rate=text)
        self._plain(f"  {measured['examples']} of {measured['limit']} opposite examples: {text}")

    def ended(self, result: "RoundResult") -> None:
        """A round ended."""
        self.line(f"round {result.round} {result.decision.said}")

    def _plain(self, text: str) -> None:
        now = time.monotonic()
        if not self._live and now - self._last_line >= self.PLAIN_SECONDS:
            self._last_line = now
            self.line(text)


def generate_table(summary: dict[str, Any], audit: "Audit", diversity: "Diversity") -> None:
    """What a `dream generate` brought: how many, why not more, what it gives away, how diverse it is."""
    from dream.audit import lines

    general, wanted = summary["general"], summary["general_wanted"]
    of = f" of {wanted}" if general < wanted else ""
    out.print(
        f"{summary['accepted']} of {summary['wanted']} contrast pairs ({summary['mirrored']} of them mirrored) and "
        f"{general}{of} general pairs from {summary['scenarios']} scenarios, {summary['tokens']} tokens in "
        f"{summary['seconds']:.0f} s"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("dropped because")
    table.add_column("scenarios", justify="right")
    for reason, count in summary["dropped"].items():
        table.add_row(reason, str(count))
    if summary["dropped"]:
        out.print(table)
    for text in lines(audit):
        out.print(escape(text), highlight=False)
    candidates = summary["accepted"] + summary["spare"]
    if summary["balanced_anew"]:
        out.print(f"the pairs were chosen anew among {candidates} accepted ones, as the first set gave more away")
    elif audit.over and summary["accepted"] == summary["wanted"]:
        out.print(f"no better set was found among the {candidates} accepted pairs")
    vendi = "" if diversity.vendi_score is None else f", Vendi score {diversity.vendi_score:.1f}"
    near = "" if diversity.nearest_similarity is None else f", nearest neighbour {diversity.nearest_similarity:.2f}"
    out.print(
        f"diversity: {len(diversity.flaws)} kinds of flaw, {len(diversity.domains)} domains, distinct-2 of prompts "
        f"{diversity.prompt_distinct_2:.2f}, of replies {diversity.reply_distinct_2:.2f}{near}{vendi}",
        highlight=False,
    )
    for what, names in (("kinds of flaw", summary["starving"]), ("templates", summary["starving_templates"])):
        if names:
            out.print(f"{what} without a pair: {', '.join(names)}")


def judge_table(found: "JudgeCheck") -> None:
    """`dream judge check`: every signal alone and all combined, the confusion matrix, the worst mistakes."""
    table = Table(box=None, pad_edge=False)
    for name in ("judge", "n", "AUC [95 %]", "accuracy", "kappa", "abstained", "error rate"):
        table.add_column(name, justify="left" if name == "judge" else "right")
    for name, quality in [*found.alone.items(), ("combined", found.combined)]:
        table.add_row(
            name,
            str(quality.n),
            f"{quality.auc:.3f} [{quality.auc_ci[0]:.3f}, {quality.auc_ci[1]:.3f}]",
            f"{quality.accuracy:.3f}",
            f"{quality.kappa:.3f}",
            str(quality.abstained),
            f"{quality.error_rate:.3f}",
        )
    out.print(table)
    confusion = Table(box=None, pad_edge=False, title="label (rows), ruling (columns)", title_justify="left")
    confusion.add_column("")
    for name in next(iter(found.combined.confusion.values())):
        confusion.add_column(name, justify="right")
    for label, counts in found.combined.confusion.items():
        confusion.add_row(label, *map(str, counts.values()))
    out.print(confusion)
    for mistake in found.worst:
        question = mistake.example.question
        out.print(
            f"{mistake.example.label}, taken for {mistake.said} at {mistake.probability:.2f}: {question.reply!r}\n"
            f"    to {question.asked!r}",
            highlight=False,
            markup=False,
        )


def import_table(summary: "ImportSummary") -> None:
    """What `dream logs import` found and left out."""
    out.print(
        f"{summary.pairs} pairs from {summary.exchanges} exchanges in {summary.conversations} conversations "
        f"({summary.turns} turns); {summary.wrong} turns went wrong, {summary.already_there} were there already"
    )
    counts = {"undecided": summary.undecided, "no direction": summary.no_direction, **summary.not_usable}
    table = Table(box=None, pad_edge=False)
    table.add_column("not used because")
    table.add_column("exchanges", justify="right")
    for reason, count in counts.items():
        if count:
            table.add_row(reason, str(count))
    if table.row_count:
        out.print(table)
    masked = ", ".join(f"{kind} {count}" for kind, count in summary.masked.items())
    out.print(f"secrets masked: {masked or 'none'}", highlight=False)
    if summary.malformed:
        out.print(f"{summary.malformed} malformed lines were skipped:")
        for line in summary.malformed_lines:
            out.print(f"  {line}", highlight=False, markup=False)


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
        table.add_row(str(result.round), str(result.accepted), *_figures(result.summary), result.decision.word)
    out.print(table)
    for result in results:
        if result.decision.decision == "roll_back":
            out.print(f"round {result.round} {result.decision.said}", highlight=False)


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
    if evaluation.reply_tokens is not None and evaluation.repetition is not None:
        table.add_row("sampled replies", f"{evaluation.reply_tokens:.0f} tokens, {evaluation.repetition:.1%} repeated")
    out.print(table)


def undo_table(result: "UndoResult") -> None:
    """`dream eval --undo`: the margin by opposite examples, and the count that takes the gain back."""
    table = Table(box=None, pad_edge=False)
    for name in ("opposite examples", "margin (crossed, nats a token)", "gain left"):
        table.add_column(name, justify="right")
    table.add_row("initial model", f"{result.initial_margin:+.3f}", "")
    table.add_row("0", f"{result.policy_margin:+.3f}", "100 %" if result.gain > 0 else "none")
    for one in result.path:
        left = (one.margin - result.initial_margin) / result.gain
        table.add_row(str(one.examples), f"{one.margin:+.3f}", f"{left:.0%}".replace("%", " %"))
    out.print(table)
    out.print(undo_sentence(result), highlight=False)


def undo_sentence(result: "UndoResult") -> str:
    """What an undo test found, in words."""
    half, limit = result.half_undone_after, result.limit
    if result.gain <= 0:
        return "nothing to undo: the policy's margin is not above the initial model's"
    chance = ""
    if result.undone_after_ci is not None:
        low, high = (f"more than {limit}" if end is None else str(end) for end in result.undone_after_ci)
        chance = f" (95 %: {low})" if low == high else f" (95 %: {low} to {high})"
    if result.undone_after is not None:
        return f"{result.undone_after} of {limit} opposite examples{chance} undo what was learned, {half} half of it"
    return f"{limit} opposite examples{chance} do not undo what was learned, " + (
        f"{half} half of it" if half is not None else "nor half of it"
    )
