r"""From soft chips to accusations: which customers' codewords does a suspect carry, and with what certainty?

Formal guarantees. Whatever the attackers did, the probability that :func:`trace` accuses any innocent customer is at
most alpha (plus the advantage of telling ChaCha20 from random bits), provided that

- A1: codewords are independent fair signs, never filtered or redrawn (:mod:`smark_jax.codes`);
- A2: the read-out depends on the codebook only through the guilty customers' words: innocents' words stay secret, and
  carrier, alignment and choice of layers never depend on them;
- A3: decoder, alpha, and the numbers of suspects and alignments were fixed before tracing.

The guarantee does not cover an insider who holds the code key, nor an owner who frames a customer on purpose.

*One customer (T1, T1+).* Let u be the read-out normalised to unit length. An innocent j's statistic T_j = <u, b_j> is
a weighted sum of independent fair signs. T1 is Hoeffding's bound on it, P(|T_j| >= t) <= 2 exp(-t^2 / 2); T1+ is the
smaller of two sharper bounds, Chernoff's and that of Bentkus and Dzindzalieta (:mod:`smark_jax.statistics`). All
p-values come from T1+.

*Joint decoding (T2).* Orthogonal matching pursuit explains the read-out y by few codewords: it adds the customer whose
word correlates best with the residual, projects, and stops when no correlation exceeds what the best of N innocents
would show. Each selected customer j is then tested on the residual r_j of the same pursuit, run *without j in the
codebook*. For an innocent j, b_j is independent of r_j, so <r_j, b_j> / norm(r_j) obeys T1+, and the sum over N
customers bounds the family-wise error of any such procedure. It is *not* valid to test j against a residual that merely
leaves j out of the selected support: b_j influenced the selection of that support.

*Sequential decoding (T3).* The path of the pursuit before j's first selection does not depend on b_j, so the selection
of step k may be accepted at level alpha / 2^k, without a second run.
"""

from smark_jax.tracing.decoders import DECODERS
from smark_jax.tracing.decoys import Decoys
from smark_jax.tracing.verdict import Accusation, Verdict, trace, trace_batch

__all__ = ["DECODERS", "Accusation", "Decoys", "Verdict", "trace", "trace_batch"]
