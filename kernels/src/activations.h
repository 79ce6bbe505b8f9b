// exp, expm1, sigmoid, tanh and the erf form of GELU on vectors.
//
// The coefficients are our own minimax fits (Lawson iteration on Chebyshev nodes); the budgets they
// must keep are in tests/test_kernels_budgets.py.

#if defined(MSE_USE_LIBM)

inline V exp_(V x) { return expf(x); }
inline V expm1_(V x) { return expm1f(x); }
inline V half_erfc(V x) { return 0.5f * erfcf(x * 0.70710678118654752f); }  // x >= 0
inline V select_negative(V x, V yes, V no) { return x < 0.0f ? yes : no; }

#else

// expm1 of the remainder r = x - n ln 2, |r| <= ln(2) / 2. ln 2 is split so that n ln2_hi is exact.
inline V remainder_expm1(V x, V *n) {
  *n = round_even(mul(x, set1(1.44269504088896341f)));
  V r = fnma(*n, set1(0.693359375f), x);
  r = fnma(*n, set1(-2.12194440054690583e-4f), r);
  V p = fma(set1(1.39466592e-3f), r, set1(8.36671144e-3f));
  p = fma(p, r, set1(4.16662805e-2f));
  p = fma(p, r, set1(0.16666542f));
  p = fma(p, r, set1(0.5f));
  return fma(p, mul(r, r), r);
}
// |x| <= 87.
inline V exp_(V x) {
  V n;
  const V p = remainder_expm1(x, &n);
  const V s = pow2(n);
  return fma(p, s, s);
}
// Keeps the relative precision of a small x: for n = 0 it is the polynomial itself.
inline V expm1_(V x) {
  V n;
  const V p = remainder_expm1(x, &n);
  const V s = pow2(n);
  return fma(p, s, sub(s, set1(1.0f)));
}
// erfc(x / sqrt 2) / 2 for x >= 0, as exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.4 x / sqrt 2).
inline V half_erfc(V x) {
  const V t = div(set1(1.0f), fma(x, set1(0.28284271247461901f), set1(1.0f)));
  V p = fma(set1(-0.0317481384f), t, set1(0.209374428f));
  p = fma(p, t, set1(-0.524678946f));
  p = fma(p, t, set1(0.580721021f));
  p = fma(p, t, set1(-0.310978413f));
  p = fma(p, t, set1(0.285742253f));
  p = fma(p, t, set1(0.12517187f));
  p = fma(p, t, set1(0.215836331f));
  p = fma(p, t, set1(0.2248476f));
  p = fma(p, t, set1(0.225711972f));
  const V e = exp_(vmax(mul(set1(-0.5f), mul(x, x)), set1(-87.0f)));
  return mul(set1(0.5f), mul(e, mul(t, p)));
}

#endif

inline V clamp(V x, float limit) { return vmin(vmax(x, set1(-limit)), set1(limit)); }
inline V sigmoid(V x) {
  const V one = set1(1.0f);
  return div(one, add(one, exp_(clamp(sub(set1(0.0f), x), 87.0f))));
}
inline V tanh_(V x) {
  const V e = expm1_(clamp(add(x, x), 20.0f));
  return div(e, add(e, set1(2.0f)));
}
inline V gelu_(V x) {
  const V tail = half_erfc(vmax(x, sub(set1(0.0f), x)));
  return mul(x, select_negative(x, tail, sub(set1(1.0f), tail)));
}

// One LSTM unit from its four gates: new cell state, and the hidden state it gives. The quotients of
// sigmoid and tanh are joined over common denominators: two divisions instead of five. The clamps at
// 30 and 20 keep every product below 1e35 (|c| grows by at most 1 per step).
inline V lstm_cell(V zi, V zf, V zg, V zo, V *c) {
  const V one = set1(1.0f), zero = set1(0.0f);
  const V di = add(one, exp_(clamp(sub(zero, zi), 30.0f)));
  const V df = add(one, exp_(clamp(sub(zero, zf), 30.0f)));
  const V dout = add(one, exp_(clamp(sub(zero, zo), 30.0f)));
  const V eg = expm1_(clamp(add(zg, zg), 20.0f));
  const V ig = mul(di, add(eg, set1(2.0f)));
  const V cell = div(fma(*c, ig, mul(eg, df)), mul(ig, df));
  *c = cell;
  const V ec = expm1_(clamp(add(cell, cell), 20.0f));
  return div(ec, mul(dout, add(ec, set1(2.0f))));
}
