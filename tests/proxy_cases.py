"""Proxies of small models, made in milliseconds, and the FFN that they stand for, in torch."""

from __future__ import annotations

import numpy as np
import torch

from cpu_kernels.activations import activate_ref, activate_up_ref
from hybrid.model.loader import ModelFolder
from predictor.proxy import LayerProxy, ProxyBank, proxy_form
from predictor.proxy_fit import ProxyFit
from predictor.row_copies import CopiedPart, LayerCopies, RowCopies
from predictor.samples import FFNWeights


def weights_of(folder: ModelFolder, layer: int) -> FFNWeights:
    t = folder.ffn_tensors(layer)
    return FFNWeights(t.gate, t.up, t.down, folder.spec.activation, t.gate_bias, t.up_bias).float()


def copies_of(folder: ModelFolder, layer: int) -> LayerCopies:
    weights = weights_of(folder, layer)
    parts: dict[CopiedPart, np.ndarray] = {"up": weights.up.numpy()}
    if weights.gate is not None:
        parts["gate"] = weights.gate.numpy()
    return proxy_form(folder.spec).layer(parts)


def proxies_of(folder: ModelFolder, share: float = 0.5, seed: int = 0) -> ProxyBank:
    """Proxies that leave out `share` of the neurons for random inputs of FFNs."""
    spec = folder.spec
    copies = RowCopies(tuple(copies_of(folder, layer) for layer in range(spec.n_layers)), proxy_form(spec))
    inputs = np.random.default_rng(seed).standard_normal((spec.n_layers, 96, spec.d_model)).astype(np.float16)
    layers = [weights_of(folder, layer) for layer in range(spec.n_layers)]
    return ProxyFit.of(spec, copies, layers, inputs).finished(share)


def ffn_ref(weights: FFNWeights, proxy: LayerProxy, x: torch.Tensor) -> torch.Tensor:
    """The sum f32 [t, d] of the neurons that pass, without the bias of down, and all others left out."""
    up = x @ weights.up.T + (0 if weights.up_bias is None else weights.up_bias)
    if weights.gate is None:
        hidden = activate_ref(weights.activation, up)
    else:
        gate = x @ weights.gate.T + (0 if weights.gate_bias is None else weights.gate_bias)
        hidden = activate_ref(weights.activation, gate) * activate_up_ref(weights.activation, up)
    return (hidden * (proxy.scores(weights, x) >= proxy.threshold)) @ weights.down
