"""The command line: `python -m raysearch.run`, also installed as `raysearch`. It connects the parts and holds no logic.

Data goes to stdout, everything said along the way to stderr. Bad input is one line and exit code 2.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from raysearch import __version__, folder, labels, objective, profile, programs
from raysearch.config import StudyConfig, load_config, write_config
from raysearch.directions import GENERAL, Directions, refusal
from raysearch.errors import UserError
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.objective import Objective
from raysearch.patches import PatchError, unified_diff
from raysearch.proposers import Proposer, inbox
from raysearch.proposers.prices import Purse
from raysearch.ratchet import Ratchet
from raysearch.study import Study

if TYPE_CHECKING:
    from raysearch.report import StudyStatus  # draws with matplotlib

BAD_INPUT = 2
BLOCKED = 1
STOPPED = 130

_STUDIES = click.option(
    "--studies",
    type=click.Path(path_type=Path),
    default=Path("studies"),
    envvar="RAYSEARCH_STUDIES",
    show_default=True,
    help="Folder of studies; on a cluster, on its head.",
)
_HEAD = click.option("--address", help="Ask the head of a cluster, by HOST:PORT of Ray's dashboard (8265).")


@click.group(invoke_without_command=True, context_settings={"max_content_width": 110})
@click.version_option(__version__)
@_STUDIES
@click.option("--study", "name", default="default", show_default=True, help="Its name; one that is there is continued.")
@click.option("--preset", help="Where to start: h100, rtx3060, cpu.  [default: by each slot's hardware]")
@click.option("--dataset", help="climbmix, tinystories, files:DIR, python or sotu.  [default: by the preset]")
@click.option(
    "--train-file", type=click.Path(path_type=Path), help="A base program of your own.  [default: the bundled]"
)
@click.option(
    "--program", type=click.Path(path_type=Path), help="Your directions, a program.md.  [default: general ones]"
)
@click.option("--objective", "objective_file", type=click.Path(path_type=Path), help="TOML file of another objective.")
@click.option("--budget-s", type=float, help="Training seconds of a trial.  [default: by the preset]")
@click.option("--budget-tokens", type=int, help="Tokens of a trial instead of seconds: deterministic, for CI.")
@click.option("--trials", type=int, help="Stop after so many proposals were tried.  [default: no limit]")
@click.option("--hours", type=float, help="Propose nothing new after so many hours.  [default: no limit]")
@click.option("--searcher", help="Of tune: random, or one of ray.tune.search.  [default: optuna]")
@click.option("--proposers", help="Who is asked, with commas.  [default: all; models and agents in front]")
@click.option("--model", "models", multiple=True, help="Chat model, [WEIGHT*][anthropic:]NAME[@URL]; may be repeated.")
@click.option("--agent", "agents", multiple=True, help="Coding agent: claude, codex, gemini, opencode, aider [=MODEL].")
@click.option("--minds", type=click.Path(path_type=Path), help="TOML with [[models]] and [agents.NAME] in full.")
@click.option("--prices", type=click.Path(path_type=Path), help="TOML with your prices of models.")
@click.option("--max-usd", type=float, help="Most that models and agents may cost the study.  [default: no limit]")
@click.option("--parallel", type=int, help="Asks at once of the models, and of each agent.  [default: 4]")
@click.option("--seed", type=int, help="Of the search.  [default: 0]")
@click.option(
    "--judge", type=click.Choice(["race", "greedy"]), help="greedy: keep what looks better once.  [default: race]"
)
@click.option("--baseline-runs", type=int, help="Runs of each profile's first program, for its noise.  [default: 3]")
@click.option("--address", help="Ray cluster to join, `auto` for this machine's.  [default: start Ray here]")
@click.option("--want", "wants", multiple=True, help="PROFILE=SLOTS to have the cluster start; may be repeated.")
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), metavar="PORT", help="Where a Ray started here shows its metrics."
)
@click.option(
    "--mirror", "mirrors", multiple=True, help="Git remote or fsspec URL for a copy, or none; may be repeated."
)
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), help="Which slots.  [default: GPUs, else CPU]")
@click.option("--cpu-slots", type=int, help="CPU slots a machine.  [default: one a core]")
@click.option("--threads", type=int, help="CPU threads of a trial on a CPU slot.  [default: 1]")
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    """Search for a better train.py on every GPU that you own.

    Without a command: start a study, or continue it. Ctrl-C once lets the runs in flight end, twice stops at once.
    """
    context.obj = options
    if context.invoked_subcommand is None:
        context.exit(search(options))


@cli.command()
@click.argument("study")
@_STUDIES
@_HEAD
@click.option("--into", type=click.Path(path_type=Path), help="With --address: folder for the files.  [STUDY-report]")
@click.pass_context
def report(context: click.Context, /, study: str, studies: Path, address: str | None, into: Path | None) -> None:
    """Write results.tsv, report.md and progress.png of STUDY, and print the summary."""
    from raysearch import remote  # noqa: PLC0415 - httpx

    if address is None:
        written = _report(folder.existing_folder(study, studies))
    else:
        files = _asked(context, address, "report", study)["files"]
        written = remote.unpack(files, into or Path(f"{Path(study).name}-report"))
    summary = next(path for path in written if path.suffix == ".md")
    click.echo(summary.read_text())
    click.echo(f"written: {', '.join(map(str, written))}", err=True)


@cli.command()
@click.argument("study")
@_STUDIES
@_HEAD
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def status(context: click.Context, /, study: str, studies: Path, address: str | None, as_json: bool) -> None:
    """Print where STUDY stands, at any time."""
    from raysearch import report as reports  # noqa: PLC0415

    if address is None:
        found = _status(folder.existing_folder(study, studies))
    else:
        found = _asked(context, address, "status", study)["status"]
    click.echo(json.dumps(found, indent=2) if as_json else reports.status_text(found))


@cli.command(hidden=True)
@click.argument("what", type=click.Choice(["status", "report"]))
@click.argument("study")
@_STUDIES
def answer(what: str, study: str, studies: Path) -> None:
    """Print in one line what `status` or `report` with --address wants to know."""
    from raysearch import remote  # noqa: PLC0415 - httpx

    try:
        place = folder.existing_folder(study, studies.absolute())  # so that an error says which folder it is
        found = {"status": _status(place)} if what == "status" else {"files": remote.packed(_report(place))}
    except UserError as error:
        found = {"error": str(error)}
    click.echo(remote.answered(**found))


def _report(place: Folder) -> list[Path]:
    from raysearch import report as reports  # noqa: PLC0415 - draws with matplotlib

    config, state, _ = _read(place)
    return reports.write_all(state, place.path, name=config.name, metric=config.objective.metric)


def _status(place: Folder) -> StudyStatus:
    from raysearch import report as reports  # noqa: PLC0415

    config, state, driven = _read(place)
    return reports.status(state, name=config.name, metric=config.objective.metric, now=time.time(), running=driven)


def _asked(context: click.Context, address: str, what: str, study: str) -> dict[str, Any]:
    """What the head says; its own folder of studies, unless one was named here."""
    from raysearch import remote  # noqa: PLC0415 - httpx

    named = context.get_parameter_source("studies") is ParameterSource.COMMANDLINE
    return remote.ask(address, what, study, studies=context.params["studies"] if named else None)


@cli.command()
@click.argument("patch", type=click.Path(path_type=Path, allow_dash=True), required=False)
@click.option("--why", required=True, help="The hypothesis, in a sentence.")
@click.option("--commit", help="A commit of the study's repository (or of a clone pushed to it) instead of a file.")
@click.option("--study", "name", help="Name of the study.  [default: the only one, or the only one that runs]")
@click.option("--profile", "profiles", multiple=True, help="Slug, may be repeated.  [default: all of the study]")
@click.option("--by", default="human", show_default=True, help="Who proposes it.")
@_STUDIES
def propose(
    *,
    patch: Path | None,
    why: str,
    commit: str | None,
    name: str | None,
    profiles: Sequence[str],
    by: str,
    studies: Path,
) -> None:
    """Drop PATCH into a study: a unified diff, a whole edited train.py, or - for standard input."""
    place = folder.existing_folder(name, studies) if name else folder.only_folder(studies)
    config, state, driven = _read(place)
    wanted = tuple(profiles) or tuple(state.lanes)
    unknown = [slug for slug in wanted if slug not in state.lanes]
    if unknown or not wanted:
        known = ", ".join(state.lanes) or "none yet, since no slot has joined"
        raise UserError(f"profile {unknown[0] if unknown else '?'!r} is not in study {place.name!r}; known: {known}")
    repo, task = Ratchet.open(place.repo), config.to_objective()
    for slug in wanted:
        text = _patch_text(patch, commit, repo, task, state.lanes[slug].champion_commit)
        wishes = state.directions(state.lanes[slug])
        _check_patch(text, repo, task, state.lanes[slug].champion_commit, slug=slug, directions=wishes)
        target = inbox.drop(place.inbox, patch=text, why=why, by=by, profiles=[slug], at=time.time())
        click.echo(str(target))
    note = "the study takes it now" if driven else f"it is taken when the study runs: raysearch --study {place.name}"
    click.echo(note, err=True)


@cli.command("node-labels")
def node_labels() -> None:
    """Print what this machine is, for `ray start --labels="$(raysearch node-labels)"`."""
    found = profile.detect()
    click.echo(labels.node_labels(found, version=__version__))
    for line in labels.advice(found, chosen="CUDA_VISIBLE_DEVICES" in os.environ):
        _note(f"node-labels: {line}")


def _patch_text(patch: Path | None, commit: str | None, repo: Ratchet, task: Objective, champion: str) -> str:
    if (patch is None) == (commit is None):
        raise UserError("propose takes a patch file or --commit, one of the two; see `raysearch propose --help`")
    if commit is not None:
        resolved = repo.resolve(commit)
        parents = repo.parents(resolved)
        return repo.diff(parents[0] if parents else champion, resolved)
    assert patch is not None
    try:
        text = sys.stdin.read() if str(patch) == "-" else patch.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{patch}: {error}; name a readable patch file") from None
    if patch.suffix == ".py":
        path = patch.name if patch.name in task.editable else task.editable[0]
        return unified_diff(path, repo.read(champion, path), text)
    return text


def _check_patch(
    text: str, repo: Ratchet, task: Objective, champion: str, *, slug: str, directions: Directions
) -> None:
    """Says at once what the study would refuse later."""
    try:
        commit = repo.commit_patch(champion, text, editable=task.editable, message="checked\n", at=0.0)
    except PatchError as error:
        raise UserError(f"it does not fit the champion of {slug}: {error}") from None
    files = repo.files(commit, task.editable)
    objective.check_program(files, task)
    against = refusal(directions, before=repo.files(champion, task.editable), after=files, operator=None)
    if against is not None:
        raise UserError(f"it is {against}; change the patch, or that file in the study's folder")


def _read(place: Folder) -> tuple[StudyConfig, Study, bool]:
    config = folder.load_config(place.config)
    journal = Journal(place.journal, writer=False)
    try:
        return config, folder.replay(config, journal), Journal.is_driven(place.journal)
    finally:
        journal.close()


# ---- the search ----


def search(options: Mapping[str, Any]) -> int:
    """Starts or continues a study; returns the exit code."""
    from raysearch import minds, remote  # noqa: PLC0415 - numpy and httpx; for a search alone

    _check_limits(options)
    if options["address"] is None and remote.is_job(os.environ):
        options = {**options, "address": "auto"}  # the cluster that it was submitted to
    _wanted(options)  # says now what it would say then
    place = folder.named_folder(options["name"], options["studies"])
    folder.check_lasting(place)
    chosen = _chosen(options)
    config, is_new = folder.configure(place, chosen)
    program = programs.given(options["program"]) if options["program"] else programs.general() if is_new else None
    folder.check_space(place)
    task = config.to_objective()
    if task.has_presets and config.preset != "auto":
        objective.named_preset(objective.load_presets(), config.preset)
    files = _base_program(options, config) if is_new else None
    if files is not None:
        minds.tuner(config).check(files[objective.tuned_file(task.editable)])
    purse = Purse(options["max_usd"])
    protected = files or Ratchet.open(place.repo).files("main", task.protected)
    proposers = minds.make(config, minds.Place(place.scratch, minds.readable(task, protected), purse, _note))
    _say_who_is_asked(config, config if is_new else load_config(place.config), chosen)
    if task.has_presets and options["address"] is None:
        config = _prepare_here(config, files)
    if files is not None:
        folder.make(place, config, files, at=time.time())
    return _drive(place, config, options, proposers, program=program, purse=purse)


def _note(line: str) -> None:
    click.echo(line, err=True)


def _say_who_is_asked(config: StudyConfig, before: StudyConfig, chosen: Mapping[str, Any]) -> None:
    if config.proposers != before.proposers:
        _note(f"asked from now on: {', '.join(config.proposers)}; --proposers names others")
    idle = [name for name in config.minds if name not in config.proposers]
    if idle and ("models" in chosen or "agents" in chosen):
        _note(f"{' and '.join(idle)} will not be asked: --proposers is {','.join(config.proposers)}; add it there")


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say about the study itself, as `study.toml` has it."""
    from raysearch import minds, mirrors  # noqa: PLC0415 - numpy
    from raysearch.data import anywhere  # noqa: PLC0415

    table: dict[str, Any] = {}
    if options["mirrors"]:
        table["mirrors"] = mirrors.chosen(options["mirrors"])
    if options["objective_file"]:
        table |= _objective_table(options["objective_file"])
    named: str | None = options["dataset"]
    plain = {"preset": options["preset"], "dataset": None if named is None else anywhere(named)}
    sections = {
        "budget": {"seconds": options["budget_s"], "tokens": options["budget_tokens"]},
        "search": {
            "searcher": options["searcher"],
            "seed": options["seed"],
            "proposers": _names(options["proposers"]),
            "parallel": options["parallel"],
        },
        "judge": {"rule": options["judge"], "baseline_runs": options["baseline_runs"]},
        "slots": {"device": options["device"], "cpu_slots": options["cpu_slots"], "threads": options["threads"]},
    }
    given = minds.chosen(
        models=options["models"], agents=options["agents"], file=options["minds"], prices=options["prices"]
    )
    table |= given
    table |= {key: value for key, value in plain.items() if value is not None}
    for section, values in sections.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            table[section] = {**table.get(section, {}), **given}
    return table


def _names(option: str | None) -> list[str] | None:
    return None if option is None else [name.strip() for name in option.split(",")]


def _objective_table(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}; --objective takes a readable TOML file") from None
    table.setdefault("objective", {}).setdefault("kind", "command")
    return table


def _check_limits(options: Mapping[str, Any]) -> None:
    for name in ("trials", "hours", "max_usd"):
        value = options[name]
        if value is not None and not value > 0:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {value}: it must be more than 0; leave it out for no limit")


def _wanted(options: Mapping[str, Any]) -> dict[str, int]:
    """Slots by profile, of the options `--want PROFILE=SLOTS`."""
    found: dict[str, int] = {}
    for text in options["wants"]:
        match = re.fullmatch(r"([a-z0-9]+(?:-[a-z0-9]+)*)=([1-9]\d{0,3})", text)
        if match is None:
            raise UserError(
                f"--want {text!r}: it must be PROFILE=SLOTS, such as h100-80gb=4; status lists the profiles"
            )
        found[match[1]] = int(match[2])
    if found and options["address"] is None:
        raise UserError("--want is for a cluster that can start machines; give its --address, or leave it out")
    return found


def _base_program(options: Mapping[str, Any], config: StudyConfig) -> dict[str, str]:
    """The files of the first commit, checked."""
    task = config.to_objective()
    if options["train_file"] and not task.has_presets:
        raise UserError("--train-file is for the bundled trainer; an --objective names its own files")
    if task.has_presets:
        sources = {objective.TRAIN_FILE: options["train_file"] or objective.trainer_folder() / objective.TRAIN_FILE}
    else:
        home = options["objective_file"].parent
        sources = {path: home / path for path in (*task.editable, *task.protected)}
    files: dict[str, str] = {}
    for path, source in sources.items():
        try:
            files[path] = source.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}: {error}; the base program needs this file") from None
    try:
        objective.check_program({path: files[path] for path in task.editable}, task)
    except UserError as error:
        path = str(error).split(":", 1)[0]  # the user knows the file by where it lies
        raise UserError(str(error).replace(path, str(sources.get(path, path)), 1)) from None
    return files


def _prepare_here(config: StudyConfig, files: Mapping[str, str] | None) -> StudyConfig:
    """Makes the data before Ray starts, so that progress and errors are seen; slots of a cluster do it themselves."""
    from raysearch.data import prepare  # noqa: PLC0415

    presets = objective.load_presets()
    found = [profile.cpu()] if config.slots.device == "cpu" else profile.detect()
    names = {
        config.preset
        if config.preset != "auto"
        else objective.choose_preset(presets, device=hardware.device, memory_mb=hardware.memory_mb).name
        for hardware in found
    }
    datasets = dict(config.datasets)
    for name in sorted(names):
        if files:
            objective.base_program(files[objective.TRAIN_FILE], presets[name])  # says now what it would say then
        data = prepare(presets[name], datasets.get(name) or config.dataset or None, show=True)
        click.echo(f"data for preset {name}: {data.dataset}, {data.why}", err=True)
        datasets[name] = data.dataset
    return config.model_copy(update={"datasets": datasets})


def _drive(
    place: Folder,
    config: StudyConfig,
    options: Mapping[str, Any],
    proposers: Sequence[Proposer],
    *,
    program: str | None,
    purse: Purse,
) -> int:
    journal = Journal(place.journal, writer=True)
    try:
        study = folder.replay(config, journal, max_trials=options["trials"])
        repo = Ratchet.open(place.repo)
        folder.check_ratchets(study, repo, place)
        if program is not None:
            programs.put(place.path / GENERAL, program)
        presets = objective.load_presets() if config.to_objective().has_presets else ()
        programs.Programs(place.path, presets).begin(study.directed)  # says now what the coordinator would say later
        write_config(place.config, config)  # with what the options have changed, now that all of it is known to work
        return _coordinate(place, config, options, proposers, journal=journal, study=study, repo=repo, purse=purse)
    finally:
        journal.close()


def _coordinate(
    place: Folder,
    config: StudyConfig,
    options: Mapping[str, Any],
    proposers: Sequence[Proposer],
    *,
    journal: Journal,
    study: Study,
    repo: Ratchet,
    purse: Purse,
) -> int:
    # Ray and what draws cost a second: after everything that can be wrong with the input
    from raysearch import report as reports  # noqa: PLC0415
    from raysearch.asker import Asker  # noqa: PLC0415
    from raysearch.console import Console  # noqa: PLC0415
    from raysearch.coordinator import Coordinator, Session  # noqa: PLC0415
    from raysearch.executors.ray import RayExecutor  # noqa: PLC0415
    from raysearch.executors.ray_actors import SlotPlan  # noqa: PLC0415
    from raysearch.exporter import Exporter  # noqa: PLC0415
    from raysearch.mirrors import Mirrors  # noqa: PLC0415

    hours = options["hours"]
    deadline = time.time() + hours * 3600 if hours else None
    session = Session(place.token.read_text(), uuid.uuid4().hex, deadline, _wanted(options))
    task = config.to_objective()
    plan = SlotPlan(
        study=session.study,
        session=session.id,
        folder=str(place.path),
        token=place.token.name,
        preset=config.preset if task.has_presets else "",
        dataset=config.dataset,
        datasets=config.datasets,
        withheld=config.key_names,
        manifests=config.manifests,
    )
    slots = config.slots
    console = Console(study, name=config.name, metric=task.metric)
    executor = RayExecutor(
        plan,
        address=options["address"],
        device=slots.device,
        cpu_slots=slots.cpu_slots,
        threads=slots.threads,
        metrics_port=options["metrics_port"],
    )
    # nobody knows the port of a Ray of our own that was given none
    is_scraped = options["address"] is not None or options["metrics_port"] is not None
    exporters = [Exporter(study, name=config.name, metric=task.metric)] if is_scraped else []
    mirrors = Mirrors(place, config.mirrors, say=console.note)
    coordinator = Coordinator(
        folder=place,
        config=config,
        study=study,
        journal=journal,
        repo=repo,
        executor=executor,
        askers=[Asker(proposer, time.time) for proposer in proposers],
        console=console,
        session=session,
        onlookers=[*exporters, mirrors],
        purse=purse,
    )
    _on_signal(signal.SIGINT, coordinator.interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        _on_signal(number, coordinator.stop)
    try:
        reason = coordinator.run()
    finally:
        console.close()
        executor.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            _on_signal(number, mirrors.give_up)
        mirrors.close()
    click.echo(f"ended: {reason}", err=True)
    written = reports.write_all(study, place.path, name=config.name, metric=task.metric)
    found = reports.status(study, name=config.name, metric=task.metric, now=time.time(), running=False)
    click.echo(reports.status_text(found))
    click.echo(f"written: {', '.join(map(str, written))}", err=True)
    if study.lanes and all(lane.blocked for lane in study.lanes.values()):
        return BLOCKED
    return STOPPED if reason.startswith("stopped at once") else 0


def _on_signal(number: signal.Signals, call: Callable[[], None]) -> None:
    def handle(_number: int, _frame: object) -> None:
        call()

    signal.signal(number, handle)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its code."""
    try:
        code = cli.main(args=arguments, prog_name="raysearch", standalone_mode=False)
    except UserError as error:
        sys.exit(_said(str(error)))
    except click.ClickException as error:
        sys.exit(_said(error.format_message()))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(_said(f"{error.filename or 'the disk'}: no space is left; free some and start the study again"))
    except click.Abort:
        sys.exit(STOPPED)
    sys.exit(code if isinstance(code, int) else 0)


def _said(message: str) -> int:
    print(f"raysearch: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    return BAD_INPUT


if __name__ == "__main__":
    main()
