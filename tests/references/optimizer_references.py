"""Slow and obvious optimizers that start from a given v0: fp64, one step at a time, written from the papers' formulas.

Every function returns [(w, v), ...] after each step, v being the second moment in units of gradient squared. g is the gradient,
m the first moment, v the second; t counts from 1.
"""

import math

import torch


def _start(w, v0):
    w, v = w.double().clone(), v0.double().clone()
    return w, torch.zeros_like(w), v, []


def adam(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8, l2=0.0, decay=0.0, amsgrad=False):
    """Adam (Kingma & Ba); l2 couples weight decay into g, decay decouples it (AdamW), amsgrad keeps the largest v from v1 on."""
    w, m, v, history = _start(w, v0)
    largest = torch.zeros_like(v)
    for t, g in enumerate(gradients, 1):
        w = w * (1 - lr * decay)
        g = g.double() + l2 * w
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        largest = torch.maximum(largest, v)
        v_hat = (largest if amsgrad else v) / (1 - b2**t)
        w = w - lr * m / (1 - b1**t) / (v_hat.sqrt() + eps)
        history.append((w, v))
    return history


def nadam(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8, momentum_decay=4e-3):
    """NAdam (Dozat, 2016) with the momentum schedule mu_t = b1 (1 - 0.96^(t psi) / 2)."""
    w, m, v, history = _start(w, v0)
    product = 1.0
    for t, g in enumerate(gradients, 1):
        g = g.double()
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
        product *= mu
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
        w = w - lr * m_hat / ((v / (1 - b2**t)).sqrt() + eps)
        history.append((w, v))
    return history


def rectification(t, b2, threshold):
    """r_t of RAdam (Liu et al., 2020), None while the variance of the step is intractable."""
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    if length <= threshold:
        return None
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))


def radam(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8):
    """RAdam: momentum SGD until the variance is tractable."""
    w, m, v, history = _start(w, v0)
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, r = m / (1 - b1**t), rectification(t, b2, 5)
        step = m_hat if r is None else r * m_hat * math.sqrt(1 - b2**t) / (v.sqrt() + eps)
        w = w - lr * step
        history.append((w, v))
    return history


def adamax(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8):
    """Adamax (Kingma & Ba, section 7.1): u is a decaying maximum; here u0 = sqrt(v0), and v stands for u^2."""
    w, m, v, history = _start(w, v0)
    u = v.sqrt()
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m = b1 * m + (1 - b1) * g
        u = torch.maximum(b2 * u, g.abs() + eps)
        w = w - lr / (1 - b1**t) * m / u
        history.append((w, u**2))
    return history


def rmsprop(w, v0, gradients, *, lr, alpha=0.99, eps=1e-8, momentum=0.0, centered=False, l2=0.0):
    """RMSprop (Hinton), no bias correction; centered subtracts the squared mean (Graves, 2013)."""
    w, mean, v, history = _start(w, v0)
    buffer = torch.zeros_like(w)
    for g in gradients:
        g = g.double() + l2 * w
        v = alpha * v + (1 - alpha) * g**2
        mean = alpha * mean + (1 - alpha) * g
        step = g / ((v - mean**2 if centered else v).sqrt() + eps)
        buffer = momentum * buffer + step
        w = w - lr * (buffer if momentum else step)
        history.append((w, v))
    return history


def adagrad(w, v0, gradients, *, lr, eps=1e-10):
    """Adagrad (Duchi et al., 2011): a sum."""
    w, _, v, history = _start(w, v0)
    for g in gradients:
        g = g.double()
        v = v + g**2
        w = w - lr * g / (v.sqrt() + eps)
        history.append((w, v))
    return history


def adadelta(w, v0, gradients, *, lr, rho=0.9, eps=1e-6):
    """Adadelta (Zeiler, 2012)."""
    w, d, v, history = _start(w, v0)
    for g in gradients:
        g = g.double()
        v = rho * v + (1 - rho) * g**2
        step = (d + eps).sqrt() / (v + eps).sqrt() * g
        d = rho * d + (1 - rho) * step**2
        w = w - lr * step
        history.append((w, v))
    return history


def ademamix(w, v0, gradients, *, lr, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0, eps=1e-8, decay=0.0):
    """AdEMAMix (Pagliardini et al., 2024): a second, slow mean of g beside m, uncorrected."""
    w, m, v, history = _start(w, v0)
    slow = torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m = b1 * m + (1 - b1) * g
        slow = b3 * slow + (1 - b3) * g
        v = b2 * v + (1 - b2) * g**2
        w = w * (1 - lr * decay) - lr * (m / (1 - b1**t) + alpha * slow) / ((v / (1 - b2**t)).sqrt() + eps)
        history.append((w, v))
    return history


def schedule_free(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8, rectified=False):
    """Schedule-free AdamW and RAdam (Defazio et al., 2024): gradients at y = (1 - b1) z + b1 x, x the mean of the z.

    The weights returned are y, where training stands. RAdam's silent phase has step size 0.
    """
    y, _, v, history = _start(w, v0)
    x, z = y.clone(), y.clone()
    weight_sum, largest = 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = g.double()
        r = rectification(t, b2, 4) if rectified else 1.0
        rate = lr * (r or 0.0)
        largest = max(largest, rate)
        weight_sum += largest**2
        c = largest**2 / weight_sum if weight_sum else 0.0
        v = b2 * v + (1 - b2) * g**2
        step = g / ((v / (1 - b2**t)).sqrt() + eps) if r else g
        z = z - rate * step
        x = (1 - c) * x + c * z
        y = (1 - b1) * z + b1 * x
        history.append((y, v))
    return history


def grokadamw(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, alpha=0.98, lamb=2.0):
    """GrokAdamW: Adam on g + lamb * (slow mean of g), g clipped to norm 1 a tensor. For the first tensor of a group."""
    w, m, v, history = _start(w, v0)
    slow = torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        g = g.double()
        g = g * min(1.0, 1.0 / (float(g.norm()) + 1e-6))
        slow = alpha * slow + (1 - alpha) * g
        g = g + lamb * slow
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w = w * (1 - lr * decay)
        w = w - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (v.sqrt() + eps)
        history.append((w, v))
    return history


def adabelief(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-16):
    """AdaBelief (Zhuang et al., 2020): the second moment s is of g - m, with eps added at each step."""
    w, m, s, history = _start(w, v0)
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        w = w - lr * m / (1 - b1**t) / ((s / (1 - b2**t)).sqrt() + eps)
        history.append((w, s))
    return history


def adabound(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-8, final_lr=0.1, gamma=1e-3, amsbound=False):
    """AdaBound (Luo et al., 2019): Adam's step size an element, clipped between two bounds that close on final_lr."""
    w, m, v, history = _start(w, v0)
    largest = torch.zeros_like(v)
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        largest = torch.maximum(largest, v)
        rate = lr * math.sqrt(1 - b2**t) / (1 - b1**t) / ((largest if amsbound else v).sqrt() + eps)
        low, high = final_lr * (1 - 1 / (gamma * t + 1)), final_lr * (1 + 1 / (gamma * t))
        w = w - rate.clamp(low, high) * m
        history.append((w, v))
    return history


def adopt(w, v0, gradients, *, lr, b1=0.9, b2=0.9999, eps=1e-6):
    """ADOPT (Taniguchi et al., 2024), clipped at t^(1/4): step 1 only adds g^2 to v; then v of the step before divides."""
    w, m, v, history = _start(w, v0)
    for t, g in enumerate(gradients, 1):
        g = g.double()
        if t == 1:
            v = v + g**2
        else:
            clip = t**0.25
            m = b1 * m + (1 - b1) * (g / v.sqrt().clamp_min(eps)).clamp(-clip, clip)
            w = w - lr * m
            v = b2 * v + (1 - b2) * g**2
        history.append((w, v))
    return history


def yogi(w, v0, gradients, *, lr, b1=0.9, b2=0.999, eps=1e-3, m0=1e-6):
    """Yogi (Zaheer et al., 2018): v moves towards g^2 by (1 - b2) g^2."""
    w, m, v, history = _start(w, v0)
    m = m + m0
    for t, g in enumerate(gradients, 1):
        g = g.double()
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * torch.sign(v - g**2) * g**2
        w = w - lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
        history.append((w, v))
    return history
