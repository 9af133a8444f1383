"""LeaF: gradients by token, what is flagged, samples without it, and the loss of distillation."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import transformers
from conftest import CHECKPOINT, tiny_llama, tokens
from torch.nn import functional as F

from pruneforge_leaf.distillation import distillation_loss, divergence, sample_loss
from pruneforge_leaf.samples import Sample, padded
from pruneforge_leaf.scores import confounding, gap, gradient_norms, sensitivities, words
from pruneforge_leaf.spans import pruned, runs


def samples():
    """Instructions and responses of several lengths."""
    ids = tokens(4, 20)
    return [Sample(ids[0, :9], ids[0, 9:12]), Sample(ids[1, :4], ids[1, 4:9]), Sample(ids[2, :12], ids[2, 12:13])]


def response_loss(model, embedded, sample):
    """The mean loss a token of one response, from embeddings [1, tokens, hidden]."""
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
    start, total = len(sample.instruction), 0.0
    for place, token in enumerate(sample.response.tolist()):
        total = total - logits[start + place - 1].log_softmax(0)[token]
    return total / len(sample.response)


def test_sensitivities_are_gradients_of_each_response_whatever_the_padding():
    model = tiny_llama()
    found = sensitivities(model, samples())
    for sample, norms in zip(samples(), found, strict=True):
        ids = torch.cat([sample.instruction, sample.response])[None]
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        response_loss(model, embedded, sample).backward()
        expected = [embedded.grad[0, place].square().sum().sqrt().item() for place in range(len(sample.instruction))]
        assert norms.tolist() == pytest.approx(expected, rel=1e-9)


def test_sensitivities_are_slopes():
    """Along the gradient's own direction the loss changes by the norm; transformers' norms compute in float32."""
    model, sample = tiny_llama(), samples()[0]
    (norms,) = sensitivities(model, [sample])
    ids = torch.cat([sample.instruction, sample.response])[None]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(response_loss(model, embedded, sample), embedded)
    for place in range(len(sample.instruction)):
        step = torch.zeros_like(embedded)
        step[0, place] = 1e-3 * gradient[0, place] / gradient[0, place].norm()
        with torch.no_grad():
            rise = response_loss(model, embedded + step, sample) - response_loss(model, embedded - step, sample)
        assert rise.item() / 2e-3 == pytest.approx(norms[place].item(), rel=1e-3)


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sensitivities(model, samples())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_patches_of_images_have_gradients_as_well():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    model, images, labels = model.eval().double(), torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 4])
    norms = gradient_norms(model.patch_embed, lambda: F.cross_entropy(model(images), labels, reduction="sum"))
    assert norms.shape == (2, 4)
    # What the loss depends on by the pixels of one patch alone is what it depends on by that patch's embedding.
    pixels = images.clone().requires_grad_()
    (of_pixels,) = torch.autograd.grad(F.cross_entropy(model(pixels), labels, reduction="sum"), pixels)
    kernel = model.patch_embed.proj.weight.flatten(1)  # [hidden, pixels]
    patches = of_pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    solved = torch.linalg.lstsq(
        kernel.T, patches.flatten(0, 1).T
    ).solution.T  # the embedding's gradient from the pixels'
    torch.testing.assert_close(solved.norm(dim=1).view(2, 4), norms, rtol=1e-6, atol=1e-12)
    with pytest.raises(RuntimeError, match="does not go through Linear"):
        gradient_norms(torch.nn.Linear(2, 2), lambda: torch.ones(()))


def test_what_moves_the_student_alone_is_flagged():
    teacher = torch.tensor([1.0, 5.0, 1.0, 2.0, 1.0])
    student = torch.tensor([3.0, 3.0, 9.0, 3.0, 1.0])
    # scaled: teacher 0, 1, 0, .25, 0; student .25, .25, 1, .25, 0; their difference -.25, .75, -1, 0, 0
    assert gap(teacher, student).tolist() == pytest.approx([0.75 / 1.75, 1, 0, 1 / 1.75, 1 / 1.75])
    assert confounding(teacher, student).tolist() == [False, False, True, False, False]
    assert confounding(teacher, student, share=0.2).tolist() == [True, False, True, False, False]
    assert confounding(teacher, student, share=1.0).tolist() == [True, False, True, False, False]  # none above a half


def test_tokens_that_are_no_candidates_have_no_part():
    teacher, student = torch.tensor([9.0, 1.0, 5.0, 1.0, 2.0, 1.0]), torch.tensor([0.0, 3.0, 3.0, 9.0, 3.0, 1.0])
    candidates = torch.tensor([False, True, True, True, True, True])
    assert confounding(teacher, student, candidates=candidates).tolist() == [False, False, False, True, False, False]
    alone = confounding(teacher[1:], student[1:], share=0.2)
    assert confounding(teacher, student, share=0.2, candidates=candidates).tolist() == [False, *alone.tolist()]
    assert not confounding(teacher, student, candidates=torch.zeros(6, dtype=torch.bool)).any()


@pytest.mark.parametrize(("count", "flagged"), [(14, 1), (20, 2), (100, 6)])
def test_as_many_are_flagged_as_by_the_authors_quantile(count, flagged):
    """The authors take the value at place int(0.05 n) of those sorted, and all up to it."""
    student = torch.arange(float(count))
    assert confounding(torch.zeros(count), student, share=0.05).sum() == flagged


def test_tokens_that_all_matter_as_much_are_no_difference():
    assert gap(torch.ones(4), torch.full((4,), 7.0)).tolist() == [0, 0, 0, 0]
    assert not confounding(torch.ones(4), torch.full((4,), 7.0)).any()


def test_white_space_and_special_tokens_are_no_words():
    loaded = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = torch.tensor([*loaded("a word\n\n  b")["input_ids"], loaded.eos_token_id])
    expected = [any(letter not in " \n" for letter in loaded.decode([token])) for token in ids.tolist()[:-1]]
    assert words(loaded, ids).tolist() == [*expected, False]
    assert 0 < sum(expected) < len(expected)


def test_samples_without_a_token_are_refused():
    empty, some = torch.tensor([], dtype=torch.int64), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="the instruction of a sample has no token"):
        Sample(empty, some)
    with pytest.raises(ValueError, match="the response of a sample has no token"):
        Sample(some, some).with_response(2)


@pytest.mark.parametrize("seed", range(5))
def test_each_run_of_flags_is_left_out_alone_or_all_at_once(seed):
    flags = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.5
    sample = Sample(torch.arange(100, 112), torch.tensor([7, 8]))
    expected, run = [], []
    for place in range(13):
        if place < 12 and flags[place]:
            run.append(place)
        elif run:
            expected.append(run)
            run = []
    assert runs(flags) == [(each[0], each[-1] + 1) for each in expected]
    spans = pruned(sample, flags)
    assert [each.instruction.tolist() for each in spans] == [
        [100 + place for place in range(12) if place not in gone] for gone in expected
    ]
    (collective,) = pruned(sample, flags, "collective")
    assert collective.instruction.tolist() == [100 + place for place in range(12) if not flags[place]]
    assert all(torch.equal(each.response, sample.response) for each in [*spans, collective])


def test_nothing_flagged_leaves_no_other_sample():
    sample = Sample(torch.arange(4), torch.tensor([7]))
    assert pruned(sample, torch.zeros(4, dtype=torch.bool)) == []
    assert pruned(sample, torch.zeros(4, dtype=torch.bool), "collective") == []


def test_the_response_level_flags_the_beginning_of_the_response_too():
    sample = Sample(torch.tensor([1, 2]), torch.tensor([3, 4, 5]))
    longer = sample.with_response(2)
    assert longer.instruction.tolist() == [1, 2, 3, 4]
    assert longer.response.tolist() == [5]


def test_batches_mark_responses_and_padding():
    batch = padded(samples())
    assert batch.mask.sum(1).tolist() == [12, 9, 13]
    assert batch.response.sum(1).tolist() == [3, 5, 1]
    for row, sample in zip(range(3), samples(), strict=True):
        assert batch.ids[row][batch.response[row]].tolist() == sample.response.tolist()


def test_divergence_is_kl_of_teacher_and_student():
    teacher, student = tokens(2, 5).float(), tokens(2, 5, seed=3).float() / 7
    for found, p, q in zip(divergence(teacher, student), teacher.softmax(1), student.softmax(1), strict=True):
        expected = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 1e-30)
        assert found.item() == pytest.approx(expected, rel=1e-4)
    assert divergence(teacher, teacher).abs().max() < 1e-6


def test_the_loss_is_over_the_tokens_of_responses_and_the_student_alone_learns():
    teacher, student = tiny_llama(), tiny_llama(seed=5)
    loss = sample_loss(teacher, student, samples())
    rows = []
    with torch.no_grad():
        for sample in samples():
            ids = torch.cat([sample.instruction, sample.response])[None]
            wanted, found = (model(input_ids=ids).logits[0].log_softmax(1) for model in (teacher, student))
            start = len(sample.instruction) - 1
            for place in range(start, start + len(sample.response)):
                rows.append((wanted[place].exp() * (wanted[place] - found[place])).sum().item())
    assert loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.lm_head.weight.grad.abs().sum() > 0


def test_both_kinds_of_samples_are_weighed():
    teacher, student, given = tiny_llama(), tiny_llama(seed=5), samples()
    without = [each for sample in given for each in pruned(sample, torch.arange(len(sample.instruction)) == 1)]
    plain, other = sample_loss(teacher, student, given), sample_loss(teacher, student, without)
    found = distillation_loss(teacher, student, given, without, weight=0.8)
    assert found.item() == pytest.approx(0.8 * plain.item() + 0.2 * other.item(), rel=1e-6)
    assert distillation_loss(teacher, student, given, []).item() == pytest.approx(plain.item(), rel=1e-6)


def test_one_step_on_the_loss_lowers_it():
    teacher, student = tiny_llama(), tiny_llama(seed=5)
    norms = zip(*(sensitivities(model, samples()) for model in (teacher, student)), strict=True)
    flags = [confounding(*pair) for pair in norms]
    without = [each for sample, flag in zip(samples(), flags, strict=True) for each in pruned(sample, flag)]
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    before = distillation_loss(teacher, student, samples(), without)
    before.backward()
    optimizer.step()
    assert distillation_loss(teacher, student, samples(), without) < before
