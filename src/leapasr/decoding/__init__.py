"""Decoding: from prompt embeddings to token ids. Sees ids, never text."""

from leapasr.decoding.interface import CausalLMDecoder, Decoder, Prompts, SpeechLlamaDecoder
from leapasr.decoding.loop import DecodingLoop, decode
from leapasr.decoding.options import DecodingOptions, DecodingResult

__all__ = [
    "CausalLMDecoder",
    "Decoder",
    "DecodingLoop",
    "DecodingOptions",
    "DecodingResult",
    "Prompts",
    "SpeechLlamaDecoder",
    "decode",
]
