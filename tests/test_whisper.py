"""A Whisper of one's own in the decoding loop, beside transformers' `generate` with the same random weights."""

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decoding import ScriptedDrafter, course, outcomes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperTimeStampLogitsProcessor,
)
from transformers.modeling_outputs import BaseModelOutput

from leapasr.decoding import DecodingLoop, DecodingOptions, Prompts, decode
from leapasr.decoding.interface import Ways
from leapasr.decoding.reference import decode_reference, full_forward
from leapasr.decoding.rules import Timestamps, WhisperRules
from leapasr.decoding.whisper import WhisperTextDecoder
from leapasr.model.checkpoints import CheckpointError
from leapasr.model.fitted_heads import FittedHeads, FittedHeadsConfig
from leapasr.model.mtp_heads import new_heads
from leapasr.model.whisper import fingerprint, load_whisper_model, whisper_generation_config
from leapasr.transcriber import load
from leapasr.whisper_transcriber import WhisperOptions, WhisperTranscriber
from leapasr.whisper_windows import WindowedRecording

NUM_PAIRS, NUM_FRAMES, MAX_POSITIONS = 300, 50, 48
LANGUAGES = ["<|en|>", "<|de|>", "<|fr|>"]
SPECIAL = [
    "<|endoftext|>", "<|startoftranscript|>", *LANGUAGES, "<|translate|>", "<|transcribe|>", "<|startoflm|>",
    "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>",
]  # fmt: skip
TIMES = [f"<|{step / 50:.2f}|>" for step in range(NUM_FRAMES + 1)]
AUTOREGRESSIVE = DecodingOptions(strategy="autoregressive", max_repeats=None)
VERIFY = DecodingOptions(max_repeats=None)
KINDS = ("right", "wrong", "random", "mixed", "end inside", "timestamps inside", "empty")


def tokenizer_of_pairs() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PAIRS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [" the cat sat on the mat where is the dog then"] * 9 + [chr(97 + n % 26) * 3 for n in range(99)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(folder, *, languages: Sequence[str] = LANGUAGES) -> WhisperForConditionalGeneration:
    """A Whisper of some ten thousand random weights that hears one second at once, in `folder`."""
    pairs = tokenizer_of_pairs()
    pairs.add_special_tokens([token for token in SPECIAL if token not in LANGUAGES or token in languages])
    pairs.add_tokens(TIMES)
    pairs.save(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs)
    generation = whisper_generation_config(
        tokenizer,
        languages=languages,
        suppressed=[3, 7, *tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|startofprev|>"])],
        not_first=[5, tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        max_length=MAX_POSITIONS,
    )
    generation.max_initial_timestamp_index = 10
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40,
        max_source_positions=NUM_FRAMES, max_target_positions=MAX_POSITIONS, pad_token_id=generation.eos_token_id,
        bos_token_id=generation.eos_token_id, eos_token_id=generation.eos_token_id,
        decoder_start_token_id=generation.decoder_start_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():  # what is written depends on speech and on what came before
        if parameter.ndim == 3:
            parameter.normal_(0, 2 / parameter[0].numel() ** 0.5, generator=generator)
        if parameter.ndim == 2 and "encoder.embed_positions" not in name:
            scale = (
                0.2 if "embed_tokens" in name else 1.0 if "embed_positions" in name else 3 / len(parameter[0]) ** 0.5
            )
            parameter.normal_(0, scale, generator=generator)
    table = model.get_input_embeddings().weight
    table[generation.eos_token_id] *= 1.7  # end-of-text now and then
    model.generation_config = generation
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_whisper_model(folder).requires_grad_(False)


@pytest.fixture(scope="module")
def frames(model):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(12, 8, 2 * NUM_FRAMES, generator=generator)
    return model.model.encoder(features).last_hidden_state


def decoder_of(model, head_type: str | None = "residual") -> WhisperTextDecoder:
    torch.manual_seed(3)
    heads = None
    if head_type:
        heads = new_heads(head_type, 4, model.config.d_model, model.config.vocab_size).requires_grad_(False)
    return WhisperTextDecoder(model, heads, suppressed=model.generation_config.suppress_tokens)


@pytest.fixture(scope="module")
def decoder(model):
    return decoder_of(model)


def times_of(model) -> Timestamps:
    config = model.generation_config
    return Timestamps(config.no_timestamps_token_id + 1, config.eos_token_id, config.max_initial_timestamp_index)


def rules_of(model, *, timestamps: bool) -> WhisperRules:
    return WhisperRules(model.generation_config.begin_suppress_tokens, times_of(model) if timestamps else None)


def begin_tokens(model, *, timestamps: bool) -> list[int]:
    config = model.generation_config
    tokens = [config.decoder_start_token_id, config.lang_to_id["<|de|>"], config.task_to_id["transcribe"]]
    return tokens if timestamps else [*tokens, config.no_timestamps_token_id]


def make_prompts(decoder, model, frames, *, timestamps: bool, uneven: bool = False) -> Prompts:
    """Prompts of all rows; uneven ones go on from some text, and have large values where nothing may look."""
    begin = begin_tokens(model, timestamps=timestamps)
    chance = random.Random(5)
    rows = []
    for _ in frames:
        previous = [chance.randrange(NUM_PAIRS) for _ in range(chance.randrange(6) if uneven else 0)]
        rows.append([*([model.generation_config.prev_sot_token_id] if previous else []), *previous, *begin])
    lengths_B = torch.tensor([len(row) for row in rows])
    embeddings = torch.full((len(rows), int(lengths_B.max()), model.config.d_model), 100.0)
    for place, row in enumerate(rows):
        embeddings[place, : len(row)] = decoder.embed(torch.tensor(row), torch.tensor(row))
    return Prompts(embeddings, lengths_B, None, frames)


def take(prompts: Prompts, rows: Sequence[int]) -> Prompts:
    return prompts.select(list(rows))


def generated(model, frames, *, timestamps: bool) -> list[list[int]]:
    """What transformers' `generate` writes for each row, without prompt and end-of-text."""
    written = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=frames), language="de", task="transcribe",
        return_timestamps=timestamps, force_unique_generate_call=True,
    )  # fmt: skip
    return [bare(model, row) for row in written.tolist()]


def bare(model, row: list[int]) -> list[int]:
    """Tokens without prompt (which `generate` leaves out in some cases), end-of-text and padding."""
    config = model.generation_config
    if row[0] == config.decoder_start_token_id:
        row = row[3 + (row[3] == config.no_timestamps_token_id) :]
    return row[: row.index(config.eos_token_id)] if config.eos_token_id in row else row


def corrupted(kind: str, model, seed: int):
    times, size = times_of(model), model.config.vocab_size
    chance = random.Random(seed)
    return {
        "right": lambda token, j: token,
        "wrong": lambda token, j: (token + 1) % size,
        "random": lambda token, j: chance.randrange(size),
        "mixed": lambda token, j: token if chance.random() < 0.7 else chance.randrange(size),
        "end inside": lambda token, j: times.end_token if j == 1 else token,
        "timestamps inside": lambda token, j: times.begin + chance.randrange(20) if j % 2 else token,
        "empty": lambda token, j: token,
    }[kind]


def scripted(references, kind: str, model, num_drafts: int = 5) -> list[ScriptedDrafter]:
    num_drafts = 0 if kind == "empty" else num_drafts
    scripts = [[record.token for record in result.trace] for result in references]
    return [ScriptedDrafter(script, num_drafts, corrupted(kind, model, n)) for n, script in enumerate(scripts)]


# The rules, beside transformers' own processors.


@pytest.mark.parametrize("max_initial", [None, 10])
@pytest.mark.parametrize("timestamps", [True, False])
def test_rules_forbid_at_every_place_what_transformers_processors_forbid_there(model, timestamps, max_initial):
    config, size = model.generation_config, model.config.vocab_size
    times = replace(times_of(model), max_initial=max_initial)
    rules = WhisperRules(config.begin_suppress_tokens, times if timestamps else None)
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    settings = SimpleNamespace(
        no_timestamps_token_id=times.switch, eos_token_id=times.end_token, bos_token_id=None,
        max_initial_timestamp_index=max_initial,
    )  # fmt: skip
    begin = [1, 2, 3]
    processors = [SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, len(begin))]
    if timestamps:
        processors.append(WhisperTimeStampLogitsProcessor(settings, len(begin)))
    seen_forbidden = 0
    for trial in range(60):
        draw = [lambda: chance.randrange(NUM_PAIRS), lambda: times.begin + chance.randrange(len(TIMES))]
        texts = [[chance.choice(draw)() for _ in range(length)] for length in (trial % 4, 0, 3)]
        drafts = [[chance.choice(draw)() for _ in range(length)] for length in (4, trial % 5, 0)]
        logits = 2 * torch.randn(3, 5, size, generator=generator)
        logits[..., times.begin :] += chance.choice([-4.0, 0.0, 1.0])
        expected = {
            (row, place): [*begin, *texts[row], *drafts[row][:place]]
            for row in range(3)
            for place in range(len(drafts[row]) + 1)
        }
        before = logits.clone()
        obeyed = rules.obeyed(logits, texts, drafts) if any(map(rules.bind, texts)) else logits
        for (row, place), ids in expected.items():
            scores = before[row, place][None]
            for processor in processors:
                scores = processor(torch.tensor([ids]), scores)
            assert torch.equal(obeyed[row, place], scores[0]), (texts[row], drafts[row][:place])
            seen_forbidden += int(torch.isinf(scores).sum())
    assert seen_forbidden


def test_suppressed_tokens_are_those_of_transformers_in_all_logits(model, decoder):
    hidden = torch.randn(3, 2, model.config.d_model)
    processor = SuppressTokensLogitsProcessor(model.generation_config.suppress_tokens)
    expected = processor(None, model.proj_out(hidden).flatten(0, 1)).view(3, 2, -1)
    assert torch.equal(decoder.logits(hidden), expected)
    drafts = decoder.draft_logits(hidden[:, 0], torch.tensor([1, 2, 3]), 3)
    assert torch.isinf(drafts[..., model.generation_config.suppress_tokens]).all()
    assert torch.isfinite(drafts).sum() == 9 * (model.config.vocab_size - 4)


# The arithmetic.


def test_the_decoder_computes_what_transformers_computes_bit_for_bit(model, decoder, frames):
    tokens = torch.randint(0, NUM_PAIRS, (12, 9), generator=torch.Generator().manual_seed(4))
    expected = model(encoder_outputs=BaseModelOutput(last_hidden_state=frames), decoder_input_ids=tokens)
    prompts = Prompts(decoder.embed(tokens, tokens), torch.full((12,), 9), None, frames)
    cache = decoder.new_cache(prompts)
    hidden = decoder.call(prompts.embeddings_BLD, *cache.plan(9, decoder.dtype), cache)
    logits = decoder.logits(hidden)
    kept = [token for token in range(model.config.vocab_size) if token not in model.generation_config.suppress_tokens]
    assert torch.equal(logits[..., kept], expected.logits[..., kept])


def test_a_cached_forward_pass_equals_a_full_one_at_every_split_point(model, decoder, frames):
    tokens = torch.randint(0, NUM_PAIRS, (3, 12), generator=torch.Generator().manual_seed(4))
    embeddings = decoder.embed(tokens, tokens)
    prompts = Prompts(embeddings, torch.full((3,), 12), None, frames[:3])
    full = torch.stack([full_forward(decoder, prompts.row(row), embeddings[row, :0]) for row in range(3)])
    for split in range(1, 12):
        cache = decoder.new_cache(prompts)
        first = decoder.call(embeddings[:, :split], *cache.plan(split, decoder.dtype), cache)
        cache.commit([split] * 3)
        second = decoder.call(embeddings[:, split:], *cache.plan(12 - split, decoder.dtype), cache)
        torch.testing.assert_close(torch.cat([first, second], 1), full, rtol=1e-4, atol=1e-4)


# Contracts 1 to 3, and `generate`.


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("batch_size", range(1, 8))
def test_greedy_decoding_writes_what_generate_writes(model, decoder, frames, timestamps, batch_size):
    rows = list(range(batch_size))
    prompts = take(make_prompts(decoder, model, frames, timestamps=timestamps), rows)
    expected = generated(model, frames[rows], timestamps=timestamps)
    rules = rules_of(model, timestamps=timestamps)
    for options in (AUTOREGRESSIVE, VERIFY):
        assert [result.tokens for result in decode(decoder, prompts, options, rules=rules)] == expected


def test_the_random_model_is_worth_testing_on(model, decoder, frames):
    for timestamps in (False, True):
        rows = generated(model, frames, timestamps=timestamps)
        assert len({len(row) for row in rows}) > 4
        assert len({token for row in rows for token in row}) > 40
    assert len({token for row in rows for token in row if token >= times_of(model).begin}) > 8
    plain = decode(decoder, make_prompts(decoder, model, frames, timestamps=True), AUTOREGRESSIVE)
    assert [result.tokens for result in plain] != rows  # the rules change what is written


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_verification_is_exact_whatever_the_drafts(model, decoder, frames, kind, timestamps):
    prompts = make_prompts(decoder, model, frames, timestamps=timestamps, uneven=True)
    rules = rules_of(model, timestamps=timestamps)
    references = decode(decoder, prompts, AUTOREGRESSIVE, rules=rules)
    results = decode(decoder, prompts, VERIFY, drafters=scripted(references, kind, model), rules=rules)
    assert outcomes(results) == outcomes(references)
    if kind == "right":
        assert sum(result.num_calls for result in results) < sum(result.num_calls for result in references) / 3


@pytest.mark.parametrize("head_type", ["latent", "residual", "sequential"])
def test_verification_of_what_heads_draft_is_exact(model, frames, head_type):
    decoder = decoder_of(model, head_type)
    for timestamps in (False, True):
        prompts = make_prompts(decoder, model, frames, timestamps=timestamps, uneven=True)
        rules = rules_of(model, timestamps=timestamps)
        references = decode(decoder, prompts, AUTOREGRESSIVE, rules=rules)
        assert outcomes(decode(decoder, prompts, VERIFY, rules=rules)) == outcomes(references)
        threshold = DecodingOptions(strategy="threshold", threshold=1.01 - 0.01, max_repeats=None)
        assert outcomes(decode(decoder, prompts, threshold, rules=rules)) == outcomes(references)


def test_without_rules_the_loop_equals_the_slow_reference(model, decoder, frames):
    prompts = make_prompts(decoder, model, frames, timestamps=False, uneven=True)
    options = replace(AUTOREGRESSIVE, max_repeats=4)
    assert outcomes(decode(decoder, prompts, options)) == outcomes(decode_reference(decoder, prompts, options))


@pytest.mark.parametrize("timestamps", [False, True])
def test_a_row_gets_what_it_gets_alone(model, decoder, frames, timestamps):
    prompts = make_prompts(decoder, model, frames, timestamps=timestamps, uneven=True)
    rules = rules_of(model, timestamps=timestamps)
    alone = [decode(decoder, prompts.row(row), VERIFY, rules=rules)[0] for row in range(12)]
    together = decode(decoder, prompts, VERIFY, rules=rules)
    assert [course(result) for result in together] == [course(result) for result in alone]

    loop = DecodingLoop(decoder, VERIFY, rules=rules)
    keys = loop.add(take(prompts, range(4)))
    results = loop.step() | loop.step() | loop.step()
    keys += loop.add(take(prompts, [6, 4, 5]))
    results |= loop.step()
    dropped = next(key for key in keys[1:] if key not in results)
    loop.drop([dropped])
    while loop:
        results |= loop.step()
    for key, row in zip(keys, [0, 1, 2, 3, 6, 4, 5], strict=True):
        if key != dropped:
            assert outcomes([results[key]]) == outcomes([alone[row]])


@pytest.mark.parametrize("ways", [Ways("mkl"), Ways("onednn"), Ways(rough=True), Ways("onednn", rough=True)])
@pytest.mark.parametrize("timestamps", [False, True])
def test_other_ways_of_computing_write_the_same(model, frames, ways, timestamps):
    decoder = decoder_of(model)
    prompts = make_prompts(decoder, model, frames, timestamps=timestamps)
    decoder.prepare(ways)
    results = decode(decoder, prompts, VERIFY, rules=rules_of(model, timestamps=timestamps))
    assert [result.tokens for result in results] == generated(model, frames, timestamps=timestamps)


def test_drafts_of_a_part_of_the_vocabulary_are_of_that_part(model):
    torch.manual_seed(3)
    heads = new_heads("sequential", 4, model.config.d_model, 20).requires_grad_(False)
    tokens = torch.arange(40, 60)
    part = WhisperTextDecoder(model, heads, draft_tokens=tokens, suppressed=[45])
    whole = WhisperTextDecoder(model, heads, suppressed=[45])
    hidden, first = torch.randn(5, model.config.d_model), torch.arange(5)
    assert torch.equal(part.draft_logits(hidden, first, 1), whole.draft_logits(hidden, first, 1)[..., tokens])
    drafts = part.draft_logits(hidden, first, 3).argmax(-1)
    state = hidden
    for place, token in enumerate([first, *tokens[drafts].T[:-1]]):  # each head sees the token drafted before it
        state = heads.advance(state, part.embed_tokens(token))
        logits = state @ model.proj_out.weight[tokens].T
        logits[:, 5] = -torch.inf
        assert torch.equal(logits.argmax(-1), drafts[:, place])


# Fitted heads.


def heads_for(model, **fields) -> FittedHeads:
    """Heads with random weights, of which CTC's reads something."""
    tokens = [*range(200), model.generation_config.eos_token_id]
    config = FittedHeadsConfig(
        base_model="tiny", base_weights=fingerprint(model), hidden_size=32, encoder_size=32, num_tokens=len(tokens),
        adapter_size=16, adapter_layers=1, adapter_attention_heads=2, adapter_ffn_size=32, **fields,
    )  # fmt: skip
    torch.manual_seed(6)
    heads = FittedHeads(config, tokens)
    heads.reset_from(model.proj_out, model.model.decoder.layer_norm)
    for parameter in heads.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return heads.eval().requires_grad_(False)


def test_fitted_heads_come_back_as_they_were_stored(model, tmp_path):
    heads = heads_for(model)
    heads.save(tmp_path / "heads")
    loaded = FittedHeads.load(tmp_path / "heads")
    assert loaded.config == heads.config
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=float(value.abs().max()) / 200)
    loaded.save(tmp_path / "again")
    first, again = ((tmp_path / name / "heads.safetensors").read_bytes() for name in ("heads", "again"))
    assert first == again


def test_heads_of_another_model_are_refused(folder, model, tmp_path):
    heads_for(model).save(tmp_path / "heads")
    assert load(folder, adapter=tmp_path / "heads").decoder.num_heads == 4
    other = tmp_path / "other"
    other.mkdir()
    build(other)
    changed = load_whisper_model(other)
    changed.model.decoder.layers[0].fc1.bias.data[0] += 0.01
    changed.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"fitted to tiny .* has other weights"):
        load(other, adapter=tmp_path / "heads")


@pytest.mark.parametrize("damage", ["missing", "no weights", "cut short", "unknown field"])
def test_damaged_heads_are_refused(folder, model, tmp_path, damage):
    heads_for(model).save(tmp_path)
    config, weights = tmp_path / "heads.json", tmp_path / "heads.safetensors"
    if damage == "missing":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        config.write_text(config.read_text().replace('"updates"', '"update"'))
    with pytest.raises(CheckpointError, match=r"heads\.(json|safetensors)"):
        load(folder, adapter=tmp_path)


@pytest.mark.parametrize("fields", [{"num_heads": 1}, {"head_type": "projection"}])
def test_heads_that_cannot_be_fitted_are_refused(model, fields):
    with pytest.raises(ValueError, match=r"num_heads|head_type"):
        heads_for(model, **fields)


def test_head_1_is_the_models_own_bit_for_bit(model, frames):
    hidden = torch.randn(4, model.config.d_model)
    for head_type in (None, "latent", "sequential"):
        logits = decoder_of(model, head_type).logits(hidden)
        kept = torch.isfinite(logits)
        assert torch.equal(logits[kept], model.proj_out(hidden)[kept])


def test_the_fingerprint_is_of_the_weights_whatever_they_are_stored_in(folder, model):
    assert fingerprint(model) == fingerprint(load_whisper_model(folder))
    half = load_whisper_model(folder).half()
    assert fingerprint(half) == fingerprint(model)
    half.model.decoder.layers[1].fc2.weight.data[0, 0] *= 2
    assert fingerprint(half) != fingerprint(model)


# The transcriber.


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).normal(0, 0.1, int(16_000 * seconds))
    return (samples * np.sin(np.arange(len(samples)) / 2000) ** 2).astype(np.float32)


@pytest.fixture(scope="module")
def transcriber(folder, model, tmp_path_factory):
    heads = tmp_path_factory.mktemp("heads")
    heads_for(model).save(heads)
    return load(folder, adapter=heads, whisper=WhisperOptions(language="de"))


def features_of(transcriber: WhisperTranscriber, samples: np.ndarray) -> torch.Tensor:
    return transcriber.processor.features(samples).T[None]


@pytest.mark.parametrize("batch_size", range(1, 8))
@pytest.mark.parametrize("drafts", ["mtp", "ctc", "both"])
def test_transcriptions_are_what_generate_writes(transcriber, model, drafts, batch_size):
    audio = [speech(0.3 + 0.1 * n, n) for n in range(7)]
    options = DecodingOptions(drafts=drafts, draft_length=None if drafts == "mtp" else "full")
    done = transcriber.transcribe(audio, options, batch_size=batch_size)
    for samples, result in zip(audio, done, strict=True):
        written = model.generate(
            features_of(transcriber, samples), language="de", task="transcribe", return_timestamps=False,
            force_unique_generate_call=True,  # it would hear again what is behind a pair of timestamps
        )  # fmt: skip
        expected = bare(model, written[0].tolist())
        assert result.tokens == expected
        assert result.language == "de"
        assert result.text == transcriber.processor.decode_text(expected)


def test_drafts_come_from_the_ctc_head_and_the_heads(transcriber):
    audio = [speech(0.9, n) for n in range(6)]
    for drafts, sources in (("ctc", {"ctc"}), ("mtp", {"head2", "head3", "head4"})):
        options = DecodingOptions(drafts=drafts, draft_length="full" if drafts == "ctc" else None)
        done = transcriber.transcribe(audio, options)
        proposed = {
            record.rejected.source for each in done for trace in each.trace for record in trace if record.rejected
        }
        assert proposed & sources


def test_languages_are_detected_as_transformers_detects_them(folder, model, transcriber):
    free = load(folder)
    audio = [speech(0.5 + 0.05 * n, 20 + n) for n in range(8)]
    batch = free.encode([chunk for n, samples in enumerate(audio) for chunk in free.cut([(n, samples)])])
    languages = free.detect_languages(batch.prompts.memory_BMD)
    features = torch.cat([features_of(free, samples) for samples in audio])
    expected = model.detect_language(features).tolist()
    assert [model.generation_config.lang_to_id[f"<|{language}|>"] for language in languages] == expected
    assert len(set(languages)) > 1
    for samples, language in zip(audio, languages, strict=True):
        assert free.transcribe(samples).tokens == transcriber.transcribe(samples, language=language).tokens


@pytest.mark.parametrize("condition", [False, True])
def test_long_recordings_with_timestamps_are_what_generate_makes_of_them(folder, model, condition, tmp_path):
    heads_for(model).save(tmp_path)
    options = WhisperOptions(language="fr", timestamps=True, condition_on_previous_text=condition)
    whisper = load(folder, adapter=tmp_path, whisper=options)
    audio = [speech(3.7, 31), speech(2.2, 32), speech(0.6, 33), np.zeros(0, np.float32)]
    done = whisper.transcribe(audio, DecodingOptions(draft_length="full"), batch_size=2)
    for samples, result in zip(audio[:3], done, strict=False):
        features = whisper.windowed(samples).features_TF.T[None]
        written = model.generate(
            features, language="fr", task="transcribe", return_timestamps=True, return_segments=True,
            condition_on_prev_tokens=condition, attention_mask=torch.ones(1, features.shape[-1], dtype=torch.long),
        )  # fmt: skip
        (segments,) = written["segments"]
        assert [segment.tokens for segment in result.segments] == [each["tokens"].tolist() for each in segments]
        for segment, each in zip(result.segments, segments, strict=True):
            assert (segment.start, segment.end) == pytest.approx((float(each["start"]), float(each["end"])))
        assert [segment.tokens for segment in whisper.stream(samples)] == [each.tokens for each in result.segments]
    assert any(len(result.segments) > 4 for result in done)
    assert done[3].segments == []


def test_windows_go_on_where_the_text_of_the_last_one_ends():
    begin = 100
    recording = WindowedRecording(torch.zeros(500, 8), 100, begin)
    pairs = recording.advance([begin, 1, 2, begin + 20, begin + 20, 3, begin + 30, begin + 30, 4])
    assert [(each.start, each.end, each.tokens) for each in pairs] == [
        (0.0, 0.4, [begin, 1, 2, begin + 20]),
        (0.4, pytest.approx(0.6), [begin + 20, 3, begin + 30, begin + 30]),
    ]
    assert recording.place == 60  # what is behind the last pair is heard again
    assert recording.previous_tokens(5) == [1, 2, begin + 20, begin + 20, 3, begin + 30][-5:]
    recording.advance([begin, 5, begin + 10])
    assert recording.place == 160
    recording.advance([6])
    assert (recording.written[-1].start, recording.written[-1].end) == (1.6, 2.6)
    assert recording.next_window().shape == (100, 8)


def test_words_have_times(transcriber):
    samples = speech(0.9, 3)
    result = transcriber.transcribe(samples, DecodingOptions(max_tokens=8), word_times=True)
    assert result.words
    starts = [word.start for word in result.words]
    assert starts == sorted(starts)
    assert all(0 <= word.start <= word.end <= 0.91 for word in result.words)


def test_a_token_that_is_not_spelt_takes_no_time(transcriber):
    batch = transcriber.encode(transcriber.cut([(0, speech(0.9, 3))]))
    (done,) = transcriber.decode_each([batch], DecodingOptions(max_tokens=4))
    special, text = transcriber.begin_tokens("de")[0], [8, 9, 10]
    plain = transcriber.token_times(done, text)
    assert len(plain) == 3
    begin, end = (plain[0][0],) * 2, (plain[-1][1],) * 2
    assert transcriber.token_times(done, [special, *text, special]) == [begin, *plain, end]


def test_a_whisper_without_heads_says_one_token_a_call(folder, transcriber):
    plain = load(folder, whisper=WhisperOptions(language="de"))
    assert plain.decoder.num_heads == 1
    samples = speech(0.8, 1)
    result = plain.transcribe(samples)
    assert result.tokens == transcriber.transcribe(samples).tokens
    assert result.decoder_calls == result.num_tokens
    assert plain.ctc_text(samples) == ""


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"language": "xx"}, "'xx' is not one of the model's: de, en, fr"),
        ({"options": DecodingOptions(strategy="beam")}, "beam search of a Whisper is transformers' own"),
        ({"options": DecodingOptions(num_heads=9)}, "num_heads 9"),
    ],
)
def test_what_the_model_cannot_do_is_refused(transcriber, asked, message):
    with pytest.raises(ValueError, match=message):
        transcriber.transcribe(speech(0.5), asked.pop("options", VERIFY), **asked)


def test_options_that_fit_no_whisper_or_not_this_one_are_refused(folder, tmp_path, tiny_model_folder):
    with pytest.raises(ValueError, match="unknown task 'sing'"):
        WhisperOptions(task="sing")
    with pytest.raises(ValueError, match="needs timestamps"):
        WhisperOptions(condition_on_previous_text=True)
    with pytest.raises(ValueError, match="'klingon' is not one of"):
        load(folder, whisper=WhisperOptions(language="klingon"))
    with pytest.raises(ValueError, match="is for a Whisper"):
        load(tiny_model_folder, whisper=WhisperOptions())
    with pytest.raises(ValueError, match="is for a Whisper"):
        load(tiny_model_folder, adapter=tmp_path)
    build(tmp_path, languages=())
    english = load(tmp_path)
    assert english.language == "en"
    assert english.begin_tokens("en") == [
        english.model.generation_config.decoder_start_token_id,
        english.model.generation_config.no_timestamps_token_id,
    ]
    with pytest.raises(ValueError, match="English alone"):
        english.transcribe(speech(0.5), language="de")
    with pytest.raises(ValueError, match="English alone"):
        load(tmp_path, whisper=WhisperOptions(task="translate"))
    with pytest.raises(ValueError, match="no heads were fitted"):
        english.transcribe(speech(0.5), DecodingOptions(drafts="mtp"))
    timed = load(tmp_path, whisper=WhisperOptions(timestamps=True))
    with pytest.raises(ValueError, match="know no rules of timestamps"):
        timed.transcribe(speech(0.5), DecodingOptions(strategy="threshold", threshold=0.5))
    with pytest.raises(ValueError, match="one clip"):
        timed.transcribe(speech(0.5), clips=((0.0, 0.1), (0.2, 0.3)))
