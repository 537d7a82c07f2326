"""The network against a second forward pass written with torch.nn.functional from its state_dict."""

import copy

import pytest
import torch
import torch.nn.functional as F

from utils_model import DQN, blocks

SHAPES = {
    "conv1.weight": (32, 4, 8, 8),
    "conv2.weight": (64, 32, 4, 4),
    "conv3.weight": (64, 64, 3, 3),
    "hidden.weight": (512, 3136),
    "hidden.bias": (512,),
    "output.weight": (6, 512),
    "output.bias": (6,),
}
VARIANTS = [
    pytest.param(
        {"dueling": dueling, "layer_norm": layer_norm, kind: count},
        id=f"{'dueling' if dueling else 'plain'}-{kind}-{count}{'-normed' if layer_norm else ''}",
    )
    for dueling in (False, True)
    for kind, count in (("quantiles", 1), ("quantiles", 5), ("atoms", 5))
    for layer_norm in (False, True)
]


def make_states(count, seed=0, channels=4):
    """Blocky random pictures: coarse enough that two of them give clearly different values."""
    blocks = torch.randint(0, 256, (count, channels, 7, 7), generator=torch.Generator().manual_seed(seed))
    return blocks.repeat_interleave(12, 2).repeat_interleave(12, 3).to(torch.uint8)


def fill(model, seed=0):
    """Random parameters of a usual size, biases included, so that every parameter matters."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, value in model.state_dict().items():
        scale = 0.1 if name.endswith("bias") else (2 / value[0].numel()) ** 0.5
        values[name] = scale * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    model.load_state_dict(values)
    return model


def make(action_dim=6, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    model = DQN(action_dim, dtype=dtype, **options)
    return fill(model.double() if dtype == torch.float64 else model, seed)


def same(x):
    return x


class Bfloat16(torch.autograd.Function):
    """Rounding to bfloat16, of the gradient too."""

    @staticmethod
    def forward(ctx, x):
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().float()


def body(p, states, rounded=same):
    x = states.to(p["conv1.weight"].dtype)
    for layer, stride, scale in (("conv1", 4, 1 / 255), ("conv2", 2, 1), ("conv3", 1, 1)):
        x = F.relu(rounded(F.conv2d(x, rounded(p[f"{layer}.weight"] * scale), stride=stride)))
    return x.permute(0, 2, 3, 1).flatten(1)


def normalise(x):
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()


def head(p, features, prefix="", rounded=same):
    hidden, norm, output = f"{prefix}hidden", f"{prefix}norm", f"{prefix}output"
    if normed := f"{norm}.weight" in p:
        features = rounded(normalise(255 * features))
    x = rounded(F.linear(features, rounded(p[f"{hidden}.weight"]), rounded(p[f"{hidden}.bias"])))
    if normed:
        x = normalise(x) * p[f"{norm}.weight"] + p[f"{norm}.bias"]
    return F.linear(F.relu(x), p[f"{output}.weight"], p[f"{output}.bias"])


def forward(p, states, rounded=same, actions=6):
    features = body(p, states, rounded)
    outputs = head(p, features, "", rounded).view(len(states), actions, -1)
    if "value_output.weight" in p:
        outputs = outputs - outputs.mean(1, keepdim=True)
        outputs = outputs + head(p, features, "value_", rounded).unsqueeze(1)
    return outputs


def gradients(model, values):
    """Of a sum in which the actions have different weights, so that a dueling head does not cancel."""
    direction = torch.linspace(-1, 1.5, values.shape[1], dtype=values.dtype)[None, :, None]
    return dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad((values * direction).sum(), list(model.parameters())),
            strict=True,
        )
    )


def test_parameters_are_those_of_mnih_2015_without_convolution_biases():
    shapes = {name: tuple(parameter.shape) for name, parameter in DQN(6).named_parameters()}
    assert shapes == SHAPES
    assert sum(parameter.numel() for parameter in DQN(4).parameters()) == 1_686_020


def test_state_dict_holds_the_parameters_and_nothing_else():
    model = DQN(6, dueling=True, atoms=3)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_dueling_adds_a_value_branch_of_its_own():
    shapes = {name: tuple(parameter.shape) for name, parameter in DQN(6, dueling=True).named_parameters()}
    assert shapes == SHAPES | {
        "value_hidden.weight": (512, 3136),
        "value_hidden.bias": (512,),
        "value_output.weight": (1, 512),
        "value_output.bias": (1,),
    }


def test_quantiles_widen_the_output_layers_only():
    shapes = {name: tuple(value.shape) for name, value in DQN(6, dueling=True, quantiles=5).state_dict().items()}
    classic = {name: tuple(value.shape) for name, value in DQN(6, dueling=True).state_dict().items()}
    assert shapes == classic | {
        "output.weight": (30, 512),
        "output.bias": (30,),
        "value_output.weight": (5, 512),
        "value_output.bias": (5,),
    }


def test_norms_have_a_scale_and_a_shift_for_every_hidden_unit():
    shapes = {name: tuple(value.shape) for name, value in DQN(6, dueling=True, layer_norm=True).state_dict().items()}
    plain = {name: tuple(value.shape) for name, value in DQN(6, dueling=True).state_dict().items()}
    norms = ("norm.weight", "norm.bias", "value_norm.weight", "value_norm.bias")
    assert shapes == plain | dict.fromkeys(norms, (512,))


def test_with_norms_the_scale_of_what_is_before_them_does_not_matter():
    torch.manual_seed(0)
    model = DQN(6, dueling=True, layer_norm=True, dtype=torch.float64)  # as it starts, with the weakest features ...
    states = make_states(3) * (make_states(3, seed=1) > 250)  # ... of a game that is nearly black
    before = model(states)
    with torch.no_grad():
        for layer in (model.conv1, model.conv3, model.hidden, model.value_hidden):
            layer.weight *= 3
        model.hidden.bias *= 3
        model.value_hidden.bias *= 3
    torch.testing.assert_close(model(states), before, rtol=0, atol=1e-3)  # but for the norms' own epsilon


@pytest.mark.parametrize("stack_size", [1, 3, 4])
def test_stack_size_sets_the_number_of_input_frames(stack_size):
    model = make(3, stack_size=stack_size)
    assert tuple(model.state_dict()["conv1.weight"].shape) == (32, stack_size, 8, 8)
    states = make_states(2, channels=stack_size)
    torch.testing.assert_close(model(states), forward(model.state_dict(), states, actions=3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", VARIANTS)
def test_output_is_float32_for_every_state_action_and_quantile_or_atom(options):
    values = DQN(7, **options)(make_states(3))
    assert values.shape == (3, 7, options.get("quantiles", options.get("atoms")))
    assert values.dtype == torch.float32


@pytest.mark.parametrize("options", VARIANTS)
def test_float64_network_equals_the_functional_forward_pass(options):
    model = make(**options)
    values = model(make_states(4))
    assert values.dtype == torch.float64
    assert values.std(0).min() > 1e-3  # the states tell: not a constant network
    torch.testing.assert_close(values, forward(model.state_dict(), make_states(4)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", VARIANTS)
def test_float32_network_stays_within_rounding_of_the_float64_one(options):
    exact = make(**options)
    model = fill(DQN(6, **options))
    torch.testing.assert_close(model(make_states(4)).double(), exact(make_states(4)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_of_every_parameter_equal_those_of_the_functional_forward_pass(options):
    model = make(**options)
    states = make_states(4)
    expected = gradients(model, forward(dict(model.named_parameters()), states))
    for name, gradient in gradients(model, model(states)).items():
        assert gradient.abs().max() > 0, name
        assert (gradient - expected[name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_white_pixels_count_as_one_and_black_ones_as_zero(dtype):
    model = make(dtype=dtype)
    parameters = {name: value.double() for name, value in model.state_dict().items()}
    states = torch.stack([torch.full((4, 84, 84), 255), torch.zeros(4, 84, 84, dtype=torch.int64)]).to(torch.uint8)
    x = torch.stack([torch.ones(4, 84, 84), torch.zeros(4, 84, 84)]).double()
    for layer, stride in (("conv1", 4), ("conv2", 2), ("conv3", 1)):
        x = F.relu(F.conv2d(x, parameters[f"{layer}.weight"], stride=stride))
    expected = head(parameters, x.permute(0, 2, 3, 1).flatten(1)).unsqueeze(2)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    error = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(model(states).double(), expected, rtol=0, atol=error)


def test_over_blocks_the_first_convolution_has_a_stride_of_one_and_the_same_outputs_and_gradients():
    states, weights = make_states(3).double(), fill(DQN(6).double()).conv1.weight
    strided, plain = (
        F.conv2d(states, weights, stride=4),
        F.conv2d(blocks(states, torch.float64), blocks(weights, torch.float64)),
    )
    assert torch.allclose(strided, plain, rtol=1e-12, atol=1e-9)
    gradients = (torch.autograd.grad((outputs**2).sum(), weights)[0] for outputs in (strided, plain))
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-6)


def test_blocks_have_the_type_asked_for_and_their_channels_last():
    made = blocks(make_states(2), torch.bfloat16)
    assert made.shape == (2, 64, 21, 21)
    assert made.dtype == torch.bfloat16
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("quantiles", [1, 5])
def test_dueling_mean_over_actions_is_the_state_value(quantiles):
    model = make(dueling=True, quantiles=quantiles)
    value = head(model.state_dict(), body(model.state_dict(), make_states(4)), "value_")
    torch.testing.assert_close(model(make_states(4)).mean(1), value, rtol=0, atol=1e-9)


def test_dueling_ignores_a_constant_in_the_advantages_and_adds_one_in_the_value():
    model = make(dueling=True)
    before = model(make_states(2))
    with torch.no_grad():
        model.output.bias += 3
    torch.testing.assert_close(model(make_states(2)), before, rtol=0, atol=1e-9)
    with torch.no_grad():
        model.value_output.bias += 3
    torch.testing.assert_close(model(make_states(2)), before + 3, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_has_the_same_values_alone_and_in_a_batch(dtype):
    model = make(dtype=dtype, dueling=True, quantiles=2)
    states = make_states(5)
    alone = torch.cat([model(state.unsqueeze(0)) for state in states])
    torch.testing.assert_close(model(states), alone, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


def test_states_of_any_memory_layout_give_the_same_values_and_stay_unchanged():
    model, states = make(), make_states(3)
    expected = model(states)
    for view in (
        states.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        states.contiguous(memory_format=torch.channels_last),
        make_states(3).repeat_interleave(2, 0)[::2],
    ):
        torch.testing.assert_close(model(view), expected, rtol=0, atol=1e-9)
    assert torch.equal(states, make_states(3))


@pytest.mark.parametrize("options", VARIANTS)
def test_bfloat16_body_stays_near_float32_and_keeps_a_float32_output(options):
    exact = make(dtype=torch.float32, **options)
    model = make(dtype=torch.bfloat16, **options)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "output" in name or "norm" in name else torch.bfloat16), name
    with torch.no_grad():
        values, expected = model(make_states(16)), exact(make_states(16))
    assert values.dtype == torch.float32
    assert model.distribution.means(values).dtype == torch.float32
    assert not torch.equal(values, expected)  # the body does use the coarser numbers
    assert (values - expected).norm() < 0.02 * expected.norm()


def test_bfloat16_network_computes_its_output_layer_in_float32():
    model = make(dtype=torch.bfloat16)
    before = model(make_states(4))
    with torch.no_grad():
        model.output.bias += 2**-12  # far below what bfloat16 can add to a value near 1
    moved = model(make_states(4)) - before
    torch.testing.assert_close(moved, torch.full_like(moved, 2**-12), rtol=0, atol=2**-20)


@pytest.mark.parametrize("options", VARIANTS)
def test_bfloat16_gradients_are_off_by_no_more_than_the_rounding_of_each_layer(options):
    model, states = make(dtype=torch.float32, **options), make_states(16)
    exact = gradients(model, model(states))
    parameters = dict(model.named_parameters())
    reference = gradients(model, forward(parameters, states, Bfloat16.apply))
    model = make(dtype=torch.bfloat16, **options)
    for name, gradient in gradients(model, model(states)).items():
        error, allowed = (
            (g[name].float() - exact[name]).norm() / exact[name].norm() for g in ({name: gradient}, reference)
        )
        assert allowed < 0.07, name
        assert error < (2 if options["layer_norm"] else 1.5) * allowed + 2**-10, (name, error.item(), allowed.item())


def test_two_quantiles_of_an_action_are_neighbouring_rows_of_the_output_layer():
    model = make(3, quantiles=2)
    before = model(make_states(2))
    with torch.no_grad():
        model.output.bias[2 * 1 + 1] += 1  # action 1, quantile 1
    expected = torch.zeros(2, 3, 2, dtype=torch.float64)
    expected[:, 1, 1] = 1
    torch.testing.assert_close(model(make_states(2)) - before, expected, rtol=0, atol=1e-9)


def test_a_deep_copy_is_equal_and_independent():
    model = make()
    twin = copy.deepcopy(model)
    assert torch.equal(model(make_states(2)), twin(make_states(2)))
    before = model(make_states(2))
    with torch.no_grad():
        twin.conv1.weight += 1
    assert torch.equal(model(make_states(2)), before)


def test_weights_start_with_the_spread_of_kaiming_for_rectifiers():
    torch.manual_seed(0)
    for name, value in DQN(18, dueling=True).state_dict().items():
        if name.endswith("weight") and "output" not in name:
            ratio = value.std().item() / (2 / value[0].numel()) ** 0.5
            assert 0.9 < ratio < 1.1, (name, ratio)


def test_with_norms_all_weights_start_smaller():
    torch.manual_seed(0)
    for name, value in DQN(18, dueling=True, layer_norm=True).state_dict().items():
        if name.endswith("weight") and "norm" not in name:
            ratio = value.std().item() / (2 / value[0].numel()) ** 0.5
            assert 0.35 < ratio < 0.45, (name, ratio)


def test_the_seed_decides_the_first_parameters():
    first, again, other = (DQN(4) for seed in (0, 0, 1) if torch.manual_seed(seed))
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
