"""The bidirectional state-space operator: one public function for each job, one file for each backend.

y_f[t] = sum_{s<=t} k_f[t-s] u_f[s]      y_b[t] = sum_{s>=t} k_b[s-t] u_b[s]      (the skip sits in k[0])
"""

from __future__ import annotations

from diffussm.ops.api import bidirectional_conv, bidirectional_ssm, kept_kernel, ssm_kernel, uses_kernels
from diffussm.ops.params import SSMParams

__all__ = ["SSMParams", "bidirectional_conv", "bidirectional_ssm", "kept_kernel", "ssm_kernel", "uses_kernels"]
