"""What latent attention is fitted to: sums over sampled query positions of one layer, weighted by what they do to its output.

Shapes: H query heads, K key/value heads, D head width, P rotated pairs, E' inputs (E, or one more where projections have
biases: a column of ones). p are a row's attention weights, imp its importance: what an error of its scores costs in the
attention's output, Σ p |O_h (v − v̄)|² over the stream's energy. x̄ = Σ p x; "centred" takes the mean under p away, for a softmax
does not see a shift of all scores. Sums are over rows and, where no H stands, over heads.

- `pairs` complex [H, P, K, K]: imp · centred moment of the rotated keys on each pair, as complex numbers.
- `queries` [H, D, D]: moment of the queries without their rotation, in `AttentionTraits.order`.
- `keys` [E', E']: imp · centred moment of the inputs. `share` [H]: each head's part of its trace.
- `values` [E', E']: moment of x̄ over the stream's energy.
- `inputs` [E', E']: moment of the inputs at all positions, of which there are `tokens` [].
- `rows` []: how many query positions were summed.
"""

import torch
from torch import Tensor

from upfit.calibration.observe import Seen
from upfit.calibration.ridge import augmented
from upfit.calibration.rotation import Turns
from upfit.calibration.teacher_view import View
from upfit.calibration.traits import AttentionTraits


def observe(view: View, seen: Seen, traits: AttentionTraits, turns: Turns, width: int) -> dict[str, Tensor]:
    """The sums of one batch (float64), see the module; `width` is E'."""
    inputs = augmented(view.inputs, width)
    order, stream = list(traits.order), view.batch.middle(view.attended, traits.residual, view.before)
    tokens = view.batch.weights(stream, 2.0)
    queries = still(seen.q[..., order].transpose(1, 2), turns.q)
    counted = inputs.flatten(0, 1) if view.batch.counted is None else inputs[view.batch.counted]
    sums = {"inputs": (counted.T @ counted).double().cpu(), "tokens": torch.tensor(float(len(counted)), dtype=torch.float64)}
    for target in view.targets:
        importance = target.importance[..., 0] * target.unit  # [B, H, R]
        parts = _inputs_sums(inputs[:, : target.keys], target.weights, importance, tokens[:, target.at])
        real = _real(view, target.at)
        own = (queries[:, target.at] * real[..., None, None]).permute(2, 0, 1, 3).flatten(1, 2)  # [H, B·R, D]
        parts["queries"] = own.transpose(1, 2) @ own
        keys = seen.k[:, :, : target.keys, order].transpose(1, 2)
        turned = torch.complex(keys[..., : traits.pairs], keys[..., traits.pairs : 2 * traits.pairs])
        parts["pairs"] = _pair_sums(turned, target.weights, importance)
        parts["rows"] = real.sum()
        for name, part in parts.items():
            wide = part.to(torch.complex128 if part.is_complex() else torch.float64).cpu()
            sums[name] = sums[name] + wide if name in sums else wide
    return sums


def _real(view: View, at: Tensor) -> Tensor:
    """[B, R]: 1 at rows that are no padding."""
    shape = (len(view.inputs), len(at))
    return view.inputs.new_ones(shape) if view.batch.counted is None else view.batch.counted[:, at].to(view.inputs)


def still(heads: Tensor, turns: Tensor) -> Tensor:
    """`heads` [B, T, heads, D] in `AttentionTraits.order`, with the rotation by `turns` [T, P] (and its scale) taken back."""
    pairs = turns.shape[1]
    if not pairs:
        return heads
    turned = torch.complex(heads[..., :pairs], heads[..., pairs : 2 * pairs]) / turns[: heads.shape[1], None]
    return torch.cat([turned.real, turned.imag, heads[..., 2 * pairs :]], -1)


def _inputs_sums(x: Tensor, weights: Tensor, importance: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """`keys`, `share` and `values` of inputs [B, L, E'] that rows look at with `weights` [B, H, R, L]."""
    columns = torch.einsum("bhrl,bhr->bhl", weights, importance)
    keys = (x * columns.sum(1)[..., None]).flatten(0, 1).T @ x.flatten(0, 1)
    lengths, values, shares = x.square().sum(-1), torch.zeros_like(keys), []
    for head in range(weights.shape[1]):
        mixed = weights[:, head] @ x  # [B, R, E']
        part = (mixed * importance[:, head, :, None]).flatten(0, 1).T @ mixed.flatten(0, 1)
        shares.append((columns[:, head] * lengths).sum() - part.trace())
        keys -= part
        values += (mixed * tokens[..., None]).flatten(0, 1).T @ mixed.flatten(0, 1)
    return {"keys": keys, "values": values, "share": torch.stack(shares).clamp_min(0)}


def _pair_sums(turned: Tensor, weights: Tensor, importance: Tensor) -> Tensor:
    """`pairs` of rotated keys [B, L, K, P]."""
    columns = torch.einsum("bhrl,bhr->bhl", weights, importance)
    flat, parts = turned.flatten(0, 1).permute(2, 1, 0).contiguous(), []  # [P, K, B·L]
    for head in range(weights.shape[1]):
        of_rows = torch.einsum("brl,blkp->brkp", weights[:, head].to(turned), turned)
        middle = of_rows.flatten(0, 1).permute(2, 1, 0)  # [P, K, B·R]
        moment = (flat * columns[:, head].flatten()) @ flat.mH
        parts.append(moment - (middle * importance[:, head].flatten()) @ middle.mH)
    return torch.stack(parts)
