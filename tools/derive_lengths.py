"""Derive the quantile tables in traces/data/lengths from the traces that they stand for.

    python tools/derive_lengths.py [AZURE_CONV_CSV] [--out DIR]

Prints how far mean and quantiles of 100,000 draws from the table lie from the trace's own.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from qllm.traces.requests.lengths import draw_lengths
from qllm.traces.requests.quantile_table import BUNDLED
from qllm.traces.requests.readers import read_requests
from qllm.traces.requests.recipe import Length
from qllm.traces.requests.trace import RequestTrace, TraceError

ROOT = Path(__file__).parent.parent
AZURE = ROOT / "../shared/data/traces/AzureLLMInferenceTrace_conv.csv"
# One per cent apart; the last per cent finer, since a straight line over it would raise the mean prompt by 3.5 %.
QUANTILES = [*(i / 100 for i in range(100)), 0.995, 0.999, 0.9999, 1.0]
HEADER = """\
# Prompt and output lengths, in tokens, of conversation requests to an Azure LLM service, November 2023: quantiles of
# each column on its own (which prompt had which output is not kept).
# Source: Azure Public Dataset, AzureLLMInferenceTrace_conv.csv ({requests} requests), Microsoft,
#   https://github.com/Azure/AzurePublicDataset; described in P. Patel et al., "Splitwise: Efficient Generative LLM
#   Inference Using Phase Splitting", ISCA 2024.
# Licence: CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/ (the source's; this table is under the same).
# Changes: {points} quantiles computed from the rows (linear interpolation between order statistics, 2 decimals) by
#   tools/derive_lengths.py; arrival times left out.
"""


def table(trace: RequestTrace) -> str:
    """The table as CSV text with its header comment."""
    columns = [np.quantile(tokens, QUANTILES) for tokens in (trace.prompt_tokens, trace.output_tokens)]
    lines = [f"{q},{prompt:.2f},{output:.2f}" for q, prompt, output in zip(QUANTILES, *columns, strict=True)]
    header = HEADER.format(requests=len(trace), points=len(QUANTILES))
    return header + "quantile,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", type=Path, default=AZURE)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    options = parser.parse_args()
    try:
        trace = read_requests(options.trace, "azure")
    except TraceError as error:
        sys.exit(str(error))
    path = options.out / "azure_conv.csv"
    path.write_text(table(trace), encoding="utf-8")
    print(f"{path.name}: {len(QUANTILES)} quantiles of {len(trace)} requests")
    for column, real in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        drawn = draw_lengths(np.random.default_rng(0), 100_000, Length(quantiles=str(path)), column=column)
        for name, statistic in (("mean", np.mean), *((f"p{p}", lambda x, p=p: np.percentile(x, p)) for p in (50, 99))):
            print(f"  {column:6} {name:4}  trace {statistic(real):8.1f}  table {statistic(drawn):8.1f}")


if __name__ == "__main__":
    main()
