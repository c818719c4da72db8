"""The class token's attention that `tap` reads, against explicit attention matrices."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from tapped import Small
from toys import close

import attention_transfer as at
from attention_transfer.taps.attention import AttentionCall

PATCHES = 4  # each side


def vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    size = PATCHES * 14 if "14" in name else PATCHES * 16
    options = {"img_size": size, "depth": 2, "num_classes": 3} | options
    return timm.create_model(name, **options).eval().double(), images(size)


def images(size, n=2):
    return torch.rand(n, 3, size, size, dtype=torch.float64)


def read(model, layer, x):
    with at.tap(model, [layer], attention=True) as tapped:
        return tapped(x)[1][layer]


def unfused_attention(model, x):
    """The softmax that timm computes itself without the fused kernel, in its last block."""
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    seen = []
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    hook.remove()
    attention.fused_attn = True
    return seen[0]  # (N, heads, L, L)


TIMM = {
    "class token": "vit_tiny_patch16_224",
    "distillation token": "deit_tiny_distilled_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "rotary": "eva02_tiny_patch14_224",
    "rotary and registers": "vit_small_patch16_dinov3",
    "mixed rotary": "vit_small_patch16_rope_mixed_224",
    "position bias": "beit_base_patch16_224",
}


@pytest.mark.parametrize("name", TIMM.values(), ids=TIMM)
def test_is_the_class_tokens_row_over_the_patches(name):
    model, x = vit(name)
    attention = read(model, "blocks.1", x)
    expected = unfused_attention(model, x)[:, :, 0, -(PATCHES**2) :]
    close(attention, expected.unflatten(2, (PATCHES, PATCHES)))


def test_queries_and_keys_may_be_normalised():
    model, x = vit(qk_norm=True)
    with torch.no_grad():
        model.blocks[1].attn.q_norm.weight.mul_(3)
    expected = unfused_attention(model, x)[:, :, 0, 1:]
    close(read(model, "blocks.1", x).flatten(2), expected)


@pytest.mark.parametrize(
    "name", ["vit_medium_patch16_reg4_gap_256", "vit_relpos_small_patch16_224"]
)
def test_is_the_mean_row_without_a_class_token(name):
    model, x = vit(name)
    expected = unfused_attention(model, x).mean(2)[..., -(PATCHES**2) :]
    close(read(model, "blocks.1", x).flatten(2), expected)


def test_torchvision():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64).eval().double()
    x = images(64)
    attention = read(model, "encoder.layers.encoder_layer_1", x)
    layer = model.encoder.layers[1].self_attention
    inputs = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(x)
    weights = layer(inputs[0], inputs[0], inputs[0], average_attn_weights=False)[1]
    close(attention.flatten(2), weights[:, :, 0, 1:])


TRANSFORMERS = ["ViT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(
        **sizes, num_hidden_layers=2, image_size=56, patch_size=14
    )
    model = getattr(transformers, f"{name}Model")(config).eval().double()
    x = images(56)
    layer = at.stages(model, x)[-1].name
    attention = read(model, layer, x)
    model.set_attn_implementation("eager")
    expected = model(x, output_attentions=True).attentions[-1][:, :, 0, -16:]
    close(attention.flatten(2), expected, 1e-6)  # their softmax is in float32


def test_a_layer_of_blocks_gives_the_attention_of_its_last():
    model, x = vit()
    close(read(model, "blocks", x), read(model, "blocks.1", x))


def test_the_patches_may_be_no_square():
    model, _ = vit(img_size=(64, 96))
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    attention = read(model, "blocks.1", x)
    assert attention.shape == (2, 3, 4, 6)
    close(attention.flatten(2), unfused_attention(model, x)[:, :, 0, 1:])


def test_bfloat16_is_computed_in_float32():
    model, x = vit()
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        attention = read(model, "blocks.1", x)
    assert attention.dtype == torch.float32
    close(attention, read(model, "blocks.1", x), 2e-2)


def test_the_output_is_that_of_the_network():
    model, x = vit()
    with at.tap(model, ["blocks.1"], attention=True) as tapped:
        assert torch.equal(tapped(x)[0], model(x))
    assert torch.equal(model(x), model(x)), "and no hook stays"
    assert not model.blocks[1]._forward_hooks and not model.blocks[1]._forward_pre_hooks


def test_gradients_are_those_of_the_explicit_matrix():
    model, x = vit()
    weight = model.blocks[1].attn.qkv.weight
    probe = torch.randn(2, PATCHES**2, dtype=torch.float64)
    attention_map = at.attention_map(read(model, "blocks.1", x), kind="attention")
    (gradient,) = torch.autograd.grad((attention_map * probe).sum(), weight)
    rows = unfused_attention(model, x)[:, :, 0, 1:].mean(1)
    expected = torch.autograd.grad((rows / rows.norm(dim=1, keepdim=True) * probe).sum(), weight)
    close(gradient, expected[0])
    queries, keys, values = gradient.chunk(3)
    assert queries.any() and keys.any() and not values.any()


@pytest.mark.parametrize("first_only", [True, False])
def test_gradients_of_the_rows(first_only):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def rows(q, k, bias):
        return AttentionCall(q, k, bias, scale=0.7).rows(first_only)

    assert torch.autograd.gradcheck(rows, (q, k, bias))


def test_a_boolean_mask_hides_keys():
    q, k = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    rows = AttentionCall(q, k, mask[None]).rows(first_only=False)
    assert not rows[..., 1].any()
    close(rows.sum(-1), torch.ones(1, 2, dtype=torch.float64))


def test_a_copy_reads_its_own_model():
    model, x = vit()
    tapped = at.tap(model, ["blocks.1"], attention=True)
    twins = [copy.deepcopy(tapped), pickle.loads(pickle.dumps(tapped))]
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.zero_()
    for twin in twins:
        hooks = twin.model.blocks[1]
        assert len(hooks._forward_hooks) == len(hooks._forward_pre_hooks) == 1
        assert not torch.equal(twin(x)[1]["blocks.1"], tapped(x)[1]["blocks.1"])


def test_networks_without_such_attention_are_refused_in_words():
    with pytest.raises(ValueError, match="'two' has no attention that can be read"):
        read(Small(), "two", torch.rand(1, 3, 16, 16))
    model, x = vit()
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(ValueError, match="set_fused_attn"):
        read(model, "blocks.1", x)
    hiera = timm.create_model("hiera_tiny_224", img_size=64).eval()
    with pytest.raises(ValueError, match="not over the patches of the whole image"):
        read(hiera, "blocks.11", torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="attention is 'yes': expected True or False"):
        at.tap(model, ["blocks.1"], attention="yes")
