"""What an N-best list costs: beam search in blocks against one that calls the decoder once a token; docs/nbest.md.

    python experiments/nbest.py --manifest librispeech.jsonl --use dev --limit 100

A textbook beam search calls the decoder once for each token of its longest hypothesis; without drafts of heads and of
CTC ours finds the same hypotheses (tested) in hardly fewer calls. Every search takes its turn in each round; seconds
are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leapasr.chunks import Chunk, by_length
from leapasr.data.manifests import read_manifest
from leapasr.decoding import DecodingOptions, DecodingResult
from leapasr.evaluation.scoring import count_word_errors
from leapasr.running import EncodedBatch
from leapasr.text import NORMALIZER
from leapasr.transcriber import Transcriber, load


def searches(size: int) -> dict[str, DecodingOptions]:
    """The searches that are compared, the one without drafts first."""
    fields: dict[str, Any] = {"strategy": "beam", "beam_size": size, "nbest": size}
    return {
        "no heads, no CTC": DecodingOptions(num_heads=1, drafts="mtp", **fields),
        "drafts of the heads": DecodingOptions(drafts="mtp", **fields),
        "drafts of CTC": DecodingOptions(drafts="ctc", **fields),
        "drafts of both": DecodingOptions(drafts="both", **fields),
        "heads trusted from 0.9": DecodingOptions(threshold=0.9, **fields),
        "heads trusted from 0.5": DecodingOptions(threshold=0.5, **fields),
    }


def num_steps(result: DecodingResult) -> int:
    """Tokens of the longest hypothesis, end-of-text included; of one that was cut short those that are left."""
    return max(len(each.tokens) + (each.truncated is None) for each in result.hypotheses)


def errors_of(transcriber: Transcriber, reference: str, result: DecodingResult) -> list[int]:
    """Word errors of each hypothesis."""
    texts = (transcriber.processor.decode_text(each.tokens) for each in result.hypotheses)
    return [sum(count_word_errors(reference, text, NORMALIZER)[1:]) for text in texts]


def run(
    transcriber: Transcriber, batches: Sequence[EncodedBatch], options: DecodingOptions
) -> tuple[list[DecodingResult], float]:
    """The results for all `batches` in their order, and the seconds of decoding."""
    done = [transcriber.decode(batch, options) for batch in batches]
    return [result for each in done for result in each.results], sum(each.seconds for each in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; the shipped model without it")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--use", default="dev")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--beam-size", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()

    transcriber = load(arguments.model) if arguments.model else load()
    cuts = list(read_manifest(arguments.manifest, use=arguments.use, limit=arguments.limit).cuts)
    whole = [cut for cut in cuts if cut.duration <= transcriber.max_seconds]
    chunks = [Chunk(n, 0.0, cut.load_audio()[0]) for n, cut in enumerate(whole)]
    batches = [transcriber.encode(each) for each in by_length(chunks, arguments.batch_size)]
    references = [whole[chunk.recording].supervisions[0].text for batch in batches for chunk in batch.chunks]
    num_words = sum(count_word_errors(reference, "", NORMALIZER)[0] for reference in references)

    chosen = searches(arguments.beam_size)
    results: dict[str, list[DecodingResult]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(arguments.rounds):
        for name, options in chosen.items():
            results[name], taken = run(transcriber, batches, options)
            seconds[name].append(taken)

    rows: list[dict[str, Any]] = []
    first = results["no heads, no CTC"]
    for name in chosen:
        errors = [
            errors_of(transcriber, reference, result)
            for reference, result in zip(references, results[name], strict=True)
        ]
        same = sum(
            [each.tokens for each in mine.hypotheses] == [each.tokens for each in other.hypotheses]
            for mine, other in zip(results[name], first, strict=True)
        )
        rows.append({
            "search": name,
            "calls": sum(result.num_calls for result in results[name]),
            "steps": sum(map(num_steps, results[name])),
            "wer": sum(each[0] for each in errors) / num_words,
            "oracle_wer": sum(map(min, errors)) / num_words,
            "same_lists": same / len(first),
            "seconds": statistics.median(seconds[name]),
        })  # fmt: skip
    lines = [
        "# What an N-best list costs",
        "",
        f"`experiments/nbest.py`: {len(whole)} utterances of {arguments.manifest.parent.name} {arguments.use} "
        f"({len(cuts) - len(whole)} longer than {transcriber.max_seconds:.0f} s left out), N = {arguments.beam_size}, "
        f"float32, batch {arguments.batch_size}, {torch.get_num_threads()} CPU threads; seconds of decoding, median of "
        f"{arguments.rounds} rounds. A textbook beam search needs {rows[0]['steps']} calls: one for each token of its "
        "longest hypothesis.",
        "",
        "| search | calls | fewer than textbook | WER % | oracle WER % | same lists % | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['search']} | {row['calls']} | {rows[0]['steps'] / row['calls']:.2f}x | {100 * row['wer']:.2f} "
            f"| {100 * row['oracle_wer']:.2f} | {100 * row['same_lists']:.0f} | {row['seconds']:.1f} |"
            for row in rows
        ),
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "nbest.md").write_text("\n".join(lines) + "\n")
    (arguments.output / "nbest.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
