"""The command line. Only what parses, prints and exits; the work is in `dream.tasks` and imported when it is needed."""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from typer.exceptions import TyperException

from dream.errors import ConfigError, DataError, DreamError, Stopped
from dream.paths import own_train_package


class _Group(typer.core.TyperGroup):
    """Commands whose Ctrl-C says how to go on; typer's own handler ends them without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Stopped(signal.SIGINT, "a run goes on from here with the same command and --out") from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Teach a chat model when to do as it is told and when to push back.\n\n"
    "Every day:  dream generate   |   dream train --rounds 3   |   edit prompts/scenarios/*.j2",
)
judge_app = typer.Typer(no_args_is_help=True, help="Measure the judge.")
templates_app = typer.Typer(no_args_is_help=True, help="List, show, check and try scenario templates.")
logs_app = typer.Typer(no_args_is_help=True, help="Turn conversation logs into preference pairs.")
runs_app = typer.Typer(no_args_is_help=True, help="List and show runs, or go back to an earlier round.")
app.add_typer(judge_app, name="judge")
app.add_typer(templates_app, name="templates")
app.add_typer(logs_app, name="logs")
app.add_typer(runs_app, name="runs")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML file; default: configs/gpu.yaml with a CUDA device, else configs/cpu.yaml."
    ),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key, e.g. train.learning_rate=1e-5.")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Run folder; continued when it exists. Default: new under runs/.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
ForceOption = Annotated[bool, typer.Option("--force-judge", help="Go on although the judge errs too often.")]
ChangedOption = Annotated[
    bool, typer.Option("--allow-template-change", help="Continue a run whose templates were edited since.")
]


def main() -> None:
    """The entry point: errors become one line and an exit code."""
    try:
        own_train_package()
        sys.exit(app(one_by_one(sys.argv[1:]), standalone_mode=False))
    except DreamError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except TyperException as error:  # no such option, command or value
        said: str = error.format_message()
        help_text = "\n" in said  # what a command is without arguments
        print(said if help_text else f"error: {said.rstrip('.')}; see `dream --help`", file=sys.stderr)
        sys.exit(2)


def one_by_one(words: Sequence[str]) -> list[str]:
    """The command line with each of several values after one `--set` or `--data` behind an option of its own."""
    given: list[str] = []
    option, values = "", 0
    for word in words:
        if word.startswith("-"):
            option, values = word, 0
        else:
            values += 1
            if values > 1 and (option == "--data" or (option == "--set" and "=" in word)):
                given.append(option)
        given.append(word)
    return given


@app.command()
def doctor(config: ConfigOption = None, overrides: SetOption = None, json_file: JsonOption = None) -> None:
    """What this machine can run, and what is missing.

    Example:  dream doctor --config configs/gpu.yaml
    """
    from dream.doctor import examine

    resolved, source = _load(config, overrides)
    findings = examine(resolved, source)
    for finding in findings:
        print(f"{'ok  ' if finding.good else 'MISS'} {finding.name}: {finding.text}")
    _write(json_file, [finding._asdict() for finding in findings])
    if not all(finding.good for finding in findings):
        raise typer.Exit(1)


@app.command()
def generate(
    config: ConfigOption = None,
    pairs: Annotated[int | None, typer.Option("--pairs", help="Accepted contrast pairs wanted.")] = None,
    out: OutOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the scenarios and the sampling.")] = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    force_judge: ForceOption = False,
    allow_template_change: ChangedOption = False,
) -> None:
    """Dream contrast pairs: scenarios, replies, verdicts, pairs.jsonl.

    Examples:

      dream generate

      dream generate --pairs 100 --out runs/mine --set generate.temperature=1.0
    """
    from dream import tasks
    from dream.terminal import Terminal, generate_table
    from dream.terminal import out as stdout

    _at_least_one("--pairs", pairs)
    resolved, source = _load(config, overrides, {"generate.pairs": pairs, "seed": seed})
    with Terminal(_sources(source)) as terminal:
        path, summary, audit, diversity = tasks.generate(
            resolved, source, out, terminal, force_judge=force_judge, allow_template_change=allow_template_change
        )
    generate_table(summary, audit, diversity)
    stdout.print(f"pairs: {path / 'round_01' / 'pairs.jsonl'}")
    figures = {"audit": audit.model_dump(), "diversity": diversity.model_dump()}
    _write(json_file, {"run": str(path), **summary, **figures})
    if summary["accepted"] < summary["wanted"]:
        raise DreamError(
            f"stopped short: {summary['accepted']} of {summary['wanted']} pairs after {summary['scenarios']} scenarios "
            f"(generate.max_scenarios_per_pair); the reasons are above and in {path / 'round_01' / 'dropped.jsonl'}"
        )


@app.command()
def train(
    config: ConfigOption = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Rounds in all, the finished ones included.")] = None,
    out: OutOption = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Train on these pairs.jsonl instead of dreaming.")
    ] = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    force_judge: ForceOption = False,
    allow_template_change: ChangedOption = False,
) -> None:
    """Run rounds of dreaming and DPO, each with a gate and a way back.

    Examples:

      dream train --rounds 3

      dream train --rounds 1 --data runs/latest/round_01/pairs.jsonl
    """
    from dream import runs, tasks
    from dream.terminal import Terminal
    from dream.terminal import out as stdout

    _at_least_one("--rounds", rounds)
    resolved, source = _load(config, overrides, {"rounds": rounds})
    with Terminal(_sources(source)) as terminal:
        path, _ = tasks.train(
            resolved, source, out, data or [], terminal,
            force_judge=force_judge, allow_template_change=allow_template_change,
        )  # fmt: skip
    shown = runs.show_run(path)
    stdout.print(f"run: {path}")
    _write(json_file, shown)


@app.command("eval")
def evaluate(
    run: Annotated[Path | None, typer.Option("--run", help="Evaluate the accepted policy of this run.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Evaluate this model instead.")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="With --model: a LoRA adapter on top.")] = None,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Evaluation pairs; default: held-out scenarios.")
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="With --run: how many opposite examples take back what it taught.")
    ] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure whether a policy knows when to push back.

    Examples:

      dream eval --run runs/latest --json eval.json

      dream eval --model bundled:smollm2-135m-instruct --pairs my-pairs.jsonl

      dream eval --run runs/latest --undo
    """
    from dream import runs, tasks
    from dream.terminal import Terminal, evaluation_table, undo_table

    if (run is None) == (model is None):
        raise ConfigError("dream eval: give either --run DIR or --model M")
    if adapter is not None and model is None:
        raise ConfigError("dream eval: --adapter goes with --model; --run finds its own")
    if run is not None and config is not None:
        raise ConfigError("dream eval: --config goes with --model; --run has its own, change its keys with --set")
    if undo:
        if run is None or pairs is not None:
            raise ConfigError("dream eval: --undo goes with --run and draws its own scenarios, without --pairs")
        with Terminal() as terminal:
            result = tasks.undo(runs.policy_of(run, overrides or [])[0], run, terminal)
        undo_table(result)
        _write(json_file, result.model_dump())
        return
    with Terminal() as terminal:
        if run is not None:
            resolved, weights = runs.policy_of(run, overrides or [])
        else:
            resolved, _ = _load(config, overrides, {"model": model})
            weights = None
        with tasks.merged(resolved, adapter, terminal) as merged:
            evaluation = tasks.evaluate(resolved, merged or weights, pairs, terminal)
    evaluation_table(evaluation)
    _write(json_file, evaluation.model_dump(exclude={"items"}))


@judge_app.command("check")
def judge_check(
    file: Annotated[
        Path | None,
        typer.Argument(help="JSON Lines: prompt, response, label (comply, push_back); default: the gold test half."),
    ] = None,
    config: ConfigOption = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
) -> None:
    """How good the judge is on labelled replies: each signal alone, all combined, and the worst mistakes.

    Examples:

      dream judge check

      dream judge check labelled.jsonl --json judge.json --set judge.signals=[wording,contrast]
    """
    from dream import tasks
    from dream.terminal import Terminal, judge_table

    resolved, _ = _load(config, overrides)
    with Terminal() as terminal:
        found = tasks.check_judge(resolved, file, terminal)
    judge_table(found)
    _write(json_file, found.combined.model_dump())


@templates_app.command("list")
def templates_list(json_file: JsonOption = None) -> None:
    """All templates with their kind of flaw, domains and split.

    Example:  dream templates list
    """
    from rich.table import Table
    from rich.text import Text

    from dream.templates import load_all
    from dream.terminal import out

    loaded = load_all()
    table = Table(box=None, pad_edge=False)
    for column in ("name", "flaw", "domains", "split", "description"):
        table.add_column(column, overflow="fold")
    for template in loaded:
        front = template.front
        cells = (front.name, front.flaw, ", ".join(front.domains), front.split, front.description)
        table.add_row(*(Text(cell) for cell in cells))
    out.print(table)
    _write(json_file, [{**template.front.model_dump(), "hash": template.hash} for template in loaded])


@templates_app.command("show")
def templates_show(name: str) -> None:
    """A template's file and text.

    Example:  dream templates show sales-sheet
    """
    from dream.templates import find

    template = find(name)
    print(f"# {template.path}")
    print(template.path.read_text(encoding="utf-8"), end="")


@templates_app.command("new")
def templates_new(
    name: Annotated[str, typer.Argument(help="Name of the file without .j2: a-z, 0-9 and hyphens.")],
) -> None:
    """Write a commented template to start from, into ./prompts/scenarios.

    Example:  dream templates new parcel-locker
    """
    from dream.paths import data_folder
    from dream.template_new import new

    source = data_folder("prompts")
    path = new(name)
    if source != data_folder("prompts"):
        print(f"copied {source} to ./prompts, which is used from now on in this folder", file=sys.stderr)
    print(path)


@templates_app.command("check")
def templates_check(
    paths: Annotated[list[Path] | None, typer.Argument(help="Files; default: all in the prompts folder.")] = None,
    library: Annotated[bool, typer.Option("--all", help="All, and whether a direction alone gives it away.")] = False,
) -> None:
    """Check templates: every problem names file, line and what to do; advice is what would weaken training.

    Examples:

      dream templates check

      dream templates check prompts/scenarios/mine.j2

      dream templates check --all
    """
    from dream.errors import TemplateError
    from dream.paths import data_folder
    from dream.template_audit import advice, counts, direction_auc, refuse_leaks
    from dream.templates import examine

    if library and paths:
        raise ConfigError("dream templates check: --all looks at every template; give either it or files")
    files = paths or sorted((data_folder("prompts") / "scenarios").glob("*.j2"))
    if not files:
        raise TemplateError(f"{data_folder('prompts') / 'scenarios'}: no *.j2 files to check")
    templates = []
    for path in files:
        template, problems = examine(path)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if template is not None:
            templates.append(template)
            print(f"ok {template.name} ({template.front.flaw}, {template.hash})")
    for line in advice(templates):
        print(f"advice: {line}")
    if len(templates) < len(files):
        raise TemplateError(f"{len(files) - len(templates)} of {len(files)} templates are wrong")
    if library:
        print(counts(templates))
        measured = direction_auc(templates)
        for result in measured:
            print(result)
        refuse_leaks(measured)


@templates_app.command("preview")
def templates_preview(
    name: str,
    number: Annotated[int, typer.Option("-n", help="Scenarios to draw.")] = 1,
    write: Annotated[bool, typer.Option("--write", help="Let the dreamer word them; starts the model.")] = False,
    config: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Draw scenarios from a template and show both sides, with its worked replies.

    Example:  dream templates preview sales-sheet -n 3
    """
    from dream import tasks
    from dream.scenarios import STANCES
    from dream.templates import find
    from dream.terminal import Terminal

    _at_least_one("-n", number)
    template = find(name)
    resolved, _ = _load(config, overrides)
    with Terminal() as terminal:
        scenarios = tasks.preview(template, number, resolved, write, terminal)
    for scenario in scenarios:
        for side in scenario.sides:
            print(f"{side}: {scenario.prompt(side)[0]['content']}")
            for stance in STANCES:
                replies = scenario.side(side).examples[stance]
                print(f"    {stance}: {replies[scenario.seed % len(replies)]}")
        print()


@logs_app.command("import")
def logs_import(
    logs: Annotated[list[Path], typer.Argument(help="OpenAI-style or ShareGPT JSON Lines, or transcripts.")],
    out: Annotated[Path, typer.Option("--out", help="JSON Lines of preference pairs; added to when it exists.")],
    config: ConfigOption = None,
    overrides: SetOption = None,
    json_file: JsonOption = None,
    force_judge: ForceOption = False,
) -> None:
    """Find where an assistant routed wrong, and give each such turn the reply it should have been.

    Secrets are masked before anything is stored or shown to the model.

    Example:  dream logs import chats.jsonl --out from-logs.jsonl
    """
    from dream import tasks
    from dream.terminal import Terminal, import_table

    resolved, source = _load(config, overrides)
    with Terminal(_sources(source)) as terminal:
        summary = tasks.import_logs(resolved, logs, out, terminal, force_judge=force_judge)
    import_table(summary)
    _write(json_file, summary.model_dump())


@runs_app.command("list")
def runs_list(
    folder: Annotated[Path, typer.Argument(help="Where runs are.")] = Path("runs"), json_file: JsonOption = None
) -> None:
    """All runs of a folder, newest last.

    Example:  dream runs list
    """
    from dream.runs import list_runs

    rows = list_runs(folder)
    for row in rows:
        counts = f"{row['rounds']} rounds, {row['pairs']} pairs, policy {row['policy']}"
        print(f"{row['run']}  {row['kind']}  {row['model']}  {counts}")
    _write(json_file, rows)


@runs_app.command("show")
def runs_show(run: Path, json_file: JsonOption = None) -> None:
    """A run's rounds, figures and decisions.

    Example:  dream runs show runs/latest
    """
    from dream.runs import show_run

    _write(json_file, show_run(run))


@runs_app.command("rollback")
def runs_rollback(
    run: Path, to: Annotated[int, typer.Option("--to", help="A promoted round, or 0 for the initial model.")]
) -> None:
    """Make an earlier round the policy again; nothing is deleted.

    Example:  dream runs rollback runs/latest --to 1
    """
    from dream.runs import roll_back_run

    policy = roll_back_run(run, to)
    print(
        f"{run}: the policy is round {policy.round} again; the command that made the run goes on from it, with --out "
        f"{run} and --rounds above {policy.as_of}"
    )


@app.command()
def report(run: Path) -> None:
    """Write what a run did and how good its data is to report.html and report.json in its folder.

    Example:  dream report runs/latest
    """
    from dream.report import write

    print(write(run))


@app.command()
def export(
    run: Path,
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    merged: Annotated[bool, typer.Option("--merged", help="Full weights instead of the adapter.")] = False,
) -> None:
    """Copy the accepted policy out of a run: a PEFT adapter, or a Hugging Face model folder.

    Example:  dream export runs/latest --out my-model --merged
    """
    from dream.runs import export_policy

    print(export_policy(run, out, merged))


def _load(config: Path | None, overrides: list[str] | None, options: dict[str, Any] | None = None) -> Any:
    """The configuration with `--set` values and, where given, those of options."""
    from dream.config import load

    return load(config, overrides, {key: value for key, value in (options or {}).items() if value is not None})


def _sources(config_file: Path) -> str:
    from dream.paths import data_folder

    return f"configuration {config_file}, prompts {data_folder('prompts')}"


def _at_least_one(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{option} {value}: must be 1 or more")


def _write(path: Path | None, value: Any) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--json {path}: {error.strerror or error}; name a file that can be written") from error


if __name__ == "__main__":
    main()
