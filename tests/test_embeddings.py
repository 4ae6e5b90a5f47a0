"""The two tables against loops, against transformers, and against an untied copy of themselves."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn import functional as F

from gpt3lib.embeddings import ContextError, Embeddings, check_length, check_tokens, is_traced
from gpt3lib.tokenization import TokenError


def make(vocab_size=11, n_ctx=8, d_model=6, seed=0) -> Embeddings:
    """Small tables of normal numbers."""
    torch.manual_seed(seed)
    return Embeddings(vocab_size, n_ctx, d_model)


sizes = st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 7), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_forward_is_row_plus_track_one_by_one(shape):
    vocab_size, n_ctx, d_model, batch_size = shape
    embeddings = make(vocab_size, n_ctx, d_model)
    tokens = torch.randint(vocab_size, (batch_size, n_ctx))
    found = embeddings(tokens)
    assert found.shape == (batch_size, n_ctx, d_model)
    wte, wpe = embeddings.wte.weight.tolist(), embeddings.wpe.weight.tolist()
    for b in range(batch_size):
        for t in range(n_ctx):
            row = [x + y for x, y in zip(wte[tokens[b, t].item()], wpe[t])]
            torch.testing.assert_close(found[b, t], torch.tensor(row))


@settings(max_examples=60, deadline=None)
@given(sizes, st.data())
def test_tracks_of_its_own_for_each_token_of_each_text(shape, data):
    vocab_size, n_ctx, d_model, batch_size = shape
    length = data.draw(st.integers(1, 2 * n_ctx))  # more tokens than tracks: two may share one
    row = st.lists(st.integers(0, n_ctx - 1), min_size=length, max_size=length)
    tracks = data.draw(st.lists(row, min_size=batch_size, max_size=batch_size))
    embeddings = make(vocab_size, n_ctx, d_model)
    tokens = torch.randint(vocab_size, (batch_size, length))
    found = embeddings(tokens, torch.tensor(tracks))  # (B, T)
    shared = embeddings(tokens, torch.tensor(tracks[0]))  # (T,): the same for all texts
    wte, wpe = embeddings.wte.weight, embeddings.wpe.weight
    for b in range(batch_size):
        for t in range(length):
            assert found[b, t].equal(wte[tokens[b, t]] + wpe[tracks[b][t]])
            assert shared[b, t].equal(wte[tokens[b, t]] + wpe[tracks[0][t]])


@settings(max_examples=60, deadline=None)
@given(sizes, st.data())
def test_a_piece_on_its_tracks_is_a_slice_of_the_whole(shape, data):
    vocab_size, n_ctx, d_model, batch_size = shape
    embeddings = make(vocab_size, n_ctx, d_model)
    tokens = torch.randint(vocab_size, (batch_size, n_ctx))
    start = data.draw(st.integers(0, n_ctx))
    stop = data.draw(st.integers(start, n_ctx))
    piece = embeddings(tokens[:, start:stop], tracks=torch.arange(start, stop))
    assert piece.equal(embeddings(tokens)[:, start:stop])


def test_the_same_token_differs_from_track_to_track():
    vectors = make()(torch.full((1, 8), 3))[0]
    assert len({tuple(vector.tolist()) for vector in vectors}) == 8


def test_a_text_of_one_dimension_and_one_of_length_zero():
    embeddings = make()
    assert embeddings(torch.tensor([1, 2])).equal(embeddings(torch.tensor([[1, 2]]))[0])
    assert embeddings(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 6)


def test_int32_ids_are_ids():
    embeddings, tokens = make(), torch.tensor([[0, 10, 5]])
    assert embeddings(tokens.int()).equal(embeddings(tokens))


def test_unembed_is_a_dot_product_with_every_row():
    embeddings = make()
    h = torch.randn(2, 3, 6)
    logits = embeddings.unembed(h).detach()
    assert logits.shape == (2, 3, 11)
    torch.testing.assert_close(logits, h @ embeddings.wte.weight.T)
    for b in range(2):
        for t in range(3):
            for i, row in enumerate(embeddings.wte.weight.tolist()):
                assert math.isclose(logits[b, t, i], sum(x * y for x, y in zip(h[b, t].tolist(), row)), abs_tol=1e-5)


def test_two_tables_and_no_third():
    embeddings = Embeddings(11, 8, 6)
    shapes = {name: tuple(parameter.shape) for name, parameter in embeddings.named_parameters()}
    assert shapes == {"wte.weight": (11, 6), "wpe.weight": (8, 6)}


def test_tied_gradient_is_the_sum_of_the_two_uses():
    embeddings = make()
    way_in, tracks, way_out = (
        table.detach().clone().requires_grad_()
        for table in (embeddings.wte.weight, embeddings.wpe.weight, embeddings.wte.weight)
    )
    tokens, targets = torch.tensor([[3, 3, 7]]), torch.tensor([3, 7, 1])
    F.cross_entropy(embeddings.unembed(embeddings(tokens))[0], targets).backward()
    x = torch.stack([way_in[token] + tracks[t] for t, token in enumerate((3, 3, 7))])
    F.cross_entropy(x @ way_out.T, targets).backward()
    torch.testing.assert_close(embeddings.wte.weight.grad, way_in.grad + way_out.grad)
    torch.testing.assert_close(embeddings.wpe.weight.grad, tracks.grad)
    assert way_in.grad[[3, 7]].abs().min() > 0 and way_out.grad.abs().min() > 0
    assert not way_in.grad[[0, 1, 2, 4, 5, 6, 8, 9, 10]].any()


def test_equal_to_a_gpt2_of_transformers_without_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=0, n_head=2, bos_token_id=0, eos_token_id=0)
    theirs = GPT2LMHeadModel(config).eval()
    ours = Embeddings(50, 16, 24)
    ours.load_state_dict(
        {f"{name}.weight": getattr(theirs.transformer, name).weight.detach() for name in ("wte", "wpe")}
    )
    tokens = torch.randint(50, (3, 16))
    expected = theirs.transformer.wte(tokens) + theirs.transformer.wpe(torch.arange(16))
    torch.testing.assert_close(ours(tokens), expected)
    torch.testing.assert_close(ours.unembed(F.layer_norm(ours(tokens), (24,))), theirs(tokens).logits)


def test_meta_device_holds_the_175b_tables():
    with torch.device("meta"):
        giant = Embeddings(50257, 2048, 12288)
    x = giant(torch.zeros(1, 2048, dtype=torch.int64, device="meta"))
    logits = giant.unembed(x)
    assert giant.wte.weight.numel() == 617_558_016 and giant.wpe.weight.numel() == 25_165_824
    assert x.shape == (1, 2048, 12288) and x.device.type == "meta"
    assert logits.shape == (1, 2048, 50257)


def test_the_tracks_are_made_where_the_tokens_are():
    giant, seen = Embeddings(11, 8, 6).to("meta"), []
    giant.wpe.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].device.type))
    giant(torch.zeros(1, 8, dtype=torch.int64, device="meta"))
    assert seen == ["meta"]


def test_tables_travel_through_float16_and_a_state_dict():
    embeddings, tokens = make(), torch.tensor([[1, 2, 3]])
    halves = Embeddings(11, 8, 6).half()
    halves.load_state_dict(embeddings.state_dict())
    assert halves(tokens).dtype == torch.float16
    torch.testing.assert_close(halves(tokens).float(), embeddings(tokens), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 11]]), "token id 11 is not in the vocabulary; ids go from 0 to 10"),
        (torch.tensor([[5, 99, 12]]), "token id 99 is not in the vocabulary; ids go from 0 to 10"),
        (torch.tensor([[-1, 3]]), "token id -1 is not in the vocabulary; ids go from 0 to 10"),
        (torch.tensor([[-7, 99]]), "token id -7 is not in the vocabulary; ids go from 0 to 10"),
        (torch.tensor([[1.0]]), "token ids must be integers in a tensor (torch.int64), not torch.float32"),
        (torch.tensor([[True]]), "token ids must be integers in a tensor (torch.int64), not torch.bool"),
        (
            torch.tensor([[1]], dtype=torch.uint8),
            "token ids must be integers in a tensor (torch.int64), not torch.uint8",
        ),
        (torch.tensor([1, 2]), "tokens must be (B, T) with at least one id, not (2,); for one text use tokens[None]"),
        (
            torch.ones(1, 1, 1, dtype=torch.int64),
            "tokens must be (B, T) with at least one id, not (1, 1, 1); for one text use tokens[None]",
        ),
        (
            torch.ones(2, 0, dtype=torch.int64),
            "tokens must be (B, T) with at least one id, not (2, 0); for one text use tokens[None]",
        ),
        ([1, 2], "token ids must be integers in a tensor (torch.int64), not list"),
    ],
)
def test_wrong_tokens_are_refused_with_a_reason(tokens, message):
    with pytest.raises(TokenError) as caught:
        check_tokens(tokens, 11)
    assert str(caught.value) == message


def test_the_first_and_the_last_id_are_fine():
    assert check_tokens(torch.tensor([[0, 10]]), 11) is None
    assert check_tokens(torch.tensor([[0], [10]], dtype=torch.int32), 11) is None


def test_nothing_is_read_on_the_meta_device():
    assert check_tokens(torch.full((2, 3), 99, device="meta"), 11) is None
    for tokens in (torch.ones(2, 3, device="meta"), torch.ones(3, dtype=torch.int64, device="meta")):
        with pytest.raises(TokenError):
            check_tokens(tokens, 11)


@pytest.mark.parametrize(("count", "n_ctx"), [(9, 8), (2049, 2048), (1, 0)])
def test_too_many_tokens_for_the_tracks(count, n_ctx):
    with pytest.raises(ContextError) as caught:
        check_length(count, n_ctx)
    assert str(caught.value) == f"{count} tokens do not fit into a context of {n_ctx}; pass at most {n_ctx}"
    assert check_length(n_ctx, n_ctx) is None


def test_a_track_that_the_table_does_not_have_is_an_error_of_torch():
    for track in (-1, 8):
        with pytest.raises(IndexError):
            make()(torch.tensor([[0]]), torch.tensor([track]))


def test_every_track_can_be_used():
    assert make()(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 6)
    assert make()(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([7])).shape == (1, 1, 6)


def test_the_errors_are_value_errors():
    assert issubclass(ContextError, ValueError) and issubclass(TokenError, ValueError)


def test_a_tensor_with_a_tangent_is_traced_and_no_other_beside_it():
    plain = torch.randn(3)
    with forward_ad.dual_level():
        assert is_traced(forward_ad.make_dual(plain, plain)) and not is_traced(plain)
    assert not is_traced(plain)
