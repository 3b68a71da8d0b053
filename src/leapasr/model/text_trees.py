"""Several texts that are read in one pass, with what they share from their beginning on in it once.

Shapes: B rows, N texts a row, M text tokens, U = M + 1 text positions (begin-of-text and the tokens), W nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TextTrees:
    """The texts of each row as a tree: a node is a token behind all that lies before it.

    Hypotheses of one utterance differ in a few words. Behind the first of these each needs nodes of its own; what is
    before it, all read alike.

    Attributes:
        tokens_BW: token ids of the nodes, the parent of each before it; begin-of-text first, anything where a row has
            no more nodes.
        places_BW: where in its text a node stands, begin-of-text at 0.
        sees_BWW: whether a node (first W) reads a node (second W): itself, and what its text has before it.
        nodes_BNU: the node of each position of each text; begin-of-text behind a text's end.
    """

    tokens_BW: Tensor
    places_BW: Tensor
    sees_BWW: Tensor
    nodes_BNU: Tensor

    @classmethod
    def of(cls, text_BNM: Tensor, lengths_BN: Tensor, *, begin_token_id: int) -> TextTrees:
        """Args: text_BNM: token ids, padded with any id behind each text's end. lengths_BN: valid tokens of each."""
        text_BNU = torch.nn.functional.pad(text_BNM, (1, 0), value=begin_token_id)
        B, N, U = text_BNU.shape
        place_U, number_N = (torch.arange(size, device=text_BNU.device) for size in (U, N))
        exists_BNU = place_U <= lengths_BN[..., None]
        # up to each place, is a text (first N) the beginning of another (second N)?
        same_BNNU = ((text_BNU[:, :, None] == text_BNU[:, None]) & exists_BNU[:, None]).cumprod(-1).bool()
        owner_BNU = torch.where(same_BNNU, number_N[:, None], N - 1).amin(2)  # the first text that has this beginning
        is_new_BNU = exists_BNU & (owner_BNU == number_N[:, None])
        new_BNU = (is_new_BNU.flatten(1).cumsum(1) - 1).view(B, N, U)
        nodes_BNU = new_BNU.gather(1, owner_BNU) * exists_BNU
        W = int(is_new_BNU.flatten(1).sum(1).max())

        place_of_BNU = torch.where(is_new_BNU, new_BNU, W)  # what is not a node falls behind the last

        def of_nodes(values_BNU: Tensor) -> Tensor:
            found = values_BNU.new_zeros(B, W + 1)
            return found.scatter(1, place_of_BNU.flatten(1), values_BNU.flatten(1))[:, :W]

        tokens_BW = of_nodes(text_BNU)
        places_BW = of_nodes(place_U.expand(B, N, U))
        text_of_BW = of_nodes(number_N[:, None].expand(B, N, U))
        path_BWU = nodes_BNU.gather(1, text_of_BW[..., None].expand(B, W, U))
        before_BWU = torch.where(place_U <= places_BW[..., None], path_BWU, W)
        sees_BWW = torch.zeros(B, W, W + 1, dtype=torch.bool, device=text_BNU.device)
        return cls(tokens_BW, places_BW, sees_BWW.scatter(2, before_BWU, True)[..., :W], nodes_BNU)

    def along(self, values_BWX: Tensor, *, texts: slice) -> Tensor:
        """Values (B, W, X) of the nodes at the positions of some of the texts: (B, N', U, X)."""
        nodes_BNU = self.nodes_BNU[:, texts]
        index = nodes_BNU.flatten(1)[..., None].expand(-1, -1, values_BWX.shape[-1])
        return values_BWX.gather(1, index).unflatten(1, nodes_BNU.shape[1:])
