"""Times of the matrix products of a decoder call, with plain and with packed weights: a table in docs/performance.md

    python experiments/products.py

As many weights as the shipped decoder has layers, so that they come from memory as they do there; the quickest of many
tries, in microseconds a product.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from leapasr.decoding.packing import PACKINGS, Packer, Product

SHAPES = ((432, 432), (432, 1536), (1536, 432))
NUM_WEIGHTS = 20


def microseconds(products: list[Product], x: Tensor, tries: int) -> float:
    """The quickest round of all products, divided by their number."""
    quickest = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        for product in products:
            product(x)
        quickest = min(quickest, time.perf_counter() - start)
    return 1e6 * quickest / len(products)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 40, 128])
    parser.add_argument("--tries", type=int, default=50)
    arguments = parser.parse_args()
    print("| product | weights | " + " | ".join(map(str, arguments.rows)) + " |")
    print("| --- |" + " --- |" * (len(arguments.rows) + 1))
    for width, size in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            linears = [nn.Linear(width, size).to(dtype) for _ in range(NUM_WEIGHTS)]
            packings = PACKINGS if dtype == torch.float32 else ("onednn",)  # in whichever, bfloat16 is packed by oneDNN
            for packing in (None, *packings):
                products: list[Product] = [Packer(packing).product(linear) for linear in linears]
                if packing and products[0] is linears[0]:
                    continue  # cannot be packed here
                times = [
                    microseconds(products, torch.randn(rows, width).to(dtype), arguments.tries)
                    for rows in arguments.rows
                ]
                cells = " | ".join(f"{each:.0f}" for each in times)
                name = str(dtype).removeprefix("torch.")
                print(f"| {width} to {size} | {name}, {packing or 'plain'} | {cells} |")


if __name__ == "__main__":
    main()
