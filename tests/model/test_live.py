"""accelerate: a live object of the original gives the same results, and stays what it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cellpatch_fast.errors import InputError
from cellpatch_fast.model import accelerate, restore

Live = Callable[..., Any]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a fixed random sum of ``output``, by parameter name; zeros where there are none."""
    generator = torch.Generator().manual_seed(5)
    factors = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(
        (output * factors).sum(), parameters, allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, found, strict=True))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
    assert any(gradient.any() for gradient in expected.values())


# --- the same results --------------------------------------------------------------------------


def test_padded_outputs_of_the_original(
    original: Any, live: Live, backend: str, device: torch.device
) -> None:
    model = accelerate(live(original).to(device), backend=backend)
    given = original.values.to(device), original.genes.to(device)
    with torch.inference_mode():
        features = model.get_mid_embeding(*given)
        assert_close(features.cpu(), original.arrays["embedding_padded"])
        if original.kind == "pretrain":
            _, attention = model.get_mid_embeding(*given, True)
            expected = original.arrays["attention_padded"]
            assert_close(attention["encoder_cross_extract_blocks"].cpu(), expected)
            prompts = original.arrays["prompt_genes"].to(device)
            predicted = model(*given, prompts)
            assert_close(predicted.cpu(), original.arrays["prediction_padded"])
        if original.kind == "annotate_projected":
            logits = model(*given)
            assert_close(logits.cpu(), original.arrays["logits_padded"])


def test_without_padding_cells_are_as_if_alone(
    original: Any, live: Live, backend: str, device: torch.device
) -> None:
    model = accelerate(live(original).to(device), mask_padding=True, backend=backend)
    given = original.values.to(device), original.genes.to(device)
    with torch.inference_mode():
        features, attention = model.get_mid_embeding(*given, True)
    for cell, expected in enumerate(original.alone("embedding")):
        assert_close(features[cell].cpu(), expected)
    cross = attention["encoder_cross_extract_blocks"].cpu()
    assert cross.shape == (4, 64, 90)
    assert not cross.transpose(1, 2)[~original.keep].any()
    if original.kind == "pretrain":
        for cell, expected in enumerate(original.alone("attention")):
            assert_close(cross[cell, :, : expected.shape[1]], expected)


def test_attention_of_every_block(
    original: Any, live: Live, backend: str, device: torch.device
) -> None:
    with torch.inference_mode():
        given = original.values, original.genes
        _, expected = live(original).get_mid_embeding(*given, True)
        model = accelerate(live(original).to(device), backend=backend)
        _, found = model.get_mid_embeding(*(tensor.to(device) for tensor in given), True)
    assert list(found) == list(expected)
    assert len(found) == 3
    for name, attention in expected.items():
        assert_close(found[name].cpu(), attention)


def test_padding_counts_wherever_it_lies(pretrain: Any, live: Live) -> None:
    """Entries in any order, real ones of value 0 or of gene 0 among them."""
    torch.manual_seed(3)
    order = torch.stack([torch.randperm(90) for _ in range(4)])
    values, genes = pretrain.values.gather(1, order), pretrain.genes.gather(1, order)
    values[genes == pretrain.genes[0, 0]] = 0
    genes[0, :2], values[0, :2] = 0, 1.5
    with torch.inference_mode():
        expected, their_attention = live(pretrain).get_mid_embeding(values, genes, True)
        found, attention = accelerate(live(pretrain)).get_mid_embeding(values, genes, True)
    assert_close(found, expected)
    name = "encoder_cross_extract_blocks"
    assert_close(attention[name], their_attention[name])


@pytest.mark.parametrize("original", ["annotate", "annotate_projected"], indirect=True)
def test_project_out(live: Live, original: Any) -> None:
    model = live(original)
    arguments = (original.values, original.genes, False, False)
    with torch.inference_mode():
        expected = model.get_mid_embeding(*arguments)
        assert expected.shape == (4, 64, 32)
        assert_close(accelerate(model).get_mid_embeding(*arguments), expected)


def test_all_padding(pretrain: Any, live: Live) -> None:
    nothing = torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.int64)
    with torch.inference_mode():
        expected = live(pretrain).get_mid_embeding(*nothing)
        assert_close(accelerate(live(pretrain)).get_mid_embeding(*nothing), expected)
        masked = accelerate(live(pretrain), mask_padding=True).get_mid_embeding(*nothing)
    assert masked.isfinite().all()


# --- gradients and training --------------------------------------------------------------------


def test_gradients_equal_the_originals(original: Any, live: Live) -> None:
    model, values = live(original).double(), original.values.double()
    expected = gradients(model, model.get_mid_embeding(values, original.genes))
    accelerate(model, backend="numba")  # serves inference, does not stand in the way
    found = gradients(model, model.get_mid_embeding(values, original.genes))
    assert_same_gradients(found, expected)


def test_gradients_without_padding_equal_those_of_cells_alone(original: Any, live: Live) -> None:
    model, values = live(original).double(), original.values.double()
    alone = [
        model.get_mid_embeding(values[cell, None, keep], original.genes[cell, None, keep])
        for cell, keep in enumerate(original.keep)
    ]
    expected = gradients(model, torch.cat(alone))
    accelerate(model, mask_padding=True)
    found = gradients(model, model.get_mid_embeding(values, original.genes))
    assert_same_gradients(found, expected)


def test_gradients_reach_the_values(pretrain: Any, live: Live) -> None:
    model = live(pretrain).double().requires_grad_(False)
    grads = []
    for run in (model, accelerate(copy.deepcopy(model), backend="numba")):
        values = pretrain.values.double().requires_grad_()
        run.get_mid_embeding(values, pretrain.genes)[..., 0].sum().backward()
        grads.append(values.grad)
    # padding has no gradient of its own with us: it is one weighted token
    torch.testing.assert_close(grads[1][pretrain.keep], grads[0][pretrain.keep])


def test_training_with_padding_is_the_originals_own(original: Any, live: Live) -> None:
    options = {} if original.kind == "pretrain" else {"embedding_dropout": 0.3}
    model = live(original, **options).train()
    arguments = (original.values, original.genes)
    torch.manual_seed(7)
    expected = model.get_mid_embeding(*arguments)
    torch.manual_seed(7)
    assert torch.equal(accelerate(model).get_mid_embeding(*arguments), expected)
    if original.kind != "pretrain":
        assert model.get_mid_embeding(*arguments, project_out=False).shape == (4, 64, 32)


def test_training_without_padding_drops_attention(pretrain: Any, live: Live) -> None:
    arguments = (pretrain.values, pretrain.genes)
    model = accelerate(live(pretrain), mask_padding=True)
    expected = model.get_mid_embeding(*arguments)
    model.train()
    first, second = (model.get_mid_embeding(*arguments) for _ in range(2))
    assert not torch.equal(first, second)
    assert any(gradient.any() for gradient in gradients(model, first).values())
    without = accelerate(live(pretrain, attention_dropout=0.0), mask_padding=True).train()
    assert_close(without.get_mid_embeding(*arguments), expected, tolerance=1e-6)


@pytest.mark.parametrize("original", ["annotate"], indirect=True)
def test_training_without_padding_refuses_embedding_dropout(original: Any, live: Live) -> None:
    model = accelerate(live(original, embedding_dropout=0.3), mask_padding=True)
    model.get_mid_embeding(original.values, original.genes)
    with pytest.raises(InputError, match=r"emb_dropout is 0\.3.*model\.emb_dropout\.p = 0"):
        model.train().get_mid_embeding(original.values, original.genes)


# --- it stays the same object ------------------------------------------------------------------


def test_parameters_are_shared(pretrain: Any, live: Live) -> None:
    model, witness = accelerate(live(pretrain)), live(pretrain)
    assert list(model.state_dict()) == list(witness.state_dict())
    with torch.inference_mode(), torch.no_grad():
        for changed in (model, witness):
            for parameter in changed.parameters():
                parameter.mul_(0.9)
        arguments = (pretrain.values, pretrain.genes)
        assert_close(model.get_mid_embeding(*arguments), witness.get_mid_embeding(*arguments))
        model.load_state_dict(pretrain.state)
        assert_close(model.get_mid_embeding(*arguments), pretrain.arrays["embedding_padded"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_with_their_own_parameters(
    pretrain: Any, live: Live, duplicate: Callable[[Any], Any]
) -> None:
    model = accelerate(live(pretrain), mask_padding=True)
    other = duplicate(model)
    arguments = (pretrain.values, pretrain.genes)
    with torch.inference_mode(), torch.no_grad():
        before = model.get_mid_embeding(*arguments)
        assert torch.equal(other.get_mid_embeding(*arguments), before)  # settings are copied too
        other.pathway_token.mul_(2)
        assert (other.get_mid_embeding(*arguments) - before).norm() > 0.01 * before.norm()
        assert torch.equal(model.get_mid_embeding(*arguments), before)
    assert type(other) is type(model)
    assert type(restore(other)) is type(live(pretrain))


def test_accelerating_twice_changes_the_settings_only(pretrain: Any, live: Live) -> None:
    model = live(pretrain)
    assert accelerate(model) is model
    once = type(model)
    arguments = (pretrain.values, pretrain.genes)
    with torch.inference_mode():
        padded = model.get_mid_embeding(*arguments)
        masked = accelerate(model, mask_padding=True).get_mid_embeding(*arguments)
        assert type(model) is once
        assert (padded - masked).norm() > 0.1 * padded.norm()
        assert torch.equal(accelerate(model).get_mid_embeding(*arguments), padded)


def test_restore(pretrain: Any, live: Live, peers: Any) -> None:
    model = live(pretrain)
    attributes = set(vars(model))
    assert isinstance(accelerate(model), peers.PaddedPathFormer)
    assert type(model).__name__ == "PaddedPathFormer"
    assert restore(model) is model
    assert type(model) is peers.PaddedPathFormer
    assert set(vars(model)) == attributes
    assert type(restore(model)) is peers.PaddedPathFormer


def test_modes_are_left_as_they_were(pretrain: Any, live: Live) -> None:
    model = live(pretrain).train()
    model.gene2vector.eval()
    modes = [module.training for module in model.modules()]
    accelerate(model)
    assert [module.training for module in model.modules()] == modes


# --- not the original --------------------------------------------------------------------------


def test_what_an_object_lacks_is_listed(pretrain: Any, live: Live) -> None:
    model = live(pretrain)
    del model.count2vector, model.self_extract_blocks_mlp[1]
    with pytest.raises(InputError) as caught:
        accelerate(model)
    message = str(caught.value)
    assert message.startswith("PaddedPathFormer is not a PathFormer or PathFormer_lp")
    lacking = message.split("it lacks ")[1].split(", ")
    assert sorted(lacking) == [
        "count2vector.bias",
        "count2vector.weight",
        *(f"self_extract_blocks_mlp.1.{layer}.{n}" for layer in "02" for n in ("bias", "weight")),
    ]


def test_a_wrapped_model_is_pointed_to(pretrain: Any, live: Live) -> None:
    with pytest.raises(InputError, match=r"pass its \.module"):
        accelerate(nn.DataParallel(live(pretrain)))


@pytest.mark.parametrize("change", ["activation", "epsilon"])
def test_a_relative_that_computes_something_else_is_refused(
    pretrain: Any, live: Live, change: str
) -> None:
    model = live(pretrain)
    if change == "activation":
        model.self_extract_blocks_mlp[1][1] = nn.ReLU()
    else:
        model.cross_extract_blocks_attn_norm.eps = 0.1
    with pytest.raises(InputError, match="computes something else than the released code"):
        accelerate(model)
    assert type(model) is type(live(pretrain))
