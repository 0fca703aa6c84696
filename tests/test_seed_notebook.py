"""The seed notebook's cells, in order, on a small checkpoint: its names, its tuple, its shapes."""

import pytest
import torch
from conftest import write_published_checkpoint

from generation_gpt2_value import respond_to_batch
from modeling_gpt2_value import GPT2HeadWithValueModel


@pytest.fixture
def model(tmp_path):
    write_published_checkpoint(tmp_path)
    return GPT2HeadWithValueModel.from_pretrained(tmp_path)


def test_the_cells_in_order(model, tiny_tokenizer):
    tokenizer = tiny_tokenizer
    input_txt = "I liked the movie Transformers!" + tokenizer.eos_token
    input_ids = tokenizer.encode(input_txt, add_special_tokens=True, return_tensors="pt")
    logits, _transformer_outputs, values = model(input_ids)
    tokens = input_ids.shape[1]
    assert logits.shape == (1, tokens, 96)
    assert values.shape == (1, tokens)

    pred_ids = torch.argmax(logits, dim=-1)
    pairs = [(tokenizer.decode(input_ids[:, i]), tokenizer.decode(pred_ids[:, i])) for i in range(tokens)]
    assert len(pairs) == tokens

    queries = torch.cat([tokenizer.encode(text, return_tensors="pt") for text in ("My most", "My best")])
    responses = respond_to_batch(model, queries, txt_len=10)
    assert responses.shape == (2, 10)
    assert responses.dtype == torch.long
    assert all(isinstance(tokenizer.decode(response), str) for response in responses)


def test_the_head_starts_as_gpt2_does(model):
    weight = model.v_head.summary.weight
    assert weight.shape == (1, 32)
    assert 0.01 < weight.std() < 0.03
    assert not model.v_head.summary.bias.any()


def test_the_tuple_leaves_out_what_was_not_asked_for(model):
    tokens = torch.tensor([[1, 2, 3]])
    assert [type(item).__name__ for item in model(tokens, use_cache=False)] == ["Tensor", "Tensor"]
    assert len(model(tokens, output_hidden_states=True)) == 4
    assert model(tokens, return_dict=True).value.shape == (1, 3)


def test_the_seeds_words_for_labels_and_detaching(model):
    tokens = torch.tensor([[1, 2, 3, 4]])
    loss = model(tokens, lm_labels=tokens)[0]
    assert torch.equal(loss, model(tokens, labels=tokens)[0])
    for detach in (model.detach_value_head, model.detach_head):
        model.attach_value_head()
        detach()
        model.zero_grad()
        model(tokens)[-1].sum().backward()
        assert model.transformer.wte.weight.grad is None
        assert model.v_head.summary.weight.grad.abs().sum() > 0


def test_top_k_and_top_p_reach_the_sampler(model):
    queries = torch.tensor([[1, 2, 3]] * 50)
    greedy = model(queries[:1])[0][0, -1].argmax()
    assert (respond_to_batch(model, queries, txt_len=1, top_k=1) == greedy).all()
    assert (respond_to_batch(model, queries, txt_len=1, top_p=1e-9) == greedy).all()
