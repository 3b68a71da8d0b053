"""The decoding loop against the slow reference, on random weights: contracts 1, 2, 3 and 9 of the design.

Shapes: B rows, L positions, D width.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from leapasr.decoding import CausalLMDecoder, DecodingLoop, DecodingOptions, Prompts, SpeechLlamaDecoder, decode
from leapasr.decoding.drafts import CTCDrafter, Reading, build_drafter
from leapasr.decoding.guards import guard_rows
from leapasr.decoding.reading import NUM_MISTAKES
from leapasr.decoding.reference import decode_reference, full_forward
from leapasr.decoding.strategies import LEADING, Threshold, Verification
from leapasr.decoding.trace import DraftToken, accept_length_histogram, accept_lengths

V, EOS = 48, 2
HEAD_TYPES = ("projection", "latent", "residual", "sequential")
AUTOREGRESSIVE = DecodingOptions(strategy="autoregressive", max_repeats=4)
VERIFY = DecodingOptions(max_repeats=4)
MAX_TOKENS = 30


def make_prompts(num_rows: int, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Prompts:
    """Random prompts of uneven length, not at consecutive positions, with large values where nothing may look."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, 12, (num_rows,), generator=generator)
    embeddings_BLD = torch.randn(num_rows, int(lengths_B.max()), 32, generator=generator, dtype=torch.float64)
    positions_BL = torch.randint(0, 30, embeddings_BLD.shape[:2], generator=generator)
    for embeddings_LD, positions_L, length in zip(embeddings_BLD, positions_BL, lengths_B, strict=True):
        embeddings_LD[length:] = 100.0
        positions_L[length - 1] = length - 1
    return Prompts(embeddings_BLD.to(dtype), lengths_B, positions_BL)


def full_hidden(decoder, prompts: Prompts, row: int, tokens: Sequence[int]) -> torch.Tensor:
    """Hidden states (L, D) of a row's prompt and the tokens behind it."""
    text_1M = torch.tensor([list(tokens)], dtype=torch.long)
    return full_forward(decoder, prompts.row(row), decoder.embed(text_1M, text_1M)[0])


def take(prompts: Prompts, rows: Sequence[int]) -> Prompts:
    rows = list(rows)
    longest = int(prompts.lengths_B[rows].max())
    return Prompts(
        prompts.embeddings_BLD[rows, :longest], prompts.lengths_B[rows], prompts.positions_BL[rows, :longest]
    )


class ScriptedDrafter:
    """Drafts `num_drafts` tokens made from the script: everything that the row is going to emit."""

    def __init__(self, script: Sequence[int], num_drafts: int, corrupt: Callable[[int, int], int], at_prefill=True):
        self.script, self.num_drafts, self.corrupt, self.at_prefill = script, num_drafts, corrupt, at_prefill

    def propose(self, emitted, guesses):
        if not emitted and not self.at_prefill:
            return []
        right = self.script[len(emitted) : len(emitted) + self.num_drafts]
        return [DraftToken(self.corrupt(token, j), 0.5, f"script{j}") for j, token in enumerate(right)]

    def review(self, verdicts, num_accepted, further):
        pass

    def copy(self):
        return self


def corruption(kind: str, seed: int = 0) -> Callable[[int, int], int]:
    """What becomes of the right token at place j of a draft."""
    chance = random.Random(seed)
    return {
        "right": lambda token, j: token,
        "wrong": lambda token, j: (token + 1) % V,
        "random": lambda token, j: chance.randrange(V),
        "mixed": lambda token, j: token if chance.random() < 0.7 else chance.randrange(V),
        "end inside": lambda token, j: EOS if j == 1 else token,
    }[kind]


def scripted(references, kind: str, num_drafts: int = 4, **fields) -> list[ScriptedDrafter]:
    """A drafter per row that knows the reference's result."""
    scripts = [[record.token for record in result.trace] for result in references]
    return [ScriptedDrafter(script, num_drafts, corruption(kind, n), **fields) for n, script in enumerate(scripts)]


def outcome(result) -> tuple:
    """What two decodings of a row must agree on."""
    return result.tokens, result.truncated, [record.token for record in result.trace]


def course(result) -> tuple:
    """What two runs of one strategy on a row must agree on as well: who emitted what when, in how many calls."""
    return outcome(result), result.num_calls, [(record.step, record.source) for record in result.trace]


def outcomes(results) -> list[tuple]:
    return [outcome(result) for result in results]


def assert_log_probabilities_close(results, references) -> None:
    for result, reference in zip(results, references, strict=True):
        assert result.log_probabilities == pytest.approx(reference.log_probabilities, abs=1e-4)


@pytest.fixture(scope="module")
def decoder(build_tiny_model):
    return SpeechLlamaDecoder(build_tiny_model())


@pytest.fixture(scope="module")
def prompts():
    return make_prompts(12)


@pytest.fixture(scope="module")
def references(decoder, prompts):
    return decode_reference(decoder, prompts, AUTOREGRESSIVE, max_tokens=[MAX_TOKENS] * 12)


def test_the_random_model_is_worth_testing_on(references):
    assert {result.truncated for result in references} == {None, "length", "repetition"}
    assert len({len(result.tokens) for result in references}) > 6
    assert len({token for result in references for token in result.tokens}) > V / 2


# Contract 1: verification emits what autoregressive decoding emits.


@pytest.mark.parametrize("num_drafts", [1, 4, 40])
@pytest.mark.parametrize("kind", ["right", "wrong", "random", "mixed", "end inside"])
def test_verification_is_exact_whatever_the_drafts(decoder, prompts, references, kind, num_drafts):
    drafters = scripted(references, kind, num_drafts)
    results = decode(decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 12, drafters=drafters)
    assert outcomes(results) == outcomes(references)
    assert_log_probabilities_close(results, references)


@pytest.mark.parametrize("drafts", ["ctc", "both"])
@pytest.mark.parametrize("kind", ["right", "wrong", "random", "mixed", "end inside"])
def test_verification_of_readings_is_exact(decoder, prompts, references, kind, drafts):
    """Readings as CTC would give them, right or not: the tokens stay, and those that are right take one call."""
    options = replace(VERIFY, drafts=drafts)
    readings = []
    for row, result in enumerate(references):
        corrupt = corruption(kind, row)
        tokens = [corrupt(token, j) for j, token in enumerate(result.tokens)]
        readings.append(Reading(tokens, [0.9] * len(tokens)))
    drafters = [build_drafter(options, reading, end_token=EOS) for reading in readings]
    results = decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 12, drafters=drafters)
    assert outcomes(results) == outcomes(references)
    assert_log_probabilities_close(results, references)
    ended = [result.num_calls for result in results if result.truncated is None]
    assert ended
    if kind == "right":
        assert set(ended) == {1}


def test_a_reading_with_one_mistake_costs_two_calls(decoder, prompts, references, monkeypatch):
    """Behind the mistake the draft goes on where the reading goes on, if what random weights say of it is not heard."""
    monkeypatch.setattr(CTCDrafter, "review", lambda *verdicts: None)
    options = replace(VERIFY, drafts="ctc")
    rows = [n for n, result in enumerate(references) if result.truncated is None and len(result.tokens) > 4]
    assert rows
    for row in rows:
        tokens = list(references[row].tokens)
        tokens.insert(2, next(token for token in range(3, V) if token not in tokens))
        drafter = build_drafter(options, Reading(tokens, [0.9] * len(tokens)), end_token=EOS)
        result = decode(decoder, take(prompts, [row]), options, max_tokens=[MAX_TOKENS], drafters=[drafter])[0]
        assert outcome(result) == outcome(references[row])
        assert result.num_calls == 2


# Relaxed verification: the same loop, another test of what stands.


def relaxed_reference(decoder, prompts, row, drafter, *, ratio: float, top: int) -> list[int]:
    """Relaxed verification of one row, a token at a time, each from a forward pass over all before it."""
    tokens: list[int] = []
    while True:
        draft = [drafted.token for drafted in drafter.propose(tokens, ())][: MAX_TOKENS - len(tokens) - 1]
        for place in range(len(draft) + 1):
            logits = decoder.logits(full_hidden(decoder, prompts, row, tokens)[-1])
            best = logits.argsort(descending=True, stable=True).tolist()
            token = best[0]
            stands = place < len(draft) and draft[place] in best[:top]
            stands = stands and bool(logits.softmax(-1)[draft[place]] >= ratio * logits.softmax(-1)[token])
            token = draft[place] if stands else token
            if token == EOS:
                return tokens
            tokens.append(token)
            if len(tokens) >= MAX_TOKENS:
                return tokens
            if not stands:
                break


@pytest.mark.parametrize(("ratio", "top"), [(0.0, 2), (0.0, 48), (0.3, 48), (0.3, 2), (0.8, 3)])
@pytest.mark.parametrize("kind", ["random", "mixed", "end inside"])
def test_relaxed_verification_against_a_loop(decoder, prompts, references, kind, ratio, top):
    options = DecodingOptions(strategy="relaxed", ratio=ratio, top=top, max_repeats=None)
    drafters, again = scripted(references, kind), scripted(references, kind)
    results = decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 12, drafters=drafters)
    for row, result in enumerate(results):
        assert result.tokens == relaxed_reference(decoder, prompts, row, again[row], ratio=ratio, top=top)
        with torch.inference_mode():
            hidden = full_hidden(decoder, prompts, row, result.tokens)[int(prompts.lengths_B[row]) - 1 :]
            log_probs = decoder.logits(hidden).log_softmax(-1)
        expected = [float(log_probs[u, token]) for u, token in enumerate(result.tokens)]
        assert result.log_probabilities == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("ratio", "top"), [(1.0, 48), (0.0, 1)])
def test_relaxed_to_nothing_is_exact(decoder, prompts, references, ratio, top):
    options = DecodingOptions(strategy="relaxed", ratio=ratio, top=top, max_repeats=4)
    drafters = scripted(references, "mixed")
    results = decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 12, drafters=drafters)
    assert outcomes(results) == outcomes(references)


def test_relaxed_verification_says_other_things(decoder, prompts, references):
    options = DecodingOptions(strategy="relaxed", ratio=0.0, top=48, max_repeats=4)
    results = decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 12, drafters=scripted(references, "random"))
    assert outcomes(results) != outcomes(references)


def test_drafts_from_ctc_need_what_it_read(decoder, prompts):
    with pytest.raises(ValueError, match="drafts 'both' need what CTC read"):
        decode(decoder, prompts, replace(VERIFY, drafts="both"))


def test_verification_is_exact_without_drafts(decoder, prompts, references):
    results = decode(
        decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 12, drafters=scripted(references, "right", num_drafts=0)
    )
    assert outcomes(results) == outcomes(references)
    assert [result.num_calls for result in results] == [result.num_calls for result in references]


@pytest.mark.parametrize("num_heads", [1, 2, 4, 6])
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_every_head_type_verifies_exactly(build_tiny_model, head_type, num_heads):
    decoder = SpeechLlamaDecoder(build_tiny_model(head_type=head_type, num_heads=num_heads))
    prompts = make_prompts(4, seed=1)
    references = decode_reference(decoder, prompts, VERIFY, max_tokens=[20] * 4)
    for options in (AUTOREGRESSIVE, VERIFY):
        results = decode(decoder, prompts, options, max_tokens=[20] * 4)
        assert outcomes(results) == outcomes(references)
        assert_log_probabilities_close(results, references)


def test_verification_is_exact_in_float32(build_tiny_model):
    decoder = SpeechLlamaDecoder(build_tiny_model(dtype=torch.float32))
    prompts = make_prompts(8, seed=2, dtype=torch.float32)
    references = decode_reference(decoder, prompts, VERIFY, max_tokens=[25] * 8)
    drafters = scripted(references, "mixed")
    results = decode(decoder, prompts, VERIFY, max_tokens=[25] * 8, drafters=drafters)
    assert outcomes(results) == outcomes(references)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 7),
    num_drafts=st.integers(0, 9),
    max_tokens=st.integers(1, 12),
    max_repeats=st.sampled_from([2, 3, None]),
)
def test_verification_is_exact_under_any_guards(decoder, seed, num_rows, num_drafts, max_tokens, max_repeats):
    prompts = make_prompts(num_rows, seed)
    bounds = [max_tokens + row for row in range(num_rows)]
    options = DecodingOptions(max_repeats=max_repeats)
    references = decode_reference(decoder, prompts, options, max_tokens=bounds)
    for kind in ("right", "mixed"):
        results = decode(decoder, prompts, options, max_tokens=bounds, drafters=scripted(references, kind, num_drafts))
        assert outcomes(results) == outcomes(references)


class RecordingDrafter(ScriptedDrafter):
    """Keeps the guesses it is shown, by the number of tokens before them, and the verdicts on its proposals."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)
        self.seen, self.proposed, self.reviews = {}, [], []

    def propose(self, emitted, guesses):
        self.seen[len(emitted)] = list(guesses)
        self.proposed = super().propose(emitted, guesses)
        return self.proposed

    def review(self, verdicts, num_accepted, further):
        self.reviews.append((max(self.seen), self.proposed, verdicts, num_accepted, further))


@pytest.mark.parametrize("head_type", ["latent", "sequential"])
@pytest.mark.parametrize("kind", ["right", "mixed"])
@pytest.mark.parametrize(("drafts", "num_guesses"), [("mtp", 3), ("both", LEADING)])
def test_heads_guess_from_the_last_accepted_position(build_tiny_model, head_type, kind, drafts, num_guesses):
    """What the heads guess in a ragged batch is what they guess from a full forward over the emitted tokens."""
    decoder, prompts = SpeechLlamaDecoder(build_tiny_model(head_type=head_type)), make_prompts(6)
    options = replace(VERIFY, drafts=drafts)
    references = decode_reference(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 6)
    drafters = [RecordingDrafter(d.script, 3, d.corrupt) for d in scripted(references, kind)]
    decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 6, drafters=drafters)
    assert sum(len(drafter.seen) for drafter in drafters) > 15
    for row, drafter in enumerate(drafters):
        assert drafter.seen.pop(0) == []
        for num_emitted, guesses in drafter.seen.items():
            tokens = torch.tensor([drafter.script[:num_emitted]])
            hidden_LD = full_hidden(decoder, prompts, row, drafter.script[: num_emitted - 1])
            probabilities, ids = (
                decoder.draft_logits(hidden_LD[-1:], tokens[0, -1:], num_guesses).softmax(-1)[0].max(-1)
            )
            assert [guess.token for guess in guesses] == ids.tolist()
            assert [guess.probability for guess in guesses] == pytest.approx(probabilities.tolist(), abs=1e-5)
            assert [guess.source for guess in guesses] == ["head2", "head3", "head4"][:num_guesses]


@pytest.mark.parametrize("kind", ["right", "mixed", "wrong", "end inside"])
def test_verdicts_are_what_a_full_forward_says_along_the_draft(build_tiny_model, kind):
    decoder, prompts = SpeechLlamaDecoder(build_tiny_model()), make_prompts(6)
    references = decode_reference(decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 6)
    drafters = [RecordingDrafter(d.script, 5, d.corrupt) for d in scripted(references, kind)]
    decode(decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 6, drafters=drafters)
    assert sum(len(verdicts) for drafter in drafters for _, _, verdicts, _, _ in drafter.reviews) > 20
    for row, drafter in enumerate(drafters):
        for num_emitted, proposed, verdicts, num_accepted, _ in drafter.reviews:
            draft = [token.token for token in proposed]
            assert len(verdicts) <= len(draft)
            agrees = [verdict.token == token for verdict, token in zip(verdicts, draft, strict=False)]
            assert num_accepted == [*agrees, False].index(False)
            for place, verdict in enumerate(verdicts):
                hidden_LD = full_hidden(decoder, prompts, row, drafter.script[:num_emitted] + draft[:place])
                probabilities = decoder.logits(hidden_LD[-1]).softmax(-1)
                assert verdict.token == int(probabilities.argmax())
                assert verdict.probability == pytest.approx(float(probabilities.max()), abs=1e-5)
                assert verdict.chance == pytest.approx(float(probabilities[draft[place]]), abs=1e-5)


@pytest.mark.parametrize("head_type", ["latent", "sequential"])
@pytest.mark.parametrize("kind", ["right", "mixed", "wrong"])
def test_heads_are_heard_at_mistakes_and_behind_the_draft_as_in_a_full_forward(build_tiny_model, head_type, kind):
    """Head 2 at the first mistakes of a draft, and heads 2..K at its end, in a ragged batch."""
    decoder, prompts = SpeechLlamaDecoder(build_tiny_model(head_type=head_type)), make_prompts(6)
    options = replace(VERIFY, drafts="mtp")
    references = decode_reference(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 6)
    drafters = [RecordingDrafter(d.script, 11, d.corrupt) for d in scripted(references, kind)]
    decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 6, drafters=drafters)

    def heard(row, tokens, num_heads):
        hidden_LD = full_hidden(decoder, prompts, row, tokens)[-1:]
        first_B = decoder.logits(hidden_LD).argmax(-1)
        return decoder.draft_logits(hidden_LD, first_B, num_heads).softmax(-1)[0].max(-1)

    num_mistakes = 0
    for row, drafter in enumerate(drafters):
        for num_emitted, proposed, verdicts, _, further in drafter.reviews:
            draft, before = [token.token for token in proposed][: len(verdicts)], drafter.script[:num_emitted]
            mistakes = [place for place, verdict in enumerate(verdicts) if verdict.token != draft[place]]
            for place in mistakes[:NUM_MISTAKES]:
                probabilities, ids = heard(row, before + draft[:place], 1)
                following = verdicts[place].following
                assert (following.token, following.source) == (int(ids[0]), "head2")
                assert following.probability == pytest.approx(float(probabilities[0]), abs=1e-5)
                num_mistakes += 1
            probabilities, ids = heard(row, before + draft, 3)
            assert [token.token for token in further[1:]] == ids.tolist()
            assert [token.source for token in further] == ["jacobi", "head2", "head3", "head4"]
            assert [token.probability for token in further[1:]] == pytest.approx(probabilities.tolist(), abs=1e-5)
            said = decoder.logits(full_hidden(decoder, prompts, row, before + draft)[-1]).softmax(-1)
            assert further[0].token == int(said.argmax())
            assert further[0].probability == pytest.approx(float(said.max()), abs=1e-5)
    assert num_mistakes > (20 if kind != "right" else -1)


# Contract 2: threshold decoding, against a full forward per block.


def threshold_reference(decoder, prompts, threshold, options, max_tokens):
    """Tokens and blocks of each row, without a cache."""
    rows = []
    lengths = prompts.lengths_B.tolist()
    for row, guards in enumerate(guard_rows(options, decoder, lengths, max_tokens)):
        tokens, blocks, ended = [], [], False
        while not ended:
            hidden_LD = full_hidden(decoder, prompts, row, tokens)
            block = [int(decoder.logits(hidden_LD[-1]).argmax())]
            guesses = decoder.draft_logits(hidden_LD[-1:], torch.tensor(block), decoder.num_heads - 1).softmax(-1)[0]
            for probability, token in zip(*guesses.max(-1), strict=True):
                if probability < threshold:
                    break
                block.append(int(token))
            blocks.append([])
            for token in block:
                blocks[-1].append(token)
                if token == EOS:
                    ended = True
                    break
                tokens.append(token)
                cut = guards.cut(tokens)
                if cut is not None:
                    tokens, ended = tokens[: cut[0]], True
                    break
        rows.append((tokens, blocks))
    return rows


@pytest.mark.parametrize("head_type", HEAD_TYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_threshold_trusts_heads_while_they_are_sure(build_tiny_model, head_type, threshold):
    decoder = SpeechLlamaDecoder(build_tiny_model(head_type=head_type))
    prompts = make_prompts(6, seed=4)
    options = DecodingOptions(strategy="threshold", threshold=threshold, max_repeats=3)
    results = decode(decoder, prompts, options, max_tokens=[14] * 6)
    references = threshold_reference(decoder, prompts, threshold, options, [14] * 6)
    assert [result.tokens for result in results] == [tokens for tokens, _ in references]
    for result, (_, blocks) in zip(results, references, strict=True):
        assert result.num_calls == len(blocks)
        assert accept_lengths(result.trace) == [len(block) for block in blocks]
        for record in result.trace:
            assert (record.source == "head1") == (record.draft_probability is None)
            assert record.source == "head1" or record.draft_probability >= threshold
            assert record.source == "head1" or record.log_probability is None
    longest = max(length for result in results for length in accept_lengths(result.trace))
    assert longest == {0.0: 4, 1.0: 1}.get(threshold, longest)


def test_threshold_above_one_is_autoregressive(decoder, prompts, references):
    loop = DecodingLoop(decoder, AUTOREGRESSIVE, strategy=Threshold(num_guesses=3, threshold=1.01))
    keys = loop.add(prompts, max_tokens=[MAX_TOKENS] * 12)
    results = {}
    while loop:
        results |= loop.step()
    assert [course(results[key]) for key in keys] == [course(reference) for reference in references]


# Contract 3: a row gets what it gets alone.


@pytest.mark.parametrize("options", [AUTOREGRESSIVE, VERIFY, DecodingOptions(strategy="threshold", threshold=0.3)])
@pytest.mark.parametrize("num_rows", range(1, 8))
def test_a_batch_gives_each_row_what_it_gets_alone(decoder, prompts, references, options, num_rows):
    drafters = scripted(references, "mixed")
    together = decode(decoder, take(prompts, range(num_rows)), options, drafters=drafters[:num_rows])
    for row in range(num_rows):
        alone = decode(decoder, take(prompts, [row]), options, drafters=scripted(references, "mixed")[row : row + 1])
        assert course(together[row]) == course(alone[0])


@pytest.mark.parametrize("options", [AUTOREGRESSIVE, VERIFY, DecodingOptions(strategy="threshold", threshold=0.3)])
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_join_late_get_what_they_get_alone(decoder, prompts, references, options, seed):
    chance = random.Random(seed)
    drafters, again = scripted(references, "mixed"), scripted(references, "mixed")
    loop = DecodingLoop(decoder, options)
    row_of_key, results, row = {}, {}, 0
    while loop or row < 12:
        if row < 12 and (not loop or chance.random() < 0.3):
            rows = range(row, min(12, row + chance.randint(1, 4)))
            keys = loop.add(
                take(prompts, rows), max_tokens=[MAX_TOKENS] * len(rows), drafters=[drafters[r] for r in rows]
            )
            row_of_key |= dict(zip(keys, rows, strict=True))
            row = rows.stop
        results |= loop.step()
    assert len(results) == 12
    for key, row in row_of_key.items():
        alone = decode(decoder, take(prompts, [row]), options, max_tokens=[MAX_TOKENS], drafters=again[row : row + 1])
        assert course(results[key]) == course(alone[0])


@pytest.mark.parametrize("options", [AUTOREGRESSIVE, VERIFY, DecodingOptions(strategy="threshold", threshold=0.3)])
@pytest.mark.parametrize("num_steps", range(5))
def test_rows_that_are_dropped_leave_the_others_what_they_get_alone(decoder, prompts, references, options, num_steps):
    """After some steps five rows are dropped: of those that run, of those that wait, and all of a group that waits."""
    drafters, again = scripted(references, "mixed"), scripted(references, "mixed")
    loop = DecodingLoop(decoder, options)

    def add(rows: range) -> list[int]:
        return loop.add(
            take(prompts, rows), max_tokens=[MAX_TOKENS] * len(rows), drafters=drafters[rows.start : rows.stop]
        )

    keys, results = add(range(6)), {}
    for _ in range(num_steps):
        results |= loop.step()
    keys += add(range(6, 11)) + add(range(11, 12))
    dropped = [keys[row] for row in (0, 3, 7, 8, 11)]
    ended = set(results)
    loop.drop(dropped)
    loop.drop([*dropped, 1000])
    while loop:
        results |= loop.step()
    assert set(results) == ended | set(keys) - set(dropped)
    for row, key in enumerate(keys):
        if key in results:
            alone = decode(
                decoder, take(prompts, [row]), options, max_tokens=[MAX_TOKENS], drafters=again[row : row + 1]
            )
            assert course(results[key]) == course(alone[0])


@pytest.mark.parametrize("num_steps", range(3))
def test_a_loop_whose_rows_are_all_dropped_is_as_new(decoder, prompts, references, num_steps):
    loop = DecodingLoop(decoder, AUTOREGRESSIVE)
    keys = loop.add(prompts, max_tokens=[MAX_TOKENS] * 12)
    ended = [key for _ in range(num_steps) for key in loop.step()]
    loop.drop(keys)
    assert not loop
    assert loop._cache is None  # nor is its memory held
    keys, results = loop.add(prompts, max_tokens=[MAX_TOKENS] * 12), {}
    while loop:
        results |= loop.step()
    assert not set(results) & set(ended)
    assert outcomes(results[key] for key in keys) == outcomes(references)


def test_the_cache_gives_up_the_memory_of_dropped_rows(decoder, prompts):
    loop = DecodingLoop(decoder, AUTOREGRESSIVE)
    keys = loop.add(prompts)
    loop.step()
    num_rows = len(loop._rows)
    loop.drop(keys[-3:])
    assert num_rows - 3 <= len(loop._rows) == len(loop._cache.lengths) < num_rows
    assert {len(each) for layer in loop._cache.layers for each in (layer.keys, layer.values)} == {len(loop._rows)}


def test_no_rows_give_no_results(decoder):
    assert decode(decoder, Prompts(torch.zeros(0, 3, 32, dtype=torch.float64), torch.zeros(0).long()), VERIFY) == []


# Contract 9: transformers' own greedy search.


def generate(causal_lm, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    """Greedy `generate` on each row alone; end-of-text cut."""
    rows = []
    for embeddings_LD, positions_L, length in zip(
        prompts.embeddings_BLD, prompts.positions_BL, prompts.lengths_B, strict=True
    ):
        generated = causal_lm.generate(
            inputs_embeds=embeddings_LD[None, :length],
            position_ids=positions_L[None, :length],
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )[0].tolist()
        rows.append(generated[:-1] if generated[-1] == EOS else generated)
    return rows


@pytest.mark.parametrize("num_key_value_heads", [2, 4])
def test_transformers_generate_gives_the_same_tokens(build_tiny_model, num_key_value_heads):
    model = build_tiny_model(num_key_value_heads=num_key_value_heads)
    prompts = make_prompts(10, seed=5)
    expected = generate(model.decoder, prompts, 25)
    assert len({len(tokens) for tokens in expected}) > 2
    for strategy in ("autoregressive", "verify"):
        options = DecodingOptions(strategy=strategy, max_tokens=25, max_repeats=None)
        assert [result.tokens for result in decode(SpeechLlamaDecoder(model), prompts, options)] == expected


@pytest.mark.parametrize("config_class", [MistralConfig, Qwen3Config])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_llama_like_models_decode(config_class, attention):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = config_class(
        vocab_size=V,
        eos_token_id=EOS,
        pad_token_id=0,
        initializer_range=0.3,
        max_position_embeddings=64,
        **sizes,
        **heads,
    )
    causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    prompts = make_prompts(3, seed=6)
    options = DecodingOptions(strategy="autoregressive", max_tokens=12, max_repeats=None)
    results = decode(CausalLMDecoder(causal_lm), prompts, options)
    assert [result.tokens for result in results] == generate(causal_lm, prompts, 12)


# Calls, trace and guards.


class CountingDecoder(CausalLMDecoder):
    """Keeps the rows and the width of every call."""

    def __init__(self, model):
        super().__init__(model.decoder, model.mtp_heads)
        self.calls = []

    def call(self, embeddings_BWD, positions_BW, mask_B1WS, cache, *, drafting=True):
        self.calls.append(tuple(embeddings_BWD.shape[:2]))
        return super().call(embeddings_BWD, positions_BW, mask_B1WS, cache, drafting=drafting)


@pytest.mark.parametrize("num_drafts", [1, 3, 5, 40])
def test_call_counts(build_tiny_model, prompts, references, num_drafts):
    emitted = [len(result.trace) for result in references]

    def calls(kind, **fields):
        decoder = CountingDecoder(build_tiny_model())
        drafters = scripted(references, kind, num_drafts, **fields)
        results = decode(decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 12, drafters=drafters)
        counts = [result.num_calls for result in results]
        assert sum(counts) == sum(num_rows for num_rows, _ in decoder.calls)
        assert max(counts) == len(decoder.calls)
        return counts

    assert calls("wrong") == emitted
    assert calls("right") == [ceil(n / (num_drafts + 1)) for n in emitted]
    assert calls("right", at_prefill=False) == [1 + ceil((n - 1) / (num_drafts + 1)) for n in emitted]


@pytest.mark.parametrize("num_heads", [1, 3, None])
def test_num_heads_bounds_what_a_call_emits(build_tiny_model, prompts, num_heads):
    decoder = CountingDecoder(build_tiny_model())
    options = DecodingOptions(strategy="threshold", threshold=0.0, num_heads=num_heads)
    results = decode(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 12)
    histogram = accept_length_histogram(result.trace for result in results)
    assert max(histogram) == (num_heads or 4)
    assert max(width for _, width in decoder.calls[1:]) == (num_heads or 4)


def test_trace_tells_who_emitted_each_token(decoder, prompts, references):
    results = decode(decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 12, drafters=scripted(references, "mixed", 3))
    sources = set()
    for result in results:
        assert [record.token for record in result.trace[: len(result.tokens)]] == result.tokens
        assert [record.step for record in result.trace] == sorted(record.step for record in result.trace)
        assert sum(accept_lengths(result.trace)) == len(result.trace)
        assert len(accept_lengths(result.trace)) == result.num_calls
        for step in range(result.num_calls):
            *accepted, last = [record for record in result.trace if record.step == step]
            assert [record.source for record in accepted] == [f"script{j}" for j in range(len(accepted))]
            assert all(record.draft_probability == 0.5 and record.rejected is None for record in accepted)
            assert last.source in ("bonus", "head1") or last is result.trace[-1]
            if last.rejected is not None:
                assert last.source == "bonus"
                assert last.rejected.token != last.token
            sources.add(last.source)
    assert sources >= {"bonus", "script0"}


def test_trace_without_drafts_names_head_one(references, decoder, prompts):
    for result in decode(decoder, prompts, AUTOREGRESSIVE, max_tokens=[MAX_TOKENS] * 12):
        assert {(record.source, record.rejected) for record in result.trace} == {("head1", None)}
        assert [record.step for record in result.trace] == [*range(result.num_calls)]


def test_log_probabilities_are_head_ones(decoder, prompts, references):
    results = decode(decoder, prompts, AUTOREGRESSIVE, max_tokens=[MAX_TOKENS] * 12)
    assert_log_probabilities_close(results, references)


@pytest.mark.parametrize("kind", ["right", "wrong"])
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_nothing_is_fed_or_emitted_beyond_the_bound(build_tiny_model, prompts, max_tokens, kind):
    decoder, options = CountingDecoder(build_tiny_model()), DecodingOptions(max_repeats=None)
    references = decode_reference(decoder, prompts, options, max_tokens=[MAX_TOKENS] * 12)
    decoder.calls.clear()
    results = decode(
        decoder, prompts, options, max_tokens=[max_tokens] * 12, drafters=scripted(references, kind, num_drafts=9)
    )
    assert max(len(result.tokens) for result in results) == max_tokens
    for result, reference in zip(results, references, strict=True):
        assert result.tokens == reference.tokens[:max_tokens]
        assert result.truncated == "length" or len(reference.tokens) < max_tokens
    prefill, *steps = [width for _, width in decoder.calls]
    assert prefill <= prompts.lengths_B.max() + max_tokens - 1
    assert all(width < max_tokens for width in steps)


def test_nothing_is_fed_behind_an_end_token(build_tiny_model, prompts, references):
    decoder = CountingDecoder(build_tiny_model())
    drafters = scripted(references, "end inside", num_drafts=9)
    decode(decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 12, drafters=drafters)
    assert max(width for _, width in decoder.calls[1:]) == 3


def test_the_decoders_positions_bound_the_text(build_tiny_model):
    decoder = SpeechLlamaDecoder(build_tiny_model(max_position_embeddings=16))
    prompts = make_prompts(6, seed=7)
    options = DecodingOptions(max_repeats=None)
    results = decode(decoder, prompts, options)
    assert "length" in {result.truncated for result in results}
    for result, length in zip(results, prompts.lengths_B.tolist(), strict=True):
        assert len(result.tokens) + length <= 16
        assert (len(result.tokens) + length == 16) == (result.truncated == "length")
    with pytest.raises(ValueError, match="fills 16 of the decoder's 16 positions"):
        decode(decoder, Prompts(torch.zeros(1, 16, 32, dtype=torch.float64), torch.tensor([16])), options)


def test_an_end_token_among_several_ends_the_text(build_tiny_model, prompts):
    decoder = SpeechLlamaDecoder(build_tiny_model())
    plain = decode(decoder, prompts, VERIFY, max_tokens=[MAX_TOKENS] * 12)
    other = plain[0].tokens[3]
    decoder.end_tokens = frozenset([EOS, other])
    for options in (AUTOREGRESSIVE, VERIFY):
        result = decode(decoder, take(prompts, [0]), options)[0]
        assert result.tokens == plain[0].tokens[: plain[0].tokens.index(other)]
        assert result.truncated is None


def test_what_does_not_fit_is_refused(decoder, prompts):
    with pytest.raises(ValueError, match="num_heads 5 asked for, but the model has 4"):
        decode(decoder, prompts, DecodingOptions(num_heads=5))
    with pytest.raises(ValueError, match="11 drafters for 12 prompts"):
        decode(decoder, prompts, VERIFY, drafters=[None] * 11)
    with pytest.raises(ValueError, match="1 token bounds for 12 prompts"):
        decode(decoder, prompts, VERIFY, max_tokens=[3])


def test_a_decoder_without_end_of_text_is_refused(build_tiny_model, monkeypatch):
    model = build_tiny_model()
    monkeypatch.setattr(model.decoder.config, "eos_token_id", None)
    with pytest.raises(ValueError, match="no eos_token_id"):
        SpeechLlamaDecoder(model)


def test_verification_runs_no_heads_it_does_not_use(decoder, prompts, references):
    loop = DecodingLoop(decoder, VERIFY, strategy=Verification(num_guesses=0))
    keys = loop.add(prompts, max_tokens=[MAX_TOKENS] * 12, drafters=scripted(references, "right"))
    results = {}
    while loop:
        results |= loop.step()
    assert outcomes(results[key] for key in keys) == outcomes(references)
