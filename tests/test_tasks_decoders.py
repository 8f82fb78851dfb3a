"""Small decoders with attentions of ours learn the synthetic tasks."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.cope_tasks import POSITIONS, Attention, Decoder, parsed, run, summary, task_of
from upfit.evaluate.synthetic import flipflop

FLOAT64 = 1e-10
SMALL = ["--layers", "1", "--hidden", "16", "--heads", "2", "--feed-forward", "16", "--dropout", "0", "--results", "none"]


def small(positions: str, *words: str) -> Decoder:
    torch.manual_seed(0)
    args = parsed(["counting", "--max-steps", "12", *SMALL, *words])
    model = Decoder(args, task_of(args), positions).double().eval()
    for layer in model.layers:
        for name, parameter in layer.named_parameters():
            if name.endswith("embeddings"):
                nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("positions", POSITIONS)
def test_decoders_look_back_only_and_see_order(positions: str) -> None:
    model, ids = small(positions), torch.randint(0, 17, (2, 12), generator=torch.manual_seed(1))
    later, earlier = ids.clone(), ids.clone()
    later[:, 8:] = (ids[:, 8:] + 1) % 17
    earlier[:, :4] = ids[:, :4].flip(1)
    assert not torch.equal(ids, earlier)
    logits = model(ids)
    assert torch.allclose(logits[:, :8], model(later)[:, :8], atol=FLOAT64, rtol=0)
    assert (logits[:, -1] - model(earlier)[:, -1]).abs().max() > 1e-6
    logits[:, -1].logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_cope_without_embeddings_is_what_is_left() -> None:
    both, rope = small("rope+cope"), small("rope")
    for layer in both.layers:
        layer.attention.embeddings.data.zero_()  # type: ignore[union-attr, operator]
    assert not both.load_state_dict(rope.state_dict(), strict=False).unexpected_keys
    ids = torch.randint(0, 17, (2, 12), generator=torch.manual_seed(1))
    assert torch.allclose(both(ids), rope(ids), atol=FLOAT64, rtol=0)


def test_the_two_scales_differ_by_the_root_of_the_head_width() -> None:
    paper, code = small("cope", "--scale", "paper"), small("cope", "--scale", "code")
    ids = torch.randint(0, 17, (2, 12), generator=torch.manual_seed(1))
    assert not torch.allclose(paper(ids), code(ids))
    for layer in code.layers:
        layer.attention.embeddings.data *= 8**0.5  # type: ignore[union-attr, operator]
    assert torch.allclose(paper(ids), code(ids), atol=FLOAT64, rtol=0)


def test_turned_queries_and_keys_are_for_content_alone() -> None:
    args = parsed(["counting", "--max-steps", "12", *SMALL])
    attention = Attention(args, "rope+cope", None)
    q, k, turned_q, turned_k = (torch.randn(1, 2, 5, 8, generator=torch.manual_seed(seed)) for seed in range(4))
    nn.init.normal_(attention.embeddings)
    given = attention.inputs(q, k, k, turned_q, turned_k)
    assert given.q is turned_q and given.k is turned_k and given.gate_k is k and given.gate_q is not None
    assert torch.allclose(given.gate_q, q / 8**0.5) and not given.gate_bias.any() and given.scaling == 8**-0.5
    assert torch.allclose(given.z, torch.einsum("bhtd,pd->bhtp", q, attention.embeddings))


def test_relative_positions_are_a_vector_for_each_distance() -> None:
    attention = Attention(parsed(["counting", *SMALL]), "relative", None)
    q, distances = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    found = attention.relative(q, distances)
    for i in range(6):
        for j in range(6):
            wanted = q[0, 1, i] @ distances[min(i - j, 3)] / 8**0.5 if j <= i else torch.tensor(float("-inf")).double()
            assert torch.allclose(found[0, 1, i, j], wanted, atol=FLOAT64)


@pytest.mark.slow
def test_a_decoder_learns_the_smallest_register(tmp_path: Path) -> None:
    words = ["flipflop", "--length", "6", *SMALL, "--train-steps", "80", "--test-samples", "50", "--learning-rate", "1e-2"]
    args = parsed([*words, "--train-samples", "200"])
    runs = [run(args, task_of(args), "cope", seed, torch.device("cpu")) for seed in (0, 1)]
    assert all(one["losses"][-1] < 0.1 < one["losses"][0] for one in runs)
    rows = {row["split"]: row for row in summary(runs)}
    assert set(rows) == set(flipflop.IGNORE)
    assert rows["in distribution"]["error"]["mean"] < 5 and len(rows["sparse"]["error"]["values"]) == 2
