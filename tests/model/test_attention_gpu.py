"""On a GPU, the varlen kernel in 16 bits gives what the groups give in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infoxlm_ds.data.flat_batch import make_layout
from infoxlm_ds.data.upload import to_device
from infoxlm_ds.model.attention import flat_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_equals_groups(dtype: torch.dtype) -> None:
    lengths = np.array([5, 64, 17, 17, 130, 1])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, int(lengths.sum()), 64, generator=generator).to(dtype) for _ in range(3))
    layout = make_layout(lengths)
    module = torch.nn.Module()
    expected, _ = flat_attention(module, q.float(), k.float(), v.float(), None, layout=layout)
    device = torch.device("cuda")
    q, k, v = (x.to(device) for x in (q, k, v))
    ours, _ = flat_attention(module, q, k, v, None, layout=to_device(layout, device))
    torch.testing.assert_close(ours.float().cpu(), expected, atol=2e-2, rtol=2e-2)
