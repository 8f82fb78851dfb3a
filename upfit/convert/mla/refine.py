"""Better latents and outputs for what the teacher's attention gives out, on sampled rows: least squares in turn.

The closed form takes errors of values for independent between heads. Here the latent and the output projection are fitted to
the layer's own output, with the matrices that read the latent as they are. What a change of the latent does to keys is a cost
besides. The latent stays a mixture of the source's keys and values, which fewer rows can tell than one of all inputs.

Shapes: N rows, H query heads, S mixtures, K key/value heads, V value width, E' inputs, E outputs, r latent width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upfit.calibration.fit_values import NEGLIGIBLE, RIDGES, Mixed, descend, improve_outputs
from upfit.calibration.ridge import augmented
from upfit.calibration.scores.fit import Penalty
from upfit.calibration.teacher_view import View
from upfit.calibration.traits import AttentionTraits
from upfit.convert.mla.layer import Latent, key_metric, plain_places
from upfit.convert.mla.sizes import Sizes
from upfit.convert.mla.watch_layer import Shown, attended

ROUNDS = 3  # outputs and latent in turn; it ends before where what is held back gains nothing
ITERATIONS = 8  # conjugate gradients a round
SPAN = 1e-4  # of the strongest mixture: weaker ones are left out


@dataclass(frozen=True)
class Rows:
    """`mixed` [N, H, S]: the span of old keys and values as each query head's attention mixes it; what the attention gave out
    [N, E], with a weight [N]."""

    mixed: Tensor
    target: Tensor
    weight: Tensor

    def error(self, down: Tensor, up: Tensor, outputs: Tensor) -> float:
        """Weighted squared error of `down` [r, S] read by `up` [H, V, r] and `outputs` [E, H, V]."""
        return float(((self.values(down, up) @ outputs.flatten(1).T - self.target).square().sum(1) * self.weight).sum())

    def values(self, down: Tensor, up: Tensor) -> Tensor:
        """[N, H·V]"""
        return torch.einsum("nhs,hvs->nhv", self.mixed, up @ down).flatten(1)


def refine(latent: Latent, shown: Shown, traits: AttentionTraits, sizes: Sizes, balance: float, token_power: float) -> Latent:
    """`latent` with a better mixture and outputs; as it is where what is held back gains nothing."""
    span = _span(shown, sizes)
    inputs = shown.sums["inputs"] / shown.sums["tokens"]
    start = (latent.key[latent.rotated :].double().cpu() @ inputs @ span.T).to(latent.key)
    fit, held = (_rows(shown.views, traits, latent.o, span.to(latent.key), token_power, back) for back in (False, True))
    up, cost = latent.of_heads(latent.up_v), _key_cost(latent, shown, sizes, span, balance)
    down, outputs = refine_mixture(fit, held, start, up, latent.o, cost)
    own = _rows(shown.views, traits, latent.o, latent.key[latent.rotated :], token_power, True)  # some of it is in no mixture
    as_it_is = own.error(torch.eye(own.mixed.shape[-1]).to(down), up, latent.o)
    if down is start or held.error(down, up, outputs) >= as_it_is:
        return latent
    key = torch.cat([latent.key[: latent.rotated], down @ span.to(down)])
    return replace(latent, key=key, o=outputs)


def refine_mixture(fit: Rows, held: Rows, start: Tensor, up: Tensor, outputs: Tensor, keys: Penalty) -> tuple[Tensor, Tensor]:
    """`start` [r, S] and `outputs` [E, H, V] in turn, each by least squares; a round counts only if the held rows gain. The
    outputs are drawn to what they were by the ridge that these like best. Both as they were where nothing is gained."""
    prior, best, count = outputs.flatten(1), (start, outputs), len(held.target)
    error = held.error(start, up, outputs)
    if error < NEGLIGIBLE * float((held.target.square().sum(1) * held.weight).sum()):
        return best

    def improved(down: Tensor, ridge: float) -> tuple[float, Tensor, Tensor]:
        groups = Mixed(fit.values(down, up).unflatten(1, (1, len(up), -1)), fit.target, fit.weight)
        alone = torch.eye(up.shape[1], dtype=up.dtype, device=up.device)[None]
        new_outputs = improve_outputs(groups, alone, prior, ridge).reshape(outputs.shape)
        new = _improve_down(fit, down, start, torch.einsum("ehv,hvr->ehr", new_outputs, up), keys)
        return held.error(new, up, new_outputs) + count * keys.cost(new - start), new, new_outputs

    ridges = list(RIDGES)
    for _ in range(ROUNDS):
        tried = [(improved(best[0], ridge), ridge) for ridge in ridges]
        (trial, *new), ridge = min(tried, key=lambda one: one[0][0])
        if trial >= error:
            break
        error, best, ridges = trial, (new[0], new[1]), [ridge]
    return best


def _improve_down(rows: Rows, down: Tensor, start: Tensor, read: Tensor, keys: Penalty) -> Tensor:
    """Some conjugate gradients on `down` [r, S] with its readers `read` [E, H, r] held, each row scaled by its own weight in
    the output."""
    count, heads, flat = len(rows.target), read.shape[1], read.flatten(1)
    own = read.square().sum((0, 1))
    scale, gram = 1 / (own + 1e-2 * own.mean() + 1e-30)[:, None], flat.T @ flat

    def mixed(change: Tensor) -> Tensor:
        return (rows.mixed @ change.T).flatten(1)

    def pulled(back: Tensor) -> Tensor:
        weighted = (back * rows.weight[:, None]).unflatten(1, (heads, -1))
        return weighted.flatten(0, 1).T @ rows.mixed.flatten(0, 1)

    residual = pulled(rows.target @ flat - mixed(down) @ gram) - count * keys.pull(down - start)

    def curvature(change: Tensor) -> Tensor:
        return pulled(mixed(change) @ gram) + count * keys.pull(change)

    return descend(down, residual, curvature, scale, ITERATIONS)


def _span(shown: Shown, sizes: Sizes) -> Tensor:
    """[S, E']: mixtures of the source's unrotated keys and values that have unit covariance on the text."""
    source, plain = shown.source, plain_places(shown.source, sizes.counts)
    rows = torch.cat([source.k[:, plain].flatten(0, 1), source.v.flatten(0, 1)])
    powers, turn = torch.linalg.eigh(rows @ (shown.sums["inputs"] / shown.sums["tokens"]) @ rows.T)
    strong = powers > SPAN**2 * powers[-1]
    return (turn[:, strong] / powers[strong].sqrt()).T @ rows


def _key_cost(latent: Latent, shown: Shown, sizes: Sizes, span: Tensor, balance: float) -> Penalty:
    """What a change [r, S] of the latent costs the keys, a row, as the closed form weighs them against values."""
    source, sums = shown.source, shown.sums
    root, _ = key_metric(source, sums, plain_places(source, sizes.counts))
    read = root @ latent.up_k.double().cpu().flatten(0, 1)
    size = balance * source.scaling**2 / float(sums["rows"]) / len(source.q)
    return Penalty((size * read.T @ read).to(latent.key), (span @ sums["keys"] @ span.T).to(latent.key))


def _rows(views: list[View], traits: AttentionTraits, outputs: Tensor, span: Tensor, token_power: float, held: bool) -> Rows:
    """The sampled rows of all batches that are held back, or of those that are not."""
    mixed, targets, weights = list[Tensor](), list[Tensor](), list[Tensor]()
    for view in views:
        if view.batch.held != held:
            continue
        tokens = view.batch.weights(view.batch.middle(view.attended, traits.residual, view.before), token_power)
        spanned = augmented(view.inputs, span.shape[1]) @ span.T
        for target in view.targets:
            mixed.append(torch.einsum("bhrl,bls->brhs", target.weights, spanned[:, : target.keys]).flatten(0, 1))
            targets.append(attended(target.weights, view.values[:, : target.keys], outputs).flatten(0, 1))  # without a bias
            weights.append(tokens[:, target.at].flatten())
    return Rows(torch.cat(mixed), torch.cat(targets), torch.cat(weights))
