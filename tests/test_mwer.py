"""Minimum word error rate training: lists, what is expected of them, and their gradients."""

from __future__ import annotations

import copy
import itertools
import math
from functools import cache

import pytest
import torch
from conftest import EOS, tiny_config

from leapasr.config import MWER
from leapasr.data.batches import Batch
from leapasr.decoding import DecodingOptions, Prompts, SpeechLlamaDecoder, decode
from leapasr.decoding.guards import token_bound
from leapasr.decoding.options import DecodingResult, Hypothesis
from leapasr.decoding.trace import DraftToken
from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration
from leapasr.model.text_trees import TextTrees
from leapasr.training import mwer
from leapasr.training.losses import (
    drafting_probabilities,
    expected_calls,
    list_probabilities,
    mwer_loss,
    text_log_probabilities,
)
from leapasr.training.mwer import Hypotheses, hypothesize, read_lists, search

# What is expected of a list


def toy_lists(seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_probs = -5 * torch.rand(3, 4, generator=generator, dtype=torch.float64)
    errors = torch.randint(0, 6, (3, 4), generator=generator).double()
    listed = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    return log_probs, errors, listed


def of_each_alone(logits_BUV, text_BM, lengths_B):
    """`text_log_probabilities` of one text a row."""
    nodes_B1U = torch.arange(logits_BUV.shape[1]).expand(len(logits_BUV), 1, -1)
    (scores_B,) = text_log_probabilities(
        logits_BUV, nodes_B1U, text_BM[:, None], lengths_B[:, None], end_token_id=EOS
    ).unbind(1)
    return scores_B


def test_probabilities_of_a_list_sum_to_one():
    log_probs, _, listed = toy_lists()
    probabilities = list_probabilities(log_probs, listed)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, dtype=torch.float64))
    assert (probabilities[~listed] == 0).all()
    for row in range(3):
        shares = [math.exp(value) for value in log_probs[row][listed[row]]]
        assert probabilities[row][listed[row]].tolist() == pytest.approx([share / sum(shares) for share in shares])


def test_mwer_loss_written_out():
    log_probs, errors, listed = toy_lists()
    expected = []
    for row in range(3):
        values = log_probs[row][listed[row]].tolist()
        wrong = errors[row][listed[row]].tolist()
        total = sum(map(math.exp, values))
        mean = sum(wrong) / len(wrong)
        expected.append(
            sum(math.exp(value) / total * (number - mean) for value, number in zip(values, wrong, strict=True))
        )
    assert expected[2] == 0  # of one hypothesis there is nothing to choose
    loss = mwer_loss(list_probabilities(log_probs, listed), errors, listed)
    assert loss.item() == pytest.approx(sum(expected) / 3)


def test_gradient_of_the_mwer_loss_by_finite_differences():
    """Contract 7: from head 1's logits to the loss."""
    generator = torch.Generator().manual_seed(2)
    B, N, M, V = 2, 3, 4, 7
    logits = torch.randn(B * N, M + 1, V, generator=generator).double().requires_grad_()
    text = torch.randint(3, V, (B * N, M), generator=generator)
    lengths = torch.tensor([4, 0, 2, 3, 1, 4])
    _, errors, _ = toy_lists()
    listed = torch.tensor([[True, True, True], [True, True, False]])

    def loss(logits):
        labels = [[*text[row, :length].tolist(), EOS] for row, length in enumerate(lengths.tolist())]
        log_probs = logits.log_softmax(-1)
        sums = torch.stack(
            [sum(log_probs[row, u, label] for u, label in enumerate(each)) for row, each in enumerate(labels)]
        )
        return mwer_loss(list_probabilities(sums.view(B, N), listed), errors[:B, :N], listed)

    (expected,) = torch.autograd.grad(loss(logits), logits)
    small = 1e-6
    for index in itertools.product(range(B * N), range(M + 1), range(V)):
        moved = logits.detach().clone()
        moved[index] += small
        higher = loss(moved)
        moved[index] -= 2 * small
        assert expected[index].item() == pytest.approx(((higher - loss(moved)) / (2 * small)).item(), abs=1e-7)
    log_probs = of_each_alone(logits, text, lengths).view(B, N)
    ours = mwer_loss(list_probabilities(log_probs, listed), errors[:B, :N], listed)
    assert ours.item() == pytest.approx(loss(logits).item(), abs=1e-6)
    (found,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert (found[5] == 0).all()  # in no list
    assert (found[1, 1:] == 0).all()  # behind end-of-text


def calls_by_cases(drafting, length):
    """Expected calls of one text, all that may be accepted in each call gone through one by one."""
    num_drafts = len(drafting)

    def behind(u):
        if u >= length:
            return 0.0
        total = 0.0
        for num_accepted in range(num_drafts + 1):
            chance = math.prod(drafting[k][u].item() for k in range(num_accepted))
            if num_accepted < num_drafts:
                chance *= 1 - drafting[num_accepted][u].item()
            total += chance * (1 + behind(u + 1 + num_accepted)) if chance else 0.0
        return total

    return 1 + behind(0)


@pytest.mark.parametrize("num_heads", [2, 3, 6])
def test_expected_calls_case_by_case(num_heads):
    generator = torch.Generator().manual_seed(num_heads)
    lengths = torch.tensor([0, 1, 2, 5, 7])
    logits = [3 * torch.randn(5, 8, 9, generator=generator, dtype=torch.float64) for _ in range(num_heads - 1)]
    text = torch.randint(3, 9, (5, 7), generator=generator)
    drafting = drafting_probabilities(logits, text, lengths, end_token_id=EOS)
    for head, each in enumerate(logits, 2):
        for row, length in enumerate(lengths.tolist()):
            ended = [*text[row, :length].tolist(), EOS]
            for u in range(8):
                given = each[row, u].softmax(-1)[ended[u + head - 1]].item() if u + head - 1 < len(ended) else 0.0
                assert drafting[head - 2, row, u].item() == pytest.approx(given, rel=1e-5)
    calls = expected_calls(drafting, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert calls[row].item() == pytest.approx(calls_by_cases(drafting[:, row], length), rel=1e-5)


def test_expected_calls_without_doubt():
    """Heads that are always right, and heads that are always wrong; the gradient asks for surer heads."""
    lengths = torch.tensor([0, 1, 6])
    beyond = torch.arange(2, 5)[:, None, None] + torch.arange(7) > lengths[:, None] + 1
    right = torch.ones(3, 3, 7).masked_fill(beyond, 0.0)
    assert expected_calls(right, lengths).tolist() == [1, 2, 3]  # of seven tokens: one, four, two
    assert expected_calls(torch.zeros(3, 3, 7), lengths).tolist() == [1, 2, 7]
    unsure = (0.5 * right).requires_grad_()
    expected_calls(unsure, lengths).sum().backward()
    assert (unsure.grad <= 0).all()
    assert unsure.grad[0, 2, 0] < unsure.grad[2, 2, 0] < 0


class KnownDrafter:
    """Drafts behind token u of its script what `right_KU[:, u]` says: the right token, or another."""

    def __init__(self, script, right_KU):
        self.script, self.right_KU = script, right_KU

    def propose(self, emitted, guesses):
        if not emitted:
            return []
        u = len(emitted) - 1
        following = zip(self.script[u + 1 :], self.right_KU[:, u].tolist(), strict=False)
        return [DraftToken(token if right else (token + 1) % 48, 0.5, "known") for token, right in following]

    def review(self, verdicts, num_accepted, further):
        pass


@pytest.mark.parametrize("chance", [0.3, 0.8])
def test_expected_calls_are_those_of_the_loop(build_tiny_model, chance):
    model = build_tiny_model()
    prompts = Prompts(*model.prompt(encode(model)))
    options = DecodingOptions(strategy="verify", drafts="mtp", max_tokens=30)
    scripts = [[r.token for r in result.trace] for result in decode(SpeechLlamaDecoder(model), prompts, options)]
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(3, 5, 31, generator=generator) < chance
    drafters = [KnownDrafter(script, right[:, row]) for row, script in enumerate(scripts)]
    results = decode(SpeechLlamaDecoder(model), prompts, options, drafters=drafters)
    assert [[r.token for r in result.trace] for result in results] == scripts
    for row, (script, result) in enumerate(zip(scripts, results, strict=True)):
        length = torch.tensor([len(script) - 1])  # its last token ends it
        inside = torch.arange(31) + torch.arange(2, 5)[:, None] <= len(script)
        calls = expected_calls((right[:, row] & inside)[:, None].double(), length)
        assert calls.item() == result.num_calls < len(script)


# Reading texts side by side


def encode(model, num_rows=5, num_frames=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, num_frames, 8, generator=generator, dtype=torch.float64).to(model.dtype)
    lengths = torch.tensor([num_frames - 6 * row for row in range(num_rows)])
    return model.encode(features, lengths)


SHAPES = [{}, {"ctc_positions": True}, {"draft_layers": 1}, {"head_type": "sequential"}, {"head_type": "projection"}]


def many_texts(num_rows=5, num_texts=4, longest=9):
    """Texts with common beginnings, repeated tokens, one that is another's beginning, one twice and one of no token."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(3, 6, (num_rows, num_texts, longest), generator=generator)
    lengths = torch.randint(longest + 1, (num_rows, num_texts), generator=generator)
    texts[0, 1], lengths[0, :2] = texts[0, 0], torch.tensor([longest, 5])
    texts[3, 1], lengths[3, :2] = texts[3, 0], torch.tensor([4, longest])  # what pads the first is the second's text
    texts[1, 2], lengths[1, 2] = texts[1, 0], lengths[1, 0]
    lengths[2, 0] = 0
    return texts, lengths


def trees_of(model, texts, lengths):
    return TextTrees.of(texts, lengths, begin_token_id=model.config.bos_token_id)


def test_a_node_for_each_beginning_of_a_text():
    texts, lengths = many_texts()
    trees = TextTrees.of(texts, lengths, begin_token_id=1)
    num_nodes = []
    for row in range(5):
        all_texts = [[1, *text[:length]] for text, length in zip(texts[row].tolist(), lengths[row], strict=True)]
        node_of = {}
        for n, text in enumerate(all_texts):
            for u in range(10):
                node = int(trees.nodes_BNU[row, n, u])
                if u >= len(text):
                    assert node == 0
                    continue
                assert node_of.setdefault(tuple(text[: u + 1]), node) == node
                assert (trees.tokens_BW[row, node], trees.places_BW[row, node]) == (text[u], u)
                seen = trees.sees_BWW[row, node].nonzero().flatten().tolist()
                assert seen == [node_of[tuple(text[: v + 1])] for v in range(u + 1)]
        assert sorted(node_of.values()) == list(range(len(node_of)))
        num_nodes.append(len(node_of))
    assert trees.tokens_BW.shape[1] == max(num_nodes) < 30
    assert len(set(num_nodes)) > 1  # rows with fewer nodes than others
    assert trees.sees_BWW.any(2).all()  # attention to nothing is not a number


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_texts_that_share_their_beginnings_are_read_as_each_alone(build_tiny_model, fields):
    model = build_tiny_model(**fields)
    encoding = encode(model)
    texts, lengths = many_texts()
    trees = trees_of(model, texts, lengths)
    together = trees.along(model.read_texts(*encoding.prefix, trees), texts=slice(None))
    for row, n in itertools.product(range(5), range(4)):
        length, size = int(lengths[row, n]), int(encoding.lengths_B[row])  # nor does padding of the prefix count
        prefix = encoding.embeddings_BLD[row : row + 1, :size], encoding.lengths_B[row : row + 1]
        text = texts[row : row + 1, n, :length]
        logits = model.head_logits(together[row : row + 1, n, : length + 1], text)
        alone = model.read_text(*prefix, encoding.positions_BL[row : row + 1, :size], text)
        for ours, expected in zip(logits, alone, strict=True):
            torch.testing.assert_close(ours, expected)


def test_gradients_of_texts_that_share_their_beginnings_are_those_of_each_alone(build_tiny_model):
    encoding = encode(build_tiny_model())
    texts, lengths = many_texts()
    scale = torch.randn(5, 4, 10, 48, generator=torch.Generator().manual_seed(2)).double()
    scale *= (torch.arange(10) <= lengths[..., None])[..., None]

    def gradients(read):
        model = copy.deepcopy(build_tiny_model()).requires_grad_(True)
        prefix = encoding.embeddings_BLD.clone().requires_grad_(), encoding.lengths_B, encoding.positions_BL
        (read(model, prefix) * scale).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"": prefix[0].grad}

    def together(model, prefix):
        trees = trees_of(model, texts, lengths)
        (logits,) = model.head_logits(model.read_texts(*prefix, trees), trees.tokens_BW, num_heads=1)
        return trees.along(logits, texts=slice(None))

    def alone(model, prefix):
        return torch.stack([model.read_text(*prefix, texts[:, n], num_heads=1)[0] for n in range(4)], 1)

    ours, expected = gradients(together), gradients(alone)
    assert ours.keys() == expected.keys() > {"", "decoder.model.embed_tokens.weight"}
    for name, gradient in expected.items():
        # norms are computed in float32
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


# Lists


class Words:
    """In the place of a processor: a token is a word."""

    class tokenizer:
        pad_token_id = 0

        @staticmethod
        def convert_ids_to_tokens(token):
            return chr(97 + token)

    @staticmethod
    def decode_text(ids):
        return " ".join("x" + chr(97 + token // 26) + chr(97 + token % 26) + "x" for token in ids)


def batch_of(texts):
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    return Batch(["a"] * len(texts), torch.empty(0), torch.empty(0), ids, torch.tensor([*map(len, texts)]), 1.0)


REFERENCES = [[5, 6, 7], [9], [4, 4, 8, 8], [11, 12], [30]]


@pytest.mark.parametrize("reference", [False, True])
def test_lists_are_those_of_beam_search(build_tiny_model, reference):
    model = copy.deepcopy(build_tiny_model())
    for layer in model.decoder.model.layers:
        layer.self_attn.attention_dropout = 0.5  # in training alone
    encoding = encode(model)
    options = DecodingOptions(strategy="beam", beam_size=3, nbest=3, drafts="mtp")
    bounds = [token_bound(length / model.ctc_frame_rate) for length in encoding.ctc_lengths_B.tolist()]
    model.train()
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    expected = search(model, encoding, options)
    assert [module.training for module in model.modules()] == before  # some in training, some not
    model.eval()
    plain = decode(SpeechLlamaDecoder(model), Prompts(*model.prompt(encoding)), options, max_tokens=bounds)
    assert [[h.tokens for h in r.hypotheses] for r in expected] == [[h.tokens for h in r.hypotheses] for r in plain]
    references = [*REFERENCES[:4], expected[4].hypotheses[1].tokens]
    found = hypothesize(model, Words, encoding, batch_of(references), nbest=3, with_reference=reference)
    assert found.text_BNM.shape[:2] == (5, 3 + reference)
    for row, result in enumerate(expected):
        texts = [hypothesis.tokens for hypothesis in result.hypotheses]
        if reference and references[row] not in texts:
            texts.append(references[row])
        assert found.listed_BN[row].tolist() == [n < len(texts) for n in range(3 + reference)]
        for n, text in enumerate(texts):
            assert found.text_BNM[row, n, : found.lengths_BN[row, n]].tolist() == text
            assert found.errors_BN[row, n].item() == distance(tuple(references[row]), tuple(text))
    assert found.calls_B.tolist() == [result.num_calls for result in expected]
    assert not reference or not found.listed_BN[4, 3]


@cache
def distance(one: tuple, other: tuple) -> int:
    """Levenshtein's, by its definition."""
    if not one or not other:
        return len(one) + len(other)
    return min(
        distance(one[1:], other[1:]) + (one[0] != other[0]), distance(one[1:], other) + 1, distance(one, other[1:]) + 1
    )


def test_scores_of_the_search_are_those_that_are_trained(build_tiny_model):
    model = copy.deepcopy(build_tiny_model())
    model.get_output_embeddings().weight[EOS] *= 1.5  # short texts
    encoding = encode(model)
    results = search(model, encoding, DecodingOptions(strategy="beam", beam_size=3, nbest=3, drafts="mtp"))
    found = hypothesize(model, Words, encoding, batch_of(REFERENCES), nbest=3)
    trees = trees_of(model, found.text_BNM, found.lengths_BN)
    (logits,) = model.head_logits(model.read_texts(*encoding.prefix, trees), trees.tokens_BW, num_heads=1)
    scores = text_log_probabilities(logits, trees.nodes_BNU, found.text_BNM, found.lengths_BN, end_token_id=EOS)
    checked = 0
    for row, result in enumerate(results):
        for n, hypothesis in enumerate(result.hypotheses):
            assert found.text_BNM[row, n, : found.lengths_BN[row, n]].tolist() == hypothesis.tokens
            if hypothesis.truncated is None:
                assert scores[row, n].item() == pytest.approx(hypothesis.score, rel=1e-4)
                checked += 1
    assert checked > 5


@pytest.mark.parametrize("calls_weight", [0.0, 0.5])
def test_risk_is_as_written_down(build_tiny_model, calls_weight):
    """All that is read in one pass, against each text read by itself."""
    model = build_tiny_model()
    encoding = encode(model)
    batch = batch_of(REFERENCES)
    found = hypothesize(model, Words, encoding, batch, nbest=3, with_reference=True)
    logits, risk, figures = read_lists(
        model, encoding, found, batch.text_ids, batch.text_lengths, calls_weight=calls_weight
    )
    read_BU = torch.arange(logits[0].shape[1]) <= batch.text_lengths[:, None]
    for ours, alone in zip(logits, model.read_text(*encoding.prefix, batch.text_ids), strict=True):
        torch.testing.assert_close(ours[read_BU], alone[read_BU])
    expected, expected_errors, expected_number = 0.0, 0.0, 0.0
    for row in range(5):
        scores, errors, calls = [], [], []
        for n in range(int(found.listed_BN[row].sum())):
            length = found.lengths_BN[row, n : n + 1]
            text = found.text_BNM[row, n : n + 1, : length.item()]
            read = model.read_text(*(each[row : row + 1] for each in encoding.prefix), text)
            scores.append(of_each_alone(read[0], text, length).item())
            errors.append(found.errors_BN[row, n].item())
            drafting = drafting_probabilities(read[1:], text, length, end_token_id=EOS)
            calls.append(calls_by_cases(drafting[:, 0], length.item()) if length < 12 else None)
            if calls[-1] is None:
                calls[-1] = expected_calls(drafting, length).item()
        shares = [math.exp(score - max(scores)) for score in scores]
        shares = [share / sum(shares) for share in shares]
        mean = sum(errors) / len(errors)
        expected += sum(s * (e - mean + calls_weight * c) for s, e, c in zip(shares, errors, calls, strict=True)) / 5
        expected_errors += sum(s * e for s, e in zip(shares, errors, strict=True)) / 5
        expected_number += sum(s * c for s, c in zip(shares, calls, strict=True)) / 5
    assert risk.item() == pytest.approx(expected, rel=1e-4)
    assert figures["errors_expected"].item() == pytest.approx(expected_errors, rel=1e-4)
    assert ("calls_expected" in figures) == bool(calls_weight)
    assert not calls_weight or figures["calls_expected"].item() == pytest.approx(expected_number, rel=1e-4)


def test_what_is_left_of_two_hypotheses_after_cuts_is_listed_once(build_tiny_model, monkeypatch):
    model = build_tiny_model()
    hypotheses = [Hypothesis([5, 6], -1.0, None), Hypothesis([7], -2.0, None), Hypothesis([5, 6], -3.0, "repetition")]
    result = DecodingResult([5, 6], 4, [], None, hypotheses)
    monkeypatch.setattr(mwer, "search", lambda *_, **__: [result] * 5)
    found = hypothesize(model, Words, encode(model), batch_of(REFERENCES), nbest=3)
    assert found.listed_BN.tolist() == [[True, True, False]] * 5
    assert found.lengths_BN.tolist() == [[2, 1, 0]] * 5
    assert found.errors_BN[0].tolist() == [1, 2, 0]


def test_calls_teach_further_heads_alone(build_tiny_model):
    model = copy.deepcopy(build_tiny_model(draft_layers=1)).requires_grad_(True)
    batch = batch_of(REFERENCES)
    found = hypothesize(model, Words, encode(model), batch, nbest=3)
    unweighted = read_lists(model, encode(model), found, batch.text_ids, batch.text_lengths)[1]
    weighted = read_lists(model, encode(model), found, batch.text_ids, batch.text_lengths, calls_weight=1.0)[1]
    (weighted - unweighted).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12}
    assert "mtp_heads.expansion.weight" in moved
    assert any(name.startswith("draft_layers.") for name in moved)
    assert "decoder.model.norm.weight" not in moved  # which leads to head 1 alone


def test_one_step_against_the_risk_lowers_it():
    torch.manual_seed(0)
    model = SpeechLlamaForConditionalGeneration(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    batch = batch_of(REFERENCES)
    found = hypothesize(model, Words, encode(model), batch, nbest=4, with_reference=True)
    assert isinstance(found, Hypotheses)

    def risk():
        return read_lists(model, encode(model), found, batch.text_ids, batch.text_lengths)[1:]

    before, figures = risk()
    before.backward()
    assert model.mtp_heads.expansion.weight.grad is None  # nothing for further heads without `calls_weight`
    assert model.encoder.encoder.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
    after, figures_after = risk()
    assert after < before
    assert figures_after["errors_expected"] < figures["errors_expected"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nbest": 1}, "of a list of 1 there is nothing to choose: give nbest 2 or more, or add the reference"),
        ({"nbest": 0, "reference": True}, "nbest must be at least 1, got 0"),
        ({"ce_weight": -1.0}, r"weights must not be negative, got -1.0 and 0.0"),
        ({"calls_weight": -0.5}, r"weights must not be negative, got 1.0 and -0.5"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        MWER(**fields)
    assert MWER(nbest=1, reference=True)
