"""Decoding: from prompt embeddings to token ids. Sees ids, never text."""

from leapasr.decoding.batch import build_loop, decode
from leapasr.decoding.causal_lm import CausalLMDecoder, SpeechLlamaDecoder
from leapasr.decoding.interface import Decoder, Prompts
from leapasr.decoding.loop import DecodingLoop
from leapasr.decoding.options import DecodingOptions, DecodingResult, Hypothesis

__all__ = [
    "CausalLMDecoder",
    "Decoder",
    "DecodingLoop",
    "DecodingOptions",
    "DecodingResult",
    "Hypothesis",
    "Prompts",
    "SpeechLlamaDecoder",
    "build_loop",
    "decode",
]
