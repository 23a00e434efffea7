"""qllm trace: what a request trace holds; generate one, or convert, cut, stretch and label a recorded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qllm.config.yaml_lines import ConfigError
from qllm.traces.messages import first_line

if TYPE_CHECKING:
    from qllm.traces.requests.trace import RequestTrace

app = typer.Typer(no_args_is_help=True, help="Request traces: statistics, conversion, generation.")

_FORMATS = "azure, burstgpt, mooncake, bailian, sharegpt, csv or jsonl; default: found from the content"
_UNIT = "Of the arrivals in the file: s, ms, us or ns; default: what the format says"
_LENGTH = "Tokens: a number, a bundled quantile table, or YAML such as '{lognormal: {mean: 161, sigma: 1.3}}'"


@app.command()
def describe(
    file: Annotated[Path, typer.Argument(help="Request trace", show_default=False)],
    format: Annotated[str | None, typer.Option(help=_FORMATS)] = None,
    unit: Annotated[str | None, typer.Option(help=_UNIT)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, for the texts of a sharegpt trace")] = None,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Leave broken rows out, with a warning")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Requests, rate, burstiness and token lengths of a request trace, by class."""
    from qllm.traces.prefixes import prefixes_in_words

    told = _read(file, format, unit, tokenizer, skip_invalid).describe()
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    classes = told.pop("classes")
    rows = {"all": {key: told.pop(key) for key in ("prompt_tokens", "output_tokens")}, **classes}
    told["coinciding"] = _coinciding(told["requests"], *told["coinciding"].values())
    if "prefixes" in told:
        told["prefixes"] = prefixes_in_words(told["prefixes"])
    told |= _wants(told)
    for key, value in told.items():
        typer.echo(f"{key:<12} {_number(value)}")
    for name, row in rows.items():
        share = f"  {row['requests']} requests, {_number(row['share'])} of all" if "requests" in row else ""
        typer.echo(f"\n{name}{share}")
        for column in ("prompt_tokens", "output_tokens"):
            numbers = "  ".join(f"{key} {_number(value)}" for key, value in (row[column] or {}).items())
            typer.echo(f"  {column:<14} {numbers or 'none'}")


@app.command()
def make(
    out: Annotated[Path, typer.Argument(help="File to write: .csv or .jsonl", show_default=False)],
    source: Annotated[Path | None, typer.Option("--from", help="Recorded trace to convert; default: generate")] = None,
    format: Annotated[str | None, typer.Option(help=f"Of --from: {_FORMATS}")] = None,
    unit: Annotated[str | None, typer.Option(help=_UNIT)] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, for the texts of a sharegpt trace")] = None,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Leave broken rows out, with a warning")] = False,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Of bailian: keep which request follows which (columns follows, think_s)")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Write the requests that this configuration sends, for --seed and --rate")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Mean requests per second; a recorded trace is stretched, or a batch gets Poisson arrivals"),
    ] = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Spread recorded arrivals that coincide over the gap to the next")
    ] = False,
    requests: Annotated[int | None, typer.Option(help="How many; of a recorded trace, the first ones")] = None,
    arrival: Annotated[
        str | None,
        typer.Option(help="poisson, or YAML: '{process: clients, clients: 50, cv: 3}'; replaces recorded arrivals"),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help=_LENGTH)] = None,
    output: Annotated[str | None, typer.Option(help=_LENGTH)] = None,
    classes: Annotated[
        str | None, typer.Option(help="YAML: share, and lengths that differ: '{ls: {share: 0.2}, be: {}}'")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn")] = 0,
) -> None:
    """Generate a request trace, write that of a configuration, or convert a recorded one (format, rate, classes)."""
    if config is not None:
        given = {"--from": source, "--format": format, "--unit": unit, "--tokenizer": tokenizer, "--requests": requests}
        given |= {"--arrival": arrival, "--prompt": prompt, "--output": output, "--classes": classes}
        given |= {"--skip-invalid": skip_invalid or None, "--spread": spread or None, "--sessions": sessions or None}
        _refuse(given, "is a matter of the configuration (--config)")
        _write(_of_config(config, rate, seed), out)
        return
    process = _yaml("--arrival", arrival)
    process = {"process": process} if isinstance(process, str) else process
    labels = _yaml("--classes", classes)
    if source is None:
        given = {"--format": format, "--unit": unit, "--tokenizer": tokenizer, "--sessions": sessions or None}
        given |= {"--skip-invalid": skip_invalid or None, "--spread": spread or None}
        _refuse(given, "belongs to --from FILE")
        trace = _generate(
            rate, requests, process, _length("--prompt", prompt), _length("--output", output), labels, seed
        )
    else:
        _refuse({"--prompt": prompt, "--output": output}, "a recorded trace brings its own lengths")
        trace = _read(source, format, unit, tokenizer, skip_invalid, sessions)
        trace = _convert(trace.spread() if spread else trace, rate, requests, process, labels, seed)
    _write(trace, out)


def _write(trace: RequestTrace, out: Path) -> None:
    from qllm.traces.requests.writers import write_requests

    write_requests(trace, out)
    rate_told = "all at one instant" if trace.rate is None else f"{_number(trace.rate)} requests/s"
    typer.echo(f"{out}: {len(trace)} requests, {rate_told}, classes {', '.join(trace.classes)}")


def _of_config(path: Path, rate: float | None, seed: int) -> RequestTrace:
    """What a configuration sends in a run of that seed, at that rate where one is given."""
    from qllm.config.config import RATE, load_config
    from qllm.config.workload import request_trace

    config = load_config(path)
    swept = [key for key in config.sweep if key != RATE or rate is None]
    if swept:
        told = "--rate" if swept == [RATE] else "a configuration without a sweep of it"
        raise ConfigError(f"--config {path}: sweeps {swept[0]}; allowed: {told}")
    return request_trace(config.at({} if rate is None else {RATE: rate}), seed)


def _generate(
    rate: float | None, requests: int | None, process: Any, prompt: Any, output: Any, classes: Any, seed: int
) -> RequestTrace:
    from qllm.traces.requests.generate import generate

    if rate is None or requests is None:
        raise ConfigError(f"{'--rate' if rate is None else '--requests'}: is missing; to generate a trace give both")
    spec = {"arrival": process, "classes": classes, "prompt": prompt, "output": output}
    return generate({k: v for k, v in spec.items() if v is not None}, rate=rate, requests=requests, seed=seed)


def _convert(
    trace: RequestTrace, rate: float | None, requests: int | None, process: Any, classes: Any, seed: int
) -> RequestTrace:
    from qllm.traces.requests.generate import assign_arrivals, assign_classes

    if requests is not None:
        trace = trace.head(requests)
    if process is not None or (trace.rate is None and rate is not None):
        if rate is None:
            raise ConfigError("--rate: is missing; new arrivals need a mean rate")
        trace = assign_arrivals(trace, process, rate=rate, seed=seed)
    elif rate is not None:
        trace = trace.at_rate(rate)
    if classes is not None:
        jobs = classes.values() if isinstance(classes, dict) else [classes]
        if not all(job is None or (isinstance(job, dict) and set(job) <= {"share"}) for job in jobs):
            raise ConfigError("--classes: with --from expected '{NAME: {share: 0.2}, OTHER: {}}', shares only")
        shares = {name: (job or {}).get("share") for name, job in classes.items()}
        trace = assign_classes(trace, shares, seed=seed)
    return trace


def _read(
    file: Path,
    format: str | None,
    unit: str | None,
    tokenizer: Path | None,
    skip_invalid: bool,
    sessions: bool = False,
) -> RequestTrace:
    from qllm.traces.requests.readers import read_requests

    return read_requests(
        file, format, unit=unit, skip_invalid=skip_invalid, tokenizer=_tokenizer(tokenizer), sessions=sessions
    )


def _coinciding(requests: int, shared: int, shared_instants: int, instants: int, gap_s: float | None) -> str:
    """What `describe` says of requests that arrive together, in words."""
    if not shared:
        return "no two requests arrive at one instant"
    told = f"{shared} of {requests} requests share {shared_instants} of {instants} instants"
    if gap_s is None:
        return f"{told}: a batch, without a rate"
    return f"{told}, {_number(gap_s)} s apart (spread: true in a configuration, trace make --spread)"


def _wants(told: dict[str, Any]) -> dict[str, str]:
    """What `describe` says of bounds, tenants and tags, in words."""
    found: dict[str, str] = {}
    for name in ("max_ttft_s", "max_tpot_s"):
        if name in told:
            numbers = "  ".join(f"{key} {_number(told[name][key])}" for key in ("min", "p50", "max"))
            found[name] = f"of {told[name]['requests']} requests: {numbers}"
    if "tenants" in told:
        found["tenants"] = f"{told['tenants']['tenants']}, of {told['tenants']['requests']} requests"
    if "sessions" in told:
        said = told["sessions"]
        found["sessions"] = (
            f"{said['following']} requests follow others, after {_number(said['think_s_p50'])} s (median)"
        )
    if "tags" in told:
        found["tags"] = "requests with " + ", ".join(f"{name}: {requests}" for name, requests in told["tags"].items())
    return found


def _tokenizer(path: Path | None) -> Any:
    """A function from text to tokens, by a Hugging Face tokenizer.json."""
    if path is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError("--tokenizer: needs the package tokenizers (pip install tokenizers)") from None
    if not path.is_file():
        raise ConfigError(f"--tokenizer {path}: no such file; expected the tokenizer.json of a model")
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ConfigError(f"--tokenizer {path}: not a tokenizer.json: {error}") from None
    return lambda text: loaded.encode(text).ids


def _length(option: str, text: str | None) -> Any:
    """A length's recipe; a bare number means fixed, a bare name a quantile table."""
    value = _yaml(option, text)
    if isinstance(value, int) and not isinstance(value, bool):
        return {"fixed": value}
    return {"quantiles": value} if isinstance(value, str) else value


def _yaml(option: str, text: str | None) -> Any:
    import yaml

    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {text}: not valid YAML: {first_line(error)}") from None


def _refuse(options: dict[str, Any], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name}: {why}")


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
