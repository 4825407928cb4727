"""One whole discriminator step (score + update) of the alignment stage, in several ways: each saves one thing more.

The reference's way (docs/method.md, section 7) in its best faithful form: stock transformers modules, the faster of its
experts implementations, response by response: 2N forwards for the scores, 4N with a gradient for the update. Ours: one
packed tree that scores and updates.

Every way takes a case and returns {"student" (2, N), "teacher" (2,), "loss"}, fp32, perception before reasoning; the
gradients are left in the parameters' ``.grad``. Only the last ones are the trainer's code. The others are plain
transformers modules: whole forwards of ``Qwen3VLMoeModel``, its text model on image features computed before, its
decoder layers on a packed tree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import apply_rotary_pos_emb

from benchmarks.harness.op import Outputs
from benchmarks.steps import flops
from benchmarks.steps.case import GPU, MINI, TINY
from benchmarks.steps.discriminator_case import STEP, build
from benchmarks.steps.discriminator_case import DiscriminatorCase as Case
from benchmarks.steps.flops import Work
from benchmarks.steps.step import Step, Way
from prism_fast.models.backbone import embed
from prism_fast.pack import build_pack, mrope_positions
from prism_fast.steps.discriminator_step import discriminator_gradient, discriminator_trees
from prism_fast.steps.expert_load import ExpertLoad
from prism_fast.steps.update import Backprop
from prism_kernels import tree_attention

# (caption, reasoning) of one response -> its two scores.
Score = Callable[[tuple[Tensor, Tensor]], Tensor]


def pair_loss(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
    """One response's share of the discriminator's loss: student (2,), teacher (2,)."""
    n = case.shape.responses
    squares = student.square().sum() + teacher.square().sum()
    return (F.softplus(student - teacher).sum() + STEP.score_penalty * squares / 4) / n


def whole_forward(case: Case) -> Score:
    """Stock ``Qwen3VLMoeModel.forward`` of prompt and part, batch 1; the head at the last token."""

    def one(part: Tensor) -> Tensor:
        return case.whole_forward(case.prompt, part)[-1].float() @ case.module.head

    return lambda pair: torch.stack([one(part) for part in pair])


def text_forward(case: Case, features: list[Tensor]) -> Score:
    """Stock text model of prompt and part on given image features (the embeddings, then DeepStack's)."""
    ids = case.prompt.input_ids
    is_image = ids == case.model.config.image_token_id
    above, following = mrope_positions(case.prompt, case.module.image)
    embedding = case.model.get_input_embeddings()
    image_row = is_image.nonzero().flatten()

    def one(part: Tensor) -> Tensor:
        hidden = embedding(torch.cat([ids, part])).index_copy(0, image_row, features[0])
        after = torch.arange(following, following + len(part), device=ids.device).expand(3, -1)
        hidden = case.model.model.language_model(
            inputs_embeds=hidden[None],
            position_ids=torch.cat([above.to(ids.device), after], dim=1)[:, None],
            visual_pos_masks=F.pad(is_image, (0, len(part)))[None],
            deepstack_visual_embeds=features[1:],
            use_cache=False,
        ).last_hidden_state
        return hidden[0, -1].float() @ case.module.head

    return lambda pair: torch.stack([one(part) for part in pair])


def image_features(case: Case) -> list[Tensor]:
    visual = case.model.model.visual
    out = visual(case.prompt.pixel_values.to(visual.dtype), grid_thw=case.prompt.image_grid_thw, return_dict=True)
    return [out.pooler_output, *out.deepstack_features]


def separate(case: Case, score: Score, *, scoring_pass: bool, teacher_once: bool) -> Outputs:
    """Response by response. The teacher's branch of the graph, where it is shared, waits for all its gradients."""
    student, loss = [], 0.0
    if scoring_pass:
        with torch.no_grad():
            student = [score(pair) for pair in case.parts]
    if teacher_once:
        shared = score(case.lesson.teacher)
        leaf = shared.detach().requires_grad_()
    for pair in case.parts:
        mine = score(pair)
        teacher = leaf if teacher_once else score(case.lesson.teacher)
        part = pair_loss(mine, teacher, case)
        part.backward()
        loss += part.detach()
        if not scoring_pass:
            student.append(mine.detach())
    if teacher_once:
        shared.backward(leaf.grad)
    return {"student": torch.stack(student, dim=1), "teacher": teacher.detach(), "loss": loss}


def reference(case: Case) -> Outputs:
    """2N passes for the scores, then 4N with a gradient: captions and reasonings of every student and its teacher."""
    case = case.there()
    return separate(case, whole_forward(case), scoring_pass=True, teacher_once=False)


def merged_pass(case: Case) -> Outputs:
    case = case.there()
    return separate(case, whole_forward(case), scoring_pass=False, teacher_once=False)


def teacher_once(case: Case) -> Outputs:
    case = case.there()
    return separate(case, whole_forward(case), scoring_pass=False, teacher_once=True)


def image_once(case: Case) -> Outputs:
    case = case.there()
    features = image_features(case)
    leaves = [f.detach().requires_grad_() for f in features]
    outcome = separate(case, text_forward(case, leaves), scoring_pass=False, teacher_once=True)
    torch.autograd.backward(features, [leaf.grad for leaf in leaves])
    return outcome


def prompt_once(case: Case) -> Outputs:
    return tree(case, read_out=False)


def read_out(case: Case) -> Outputs:
    return tree(case, read_out=True)


def tree(case: Case, *, read_out: bool) -> Outputs:
    """One packed tree through transformers' decoder layers; attention: torch's, called per group of segments."""
    trees, labels = discriminator_trees([case.lesson], case.rollout, case.parts)
    pack = build_pack(trees, [(0, range(len(trees[0].branches)))], case.module.image).to(case.device)
    text = case.model.model.language_model
    hidden, deepstack = embed(case.model.model, pack)
    hidden = hidden[None]
    cos_sin = text.rotary_emb(hidden, pack.position_ids[:, None])
    with case.tree_attention():  # the backward too: a checkpointed layer reads the configuration again
        for i, layer in enumerate(text.layers):
            if read_out and i == len(text.layers) - 1:
                given = (layer, hidden[0], cos_sin, pack)
                recompute = case.module.recompute
                hidden = checkpoint(last_layer, *given, use_reentrant=False) if recompute else last_layer(*given)
                break
            hidden = layer(hidden, position_embeddings=cos_sin, attention_mask=None, tree=attend(pack))
            if i < len(deepstack):
                hidden = hidden.index_add(1, pack.image_row, deepstack[i][None])
        hidden = text.norm(hidden if read_out else hidden[0, pack.readout_row])
        score = hidden.float() @ case.module.head
        branch = pack.branch_of(labels.total)
        student, teacher = (score[branch[of.to(case.device)]] for of in (labels.student, labels.teacher[:, 0]))
        loss = sum(pair_loss(student[:, i], teacher, case) for i in range(case.shape.responses))
        loss.backward()
    return {"student": student.detach(), "teacher": teacher.detach(), "loss": loss.detach()}


def attend(pack):
    """transformers' (1, heads, T, D) to the tree's (T, heads, D) and back."""

    def run(query, key, value, scaling):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return tree_attention(q, k, v, pack.layout, scale=scaling, impl="sdpa")[None]

    return run


def last_layer(layer, hidden: Tensor, cos_sin: tuple[Tensor, Tensor], pack) -> Tensor:
    """(T, H) -> (branches, H) with transformers' modules: queries, experts and norm at the read-out rows alone."""
    attention, rows = layer.self_attn, pack.readout_row
    normed = layer.input_layernorm(hidden)
    q, k, v = (
        project(x).view(len(x), -1, attention.head_dim)
        for project, x in ((attention.q_proj, normed[rows]), (attention.k_proj, normed), (attention.v_proj, normed))
    )
    q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = (x[0] for x in cos_sin)
    q, _ = apply_rotary_pos_emb(q, q, cos[rows], sin[rows])
    k, _ = apply_rotary_pos_emb(k, k, cos, sin)
    attended = tree_attention(q, k, v, pack.layout, scale=attention.scaling, query_row=rows, impl="sdpa")
    read = hidden[rows] + attention.o_proj(attended.flatten(1))
    return read + layer.mlp(layer.post_attention_layernorm(read)[None])[0]


def ours(case: Case) -> Outputs:
    """The alignment stage's own code."""
    given = (Backprop(case.module), [case.lesson], case.rollout, case.parts, STEP)
    scores, metrics, _ = discriminator_gradient(*given, tokens_per_pack=case.tokens_per_pack, load=ExpertLoad())
    student = torch.stack([scores.perception, scores.reasoning])
    teacher = torch.stack([scores.teacher_perception[0], scores.teacher_reasoning[0]])
    return {"student": student, "teacher": teacher, "loss": torch.tensor(metrics["loss/discriminator"])}


def keep_activations(case: Case) -> Outputs:
    """As ours; nothing is computed twice in the backward."""
    case.checkpoint(False)
    try:
        return ours(case)
    finally:
        case.checkpoint(True)


# In this order each saving is measured on top of those before it.
WAYS = (
    Way("reference's way", "2N scoring passes and 4N passes with a gradient, one sequence each", reference),
    Way("+ merged pass", "no scoring pass: the update's forward gives the scores", merged_pass),
    Way("+ teacher once", "two teacher passes instead of 2N", teacher_once),
    Way("+ image once", "one vision pass; its features serve all sequences", image_once),
    Way("+ prompt once", "one packed tree: the prompt's tokens once, one batch", prompt_once),
    Way("+ read-out", "last layer: queries, experts, norm at last tokens only", read_out),
    Way("ours (+ kernels)", "own routing, experts and attention: the alignment stage's code", ours),
)
KEPT = Way("ours, activations kept", "no recompute in the backward", keep_activations)


def ways(checkpointing: bool) -> tuple[Way, ...]:
    """Where all ways recompute their activations, one more that does not."""
    return (*WAYS, KEPT) if checkpointing else WAYS


def flops_of_ways(case: Case, *, checkpointing: bool = False) -> list[float]:
    """One figure for every way of :func:`ways`, in their order."""
    shape, image = case.shape, flops.vision(case.shape)

    def separate_passes(*pairs, with_image: bool = True) -> Work:
        work = Work()
        for length in (len(part) for pair in pairs for part in pair):
            work += flops.sequence(shape, shape.prompt + length) + flops.head(shape, 1, 1)
            work += image if with_image else Work()
        return work

    lesson = case.lesson.teacher
    students, teacher = separate_passes(*case.parts), separate_passes(lesson)
    update = (students + separate_passes(*[lesson] * len(case.parts))).trained(checkpointing)
    once = image + separate_passes(*case.parts, lesson, with_image=False)
    branches = [len(part) for pair in [lesson, *case.parts] for part in pair]
    scores = image + flops.head(shape, len(branches), 1)
    whole, read = (scores + flops.tree(shape, branches, read_out=last) for last in (False, True))
    own = scores + flops.tree(shape, branches, read_out=True, kernels=True)
    found = [
        students.forward() + update,
        update,
        (students + teacher).trained(checkpointing),
        once.trained(checkpointing),
        whole.trained(checkpointing),
        read.trained(checkpointing),
        own.trained(checkpointing),
    ]
    return [*found, own.trained(False)] if checkpointing else found


def smallest_margin(case: Case) -> float:
    """Smallest difference between the k-th and the next router probability, over all tokens and layers."""
    if case.shape.top_k == case.shape.experts:
        return float("inf")
    margins: list[Tensor] = []

    def see(gate: torch.nn.Module, _: tuple, output: tuple[Tensor, ...]) -> None:
        top = output[0].detach().float().softmax(-1).topk(case.shape.top_k + 1).values
        margins.append((top[:, -2] - top[:, -1]).min())

    hooks = [layer.mlp.gate.register_forward_hook(see) for layer in case.model.model.language_model.layers]
    prompt_once(case)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(margins).min())


BENCH = Step(
    op="discriminator",
    title="discriminator score + update, one prompt",
    description=__doc__,
    module=__name__,
    shapes={"tiny": TINY, "tiny-even": TINY.even(), "gpu": GPU, "gpu-even": GPU.even(0.0), "mini": MINI},
    default={"cpu": ("tiny", "tiny-even"), "cuda": ("gpu", "gpu-even")},
    build=build,
    ways=ways,
    flops=flops_of_ways,
    margin=smallest_margin,
)
