"""The update of one linear layer as the pages write it: dense, in NumPy, and slow."""

from collections.abc import Callable
from typing import Any

import numpy as np

from singd_core.structures import get


class Page:
    """Sections 2, 3 and 5 of the mathematics page.

    Args:
        W: The weight with its bias as the last column.
        structures: Of K and C, whose projections are taken.
        **s: The settings, and `rule`: "kfac", "singd", "ikfac" or "normalized".
    """

    def __init__(
        self, W: np.ndarray, structures: tuple[str, str] = ("dense", "dense"), **s: Any
    ) -> None:
        self.W, self.s, self.k, self.t, self.largest = W, s, 0, 0, 0.0
        self.d_out, self.d_in = W.shape
        self.S_K = self.K = np.eye(self.d_in)
        self.S_C = self.C = np.eye(self.d_out)
        self.m_K, self.m_C, self.m_W = 0.0 * self.K, 0.0 * self.C, 0.0 * W
        self.r, self.c = np.ones(self.d_out), np.ones(self.d_in)
        self.t_U = self.t_G = self.Q = self.w = self.N = self.growth = self.mean = 0.0
        self.P_K, self.P_C = map(_projection, structures)

    def step(self, grad: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
        s = self.s
        gap = self.gap(self.t)
        if self.is_due(self.t):
            U, G = A.T @ A / len(A), len(B) * B.T @ B
            if s["rule"] == "kfac":
                self.kfac(U, G)
            elif s["rule"] == "normalized":
                lr_cov = s["lr_cov"]
                self.relative(U, G, 1 - (1 - lr_cov) ** gap if s["growing_T"] else lr_cov)
            else:
                self.inverse_free(U, G)
        self.t += 1
        if s["rule"] == "normalized":
            return self.normalized(grad)
        if s["rule"] == "kfac":
            inverses = [
                np.linalg.inv(S + s["damping"] * np.eye(len(S))) for S in (self.S_C, self.S_K)
            ]
            natural = inverses[0] @ grad @ inverses[1]
        else:
            natural = self.C @ self.C.T @ grad @ self.K @ self.K.T
        self.m_W = s["momentum"] * self.m_W + natural + s["weight_decay"] * self.W
        self.W = self.W - s["lr"] * self.m_W
        return self.W

    def gap(self, t: int) -> int:
        gap: int = self.s.get("T", 1)
        return min(gap, 2 ** int(np.log2(max(1, t // 10)))) if self.s.get("growing_T") else gap

    def is_due(self, t: int) -> bool:
        gap = self.gap(t)
        if not self.s.get("growing_T"):
            return t % gap == 0
        golden = (1 + np.sqrt(5)) / 2
        return bool(t % gap == int(t // gap * golden % 1 * gap))

    def normalized(self, grad: np.ndarray) -> np.ndarray:
        s, d_o, d_i = self.s, self.d_out, self.d_in
        self.largest = max(self.largest, s["lr"])
        share = s["lr"] / self.largest
        alpha = s["momentum"] ** (2 - share)
        if not s["decoupled_weight_decay"]:
            grad = grad + s["weight_decay"] * self.W
        square = np.sum(grad * grad)
        self.m_W = alpha * self.m_W + grad
        self.Q, self.w = alpha * self.Q + square, alpha * self.w + 1
        self.N = alpha**2 * self.N + square
        ahead, Q, w, noise = self.m_W, self.Q, self.w, self.N
        if s["nesterov"]:
            ahead, Q, w = grad + alpha * self.m_W, square + alpha * self.Q, 1 + alpha * self.w
            noise = (1 + 2 * alpha) * square + alpha**2 * self.N
        agreement = np.linalg.norm(ahead) / np.sqrt(w * Q)
        P_C, P_K = self.C @ self.C.T, self.K @ self.K.T
        balanced = P_C @ ahead @ P_K / np.sqrt(np.outer(np.diag(P_C), np.diag(P_K)))
        n = balanced / np.sqrt(np.outer(self.r + 0.1, self.c + 0.1))
        gap = self.gap(self.t)  # of the step that follows
        if self.is_due(self.t):  # it refreshes the factors
            rate = 1 - (1 - s["lr_cov"]) ** gap if s["growing_T"] else s["lr_cov"]
            weight, squares = max(1 / self.k, rate), balanced**2
            self.r = self.r + weight * (squares.mean(1) / squares.mean() - self.r)
            self.c = self.c + weight * (squares.mean(0) / squares.mean() - self.c)
        self.mean += max(1 / self.t, 1 / 1000) * (square - self.mean)
        if self.w * (1 - alpha) > 0.88 and square > 0:
            ratio = np.sum(ahead * ahead) / noise
            longer = max(self.growth, 0)
            grown = min(longer / 2, 1)
            change = np.clip(ratio - (1.8 + 1.2 * grown), 0, 1)
            change -= np.clip(0.6 + 0.4 * grown - ratio, 0, 1)
            change = max(0.15 * change, -longer) - 0.15 * np.clip(1 - ratio / 0.05, 0, 1)
            if share > 0.999:
                settled = np.clip(1.5 - ratio, 0, 1) * min(1, self.Q / self.w / self.mean)
                change -= 0.03 * longer + 0.5 / self.t * settled
            longest = np.clip(8 + np.log(self.Q / self.w / self.mean) / 2, 0, 4)
            self.growth = np.clip(self.growth + change, -4, longest)
        most = max(0.14, share)
        f = np.clip(np.sqrt(self.Q / self.w / self.mean), 0.14, most) / most
        f = f if self.t > 60 else 1.0
        R = np.sqrt(2.26 / np.sqrt(max(d_o, d_i)) * 1.5 / np.sqrt(d_i * self.t_U))
        u = R * f * np.exp(self.growth) * agreement * n / np.sqrt(np.mean(n * n))
        lr = s["lr"] * min(1.0, self.t / s["warmup"])
        decay = s["weight_decay"] if s["decoupled_weight_decay"] else 0.0
        self.W = self.W - lr * u - lr * decay * self.W
        return self.W

    def kfac(self, U: np.ndarray, G: np.ndarray) -> None:
        beta = self.s["lr_cov"]
        self.S_K = (1 - beta) * self.S_K + beta * U
        self.S_C = (1 - beta) * self.S_C + beta * G

    def inverse_free(self, U: np.ndarray, G: np.ndarray) -> None:
        s, K, C = self.s, self.K, self.C
        H_K, H_C = self.P_K(K.T @ U @ K), self.P_C(C.T @ G @ C)
        KtK, CtC = self.P_K(K.T @ K), self.P_C(C.T @ C)
        h_K = h_C = 1.0
        lambda_K = lambda_C = s["damping"]
        alpha1 = s["alpha1"]
        if s["rule"] == "ikfac":
            alpha1 = 0.0
        else:
            h_K, h_C = np.trace(H_C) / self.d_out, np.trace(H_K) / self.d_in
            lambda_K = s["damping"] * np.trace(CtC) / self.d_out
            lambda_C = s["damping"] * np.trace(KtK) / self.d_in
        self.m_K = alpha1 * self.m_K + 0.5 * (h_K * H_K + lambda_K * KtK - np.eye(self.d_in))
        self.m_C = alpha1 * self.m_C + 0.5 * (h_C * H_C + lambda_C * CtC - np.eye(self.d_out))
        self.K = K @ (np.eye(self.d_in) - s["lr_cov"] * self.m_K)
        self.C = C @ (np.eye(self.d_out) - s["lr_cov"] * self.m_C)

    def relative(self, U: np.ndarray, G: np.ndarray, lr_cov: float) -> None:
        s = self.s
        mean_U, mean_G = np.trace(U) / self.d_in, np.trace(G) / self.d_out
        weight = max(1.0 / (self.k + 1), lr_cov)
        self.t_U += weight * (mean_U - self.t_U)
        self.t_G += weight * (mean_G - self.t_G)
        lambda_K, lambda_C = s["damping"] * self.t_U, s["damping"] * self.t_G
        if self.k == 0:
            self.K = (self.t_U + lambda_K) ** -0.5 * self.K
            self.C = (self.t_G + lambda_C) ** -0.5 * self.C
        beta = max(lr_cov, min(0.5, 1.0 / (self.k + 1)))
        self.k += 1
        for name, P, M, damping in (
            ("K", self.P_K, U, lambda_K),
            ("C", self.P_C, G, lambda_C),
        ):
            L = getattr(self, name)
            m = 0.5 * (P(L.T @ M @ L) + damping * P(L.T @ L) - np.eye(len(L)))
            bounded = min(beta, s["factor_bound"] / np.linalg.norm(m))
            setattr(self, name, L @ (np.eye(len(L)) - bounded * m))


def _projection(name: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda M: np.asarray(get(name).project(M).dense())
