"""Put a trained model into the package: 8-bit weights, model card, and the notice of the encoder it started from.

python experiments/ship.py training/model
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from leapasr.model.speech_llama import SpeechLlamaForConditionalGeneration

PACKAGED = Path(__file__).resolve().parent.parent / "src" / "leapasr" / "pretrained" / "tiny"
TOKENIZER_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("--output", type=Path, default=PACKAGED)
    arguments = parser.parse_args()
    model = SpeechLlamaForConditionalGeneration.from_pretrained(arguments.model)
    model.save_pretrained(arguments.output, weights="int8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(arguments.model / name, arguments.output / name)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
